# SPDX-License-Identifier: MIT
"""From a recipe to a cached image: a root disk, its kernel, an initrd and the key that opens it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import os
import shutil
import struct
import subprocess
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.guest import host
from tests.guest.errors import GuestError
from tests.guest.locks import exclusive, in_use, remove_unused
from tests.guest.progress import say, stage
from tests.guest.recipe import (
    DEFAULT_TARGET,
    DISK_GIB,
    DPKG_OPTIONS,
    ENABLED,
    FILES,
    INITRD_INIT,
    INITRD_MODULES,
    MASKED,
    RELEASES,
    USER,
    Recipe,
    recipe,
)


@dataclass(frozen=True, slots=True)
class Image:
    """A finished image: a directory of the cache, never written to again."""

    release: str
    directory: Path

    @property
    def disk(self) -> Path:
        """The root disk: raw, sparse, ext4 without partitions."""
        return self.directory / "disk.raw"

    @property
    def kernel(self) -> Path:
        """The release's own kernel, unpacked."""
        return self.directory / "vmlinux"

    @property
    def initrd(self) -> Path:
        """Just enough to mount the disk."""
        return self.directory / "initrd"

    @property
    def key(self) -> Path:
        """The private ssh key that root of the guest accepts."""
        return self.directory / "key"

    @property
    def known_hosts(self) -> Path:
        """The guest's host key, under the name `guest`."""
        return self.directory / "known_hosts"

    @property
    def identity(self) -> str:
        """What no other build has, of the same recipe neither: each makes keys of its own."""
        return hashlib.sha256(self.known_hosts.read_bytes() + self.key.read_bytes()).hexdigest()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the image from being removed by a build of a newer recipe."""
        with in_use(self.directory):
            yield


def cache() -> Path:
    """Return the directory of the images, made if it is missing."""
    chosen = os.environ.get("NBDD_GUEST_CACHE")
    if chosen:
        directory = Path(chosen)
    else:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nbdd" / "guests"
    directory.mkdir(parents=True, exist_ok=True)
    return directory.resolve()


def ensure(release: str) -> Image:
    """Return the image of a release, building it first if its recipe has none in the cache.

    Two at once wait for each other. Images of older recipes are removed once nobody uses them.
    """
    if release not in RELEASES:
        raise GuestError(f"there is no guest {release!r}; choose from {', '.join(RELEASES)}")
    wanted = recipe(release)
    home = cache()
    image = Image(release, home / f"{release}-{wanted.digest}")
    if image.directory.is_dir():
        return image
    with exclusive(home / f"{release}.lock", f"another build of {release}"):
        if not image.directory.is_dir():
            _remove_leftovers(home, release)
            _build(wanted, image)
            _remove_others(home, image)
    return image


def _build(wanted: Recipe, image: Image) -> None:
    if os.geteuid() != 0:
        raise GuestError(f"building the image of {wanted.release} needs root; run this as root")
    host.ensure_builder()
    start = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix=f"{wanted.release}.building-", dir=image.directory.parent))
    try:
        root, result = work / "root", work / "image"
        result.mkdir()
        with stage(f"{wanted.release}: fetching and unpacking {wanted.suite}"):
            _bootstrap(wanted, root)
        with stage(f"{wanted.release}: arranging it"):
            _arrange(root, result)
            kernel_release = _take_kernel(root, result)
            _make_initrd(root, result / "initrd", kernel_release)
        with stage(f"{wanted.release}: writing the disk"):
            _make_disk(root, result / "disk.raw")
        manifest = {
            "release": wanted.release,
            "kernel": kernel_release,
            "built": int(time.time()),
            "seconds": round(time.monotonic() - start, 1),
            "packages": _versions(root, wanted.packages),
        }
        (result / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        result.rename(image.directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    used = sum(path.stat().st_blocks for path in image.directory.iterdir()) * 512
    say(f"{wanted.release}: image of {used >> 20} MiB in {time.monotonic() - start:.1f} s, kernel {kernel_release}")


def _bootstrap(wanted: Recipe, root: Path) -> None:
    archive = host.archive()
    sources = [f"deb {archive.main} {wanted.suite} main", f"deb {archive.main} {wanted.suite}-updates main"]
    if archive.security:
        sources.append(f"deb {archive.security} {wanted.suite}-security main")
    argv = [
        # Whatever mmdebstrap mounts goes with it, even if it is killed: nothing of the host is left under `root`.
        *("unshare", "--mount", "mmdebstrap", "--mode=root", "--variant=apt", "--format=directory"),
        f"--keyring={host.KEYRING}",
        f"--include={','.join(wanted.packages)}",
        *(f"--dpkgopt={option}" for option in DPKG_OPTIONS),
        *(f"--aptopt={option}" for option in host.apt_options()),
        *(wanted.suite, str(root), *sources),
    ]
    # The kernel's packages make no initrd: it would take longer than all the rest.
    host.command(argv, f"bootstrapping {wanted.suite}", timeout=1800, env={"INITRD": "No"})


def _arrange(root: Path, result: Path) -> None:
    for name, text in FILES.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for leftover in ("etc/apt/apt.conf.d/99mmdebstrap", "etc/resolv.conf", "etc/dpkg/dpkg.cfg.d/99mmdebstrap"):
        (root / leftover).unlink(missing_ok=True)
    # A fixed one: an empty one makes systemd take every boot for the first and apply its presets.
    (root / "etc/machine-id").write_text(uuid.uuid4().hex + "\n")
    _make_keys(root, result)
    _chroot(root, "useradd", "--create-home", "--shell", "/bin/bash", USER)
    for unit in MASKED:
        (root / "etc/systemd/system" / unit).unlink(missing_ok=True)
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")
    _chroot(root, "systemctl", "enable", *ENABLED)
    _chroot(root, "systemctl", "set-default", DEFAULT_TARGET)
    (root / "var/log/journal").mkdir(exist_ok=True)
    shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
    shutil.rmtree(root / "var/lib/apt/lists", ignore_errors=True)
    # Says that /etc and /var are as new as /usr, so that no boot brings them up to date.
    for stamp in ("etc/.updated", "var/.updated"):
        (root / stamp).touch()
        times = (root / "usr").stat()
        os.utime(root / stamp, ns=(times.st_atime_ns, times.st_mtime_ns))


def _make_keys(root: Path, result: Path) -> None:
    for leftover in (root / "etc/ssh").glob("ssh_host_*"):
        leftover.unlink()
    host_key = root / "etc/ssh/ssh_host_ed25519_key"
    for path in (host_key, result / "key"):
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "guest", "-f", str(path)]
        host.command(argv, "making an ssh key", timeout=60)
    (result / "known_hosts").write_text(f"guest {host_key.with_suffix('.pub').read_text()}")
    authorized = root / "root/.ssh/authorized_keys"
    authorized.parent.mkdir(mode=0o700, exist_ok=True)
    authorized.write_text((result / "key.pub").read_text())
    authorized.chmod(0o600)


def _take_kernel(root: Path, result: Path) -> str:
    kernels = sorted((root / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1:
        raise GuestError(f"the bootstrapped system has {len(kernels)} kernels in /boot; one was expected")
    (result / "vmlinux").write_bytes(_unpack_kernel(kernels[0].read_bytes()))
    return kernels[0].name.removeprefix("vmlinuz-")


def _unpack_kernel(image: bytes) -> bytes:
    """Return the ELF file inside a bzImage (Linux: Documentation/arch/x86/boot.rst, payload_offset).

    QEMU starts it as it is (PVH), which spares an emulated machine some seconds of unpacking.
    """
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    begin = (setup_sectors + 1) * 512 + offset
    payload = image[begin : begin + length]
    if payload.startswith(b"\xfd7zXZ\0"):
        # The kernel's own size follows the stream.
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        # zstd says 2 after the whole stream, as the same trailing size is no frame.
        found = subprocess.run(["zstd", "-dcq"], input=payload, capture_output=True, check=False)
        if found.stdout.startswith(b"\x7fELF"):
            return found.stdout
    raise GuestError("the guest's kernel is packed in a way that is not known here")


def _make_initrd(root: Path, target: Path, kernel_release: str) -> None:
    tree = Path(tempfile.mkdtemp(prefix="initrd-", dir=target.parent.parent))
    for name in ("bin", "dev", "root", "modules"):
        (tree / name).mkdir()
    shutil.copy2(root / "bin/busybox", tree / "bin/busybox")
    order: list[str] = []
    for module in INITRD_MODULES:
        found = subprocess.run(
            ["chroot", str(root), "modprobe", "--show-depends", "--set-version", kernel_release, module],
            capture_output=True,
            text=True,
            check=False,
        )
        # A module that this kernel has not, or has built in, is not needed.
        for line in found.stdout.splitlines():
            if not line.startswith("insmod "):
                continue
            path = root / line.split()[1].lstrip("/")
            name = path.name.partition(".ko")[0] + ".ko"
            if name not in order:
                order.append(name)
                data = path.read_bytes()
                (tree / "modules" / name).write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
    (tree / "modules/order").write_text("".join(f"{name}\n" for name in order))
    (tree / "init").write_text(INITRD_INIT)
    (tree / "init").chmod(0o755)
    names = "\0".join(sorted(str(path.relative_to(tree)) for path in tree.rglob("*")))
    with target.open("wb") as out:
        subprocess.run(
            ["cpio", "--null", "--create", "--format=newc", "--quiet", "--owner=0:0"],
            input=names.encode(),
            stdout=out,
            cwd=tree,
            check=True,
        )


def _make_disk(root: Path, disk: Path) -> None:
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-L", "root", "-E", "lazy_itable_init=1", "-d", str(root)]
    # Debian 12's own tools must be able to check it, whichever Debian made it.
    argv += ["-O", "^metadata_csum_seed,^orphan_file"]
    host.command([*argv, str(disk), f"{DISK_GIB}G"], "writing the root disk", timeout=600)


def _versions(root: Path, packages: Collection[str]) -> dict[str, str]:
    argv = ["dpkg-query", f"--admindir={root}/var/lib/dpkg", "-W", "-f", "${Package} ${Version}\\n"]
    lines = host.command(argv, "listing the packages", timeout=60).splitlines()
    return dict(line.split(" ", 1) for line in lines if line.partition(" ")[0] in packages)


def _chroot(root: Path, *argv: str) -> None:
    host.command(["chroot", str(root), *argv], f"running {argv[0]} in the new system", timeout=120)


def _remove_leftovers(home: Path, release: str) -> None:
    # Under the lock: whoever made these is dead.
    for path in home.glob(f"{release}.building-*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove_others(home: Path, image: Image) -> None:
    for path in home.glob(f"{image.release}-*"):
        if path == image.directory:
            continue
        if not remove_unused(path):
            say(f"{path.name}: an older image, in use by a running guest, is kept")
