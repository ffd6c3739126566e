# SPDX-License-Identifier: MIT
"""The log: entries of the journal with the device's name as a field, or lines on stderr if there is no journal."""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter

FIELD = "NBDD_DEVICE"
"""The field that holds a device's name: ``journalctl NBDD_DEVICE=backup``."""

SOCKET = "/run/systemd/journal/socket"
"""The socket on which journald takes entries with fields (systemd's JOURNAL_NATIVE_PROTOCOL)."""

_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


class DeviceLog(_Adapter):
    """Logger of one device: each line begins with its name, and has the name as a field."""

    def __init__(self, logger: logging.Logger, name: str) -> None:
        super().__init__(logger, {"device": name})
        self._name = name

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Put the name in front; a device's name holds no percent sign."""
        kwargs["extra"] = self.extra
        return f"{self._name}: {msg}", kwargs


class JournalHandler(logging.Handler):
    """Sends entries to journald. An entry that can't be sent goes to stderr, or is lost if the socket is full."""

    def __init__(self, path: str = SOCKET) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # A slow journald must not block the manager's loop.
        self._socket.setblocking(False)
        self._stderr = stderr_handler()
        # Without one, logging.basicConfig sets a formatter that repeats level and logger in the text.
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Send one entry."""
        try:
            self._socket.sendto(_entry(record, self.format(record)), self._path)
        except BlockingIOError:
            pass  # Lost: stderr leads to the same journald, and would block.
        except OSError:
            self._stderr.emit(record)
        except Exception:  # noqa: BLE001 - as logging's own handlers: a line that can't be logged must not end the service
            self.handleError(record)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()


class _Prefixed(logging.Formatter):
    """Puts the priority in front of every line, as sd-daemon(3) describes."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"<{_priority(record)}>{line}" for line in super().format(record).splitlines())


def stderr_handler() -> logging.Handler:
    """Handler that writes lines to stderr: with priorities for the journal, with times for a terminal."""
    handler = logging.StreamHandler(sys.stderr)
    if "JOURNAL_STREAM" in os.environ:
        handler.setFormatter(_Prefixed("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


def log_to_journal(level: int) -> None:
    """Log to the journal if stderr leads there, else to stderr."""
    handler = JournalHandler() if _stderr_is_the_journal() else stderr_handler()
    logging.basicConfig(level=level, handlers=[handler])


def _stderr_is_the_journal() -> bool:
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _priority(record: logging.LogRecord) -> int:
    return next((number for level, number in _PRIORITIES if record.levelno >= level), 7)


def _entry(record: logging.LogRecord, message: str) -> bytes:
    fields = {"MESSAGE": message, "PRIORITY": str(_priority(record)), "SYSLOG_IDENTIFIER": "nbdd"}
    device = getattr(record, "device", None)
    if device is not None:
        fields[FIELD] = device
    parts = []
    for key, value in fields.items():
        # With its length in front, a value may hold line breaks.
        octets = value.encode(errors="replace")
        parts.append(key.encode() + b"\n" + struct.pack("<Q", len(octets)) + octets + b"\n")
    return b"".join(parts)
