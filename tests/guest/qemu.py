# SPDX-License-Identifier: MIT
"""QEMU: which accelerator works on this machine, and one process with its control socket."""

from __future__ import annotations

import json
import os
import select
import shlex
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO

from tests.guest import host
from tests.guest.errors import GuestError
from tests.guest.image import Image, cache
from tests.guest.progress import say, stage
from tests.guest.recipe import KERNEL_COMMAND_LINE

PROBE_SECONDS = 6.0
"""A guest under a working KVM says its first word within two seconds; one that hangs never does."""

_NETWORK = ("-device", "virtio-net-pci,netdev=net")
_DEVICES = ("-device", "virtio-blk-pci,drive=root", "-device", "virtio-rng-pci")
_MEMORY_IS_MAPPED = "x-ignore-shared"
"""QEMU's capability to leave a memory that is a shared file out of what it writes: the file has it already."""

_QMP_SECONDS = 30.0
SAVE_SECONDS = 60.0
"""For the state of the devices alone, which is less than a MiB."""

_BASE = ("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc,vmport=off")


class Accelerator(Enum):
    """How the guest's instructions are run."""

    KVM = "kvm"
    TCG = "tcg"

    @property
    def arguments(self) -> tuple[str, ...]:
        """QEMU's arguments for it."""
        if self is Accelerator.KVM:
            return ("-accel", "kvm", "-cpu", "host")
        # Not "max": what emulation has of AVX is slow, and glibc takes it wherever a processor says that it is there.
        return ("-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "Westmere")


def accelerator(image: Image) -> Accelerator:
    """Return what works here: `/dev/kvm` may be missing, refused, or take a guest that then hangs for ever.

    So a kernel is booted under it once, for a few seconds, and the verdict remembered until the machine boots anew.
    `NBDD_GUEST_ACCEL` (`kvm` or `tcg`) decides instead.
    """
    chosen = os.environ.get("NBDD_GUEST_ACCEL")
    if chosen:
        try:
            return Accelerator(chosen)
        except ValueError:
            raise GuestError(f"NBDD_GUEST_ACCEL is {chosen!r}; it can be kvm or tcg") from None
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Accelerator.TCG
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    memory = cache() / "accelerator.json"
    try:
        remembered = json.loads(memory.read_text())
        if remembered["boot_id"] == boot_id:
            return Accelerator(remembered["accelerator"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with stage(f"trying KVM for at most {PROBE_SECONDS:.0f} s"):
        verdict = Accelerator.KVM if _kvm_boots(image) else Accelerator.TCG
    if verdict is Accelerator.TCG:
        say("/dev/kvm is there, but a kernel does not start under it: emulating (TCG), which is slower")
    with tempfile.NamedTemporaryFile("w", dir=memory.parent, delete=False) as fresh:
        json.dump({"boot_id": boot_id, "accelerator": verdict.value}, fresh)
    Path(fresh.name).rename(memory)
    return verdict


def _kvm_boots(image: Image) -> bool:
    argv = [*_BASE, *Accelerator.KVM.arguments, "-m", "512", "-no-reboot", "-serial", "stdio"]
    argv += ["-kernel", str(image.kernel), "-initrd", str(image.initrd)]
    argv += ["-append", f"{KERNEL_COMMAND_LINE} probe=1"]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False
    return b"probe: alive" in done.stdout


def machine() -> str:
    """Return all of this machine's QEMU and of its processor that a saved state is bound to."""
    parts = [host.command([_BASE[0], "--version"], "asking QEMU for its version", timeout=30), *_BASE]
    parts += [KERNEL_COMMAND_LINE, *_NETWORK, *_DEVICES]
    parts += [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model name", "flags"))
    ]
    return "\n".join(parts)


@dataclass(frozen=True, slots=True)
class Saved:
    """A machine that was stopped and written to two files."""

    memory: Path
    """All of its memory, mapped as it is: a guest reads what it touches, and what it writes stays its own."""
    devices: Path
    """The state of processors and devices."""


class Qemu:
    """One QEMU process. It dies with the process that started it, however that ends.

    Start it from a thread that outlives it: Linux sends the parent-death signal when the starting *thread* ends.
    """

    def __init__(
        self,
        image: Image,
        overlay: Path,
        console: Path,
        run: Path,
        *,
        memory: int,
        cpus: int,
        sees_host: bool,
        keeps: Saved | None = None,
        restores: Saved | None = None,
    ) -> None:
        """Start it; `run` is a private directory with a short name for its sockets, `memory` is in MiB.

        One that `keeps` can `save` itself there once; one that `restores` goes on where another was saved.
        """
        self.accelerator = accelerator(image)
        self.console = console
        self._ready_bytes = b""
        self._events: list[dict[str, object]] = []
        self._keeps = keeps
        argv = [
            *("setpriv", "--pdeathsig", "KILL", *_BASE, *self.accelerator.arguments),
            *("-smp", str(cpus), "-m", str(memory)),
            *("-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", KERNEL_COMMAND_LINE),
            *("-drive", f"file={overlay},if=none,id=root,format=qcow2,cache=unsafe,discard=unmap"),
            # Port 0: the kernel picks a free one, and QEMU tells which. Nothing of the guest gets out; without a route
            # and names, one that may see its host reaches that alone.
            *("-netdev", f"user,id=net,restrict={'off' if sees_host else 'on'},hostfwd=tcp:127.0.0.1:0-:22"),
            *(*_NETWORK, *_DEVICES),
            *("-chardev", f"file,id=console,path={console},append=on", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=ready,path={run}/ready,server=on,wait=off", "-serial", "chardev:ready"),
            *("-qmp", f"unix:{run}/qmp,server=on,wait=off"),
        ]
        mapped = keeps or restores
        if mapped is not None:
            backend = f"memory-backend-file,id=ram,size={memory}M,mem-path={mapped.memory}"
            argv += ["-object", f"{backend},share={'on' if keeps else 'off'}", "-machine", "memory-backend=ram"]
        if restores is not None:
            argv += ["-incoming", "defer"]
        # QEMU's own words go where the guest's do.
        with console.open("ab") as words:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=words, stderr=words)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._sockets: list[socket.socket] = []
        try:
            deadline = time.monotonic() + 30
            self._qmp = self._connect(run / "qmp", deadline)
            self._qmp_file: IO[bytes] = self._qmp.makefile("rb")
            self._ready = self._connect(run / "ready", deadline)
            self._qmp_file.readline()
            self.execute("qmp_capabilities")
            self.ssh_port = self._forwarded_port()
            if restores is not None:
                self._restore(restores)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def execute(self, name: str, **arguments: object) -> object:
        """Send one QMP command and return its answer."""
        request: dict[str, object] = {"execute": name}
        if arguments:
            request["arguments"] = arguments
        try:
            self._qmp.sendall(json.dumps(request).encode() + b"\n")
            while line := self._qmp_file.readline():
                answer = json.loads(line)
                if "error" in answer:
                    raise GuestError(f"QEMU refused {name}: {answer['error'].get('desc')}")
                if "return" in answer:
                    result: object = answer["return"]
                    return result
                self._events.append(answer)
        except OSError as error:
            raise GuestError(f"QEMU did not answer {name}: {error}") from None
        raise GuestError(f"QEMU ended before it answered {name}")

    def save(self) -> None:
        """Stop the machine, write it to what it `keeps`, and end the process; its disk is complete then."""
        if self._keeps is None:
            raise GuestError("this QEMU was not started to be saved")
        self.execute("stop")
        self._prepare_migration()
        self.execute("migrate", uri=f"exec:cat >{shlex.quote(str(self._keeps.devices))}")
        self._wait_migrated()
        self.execute("quit")
        if not self.wait_end(SAVE_SECONDS):
            raise GuestError("QEMU did not end after it was saved")

    def _restore(self, saved: Saved) -> None:
        self._prepare_migration()
        self.execute("migrate-incoming", uri=f"exec:cat {shlex.quote(str(saved.devices))}")
        self._wait_migrated()
        # It was stopped before it was saved, and is that still.
        self.execute("cont")

    def _prepare_migration(self) -> None:
        wanted = [{"capability": name, "state": True} for name in (_MEMORY_IS_MAPPED, "events")]
        self.execute("migrate-set-capabilities", capabilities=wanted)

    def _wait_migrated(self) -> None:
        """Wait until QEMU has written or read a machine; `GuestError` if it can't."""
        self._qmp.settimeout(SAVE_SECONDS)
        try:
            while True:
                events = [event for event in self._events if event.get("event") == "MIGRATION"]
                statuses = [str(_field(event.get("data"), "status")) for event in events]
                if "completed" in statuses:
                    return
                if "failed" in statuses:
                    raise GuestError("QEMU failed to write or read the state of a machine; see its console log")
                line = self._qmp_file.readline()
                if not line:
                    raise GuestError("QEMU ended while it wrote or read the state of a machine")
                self._events.append(json.loads(line))
        except OSError as error:
            raise GuestError(f"QEMU did not write or read the state of a machine: {error}") from None
        finally:
            self._events.clear()
            self._qmp.settimeout(_QMP_SECONDS)

    def wait_ready(self, deadline: float) -> None:
        """Wait for the guest's word that it can be spoken to; once for each of its boots. `deadline`: monotonic."""
        while b"ready" not in self._ready_bytes:
            poll = select.poll()
            poll.register(self._ready, select.POLLIN)
            poll.register(self._pidfd, select.POLLIN)
            left = deadline - time.monotonic()
            events = dict(poll.poll(left * 1000)) if left > 0 else {}
            if not events:
                raise GuestError("the guest did not come up in time")
            if self._pidfd in events:
                raise GuestError(f"QEMU ended with exit code {self._process.wait()} before the guest was up")
            self._ready_bytes += self._ready.recv(4096)
        self._ready_bytes = self._ready_bytes.partition(b"ready")[2]

    def wait_end(self, timeout: float) -> bool:
        """Wait for the process to end by itself, at most `timeout` seconds; say whether it did."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End the process at once and let go of all that belongs to it; again does nothing."""
        if self._pidfd < 0:
            return
        self._process.kill()
        self._process.wait()
        for held in self._sockets:
            held.close()
        if hasattr(self, "_qmp_file"):
            self._qmp_file.close()
        os.close(self._pidfd)
        self._pidfd = -1

    def _connect(self, path: Path, deadline: float) -> socket.socket:
        # QEMU makes its sockets in its first tenth of a second; there is no event to wait for.
        while True:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                client.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                client.close()
                if not self.alive or time.monotonic() > deadline:
                    raise GuestError(f"QEMU did not start:\n{self.console.read_text(errors='replace')}") from None
                time.sleep(0.01)
                continue
            client.settimeout(_QMP_SECONDS)
            self._sockets.append(client)
            return client

    def _forwarded_port(self) -> int:
        text = str(self.execute("human-monitor-command", **{"command-line": "info usernet"}))
        for line in text.splitlines():
            # Protocol[State]  FD  Source Address  Port  Dest. Address  Port ...
            fields = line.split()
            if fields and fields[0].startswith("TCP[HOST_FORWARD]"):
                return int(fields[3])
        raise GuestError(f"QEMU does not tell the port it forwards to the guest:\n{text}")


def _field(data: object, name: str) -> object:
    return data.get(name) if isinstance(data, dict) else None
