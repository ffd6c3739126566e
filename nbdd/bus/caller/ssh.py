# SPDX-License-Identifier: MIT
"""The system bus of another machine: ssh starts systemd-stdio-bridge there, which speaks D-Bus on its input and output.

It is how systemd's own tools do it (`systemctl --host`), so a machine that they reach needs nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from typing import IO

from nbdd.bus.wire.library import Authenticator, AuthError
from nbdd.errors import NbddError

_NO_SUCH_COMMAND = 127
"""The exit status of a shell that does not find a program (POSIX, "2.8.2 Exit Status for Commands")."""

_SSH_FAILED = 255
"""The exit status of ssh if the fault is its own; else it is that of the command there (ssh(1))."""

_END_SECONDS = 2
"""How long an ssh whose connection is over may take to end, by itself or after SIGTERM."""


class Bridge:
    """A running ssh; `socket` is our end of it."""

    def __init__(self, process: asyncio.subprocess.Process, ours: socket.socket, errors: IO[bytes]) -> None:
        self.socket = ours
        self._process = process
        self._errors = errors

    @classmethod
    async def open(cls, host: str, *, ask: bool) -> Bridge:
        """Start ssh to `host`, which is whatever ssh takes for its destination. Raises NbddError.

        With `ask` ssh may ask the person at the terminal for a password; without, it fails instead.
        """
        ours, theirs = socket.socketpair()
        # A file and not a pipe: it need not be read while ssh runs, and an ssh that stays in the background for later
        # connections (ControlPersist) may keep it open.
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        # -x and -T: neither windows nor a terminal. After "--" nothing is an option.
        command = ["ssh", "-xT", *([] if ask else ["-oBatchMode=yes"]), "--", host, "systemd-stdio-bridge"]
        try:
            with theirs:
                end = theirs.fileno()
                process = await asyncio.create_subprocess_exec(*command, stdin=end, stdout=end, stderr=errors)
        except OSError as problem:
            ours.close()
            errors.close()
            if isinstance(problem, FileNotFoundError):
                raise NbddError(f"There is no ssh to reach {host} with: install it (package openssh-client).") from None
            raise NbddError(f"ssh to {host} can't be started: {problem.strerror or problem}.") from None
        ours.setblocking(False)
        return cls(process, ours, errors)

    async def reason(self) -> str:
        """Why the connection ended, as a part of a sentence; "" if ssh does not say."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await self._process.wait()
        if self._process.returncode == _NO_SUCH_COMMAND:
            return "there is no systemd-stdio-bridge, which comes with systemd"
        self._errors.seek(0)
        # The fault is in the last line; before it, ssh may print a banner and warnings.
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = next((line.strip().rstrip(".") for line in reversed(lines) if line.strip()), "")
        if not said and self._process.returncode not in {None, 0, _SSH_FAILED}:
            return "systemd-stdio-bridge failed there, and the journal there says why"
        return said

    async def close(self) -> None:
        """End ssh and wait for it."""
        self.socket.close()
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            if self._process.returncode is None:
                self._process.terminate()
            async with asyncio.timeout(_END_SECONDS):
                await self._process.wait()
        self._errors.close()


class AnonymousExternal(Authenticator):
    """SASL EXTERNAL without an identity: the bridge knows its user, and the number of ours means nothing there.

    D-Bus specification: "Authentication mechanisms", EXTERNAL.
    """

    def _authentication_start(self, negotiate_unix_fd: bool = False) -> str:  # noqa: ARG002 - dbus-next's signature
        return "AUTH EXTERNAL"

    def _receive_line(self, line: str) -> str:
        word = line.split(" ", 1)[0]
        if word not in {"DATA", "OK"}:
            said = line.strip().split("\n", 1)[0][:80]
            raise AuthError(f"{said!r} came instead of D-Bus; perhaps a start-up file of the shell there says it")
        return "DATA" if word == "DATA" else "BEGIN"
