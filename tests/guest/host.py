# SPDX-License-Identifier: MIT
"""The machine the guests run on: the programs they need, and the archive its own apt knows."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.guest.errors import GuestError
from tests.guest.progress import stage

# A program that a guest needs, and the package that brings it.
_TO_RUN = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}
_TO_BUILD = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "cpio": "cpio", "gpgv": "gpgv", "zstd": "zstd"}

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_LISTS = Path("/var/lib/apt/lists")
_LISTS_DAYS = 3
_QUIET = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
_LOCKED = "Could not get lock"
_LOCK_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Archive:
    """Where the machine's own apt gets Debian from."""

    main: str
    """URI of the archive."""
    security: str | None
    """URI of the security archive, if the machine has one."""


def command(argv: list[str], what: str, *, timeout: float, env: dict[str, str] | None = None) -> str:
    """Run a program of the host and return what it printed; `GuestError` with the end of its output if it fails."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            env=None if env is None else {**os.environ, **env},
        )
    except FileNotFoundError:
        raise GuestError(f"{what}: this machine has no {argv[0]}") from None
    except subprocess.TimeoutExpired as error:
        output = (error.output or b"").decode(errors="replace")
        raise GuestError(f"{what}: {argv[0]} did not end within {timeout:.0f} s\n{_tail(output)}") from None
    if done.returncode != 0:
        raise GuestError(f"{what}: {argv[0]} failed with exit code {done.returncode}\n{_tail(done.stdout)}")
    return done.stdout


def ensure_runtime() -> None:
    """Install what a guest needs to run, if it is missing."""
    _ensure(_TO_RUN)


def ensure_builder() -> None:
    """Install what an image is built with, if it is missing, and Debian's keyring as new as the machine's apt has it.

    An old keyring does not know the keys of a newer Debian; a newer one from the machine's own (verified) archive does.
    """
    _ensure(_TO_BUILD, always=("debian-archive-keyring",))
    if not KEYRING.exists():
        raise GuestError(f"the package debian-archive-keyring is installed, yet there is no {KEYRING}")


def archive() -> Archive:
    """Ask the machine's apt, whatever the format of its files, which archive it takes Debian from."""
    codename = _codename()
    text = command(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(LABEL)",
            "Created-By: Packages",
        ],
        "reading apt's sources",
        timeout=60,
    )
    return choose_archive(text, codename)


def choose_archive(targets: str, codename: str) -> Archive:
    """Pick Debian's own archive from lines of `URI|release|component|label`; others' archives are passed over.

    Before the first `apt-get update` the label is unknown and stands as `$(LABEL)`.
    """
    main: list[tuple[bool, str]] = []
    security: list[tuple[bool, str]] = []
    for line in targets.splitlines():
        uri, release, component, label = (*line.strip().split("|"), "", "", "", "")[:4]
        release = release.strip("/")
        if component != "main":
            continue
        if label in ("Debian-Security", "$(LABEL)", "") and release in (f"{codename}-security", f"{codename}/updates"):
            security.append((label == "Debian-Security", uri))
        elif (label == "Debian" and "-" not in release) or (label in ("$(LABEL)", "") and release == codename):
            main.append((label == "Debian", uri))
    if not main:
        raise GuestError(
            f"this machine's apt has no Debian archive for {codename}; "
            "add one to /etc/apt/sources.list.d, run apt-get update and try again"
        )
    return Archive(max(main)[1], max(security)[1] if security else None)


def apt_options() -> list[str]:
    """Return the lines of the machine's apt configuration on how to reach an archive (proxy, certificates, retries).

    mmdebstrap runs apt with a configuration of its own; a guest is fetched the way the machine fetches.
    """
    kept = tuple(f"Acquire::{name}" for name in ("http", "Proxy", "Retries", "Check-", "Force"))
    text = command(["apt-config", "dump"], "reading apt's configuration", timeout=60)
    lines = [line for line in text.splitlines() if line.startswith(kept) and not line.endswith(' "";')]
    for name, path in (("netrc", "/etc/apt/auth.conf"), ("netrcparts", "/etc/apt/auth.conf.d")):
        if Path(path).exists():
            lines.append(f'Dir::Etc::{name} "{path}";')
    return lines


def _ensure(needs: dict[str, str], *, always: tuple[str, ...] = ()) -> None:
    if not _missing(needs) and not always:
        return
    with _one_at_a_time():
        packages = [*_missing(needs), *always]
        if not packages:
            return
        if os.geteuid() != 0:
            raise GuestError(f"installing {' '.join(packages)} needs root; run this as root, or install them first")
        if _lists_are_old():
            _update()
        with stage(f"apt-get install {' '.join(packages)}"):
            try:
                _install(packages)
            except GuestError:
                # Lists from before the archive's last change name files that are gone.
                _update()
                _install(packages)


def _missing(needs: dict[str, str]) -> list[str]:
    return sorted({package for program, package in needs.items() if shutil.which(program, path=_path()) is None})


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Tests in several processes find the same to be missing, and apt's own locks do not wait for each other."""
    held = os.open("/var/lib/apt", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _update() -> None:
    with stage("apt-get update"):
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                command(["apt-get", "-q", "update"], "refreshing apt's lists", timeout=600, env=_QUIET)
                return
            except GuestError as error:
                # Of the lists' lock apt has no timeout, as of dpkg's; the machine's own timers may have it.
                if _LOCKED not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(1)


def _install(packages: list[str]) -> None:
    lock = f"DPkg::Lock::Timeout={_LOCK_SECONDS}"
    argv = ["apt-get", "-qy", "-o", lock, "install", "--no-install-recommends", *packages]
    command(argv, f"installing {' '.join(packages)}", timeout=1800, env=_QUIET)


def _lists_are_old() -> bool:
    stamps = [path.stat().st_mtime for path in _LISTS.glob("*Release")]
    return not stamps or time.time() - max(stamps) > _LISTS_DAYS * 86400


def _codename() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    raise GuestError("this machine is no Debian release: /etc/os-release has no VERSION_CODENAME")


def _path() -> str:
    # An ordinary user's PATH lacks the directories that mke2fs is in.
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _tail(text: str, lines: int = 25) -> str:
    return "\n".join(text.splitlines()[-lines:])
