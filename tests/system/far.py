# SPDX-License-Identifier: MIT
"""Servers on this machine, for a guest that `sees_host`: for it they are another machine's, and outlive it."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.guest import GuestError, host

MIB = 1 << 20


class FarServers:
    """A qemu-nbd for each export, which has its name; for use in ``with``. `ports` are on 127.0.0.1."""

    def __init__(self, folder: Path, exports: Sequence[str], size: int = 96 * MIB) -> None:
        self.ports: dict[str, int] = {}
        self._folder = folder
        self._running: list[subprocess.Popen[bytes]] = []
        # All at once, so that none gets the same.
        held = [socket.create_server(("127.0.0.1", 0)) for _ in exports]
        for name, listener in zip(exports, held, strict=True):
            self.ports[name] = listener.getsockname()[1]
            with self._image(name).open("wb") as image:
                image.truncate(size)
        for listener in held:
            listener.close()

    def __enter__(self) -> Self:
        host.ensure_runtime()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start them all; they take connections when this returns."""
        for name, port in self.ports.items():
            argv = ["setpriv", "--pdeathsig", "KILL", "qemu-nbd", "--persistent", "--shared=0", "--format=raw"]
            argv += ["--bind=127.0.0.1", f"--port={port}", f"--export-name={name}", "--cache=unsafe"]
            self._running.append(subprocess.Popen([*argv, str(self._image(name))]))
        deadline = time.monotonic() + 30
        for port in self.ports.values():
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                except ConnectionRefusedError:
                    if time.monotonic() > deadline:
                        raise GuestError(f"no qemu-nbd listens on port {port} within 30 s") from None
                    time.sleep(0.05)
                else:
                    break

    def kill(self) -> None:
        """End them as a machine does whose power goes; the images stay."""
        while self._running:
            server = self._running.pop()
            server.kill()
            server.wait()

    def _image(self, name: str) -> Path:
        return self._folder / f"{name}.img"
