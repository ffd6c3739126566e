# SPDX-License-Identifier: MIT
"""A booted guest, and what one does with it."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.guest import host, snapshot, ssh
from tests.guest.errors import GuestError
from tests.guest.image import Image, ensure
from tests.guest.progress import say, stage
from tests.guest.qemu import Qemu, Saved
from tests.guest.scratch import PREFIX, Scratch
from tests.guest.snapshot import Snapshot

BOOT_SECONDS = 600.0
"""A boot takes 10 s under TCG on two idle cores, and was seen to take 130 s where ten processes wanted them."""

RESTORE_SECONDS = 120.0
"""A restore takes a second or two; one that takes longer than a boot would is none."""


HOST = "10.0.2.2"
"""The host's 127.0.0.1, as seen by a guest that may see it."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command in the guest came to."""

    stdout: str
    stderr: str
    returncode: int
    seconds: float


class Guest:
    """A virtual machine of one release, on a fresh overlay of its image.

        with Guest("debian13") as guest:
            guest.run("modprobe nbd")

    Entering boots it, leaving kills it and removes its files, but for those in a `workdir` that was given.
    """

    def __init__(
        self,
        release: str,
        workdir: Path | None = None,
        *,
        memory: int = 2048,
        cpus: int = 2,
        sees_host: bool = False,
    ) -> None:
        """Name the release (`debian12`, `debian13`); console log and overlay go to `workdir`; `memory` is in MiB.

        One that `sees_host` reaches what listens on this machine's 127.0.0.1 as `HOST`.
        """
        self.release = release
        self._sees_host = sees_host
        self._memory = memory
        self._cpus = cpus
        # A Unix socket's path holds 107 bytes: the sockets get a short directory of their own.
        self._scratch = Scratch()
        self._run = self._scratch.directory
        self.name = f"{release}-{self._run.name.removeprefix(PREFIX)}"
        self._work = self._run if workdir is None else workdir.resolve()
        self._work.mkdir(parents=True, exist_ok=True)
        self.console_log = self._work / "console.log"
        self._overlay = self._work / "overlay.qcow2"
        self._image: Image | None = None
        self._qemu: Qemu | None = None
        self._held = contextlib.ExitStack()
        self.costs: list[tuple[str, float]] = []
        """What it took to come up, each time: boots, restores and installations, with their seconds."""

    def __enter__(self) -> Self:
        try:
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether its QEMU runs."""
        return self._qemu is not None and self._qemu.alive

    @property
    def accelerator(self) -> str:
        """`kvm` or `tcg`."""
        return self._running().accelerator.value

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._running().pid

    def boot(self, timeout: float = BOOT_SECONDS) -> None:
        """Build the image if it is missing, start QEMU and wait until commands can be run.

        The first call makes a fresh overlay; after `power_off` or `kill` the guest boots from its own disk again.
        """
        if self.alive:
            raise GuestError(f"{self.release} is up already")
        host.ensure_runtime()
        if self._image is None:
            self._image = self._take_image()
            self._make_overlay(self._image.disk, "raw")
        self._start()
        with self._stage("booting", f" ({self.accelerator})"):
            self._wait_up(time.monotonic() + timeout)

    def come_up(self, package: Path) -> None:
        """Be up with a package installed: restored from a snapshot of just that, which is made if it is missing.

        One that can't be made or restored is thrown away, with a word of it, and the guest is booted.
        """
        if self.alive or self._image is not None:
            raise GuestError(f"{self.release} was up already")
        if snapshot.wanted():
            host.ensure_runtime()
            self._image = image = self._take_image()
            try:
                self._restore(image, package)
                return
            except GuestError as error:
                say(f"{self.release}: no snapshot, so the guest is booted: {error}")
                self._drop_qemu()
                self._make_overlay(image.disk, "raw")
        self.boot()
        self.install(package)

    def _restore(self, image: Image, package: Path) -> None:
        def make(empty: Snapshot) -> None:
            first = Guest(self.release, memory=self._memory, cpus=self._cpus)
            with contextlib.closing(first):
                first._fill(empty, package)
                self.costs += first.costs

        with contextlib.ExitStack() as using:
            while True:
                found = snapshot.ensure(image, package, make, memory=self._memory, cpus=self._cpus)
                # Another checkout may have removed it at this very moment.
                with contextlib.suppress(FileNotFoundError):
                    using.enter_context(found.in_use())
                    break
            try:
                with self._stage("restoring", f" {package.name}"):
                    self._make_overlay(found.disk, "qcow2")
                    self._start(restores=found.saved)
                    self._connect(time.monotonic() + RESTORE_SECONDS)
                    # It goes on at the moment it was saved: by the clock that shows the time of day, too.
                    fresh = f"date --set=@{time.time():.3f} >/dev/null && cat >/dev/urandom"
                    self.run(fresh, input=os.urandom(64), timeout=RESTORE_SECONDS)
            except GuestError:
                using.close()
                found.discard()
                raise
            self._held.push(using.pop_all())

    def _fill(self, empty: Snapshot, package: Path) -> None:
        """Boot, install, and be saved; then this guest is gone, but for what the snapshot holds."""
        host.ensure_runtime()
        self._image = self._take_image()
        self._overlay = empty.disk
        self._make_overlay(self._image.disk, "raw")
        self._start(keeps=empty.saved)
        with self._stage("booting", f" ({self.accelerator})"):
            self._wait_up(time.monotonic() + BOOT_SECONDS)
        with self._stage("installing", f" {package.name}"):
            self.install(package)
        with self._stage("saving", ""):
            self.run(snapshot.QUIESCE, timeout=BOOT_SECONDS)
            self._end_ssh()
            self._running().save()
        self._drop_qemu()
        # What is left of it belongs to the snapshot.
        self._overlay = self._work / "overlay.qcow2"

    def _start(self, *, keeps: Saved | None = None, restores: Saved | None = None) -> None:
        assert self._image is not None
        self._drop_qemu()
        self._qemu = Qemu(
            self._image,
            self._overlay,
            self.console_log,
            self._run,
            memory=self._memory,
            cpus=self._cpus,
            sees_host=self._sees_host,
            keeps=keeps,
            restores=restores,
        )

    def _make_overlay(self, below: Path, kind: str) -> None:
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", kind, "-b", str(below), str(self._overlay)]
        host.command(argv, "making the guest's disk", timeout=60)

    @contextlib.contextmanager
    def _stage(self, what: str, more: str) -> Iterator[None]:
        """Say what is done, and note what it took."""
        start = time.monotonic()
        with stage(f"{self.release}: {what}{more}"):
            yield
        self.costs.append((what, time.monotonic() - start))

    def run(
        self,
        command: str,
        *,
        check: bool = True,
        timeout: float = 120,
        input: bytes | None = None,  # noqa: A002  as in subprocess.run
        user: str = "root",
    ) -> Result:
        """Run a shell command as root (or as `user`) and return what it came to.

        It ends when the command and all that holds its output have ended: start servers with `systemd-run`, or
        redirect theirs. Raises `GuestError` if `check` and it fails, if it takes longer than `timeout` seconds, and
        if the guest dies.
        """
        if user != "root":
            command = f"runuser -u {shlex.quote(user)} -- bash -c {shlex.quote(command)}"
        start = time.monotonic()
        argv = [*self.ssh_argv(), "--", command]
        try:
            done = subprocess.run(
                argv,
                input=b"" if input is None else input,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            output = _words(error.stdout) + _words(error.stderr)
            raise self._error(f"did not end within {timeout:.0f} s", command, output) from None
        seconds = time.monotonic() - start
        result = Result(_words(done.stdout), _words(done.stderr), done.returncode, seconds)
        if done.returncode == 255 and not self.alive:
            raise self._error("was cut off: the guest died", command, result.stdout + result.stderr)
        if check and done.returncode != 0:
            raise self._error(f"failed with exit code {done.returncode}", command, result.stdout + result.stderr)
        return result

    def put(self, local: Path | str, remote: str) -> None:
        """Copy a file into the guest, with its permissions."""
        path = Path(local)
        self._write(path.read_bytes(), remote, path.stat().st_mode & 0o7777)

    def write(self, remote: str, text: str, mode: int = 0o644) -> None:
        """Write a text file in the guest, and the directories it needs."""
        self._write(text.encode(), remote, mode)

    def get(self, remote: str, local: Path | str) -> None:
        """Copy a file out of the guest."""
        argv = [*self.ssh_argv(), "--", f"cat {shlex.quote(remote)}"]
        with Path(local).open("wb") as target:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, stdout=target, stderr=subprocess.PIPE, timeout=300, check=False
            )
        if done.returncode != 0:
            raise self._error(f"failed with exit code {done.returncode}", argv[-1], _words(done.stderr))

    def read(self, remote: str) -> str:
        """Return the text of a file in the guest."""
        return self.run(f"cat {shlex.quote(remote)}").stdout

    def install(self, deb: Path | str, *, timeout: float = 300) -> Result:
        """Install a .deb with dpkg, from nothing but what the guest has; conffiles that were changed are kept."""
        remote = f"/var/tmp/{Path(deb).name}"
        self.put(deb, remote)
        return self.run(
            f"DEBIAN_FRONTEND=noninteractive dpkg --force-confold -i {shlex.quote(remote)}", timeout=timeout
        )

    def journal(self, unit: str | None = None, lines: int = 200) -> str:
        """Return the last lines of this boot's journal, of one unit or of all."""
        which = f"-u {shlex.quote(unit)} " if unit else ""
        return self.run(f"journalctl -b --no-pager -o short-precise {which}-n {lines}").stdout

    def reboot(self, timeout: float = BOOT_SECONDS) -> None:
        """Reboot it in an orderly way and wait until commands can be run again."""
        with stage(f"{self.release}: rebooting"):
            self.run("systemctl reboot", check=False)
            self._wait_up(time.monotonic() + timeout)

    def reset(self, timeout: float = BOOT_SECONDS) -> None:
        """Press the reset button, as a crash would, and wait until commands can be run again."""
        with stage(f"{self.release}: resetting"):
            self._running().execute("system_reset")
            self._wait_up(time.monotonic() + timeout)

    def power_off(self, timeout: float = 120, *, command: str = "systemctl poweroff") -> float:
        """Shut it down in an orderly way; returns the seconds from the command to the end, `GuestError` past `timeout`.

        With `systemctl reboot` it ends as well, where the machine would start anew: `boot` starts it.
        """
        qemu = self._running()
        qemu.execute("set-action", reboot="shutdown")
        start = time.monotonic()
        self.run(command, check=False, timeout=timeout)
        if not qemu.wait_end(start + timeout - time.monotonic()):
            raise self._error(f"did not end it within {timeout:.0f} s", command, "")
        seconds = time.monotonic() - start
        self._drop_qemu()
        return seconds

    def kill(self) -> None:
        """Pull the plug. Its disk stays as it is, for another `boot`."""
        self._drop_qemu()

    def close(self) -> None:
        """Kill it and remove what it leaves, but for the console log in a `workdir` that was given."""
        self._drop_qemu()
        self._held.close()
        self._overlay.unlink(missing_ok=True)
        self._scratch.remove()

    def console(self, lines: int = 40) -> str:
        """Return the last lines of the console log."""
        try:
            text = self.console_log.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def save_evidence(self, directory: Path) -> None:
        """Leave the console log, and the journal if the guest still answers, in a directory."""
        directory.mkdir(parents=True, exist_ok=True)
        if self.console_log.exists():
            shutil.copyfile(self.console_log, directory / f"{self.name}-console.log")
        if self.alive:
            with contextlib.suppress(GuestError, OSError):
                text = self.run("journalctl -b --no-pager -o short-precise -n 2000", timeout=30).stdout
                (directory / f"{self.name}-journal.log").write_text(text)

    def ssh_argv(self) -> list[str]:
        """Return the ssh command line that reaches this guest as root; a command may follow after `--`."""
        assert self._image is not None
        return ssh.argv(self._image, self._running().ssh_port, self._run / "ssh")

    def _take_image(self) -> Image:
        while True:
            image = ensure(self.release)
            try:
                self._held.enter_context(image.in_use())
            except FileNotFoundError:
                # Another checkout's build removed it at this very moment.
                continue
            return image

    def _wait_up(self, deadline: float) -> None:
        try:
            self._running().wait_ready(deadline)
        except GuestError as error:
            raise GuestError(f"{self.release}: {error}\n{self._console_words()}") from None
        self._connect(deadline)

    def _connect(self, deadline: float) -> None:
        try:
            # One connection carries all commands: each costs a fork in the guest, not a key exchange.
            self._end_ssh()
            argv = [*self.ssh_argv()[:-1], "-o", "ControlMaster=yes", "-N", "-f", "root@127.0.0.1"]
            # More than once: one that others starve may need longer for a key exchange than ssh waits.
            while self._ssh_master(argv, deadline) != 0:
                if time.monotonic() > deadline or not self.alive:
                    raise GuestError("the guest is up, but its ssh server does not take us")
                time.sleep(0.5)
        except (GuestError, subprocess.TimeoutExpired) as error:
            raise GuestError(f"{self.release}: {error}\n{self._console_words()}") from None

    def _ssh_master(self, argv: list[str], deadline: float) -> int:
        with self.console_log.open("ab") as words:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                timeout=max(1.0, deadline - time.monotonic()),
                check=False,
            )
        return done.returncode

    def _end_ssh(self) -> None:
        control = self._run / "ssh"
        if control.exists():
            argv = [*self.ssh_argv()[:-1], "-O", "exit", "root@127.0.0.1"]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(argv, capture_output=True, timeout=10, check=False)
            control.unlink(missing_ok=True)

    def _drop_qemu(self) -> None:
        if self._qemu is not None:
            # The ssh connection ends with the guest it went to.
            self._qemu.kill()
            self._qemu = None
        for name in ("ssh", "qmp", "ready"):
            (self._run / name).unlink(missing_ok=True)

    def _write(self, data: bytes, remote: str, mode: int) -> None:
        path = shlex.quote(remote)
        parent = shlex.quote(str(Path(remote).parent))
        self.run(f"mkdir -p {parent} && cat >{path} && chmod {mode:o} {path}", input=data, timeout=300)

    def _running(self) -> Qemu:
        if self._qemu is None:
            raise GuestError(f"{self.release} is not up")
        return self._qemu

    def _error(self, what: str, command: str, output: str) -> GuestError:
        text = f"{self.release}: `{command}` {what}\n{output}".rstrip()
        return GuestError(f"{text}\n{self._console_words()}")

    def _console_words(self) -> str:
        return f"--- the end of {self.console_log}:\n{self.console()}"


def _words(data: bytes | str | None) -> str:
    if isinstance(data, str):
        return data
    return (data or b"").decode(errors="replace")
