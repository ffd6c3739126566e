# SPDX-License-Identifier: MIT
"""The NBD handshake without sockets: what is asked, what is believed, and what a bad server achieves (nothing)."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdd.errors import NegotiationFailed, NoSuchExport, ServerError, TimedOut, TLSFailed
from nbdd.protocol import Export, Flags, go, info, list_exports
from nbdd.protocol.constants import NBDMAGIC, OLDSTYLE_MAGIC, Info, Opt, Rep, RepErr
from nbdd.protocol.text import decode, encode
from nbdd.text import quoted
from tests.fakes import servers
from tests.fakes.servers import FIXED, HAS_FLAGS, MIB, NO_ZEROES, Play, ack, entry, greeting, refusal_of, reply

EXPORT_NAME, ABORT, LIST, INFO, GO = (
    int(option)
    for option in (
        Opt.NBD_OPT_EXPORT_NAME,
        Opt.NBD_OPT_ABORT,
        Opt.NBD_OPT_LIST,
        Opt.NBD_OPT_INFO,
        Opt.NBD_OPT_GO,
    )
)
UNSUP = reply(GO, RepErr.NBD_REP_ERR_UNSUP)


# The good server.


def test_go_asks_for_the_four_infos_and_believes_the_answers() -> None:
    server = (
        greeting()
        + servers.info_export(GO, 5 * MIB, 0x0103)
        + servers.info_blocks(GO, 512, 4096, 1 << 25)
        + servers.info(GO, Info.NBD_INFO_NAME, b"canonical")
        + servers.info(GO, Info.NBD_INFO_DESCRIPTION, "Büro".encode())
        + ack(GO)
    )
    play = Play(server)
    export = play.run(go("disk"))
    flags = Flags.NBD_FLAG_HAS_FLAGS | Flags.NBD_FLAG_READ_ONLY | Flags.NBD_FLAG_CAN_MULTI_CONN
    assert export == Export("canonical", 5 * MIB, flags, 512, 4096, 1 << 25, "Büro")
    client_flags, [asked] = servers.parse_client(play.sent)
    assert client_flags == 3
    assert asked == (GO, b"\0\0\0\4disk" + struct.pack(">5H", 4, 0, 3, 1, 2))


def test_go_leaves_every_byte_of_the_transmission_phase_alone() -> None:
    play = Play(greeting() + servers.accepts(GO) + b"gDf\x98")
    play.run(go(""))
    assert play.rest == b"gDf\x98"


def test_infos_come_in_any_order_and_only_the_export_is_required() -> None:
    server = greeting() + servers.info_blocks(GO, 1, 512, 0xFFFFFFFF) + servers.accepts(GO, flags=HAS_FLAGS)
    assert Play(server).run(go("x")) == Export("x", MIB, Flags.NBD_FLAG_HAS_FLAGS, 1, 512, 0xFFFFFFFF)
    export = Play(greeting() + servers.accepts(GO)).run(go("x"))
    assert (export.minimum, export.preferred, export.maximum) == (None, None, None)


def test_infos_and_replies_of_unknown_types_are_skipped() -> None:
    server = greeting() + servers.info(GO, 99, b"???") + reply(GO, 77, b"what") + servers.accepts(GO)
    assert Play(server).run(go("x")).size == MIB


def test_infos_sent_twice_alike_are_no_contradiction() -> None:
    said = servers.info_blocks(GO, 1, 512, 512) + servers.info(GO, 1, b"n") + servers.info_export(GO)
    assert Play(greeting() + 3 * said + ack(GO)).run(go("x")) == Export("n", MIB, Flags(HAS_FLAGS), 1, 512, 512)


def test_flags_that_are_unknown_are_kept() -> None:
    export = Play(greeting() + servers.accepts(GO, flags=0x8001)).run(go("x"))
    assert int(export.flags) == 0x8001


def test_size_of_zero_is_returned_as_it_is() -> None:
    assert Play(greeting() + servers.accepts(GO, size=0)).run(go("x")).size == 0


def test_size_up_to_the_kernels_largest_is_taken() -> None:
    assert Play(greeting() + servers.accepts(GO, size=2**63 - 1)).run(go("x")).size == 2**63 - 1


def test_no_zeroes_is_set_only_if_the_server_offers_it() -> None:
    play = Play(greeting(FIXED) + servers.accepts(GO))
    play.run(go("x"))
    assert servers.parse_client(play.sent)[0] == 1


def test_info_asks_and_ends_the_session() -> None:
    play = Play(greeting() + servers.accepts(INFO, 7 * MIB))
    assert play.run(info("x")).size == 7 * MIB
    assert play.asked == [INFO, ABORT]


def test_info_returns_the_answer_even_if_the_server_closes_before_abort() -> None:
    play = Play(greeting() + servers.accepts(INFO), hangs_up_before="NBD_OPT_ABORT")
    assert play.run(info("x")).size == MIB


# The old server.


def test_export_name_is_used_if_go_is_unknown() -> None:
    play = Play(greeting() + UNSUP + struct.pack(">QH", 3 * MIB, 1) + b"rest")
    assert play.run(go("disk")) == Export("disk", 3 * MIB, Flags.NBD_FLAG_HAS_FLAGS)
    assert play.asked == [GO, EXPORT_NAME]
    assert servers.parse_client(play.sent)[1][1].data == b"disk"
    assert play.rest == b"rest"


def test_export_name_is_followed_by_124_zeroes_without_no_zeroes() -> None:
    play = Play(greeting(FIXED) + UNSUP + struct.pack(">QH", MIB, 1) + bytes(124) + b"rest")
    assert play.run(go("disk")).size == MIB
    assert play.rest == b"rest"


@pytest.mark.parametrize("kind", [*sorted(set(RepErr) - {RepErr.NBD_REP_ERR_UNSUP}), 0x80001234])
def test_export_name_is_not_used_after_any_other_error(kind: int) -> None:
    error, play = refusal_of(greeting() + reply(GO, kind) + bytes(200), go("x"))
    assert play.asked == [GO, ABORT]
    assert isinstance(error, TLSFailed) == (kind == RepErr.NBD_REP_ERR_TLS_REQD)


def test_size_above_the_kernels_is_refused_from_an_old_server_too() -> None:
    error, _ = refusal_of(greeting() + UNSUP + struct.pack(">QH", 1 << 63, 1), go("x"))
    assert "9223372036854775808 bytes" in str(error)


def test_old_server_that_closes_probably_lacks_the_export() -> None:
    error, _ = refusal_of(greeting() + UNSUP, go("di\nsk"))
    assert "does not have 'di\\nsk'" in str(error)


# The refusing server.


@pytest.mark.parametrize(
    ("kind", "error", "sentence"),
    [
        (RepErr.NBD_REP_ERR_UNKNOWN, NoSuchExport, "has no export called 'x'."),
        (RepErr.NBD_REP_ERR_TLS_REQD, TLSFailed, "accepts encrypted connections only (TLS)"),
        (RepErr.NBD_REP_ERR_POLICY, NegotiationFailed, "its policy forbids it"),
        (RepErr.NBD_REP_ERR_INVALID, NegotiationFailed, "calls our request NBD_OPT_INFO invalid"),
        (RepErr.NBD_REP_ERR_PLATFORM, NegotiationFailed, "on the platform it runs on"),
        (RepErr.NBD_REP_ERR_UNSUP, NegotiationFailed, "is too old to describe 'x'"),
        (RepErr.NBD_REP_ERR_SHUTDOWN, NegotiationFailed, "is shutting down"),
        (RepErr.NBD_REP_ERR_BLOCK_SIZE_REQD, NegotiationFailed, "requires its block sizes"),
        (RepErr.NBD_REP_ERR_TOO_BIG, NegotiationFailed, "too big"),
        (RepErr.NBD_REP_ERR_EXT_HEADER_REQD, NegotiationFailed, "extended headers"),
        (0x80001234, NegotiationFailed, "the unknown error 0x80001234"),
    ],
)
def test_error_reply_has_its_own_sentence(kind: int, error: type[ServerError], sentence: str) -> None:
    refusal, play = refusal_of(greeting() + reply(INFO, kind), info("x"))
    assert type(refusal) is error
    assert sentence in str(refusal)
    assert play.asked == [INFO, ABORT]


def test_error_reply_message_is_repeated_escaped_and_cut() -> None:
    spoken = b"go \x1b[31maway\r\n" + b"x" * 1000
    refusal, _ = refusal_of(greeting() + reply(GO, RepErr.NBD_REP_ERR_POLICY, spoken), go("x"))
    assert "It says: 'go \\x1b[31maway\\r\\nxxx" in str(refusal)
    assert str(refusal).isprintable()
    assert len(str(refusal)) < 400


def test_name_with_control_characters_can_be_asked_for_but_not_printed() -> None:
    refusal, play = refusal_of(greeting() + reply(GO, RepErr.NBD_REP_ERR_UNKNOWN), go("\x1b]0;owned\x07\u202e"))
    assert "'\\x1b]0;owned\\x07\\u202e'" in str(refusal)
    assert "\x1b]0;owned\x07\u202e".encode() in play.sent


def test_error_reply_says_that_there_is_no_default_export() -> None:
    refusal, _ = refusal_of(greeting() + reply(GO, RepErr.NBD_REP_ERR_UNKNOWN), go(""))
    assert type(refusal) is NoSuchExport
    assert "has no default export; name one" in str(refusal)


# The server that is none, or breaks the protocol.


@pytest.mark.parametrize(
    ("server", "sentence"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not an NBD server but a web server: its first bytes are 'HTTP/1.1'"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "is not an NBD server: its first bytes are 'SSH-2.0-'"),
        (b"\x16\x03\x01\x00\x00\x00\x00\x00", "its first bytes are '\\x16\\x03\\x01\\x00"),
        (NBDMAGIC + OLDSTYLE_MAGIC + bytes(136), "speaks the oldstyle NBD protocol"),
        (NBDMAGIC + b"IHAVENOT" + b"\0\3", "greeted with 'IHAVENOT'"),
        (greeting(NO_ZEROES), "as it was before 2012"),
        (greeting() + reply(GO, 1, magic=1), "does not begin with the magic number"),
        (greeting() + ack(LIST), "answered option 3 when NBD_OPT_GO (7) was open"),
        (greeting() + reply(GO, 1, length=1 << 31), "with 2147483648 bytes; nbdd reads up to 16384"),
        (greeting() + reply(GO, 77, length=16385), "with 16385 bytes"),
        (greeting() + servers.info_export(GO) + reply(GO, 1, b"data"), "sent 4 bytes of data with the end"),
        (greeting() + ack(GO), "without saying its size"),
        (greeting() + entry(b"x").replace(b"\0\0\0\3", b"\0\0\0\7", 1), "with NBD_REP_SERVER, which is no answer"),
        (greeting() + reply(GO, Rep.NBD_REP_META_CONTEXT), "with NBD_REP_META_CONTEXT, which is no answer"),
        (greeting() + reply(GO, Rep.NBD_REP_INFO, b"\0"), "without its type"),
        (greeting() + servers.info(GO, 0, bytes(9)), "NBD_INFO_EXPORT with 9 bytes of payload; it must be 10"),
        (greeting() + servers.info(GO, 3, bytes(13)), "NBD_INFO_BLOCK_SIZE with 13 bytes of payload; it must be 12"),
        (greeting() + servers.info_export(GO, 1 << 63), "has 9223372036854775808 bytes, more than any device"),
        (greeting() + servers.info_export(GO, 2**64 - 512), "more than any device"),
        (greeting() + servers.info_export(GO, 1) + servers.info_export(GO, 2), "sent NBD_INFO_EXPORT twice"),
        (greeting() + servers.info_export(GO, 1, 1) + servers.info_export(GO, 1, 3), "with different content"),
        (greeting() + servers.info_blocks(GO, 1, 512, 512) + servers.info_blocks(GO, 512, 512, 512), "twice"),
        (greeting() + servers.info(GO, 1, b"name") + servers.info(GO, 1, b""), "sent NBD_INFO_NAME twice"),
        (greeting() + servers.info(GO, 2, b"one") + servers.info(GO, 2, b"two"), "sent NBD_INFO_DESCRIPTION twice"),
        (greeting() + servers.info(GO, 1, b"n" * 4097), "an export name of 4097 bytes; NBD allows 4096"),
        (greeting() + servers.info(GO, 2, b"d" * 4097), "a description of 4097 bytes; NBD allows 4096"),
        (greeting() + servers.info(GO, 1, b"a\0b"), "a NUL character in it: 'a\\x00b'"),
        (greeting() + 300 * servers.info(GO, 99, b""), "more than 256 replies to NBD_OPT_GO"),
        (greeting() + 300 * reply(GO, 99, b""), "more than 256 replies to NBD_OPT_GO"),
    ],
)
def test_broken_protocol_ends_the_negotiation_with_a_sentence(server: bytes, sentence: str) -> None:
    error, _ = refusal_of(server, go("x"))
    assert type(error) is NegotiationFailed
    assert sentence in str(error)
    assert str(error).isprintable()


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 512, 512),
        (3, 512, 512),
        (1 << 17, 1 << 17, 1 << 17),
        (512, 0, 4096),
        (512, 768, 4096),
        (1, 256, 4096),
        (4096, 512, 8192),
        (512, 4096, 2048),
        (512, 4096, 0),
    ],
)
def test_block_sizes_that_break_the_protocol_are_refused(sizes: tuple[int, int, int]) -> None:
    error, _ = refusal_of(greeting() + servers.info_blocks(GO, *sizes) + servers.accepts(GO), go("x"))
    assert "block sizes that break the protocol (minimum {}, preferred {}, maximum {})".format(*sizes) in str(error)


@pytest.mark.parametrize("sizes", [(1, 512, 512), (65536, 65536, 65536), (512, 1 << 31, 0xFFFFFFFF), (1, 4096, 4097)])
def test_block_sizes_at_the_edge_of_the_protocol_are_taken(sizes: tuple[int, int, int]) -> None:
    export = Play(greeting() + servers.info_blocks(GO, *sizes) + servers.accepts(GO)).run(go("x"))
    assert (export.minimum, export.preferred, export.maximum) == sizes


def test_name_that_nbd_can_not_carry_is_not_sent() -> None:
    for name, sentence in (("x" * 4097, "a name of 4097 bytes"), ("\ud800", "not valid UTF-8")):
        error, play = refusal_of(greeting(), go(name))
        assert sentence in str(error)
        assert play.asked == []


# The list.


def test_list_describes_each_export() -> None:
    play = Play(
        greeting()
        + entry(b"a")
        + entry(b"b", b"in the list")
        + entry(b"")
        + ack(LIST)
        + servers.info(INFO, Info.NBD_INFO_DESCRIPTION, b"in the info")
        + servers.accepts(INFO, 1 * MIB)
        + servers.accepts(INFO, 2 * MIB)
        + servers.info(INFO, Info.NBD_INFO_NAME, b"a")
        + servers.accepts(INFO, 3 * MIB)
    )
    exports = play.run(list_exports())
    assert [(export.name, export.size, export.description, export.problem) for export in exports] == [
        ("a", 1 * MIB, "in the info", ""),
        ("b", 2 * MIB, "in the list", ""),
        ("", 3 * MIB, "", ""),
    ]
    assert play.asked == [LIST, INFO, INFO, INFO, ABORT]


def test_list_may_be_empty() -> None:
    assert Play(greeting() + ack(LIST)).run(list_exports()) == []


def test_list_says_why_an_export_is_not_described() -> None:
    server = (
        greeting()
        + b"".join(entry(name) for name in (b"secret", b"gone", b"good", b"zero"))
        + ack(LIST)
        + reply(INFO, RepErr.NBD_REP_ERR_TLS_REQD)
        + reply(INFO, RepErr.NBD_REP_ERR_UNKNOWN)
        + servers.accepts(INFO)
        + servers.accepts(INFO, 0)
    )
    secret, gone, good, zero = Play(server).run(list_exports())
    assert "encrypted connections only" in secret.problem
    assert gone.problem == "The server has no export called 'gone'."
    assert (good.size, good.problem) == (MIB, "")
    assert (zero.size, zero.problem[:32]) == (0, "The server gives its size as 0; ")


def test_list_keeps_what_was_described_in_time() -> None:
    server = greeting() + entry(b"a") + entry(b"b") + entry(b"c") + ack(LIST)
    a, b, c = Play(server + servers.accepts(INFO), silent=True).run(list_exports())
    assert (a.name, a.size, a.problem) == ("a", MIB, "")
    assert [export.name for export in (b, c)] == ["b", "c"]
    assert all("not described in time" in export.problem for export in (b, c))
    with pytest.raises(TimedOut):
        Play(server, silent=True).run(list_exports())


def test_server_too_old_to_describe_is_asked_once() -> None:
    play = Play(greeting() + entry(b"a") + entry(b"b") + ack(LIST) + reply(INFO, RepErr.NBD_REP_ERR_UNSUP))
    exports = play.run(list_exports())
    assert [export.name for export in exports] == ["a", "b"]
    assert all("too old" in export.problem for export in exports)
    assert play.asked == [LIST, INFO, ABORT]


def test_server_that_shuts_down_ends_the_list() -> None:
    server = greeting() + entry(b"a") + entry(b"b") + ack(LIST) + reply(INFO, RepErr.NBD_REP_ERR_SHUTDOWN)
    error, play = refusal_of(server, list_exports())
    assert "is shutting down" in str(error)
    assert play.asked == [LIST, INFO, ABORT]


@pytest.mark.parametrize(
    ("kind", "error", "sentence"),
    [
        (RepErr.NBD_REP_ERR_POLICY, NegotiationFailed, "is configured not to list its exports"),
        (RepErr.NBD_REP_ERR_UNSUP, NegotiationFailed, "can't list its exports"),
        (RepErr.NBD_REP_ERR_TLS_REQD, TLSFailed, "encrypted connections only"),
        (RepErr.NBD_REP_ERR_UNKNOWN, NegotiationFailed, "though no export was named"),
    ],
)
def test_server_that_does_not_list_says_why(kind: int, error: type[ServerError], sentence: str) -> None:
    refusal, play = refusal_of(greeting() + reply(LIST, kind), list_exports())
    assert isinstance(refusal, error)
    assert sentence in str(refusal)
    assert play.asked == [LIST, ABORT]


@pytest.mark.parametrize(
    ("server", "sentence"),
    [
        (reply(LIST, 2, b"\0\0\0\5four"), "whose name is longer than the entry"),
        (reply(LIST, 2, b"\0\0\0"), "whose name is longer than the entry"),
        (reply(LIST, 2, b"\xff\xff\xff\xff" + b"x" * 20), "whose name is longer than the entry"),
        (entry(b"n" * 4097), "an export name of 4097 bytes"),
        (entry(b"n", b"d" * 4097), "a description of 4097 bytes"),
        (entry(b"a\0b"), "a NUL character"),
        (reply(LIST, 3, b"\0\0"), "with NBD_REP_INFO, which is no answer"),
        (entry(b"n" * 4096, b"d" * 4096) * 2050, "lists too much"),
    ],
)
def test_list_that_is_broken_ends_with_a_sentence(server: bytes, sentence: str) -> None:
    error, _ = refusal_of(greeting() + server, list_exports())
    assert type(error) is NegotiationFailed
    assert sentence in str(error)


# Strings and the wire.


def test_name_that_is_not_utf_8_comes_back_as_the_same_bytes() -> None:
    play = Play(greeting() + entry(b"\xff\xfe") + ack(LIST) + servers.accepts(INFO))
    [export] = play.run(list_exports())
    assert b"\0\0\0\2\xff\xfe" in play.sent
    assert quoted(export.name) == "'\\xff\\xfe'"
    assert Export.from_wire(json.loads(json.dumps(export.to_wire()))) == export


@given(
    name=st.binary(max_size=50).map(lambda octets: octets.replace(b"\0", b"")),
    size=st.integers(0, 2**63 - 1),
    flags=st.integers(0, 0xFFFF),
    block=st.none() | st.integers(1, 0xFFFFFFFF),
)
def test_export_survives_the_wire(name: bytes, size: int, flags: int, block: int | None) -> None:
    text = decode(name, "a name")
    assert encode(text) == name
    export = Export(text, size, Flags(flags), block, block, block, text, text)
    again = Export.from_wire(json.loads(json.dumps(export.to_wire())))
    assert again == export
    assert isinstance(again.flags, Flags)


@given(st.binary(max_size=2000) | st.text(max_size=500))
def test_quoted_text_is_printable_and_short(text: bytes | str) -> None:
    shown = quoted(text, 200)
    assert shown.isprintable()
    assert shown.encode()
    assert len(shown) <= 200 * 10 + 5
