# SPDX-License-Identifier: MIT
"""A server made of arbitrary bytes: every byte is a move, and most moves make sense where they stand."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from nbdd.errors import ServerError
from nbdd.protocol import Export, negotiation
from nbdd.protocol.constants import IHAVEOPT, NBDMAGIC, OLDSTYLE_MAGIC, REP_FLAG_ERROR, REPLY_MAGIC
from tests.fakes import servers
from tests.fuzz.judge import GO, LIST, NEGOTIATIONS, judge

LIMITS = {
    "MAX_INFOS": 12,
    "MAX_EXPORTS": 40,
    "MAX_LIST": 64 << 10,
    "MAX_DESCRIBED": 5,
    "MAX_NEGOTIATION": 96 << 10,
}
"""In the place of the limits in nbdd.protocol.negotiation, so that scripts of some hundred bytes reach them. The length
of a reply and of a string stay as they are."""

NAMES = ("x", "", "\x1b]0;owned\x07\u202e", "\udcff", "é" * 2048, "n" * 4097, "\ud800")
"""What the client asks for; the last two can't be asked for."""

LENGTHS = (64, 4095, 4096, 4097, 8192, 16382, 16384, 16385)
"""Of texts beyond the 56 bytes that a script can spell out."""

NEVER = 0x10
"""From this value on, the byte that says before which message of the client the server leaves says: before none."""

MAX_AGAIN = 128 << 10
"""Bytes that one repetition says, about; more than are read."""

PIECES = 300
"""So many reads get small pieces; the rest of them would only take time."""


def judge_script(data: bytes) -> Export | list[Export] | ServerError:
    """Judge one input of the fuzzer: what the client does, how the bytes arrive, and the server's moves."""
    what, piece, leaves, ending, *_ = data[:HEADER].ljust(HEADER, b"\0")
    kinds = list(NEGOTIATIONS)
    server = Script(data[HEADER:], piece, leaves, ENDINGS[ending % len(ENDINGS)])
    return judge(kinds[what % len(kinds)], NAMES[what // len(kinds) % len(NAMES)], server)


def lower_limits(put: Callable[[object, str, int], None] = setattr) -> None:
    """Have the limits that the scripts are made for; `put` as monkeypatch.setattr."""
    for name, limit in LIMITS.items():
        put(negotiation, name, limit)


class Script:
    """The server. Once its moves are over it goes on with those of `ending`, and then hangs up."""

    def __init__(self, moves: bytes, piece: int = 0, leaves: int = NEVER, ending: bytes = b"") -> None:
        self._moves = moves + ending
        self._at = 0
        self._piece = piece
        self._leaves = leaves
        self._heard = 0
        self._option = GO
        self._last = b""
        self._cut_to: int | None = None
        self._pieces = 0

    def hear(self, octets: bytes) -> None:
        if self._leaves == self._heard:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        self._heard += 1
        if octets.startswith(IHAVEOPT):
            self._option = int.from_bytes(octets[8:12], "big")

    def say(self) -> bytes:
        while self._at < len(self._moves):
            move = MOVES[self._byte() % len(MOVES)]
            said = move(self)
            if said:
                self._last = said
                said, self._cut_to = said[: self._cut_to], None
                if said:
                    return said
        return b""

    def piece(self, count: int) -> int:
        self._pieces += 1
        return min(count, self._piece) if self._piece and self._pieces < PIECES else count

    # What moves are made of. Where no more is left, they read zeroes.

    def _byte(self) -> int:
        return self._number(1)

    def _number(self, count: int) -> int:
        return int.from_bytes(self._bytes(count).ljust(count, b"\0"), "big")

    def _bytes(self, count: int) -> bytes:
        octets = self._moves[self._at : self._at + count]
        self._at += count
        return octets

    def _text(self) -> bytes:
        length = self._byte() % 64
        if length < 64 - len(LENGTHS):
            return self._bytes(length)
        return bytes([self._byte()]) * LENGTHS[length - 64]

    def _block_size(self) -> int:
        """Mostly a power of two, or one beside it."""
        byte = self._byte()
        power = 1 << (byte & 31)
        return (power, power, power, power, power + 1, power - 1, 0, 0xFFFFFFFF)[byte >> 5]

    # Moves

    def _greeting(self) -> bytes:
        return servers.greeting(3)

    def _some_greeting(self) -> bytes:
        magic = (b"IHAVEOPT", b"IHAVEOPT", OLDSTYLE_MAGIC, self._bytes(8))[self._byte() % 4]
        return NBDMAGIC + magic + self._number(2).to_bytes(2, "big")

    def _accept(self) -> bytes:
        return servers.accepts(self._option, self._byte() << 12)

    def _export(self) -> bytes:
        return servers.info_export(self._option, self._number(8), self._number(2))

    def _blocks(self) -> bytes:
        return servers.info_blocks(self._option, self._block_size(), self._block_size(), self._block_size())

    def _name(self) -> bytes:
        return servers.info(self._option, 1, self._text())

    def _description(self) -> bytes:
        return servers.info(self._option, 2, self._text())

    def _info(self) -> bytes:
        return servers.info(self._option, self._byte() % 8, self._text())

    def _ack(self) -> bytes:
        return servers.ack(self._option)

    def _error(self) -> bytes:
        return servers.reply(self._option, REP_FLAG_ERROR + self._byte() % 16, self._text())

    def _entry(self) -> bytes:
        return servers.entry(self._text(), self._text())

    def _bad_entry(self) -> bytes:
        return servers.reply(LIST, 2, self._number(4).to_bytes(4, "big") + self._text())

    def _reply(self) -> bytes:
        return servers.reply(self._option, self._byte() % 8, self._text())

    def _crooked(self) -> bytes:
        how, text = self._byte() % 4, self._text()
        return servers.reply(
            self._byte() if how == 0 else self._option,
            self._number(4) if how == 1 else 3,
            text,
            magic=self._number(8) if how == 2 else REPLY_MAGIC,
            length=self._number(4) if how == 3 else None,
        )

    def _again(self) -> bytes:
        return self._last * min(self._byte(), 1 + MAX_AGAIN // (len(self._last) + 1))

    def _raw(self) -> bytes:
        return self._text()

    def _cut(self) -> bytes:
        """Less of the next words; with nothing after them, the server leaves in their middle."""
        self._cut_to = self._byte()
        return b""

    def _silence(self) -> bytes:
        raise TimeoutError

    def _reset(self) -> bytes:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


MOVES: tuple[Callable[[Script], bytes], ...] = (
    *(Script._greeting, Script._accept, Script._export, Script._blocks, Script._name, Script._description),
    *(Script._info, Script._ack, Script._error, Script._entry, Script._bad_entry, Script._reply, Script._crooked),
    *(Script._again, Script._raw, Script._cut, Script._silence, Script._reset, Script._some_greeting),
)
"""Their number and order is what corpus.txt is written in: after a change, start a new one."""

ENDINGS = (b"", *(bytes([MOVES.index(move)]) * 24 for move in (Script._ack, Script._accept)))
"""What a server does in the end: it hangs up, or agrees to all that is asked. Without the last two, what a client ought
to have refused would hardly ever come to a result, and so to a judgement."""

HEADER = 4
"""Bytes before the moves of an input: what the client asks, and how the bytes arrive, who leaves, and the ending."""
