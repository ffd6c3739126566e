# SPDX-License-Identifier: MIT
"""What goes to the journal, and as what."""

from __future__ import annotations

import logging
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdd.system import journal
from nbdd.system.journal import DeviceLog, JournalHandler
from tests.fakes.bus import DEADLINE


class Journald:
    """The socket, and what arrived there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        self._sock.settimeout(DEADLINE)

    def entry(self) -> dict[str, str]:
        """The next one; see systemd's JOURNAL_NATIVE_PROTOCOL."""
        data, found = self._sock.recv(1 << 20), {}
        while data:
            key, data = data.split(b"\n", 1)
            (length,) = struct.unpack_from("<Q", data)
            found[key.decode()] = data[8 : 8 + length].decode()
            assert data[8 + length : 9 + length] == b"\n"
            data = data[9 + length :]
        return found

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def journald() -> Iterator[Journald]:
    # Not tmp_path: the name of a socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        found = Journald(Path(folder, "socket"))
        yield found
        found.close()


@pytest.fixture
def log(journald: Journald) -> Iterator[logging.Logger]:
    handler = JournalHandler(str(journald.path))
    found = logging.getLogger("nbdd.test")
    found.setLevel(logging.DEBUG)
    found.addHandler(handler)
    yield found
    found.removeHandler(handler)
    handler.close()


def test_journal_entry_of_a_device_has_its_name_as_a_field(journald: Journald, log: logging.Logger) -> None:
    DeviceLog(log, "a:b.c").warning("%d of %d links", 1, 2)
    assert journald.entry() == {
        "MESSAGE": "a:b.c: 1 of 2 links", "PRIORITY": "4", "SYSLOG_IDENTIFIER": "nbdd", "NBDD_DEVICE": "a:b.c"
    }  # fmt: skip


def test_journal_entry_keeps_line_breaks_and_unencodable_text(journald: Journald) -> None:
    handler = JournalHandler(str(journald.path))
    # Past the loggers: pytest would keep what they are told, and can't report what no encoding holds.
    handler.emit(logging.makeLogRecord({"msg": "one\ntwo\nMESSAGE=three \udcff", "levelno": logging.ERROR}))
    handler.close()
    found = journald.entry()
    assert found == {"MESSAGE": "one\ntwo\nMESSAGE=three ?", "PRIORITY": "3", "SYSLOG_IDENTIFIER": "nbdd"}


def test_journal_entry_has_no_prefix(journald: Journald, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(journal, "_stderr_is_the_journal", lambda: True)
    monkeypatch.setattr(journal, "JournalHandler", lambda: JournalHandler(str(journald.path)))
    journal.log_to_journal(logging.INFO)
    DeviceLog(logging.getLogger("nbdd.manager.device"), "backup").info("said")
    assert journald.entry()["MESSAGE"] == "backup: said"
    for handler in root.handlers:
        handler.close()


def test_journal_priority_follows_level(journald: Journald, log: logging.Logger) -> None:
    for level in (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG):
        log.log(level, "x")
    assert [journald.entry()["PRIORITY"] for _ in range(5)] == ["3", "3", "4", "6", "7"]


def test_journal_entry_that_journald_refuses_goes_to_stderr(
    log: logging.Logger, journald: Journald, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    handler = JournalHandler(str(journald.path))
    log.handlers = [handler]
    log.info("%s", "x" * (8 << 20))
    journald.close()
    log.info("nobody listens")
    journald.path.unlink()
    log.info("nobody is there")
    told = capsys.readouterr().err
    assert len(told) > 8 << 20
    assert "<6>nobody listens\n" in told
    assert told.endswith("<6>nobody is there\n")
    handler.close()


def test_journal_is_used_if_stderr_leads_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "stderr").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        found = os.fstat(file.fileno())
        for told, is_it in ((f"{found.st_dev}:{found.st_ino}", True), (f"{found.st_dev}:1", False)):
            monkeypatch.setenv("JOURNAL_STREAM", told)
            assert journal._stderr_is_the_journal() is is_it
        monkeypatch.delenv("JOURNAL_STREAM")
        assert not journal._stderr_is_the_journal()


def test_stderr_lines_for_the_journal_begin_with_priority() -> None:
    code = (
        "import logging; from nbdd.system.journal import log_to_journal; log_to_journal(logging.DEBUG)\n"
        "log = logging.getLogger('x')\n"
        "log.critical('a'); log.error('b\\nc'); log.warning('d'); log.info('e'); log.debug('f')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: log.exception('g')\n"
    )

    def stderr(**more: str) -> list[str]:
        process = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE,
            env={**{key: value for key, value in os.environ.items() if key != "JOURNAL_STREAM"}, **more},
        )
        return process.stderr.splitlines()

    lines = stderr(JOURNAL_STREAM="1:2")
    assert lines[:7] == ["<3>a", "<3>b", "<3>c", "<4>d", "<6>e", "<7>f", "<3>g"]
    assert all(line.startswith("<3>") for line in lines[7:])
    assert "ZeroDivisionError" in lines[-1]
    assert stderr()[0].endswith(" CRITICAL a")
