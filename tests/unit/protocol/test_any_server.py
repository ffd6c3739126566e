# SPDX-License-Identifier: MIT
"""Servers that nobody thought of, without sockets: what holds for all of them, and that every good one is understood.

The promises are in tests/fuzz/judge.py. The sockets are in test_hostile.py.
"""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nbdd.text
from nbdd.errors import NegotiationFailed, ServerError, TimedOut
from nbdd.limits import MAX_SIZE
from nbdd.protocol import Export, Flags, error_reply, negotiation, text
from nbdd.protocol import export as export_module
from nbdd.protocol.constants import NBDMAGIC, Info, Rep, RepErr
from tests.fakes import servers
from tests.fakes.servers import FIXED, HAS_FLAGS, MIB, ack, entry, greeting, reply
from tests.fuzz import corpus
from tests.fuzz.judge import EXPORT_NAME, GO, INFO, LIST, NEGOTIATIONS, judge
from tests.fuzz.script import ENDINGS, HEADER, judge_script, lower_limits

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "hostile-servers.md"

MAX_GO_MEMORY = 1 << 20
"""Bytes that opening one export may allocate at its peak; a list has a bound of its own, in test_hostile.py."""


class Talk:
    """A server that says this whatever it hears, in pieces of these sizes."""

    def __init__(self, said: Iterable[bytes], pieces: Sequence[int] = ()) -> None:
        self._said = (octets for octets in said if octets)
        self._pieces = itertools.cycle(pieces or [1 << 32])

    def hear(self, octets: bytes) -> None:
        """Never mind."""

    def say(self) -> bytes:
        return next(self._said, b"")

    def piece(self, count: int) -> int:
        return min(count, next(self._pieces))


