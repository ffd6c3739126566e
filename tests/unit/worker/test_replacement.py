# SPDX-License-Identifier: MIT
"""The look at an export before the kernel gets a connection to it: what refuses it, and what says nothing about it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from nbdd.errors import ConnectFailed, ExportChanged, NegotiationFailed, ServerError, TimedOut
from nbdd.kernel.sysfs import Node
from nbdd.server import fingerprint
from nbdd.server.connections import Connections
from nbdd.server.fingerprint import Fingerprint
from nbdd.worker import replacement

NODE = Node(0)
LINKS = cast(
    Connections, SimpleNamespace(sockets=[None], export=SimpleNamespace(size=1), block_size=512, uri="nbd://h/x")
)


def look(monkeypatch: pytest.MonkeyPatch, found: Fingerprint | Exception) -> None:
    def of_export(*_: object) -> Fingerprint:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(fingerprint, "of_device", lambda *_: Fingerprint("one"))
    monkeypatch.setattr(fingerprint, "of_export", of_export)
    replacement._look_same(NODE, LINKS, 1)


@pytest.mark.parametrize("found", [Fingerprint("one"), Fingerprint()])
def test_fingerprint_equal_or_unknown_passes(monkeypatch: pytest.MonkeyPatch, found: Fingerprint) -> None:
    look(monkeypatch, found)


def test_fingerprint_of_another_filesystem_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportChanged, match="was one and is two"):
        look(monkeypatch, Fingerprint("two"))


@pytest.mark.parametrize("error", [TimedOut("Slow."), ServerError("It can't read there.")])
def test_fingerprint_that_can_not_be_read_is_not_compared(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(replacement._CannotCompare, match=str(error)):
        look(monkeypatch, error)


@pytest.mark.parametrize("error", [ConnectFailed("Gone."), NegotiationFailed("Nonsense.")])
def test_connection_that_breaks_during_comparison_is_refused(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(type(error)):
        look(monkeypatch, error)