def refused(kind: str, said: Iterable[bytes], export: str = "x") -> str:
    outcome = judge(kind, export, Talk(said))
    assert isinstance(outcome, ServerError), outcome
    return str(outcome)


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits that scripts are made for."""
    lower_limits(monkeypatch.setattr)


def judge_corpus() -> set[type]:
    """Judge all inputs that are kept, each with every ending; returns how they ended."""
    return {
        type(judge_script(data[: HEADER - 1] + bytes([ending]) + data[HEADER:]))
        for data in corpus.load()
        for ending in range(len(ENDINGS))
    }


# Any bytes.

CUTS = st.lists(st.integers(1, 40), max_size=5)
OPTIONS = st.sampled_from([GO, INFO, LIST, EXPORT_NAME])
WORDS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([greeting(), greeting(FIXED), NBDMAGIC, ack(GO), ack(INFO), ack(LIST), entry(b"x", b"y")]),
    st.builds(
        reply,
        OPTIONS,
        st.sampled_from([*Rep, *RepErr, 99, 0xFFFFFFFF]),
        st.binary(max_size=20),
        length=st.none() | st.integers(0, 0xFFFFFFFF),
    ),
    st.builds(servers.info, st.sampled_from([GO, INFO]), st.integers(0, 5), st.binary(max_size=20)),
    st.builds(servers.info_export, st.sampled_from([GO, INFO]), st.integers(0, 2**64 - 1), st.integers(0, 0xFFFF)),
    st.builds(servers.info_blocks, st.sampled_from([GO, INFO]), *[st.sampled_from([0, 1, 512, 4096, 1 << 31])] * 3),
)


@settings(max_examples=200)
@given(start=st.sampled_from([b"", greeting(), greeting(FIXED)]), said=st.lists(WORDS, max_size=12), cuts=CUTS)
@pytest.mark.parametrize("kind", NEGOTIATIONS)
def test_server_of_any_kind_causes_a_result_or_a_typed_error(
    kind: str, start: bytes, said: list[bytes], cuts: list[int]
) -> None:
    judge(kind, "x", Talk([start, *said], cuts))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
@pytest.mark.usefixtures("lowered")
def test_script_of_any_bytes_breaks_no_promise(data: bytes) -> None:
    judge_script(data)


@pytest.mark.usefixtures("lowered")
def test_script_of_the_corpus_breaks_no_promise() -> None:
    assert {Export, list, NegotiationFailed, TimedOut} < judge_corpus()
    assert len(corpus.load()) > 100
    assert corpus.FILE.stat().st_size < 200_000


# What a mistake would look like: the module, the name in it, and what is put there.
MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "strings-shown-as-they-are": (error_reply, "quoted", lambda octets, _limit: f"'{octets!s}'"),
    "names-shown-as-they-are": (nbdd.text, "_escape", lambda char: char),
    "strings-lose-their-end": (negotiation, "decode", lambda octets, what: text.decode(octets[:-1], what)),
    "sizes-past-the-kernels": (export_module, "MAX_SIZE", 1 << 64),
    "any-block-size": (export_module, "_check_block_sizes", lambda *sizes: sizes),
    "strings-of-any-length": (text, "MAX_STRING", 1 << 32),
    "nameless-errors": (error_reply, "NoSuchExport", ServerError),
    "zeroes-left-on-the-wire": (negotiation, "EXPORT_NAME_PADDING", 123),
}


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_corpus_finds_a_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError):
        judge_corpus()


# Every good server.


@dataclass(frozen=True)
class Good:
    """An export, and one way to say it in answer to NBD_OPT_GO or NBD_OPT_INFO."""

    export: Export
    """As it is to be understood; an empty name where the server tells none."""
    replies: tuple[tuple[int, bytes], ...]
    """Kind and data, but for the acknowledgement."""

    def answer(self, option: int) -> bytes:
        return b"".join(reply(option, kind, data) for kind, data in self.replies) + ack(option)


STRINGS = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30).map(str.encode),
    st.binary(max_size=30).map(lambda octets: octets.replace(b"\0", b"")),
    st.sampled_from([b"n" * 4096, "é".encode() * 2048, b"\xff" * 4096, b"\x1b[2J\x07", "\u202e".encode()]),
)
BLOCK_SIZES = st.integers(0, 16).flatmap(
    lambda minimum: st.integers(max(minimum, 9), 31).flatmap(
        lambda preferred: st.tuples(
            st.just(1 << minimum),
            st.just(1 << preferred),
            st.integers(1 << preferred, 0xFFFFFFFF) | st.just(0xFFFFFFFF),
        )
    )
)
SKIPPED = st.one_of(
    st.tuples(st.integers(4, 0xFFFF), st.binary(max_size=50) | st.just(bytes(16382))).map(
        lambda info: (int(Rep.NBD_REP_INFO), struct.pack(">H", info[0]) + info[1])
    ),
    st.tuples(st.integers(5, 0x7FFFFFFF), st.binary(max_size=50) | st.just(bytes(16384))),
)
"""Infos and replies that are of no type that we know."""


def _text(octets: bytes) -> str:
    return octets.decode("utf-8", "surrogateescape")


@st.composite
def good_exports(draw: st.DrawFn) -> Good:
    size, flags = draw(st.integers(0, 2**63 - 1)), draw(st.integers(0, 0xFFFF))
    blocks = draw(st.none() | BLOCK_SIZES)
    name, description = draw(st.none() | STRINGS), draw(st.none() | STRINGS)
    infos = [(Info.NBD_INFO_EXPORT, struct.pack(">QH", size, flags))]
    if blocks is not None:
        infos.append((Info.NBD_INFO_BLOCK_SIZE, struct.pack(">III", *blocks)))
    if name is not None:
        infos.append((Info.NBD_INFO_NAME, name))
    if description is not None:
        infos.append((Info.NBD_INFO_DESCRIPTION, description))
    known = [(int(Rep.NBD_REP_INFO), struct.pack(">H", number) + payload) for number, payload in infos]
    again = draw(st.lists(st.sampled_from(known), max_size=4))
    replies = draw(st.permutations([*known, *again, *draw(st.lists(SKIPPED, max_size=4))]))
    minimum, preferred, maximum = blocks or (None, None, None)
    export = Export(_text(name or b""), size, Flags(flags), minimum, preferred, maximum, _text(description or b""))
    return Good(replace(export, problem="named" if name is not None else ""), tuple(replies))


def understood(good: Good, asked: str) -> Export:
    name = good.export.name if good.export.problem else asked
    return replace(good.export, name=name, problem="")


@settings(max_examples=200)
@given(good=good_exports(), asked=STRINGS, cuts=CUTS, flags=st.sampled_from([1, 3]))
@pytest.mark.parametrize("kind", ["go", "info"])
def test_good_server_is_understood(kind: str, good: Good, asked: bytes, cuts: list[int], flags: int) -> None:
    said = greeting(flags) + good.answer(GO if kind == "go" else INFO)
    assert judge(kind, _text(asked), Talk([said], cuts)) == understood(good, _text(asked))


@given(size=st.integers(0, 2**63 - 1), flags=st.integers(0, 0xFFFF), cuts=CUTS, offered=st.sampled_from([1, 3]))
def test_good_old_server_is_understood(size: int, flags: int, cuts: list[int], offered: int) -> None:
    opened = struct.pack(">QH", size, flags) + bytes(0 if offered & 2 else 124)
    said = greeting(offered) + reply(GO, RepErr.NBD_REP_ERR_UNSUP) + opened
    assert judge("go", "x", Talk([said], cuts)) == Export("x", size, Flags(flags))


REFUSED = st.sampled_from(sorted({*RepErr, 0x80001234} - {RepErr.NBD_REP_ERR_UNSUP, RepErr.NBD_REP_ERR_SHUTDOWN}))


@settings(max_examples=150)
@given(
    entries=st.lists(st.tuples(STRINGS, STRINGS, good_exports() | st.tuples(REFUSED, STRINGS)), max_size=5),
    skipped=st.lists(st.integers(5, 0x7FFFFFFF), max_size=3),
    cuts=CUTS,
)
def test_good_list_is_understood(
    entries: list[tuple[bytes, bytes, Good | tuple[int, bytes]]], skipped: list[int], cuts: list[int]
) -> None:
    said = [greeting()]
    said += [reply(LIST, kind, b"?") for kind in skipped]
    said += [entry(name, description) for name, description, _ in entries]
    said.append(ack(LIST))
    for _, _, answer in entries:
        said.append(answer.answer(INFO) if isinstance(answer, Good) else reply(INFO, *answer))
    listed = judge("list", "", Talk(said, cuts))
    assert isinstance(listed, list)
    for (name, description, answer), export in zip(entries, listed, strict=True):
        if isinstance(answer, Good):
            good = understood(answer, "")
            expected = replace(
                good,
                name=_text(name),
                description=good.description or _text(description),
                problem="" if good.size else export.problem,
            )
            assert export == expected
        else:
            assert (export.name, export.description, export.flags) == (_text(name), _text(description), Flags(0))
            assert export.problem.startswith("The server ")


DIALOGUES: dict[str, tuple[str, bytes, int]] = {
    # What is asked, all that a good server says, and how many bytes of it are not needed for an answer.
    "go": (
        "go",
        greeting()
        + servers.info(GO, Info.NBD_INFO_NAME, b"name")
        + servers.info(GO, Info.NBD_INFO_DESCRIPTION, b"description")
        + servers.info_blocks(GO, 512, 4096, 1 << 25)
        + servers.info(GO, 99, b"unknown")
        + servers.accepts(GO),
        0,
    ),
    "old": ("go", greeting(FIXED) + reply(GO, RepErr.NBD_REP_ERR_UNSUP) + struct.pack(">QH", MIB, 1) + bytes(124), 0),
    "info": ("info", greeting() + servers.info_blocks(INFO, 1, 512, 512) + servers.accepts(INFO) + ack(2), 20),
    "list": (
        "list",
        greeting() + entry(b"a", b"described") + entry(b"b") + ack(LIST) + 2 * servers.accepts(INFO) + ack(2),
        20,
    ),
}


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_dialogue_that_ends_at_any_byte_is_refused(dialogue: str) -> None:
    kind, said, spare = DIALOGUES[dialogue]
    for length in range(len(said) - spare):
        assert "closed the connection" in refused(kind, [said[:length]]), length
    assert not isinstance(judge(kind, "x", Talk([said[: len(said) - spare]])), ServerError)


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_bit_that_flips_on_the_way_breaks_no_promise(dialogue: str) -> None:
    kind, said, _ = DIALOGUES[dialogue]
    for bit in range(8 * len(said)):
        flipped = (int.from_bytes(said, "big") ^ 1 << bit).to_bytes(len(said), "big")
        judge(kind, "x", Talk([flipped]))


# The limits.


def test_replies_up_to_the_limit_are_read() -> None:
    skipped = [reply(GO, 99)] * (negotiation.MAX_INFOS - 2)
    assert judge("go", "x", Talk([greeting(), *skipped, servers.accepts(GO)])) == Export("x", MIB, Flags(HAS_FLAGS))
    assert "sent more than 256 replies to NBD_OPT_GO" in refused(
        "go", [greeting(), *skipped, reply(GO, 99), servers.accepts(GO)]
    )


def test_reply_up_to_the_limit_is_skipped_and_a_longer_one_refused() -> None:
    longest = bytes(negotiation.MAX_REPLY)
    assert judge("go", "x", Talk([greeting(), reply(GO, 99, longest), servers.accepts(GO)])) == Export(
        "x", MIB, Flags(HAS_FLAGS)
    )
    for length in (len(longest) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1):
        assert f"with {length} bytes; nbdd reads up to 16384" in refused(
            "go", [greeting(), reply(GO, 99, length=length)]
        )


def endless(octets: bytes, first: bytes = b"") -> Iterator[bytes]:
    yield greeting() + first
    yield from itertools.repeat(octets, 1_000_000)


def test_replies_by_the_million_are_not_read() -> None:
    for kind, octets, sentence in (
        ("go", reply(GO, 99), "sent more than 256 replies"),
        ("info", servers.info(INFO, 99, b""), "sent more than 256 replies"),
        ("list", entry(b""), "lists too much: nbdd reads 100000 exports"),
        ("list", reply(LIST, 99), "lists too much"),
        ("list", reply(LIST, 99, bytes(16384)), "sent replies without end; nbdd reads 32 MiB of them"),
        ("list", entry(b"n" * 4096, b"d" * 4096), "and 16 MiB of names"),
    ):
        assert sentence in refused(kind, endless(octets)), kind


def test_replies_skipped_before_each_answer_count_for_the_whole_list() -> None:
    def said() -> Iterator[bytes]:
        yield greeting() + entry(b"x") * negotiation.MAX_DESCRIBED + ack(LIST)
        while True:
            yield from itertools.repeat(reply(INFO, 99, bytes(16384)), negotiation.MAX_INFOS - 2)
            yield servers.accepts(INFO)

    assert "sent replies without end" in refused("list", said())


def test_list_of_the_largest_size_fits_into_the_limits() -> None:
    names = [b"%05d" % number + b"n" * 4091 for number in range(negotiation.MAX_DESCRIBED)]
    spent = sum(4 + len(name) for name in names)
    left, rest = negotiation.MAX_EXPORTS - len(names), negotiation.MAX_LIST - spent
    names += [b"n" * (rest // left - 4)] * left
    answer = (
        servers.info(INFO, Info.NBD_INFO_NAME, b"n" * 4096)
        + servers.info(INFO, Info.NBD_INFO_DESCRIPTION, b"d" * 4096)
        + servers.info_blocks(INFO, 512, 4096, 1 << 25)
        + servers.accepts(INFO)
    )
    said = itertools.chain(
        [greeting()], map(entry, names), [ack(LIST)], itertools.repeat(answer, negotiation.MAX_DESCRIBED)
    )
    listed = judge("list", "", Talk(said))
    assert isinstance(listed, list)
    assert len(listed) == negotiation.MAX_EXPORTS
    assert all(export.size == MIB for export in listed[: negotiation.MAX_DESCRIBED])
    assert {export.problem for export in listed[negotiation.MAX_DESCRIBED :]} == {
        "It was not asked: nbdd asks for the first 1000 exports of a list."
    }


def test_go_needs_little_memory_whatever_the_server_sends() -> None:
    nasty = [
        greeting(),
        *(servers.info(GO, number, bytes(16382)) for number in range(100, 300)),
        reply(GO, RepErr.NBD_REP_ERR_POLICY, b"\xff" * 16384),
    ]
    tracemalloc.start()
    try:
        refused("go", iter(nasty))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # All that the server said, 3 MiB, is in this list already, and once more in the notes of the judge.
    assert peak - 2 * sum(map(len, nasty)) < MAX_GO_MEMORY


def test_limits_are_written_down() -> None:
    page = DOCUMENT.read_text("utf-8")
    for name, limit in (
        ("MAX_REPLY", f"{negotiation.MAX_REPLY >> 10} KiB"),
        ("MAX_STRING", f"{text.MAX_STRING} bytes"),
        ("MAX_INFOS", f"{negotiation.MAX_INFOS}"),
        ("MAX_EXPORTS", f"{negotiation.MAX_EXPORTS:,}"),
        ("MAX_LIST", f"{negotiation.MAX_LIST >> 20} MiB"),
        ("MAX_DESCRIBED", f"{negotiation.MAX_DESCRIBED:,}"),
        ("MAX_NEGOTIATION", f"{negotiation.MAX_NEGOTIATION >> 20} MiB"),
        ("MAX_SHOWN", f"{text.MAX_SHOWN} characters"),
        ("MAX_SIZE", f"{MAX_SIZE:,} bytes"),
    ):
        [line] = [line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line]
        assert f"| {limit} |" in line
