# SPDX-License-Identifier: MIT
"""NBD URIs: what is understood, what is refused and in which words, and that no secret is repeated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdd.errors import InvalidURI
from nbdd.uri import DEFAULT_PORT, MAX_EXPORT, MAX_SOCKET_PATH, URI


def tcp(host: str, export: str = "", port: int = DEFAULT_PORT) -> URI:
    return URI(tls=False, host=host, port=port, socket=None, export=export)


def unix(path: str, export: str = "") -> URI:
    return URI(tls=False, host=None, port=DEFAULT_PORT, socket=path, export=export)


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        # The table in doc/uri.md.
        ("nbd://example.com/disk", tcp("example.com", "disk")),
        ("nbd+unix:///disk?socket=/run/sock", unix("/run/sock", "disk")),
        ("nbd://example.com/", tcp("example.com")),
        ("nbd://example.com", tcp("example.com")),
        ("nbd://example.com//disk", tcp("example.com", "/disk")),
        ("nbd://example.com/hello%20world", tcp("example.com", "hello world")),
        # The rest of the grammar.
        ("NBD://Example.COM:10809/Disk", tcp("example.com", "Disk")),
        ("nbd://example.com:/disk", tcp("example.com", "disk")),
        ("nbd://example.com./disk", tcp("example.com.", "disk")),
        ("nbd://h:1/a/b+c%2Fd%0a", tcp("h", "a/b+c/d\n", 1)),
        ("nbd://h/a@b:c", tcp("h", "a@b:c")),
        ("nbd://h/%C3%BC", tcp("h", "ü")),
        ("nbd://h/ü", tcp("h", "ü")),
        ("nbd://h/?", tcp("h")),
        ("nbd://192.0.2.1:65535", tcp("192.0.2.1", port=65535)),
        ("nbd://[::1]", tcp("::1")),
        ("nbd://[2001:DB8:0::1]:99/x", tcp("2001:db8::1", "x", 99)),
        ("nbd://[fe80::1%25eth0]/x", tcp("fe80::1%eth0", "x")),
        ("nbd://[fe80::1%eth0]/x", tcp("fe80::1%eth0", "x")),
        ("nbd+unix:///?socket=/a%20b+c", unix("/a b+c")),
    ],
)
def test_uri_names_server_and_export(text: str, uri: URI) -> None:
    assert URI.parse(text) == uri
    assert URI.parse(str(uri)) == uri


def test_uri_keeps_tls_and_its_keys() -> None:
    uri = URI.parse("nbds://alice@h/x?tls-psk-file=/etc/psk&tls-hostname=other")
    assert uri.tls
    assert uri.user == "alice"
    assert uri.options == (("tls-hostname", "other"), ("tls-psk-file", "/etc/psk"))
    assert str(uri) == "nbds://alice@h/x?tls-hostname=other&tls-psk-file=/etc/psk"
    assert URI.parse("nbds+unix:///x?socket=/s").tls


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "it is empty"),
        ("nbd:x", "does not begin with a scheme"),
        ("server/export", "does not begin with a scheme"),
        ("http://h/x", "the scheme must be one of nbd, nbds, nbd+unix, nbds+unix, not 'http'"),
        ("nbd://", "the host is missing"),
        ("nbd:///x", "the host is missing"),
        ("nbd://:10809/x", "the host is missing"),
        ("nbd://a_b!/x", "the character '!' can't stand in a host name"),
        ("nbd://h%41/x", "the character '%' can't stand in a host name"),
        ("nbd://münchen.de/x", "xn-- form"),
        ("nbd://" + "a" * 64 + "/x", "1 to 63 characters"),
        ("nbd://a..b/x", "1 to 63 characters"),
        ("nbd://" + "a." * 130 + "/x", "the limit is 253"),
        ("nbd://10.1/x", "looks like an IPv4 address"),
        ("nbd://256.1.1.1/x", "looks like an IPv4 address"),
        ("nbd://127.0.0.01/x", "looks like an IPv4 address"),
        ("nbd://::1/x", "must be in brackets"),
        ("nbd://[::1/x", "the ] after the IPv6 address is missing"),
        ("nbd://[::1]10809/x", "only :PORT may follow"),
        ("nbd://[::g]/x", "is not an IPv6 address"),
        ("nbd://[127.0.0.1]/x", "is not an IPv6 address"),
        ("nbd://[fe80::1%25]/x", "the zone after the %"),
        ("nbd://[fe80::1%25a%2fb]/x", "the zone after the %"),
        ("nbd://[fe80::1%25" + "e" * 16 + "]/x", "the zone after the %"),
        ("nbd://h:0/x", "a number from 1 to 65535, not '0'"),
        ("nbd://h:65536/x", "a number from 1 to 65535, not '65536'"),
        ("nbd://h:" + "9" * 5000, "a number from 1 to 65535"),
        ("nbd://h:nbd/x", "a number from 1 to 65535, and 'nbd' is not"),
        ("nbd://h:-1/x", "a number from 1 to 65535"),
        ("nbd://h:٣/x", "a number from 1 to 65535"),
        ("nbd://h/%", "not followed by two hexadecimal digits"),
        ("nbd://h/%1", "not followed by two hexadecimal digits"),
        ("nbd://h/%+1", "not followed by two hexadecimal digits"),
        ("nbd://h/%zz", "not followed by two hexadecimal digits"),
        ("nbd://h/%ff", "is not valid UTF-8"),
        ("nbd://h/%ed%b3%bf", "is not valid UTF-8"),
        ("nbd://h/\udcff", "it is not valid UTF-8"),
        ("nbd://h/a%00b", "contains %00"),
        ("nbd+unix:///?socket=/a%00", "contains %00"),
        ("nbd://h/a b", "the character ' ' must be written %20"),
        ("nbd://h/a\n", "the control character '\\n'"),
        (" nbd://h/a", "must be written %20"),
        ("nbd://h/" + "a" * (MAX_EXPORT + 1), "has 4097 bytes; NBD allows 4096"),
        ("nbd://h/" + "%C3%BC" * (MAX_EXPORT // 2 + 1), "has 4098 bytes; NBD allows 4096"),
        ("nbd://h/" + "a" * 70000, "the limit is 65536"),
        ("nbd://h/x#y", "no #fragment"),
        ("nbd://h/x?colour=red", "the key 'colour' is unknown"),
        ("nbd://h/x?socket", "has the form key=value"),
        ("nbd://h/x?socket=/s", "the key socket needs the scheme nbd+unix://"),
        ("nbd+unix:///x", "the path of the Unix socket is missing"),
        ("nbd+unix:///x?socket=", "the key socket has no value"),
        ("nbd+unix:///x?socket=s", "must be absolute"),
        ("nbd+unix:///x?socket=/a&socket=/b", "the key 'socket' is given twice"),
        ("nbd+unix://h/x?socket=/s", "there is no host"),
        ("nbd+unix:///x?socket=/" + "s" * MAX_SOCKET_PATH, "has 108 bytes; Linux allows 107"),
        ("nbds://h/x?tls-verify-peer=no", "tls-verify-peer must be one of 0, 1"),
        ("nbds://h/x?tls-type=rot13", "tls-type must be one of"),
        ("nbds://@h/x", "no user name before the @"),
    ],
)
def test_uri_that_is_wrong_is_refused_with_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(InvalidURI) as caught:
        URI.parse(text)
    message = str(caught.value)
    assert sentence in message
    assert message.endswith((".", "example nbd://server.example/export."))
    assert message.isprintable()
    assert len(message) < 500


@pytest.mark.parametrize(
    "text", ["nbd://h/x?tls-certificates=/etc/pki", "nbd+unix:///x?socket=/s&tls-hostname=h", "nbd://alice@h/x"]
)
def test_uri_with_tls_keys_and_scheme_nbd_is_refused(text: str) -> None:
    with pytest.raises(InvalidURI, match="TLS"):
        URI.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "nbd://alice:hunter2@h/x",
        "nbds://alice:hunter2@h/x",
        "nbds://alice:hun/ter2@h/x",
        "nbds://alice:hun?ter2@h/x",
        "nbds://alice:hun#ter2@h/x",
        "nbds://alice:hun@ter2@h/x",
        "nbds://alice:hun ter2@h/x",
        "nbds://h/x?password=hunter2",
        "nbds://h/x?hunter2",
    ],
)
def test_uri_with_a_password_is_refused_and_the_password_never_repeated(text: str) -> None:
    with pytest.raises(InvalidURI) as caught:
        URI.parse(text)
    assert "hun" not in str(caught.value)
    assert "ter2" not in str(caught.value)


def test_address_is_what_a_person_would_write() -> None:
    assert tcp("h").address == "h:10809"
    assert tcp("::1", port=1).address == "[::1]:1"
    assert tcp("fe80::1%eth0").address == "[fe80::1%eth0]:10809"
    assert unix("/run/x.sock").address == "/run/x.sock"
    assert unix("/run/\x1b[2J").address == "/run/\\x1b[2J"


def test_uris_that_are_equal_are_one_key() -> None:
    assert {URI.parse("nbd://H:10809/a"): 1} == {URI.parse("nbd://h/%61"): 1}


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


@given(
    tls=st.booleans(),
    host=st.sampled_from(["h", "a.example", "192.0.2.1", "::1", "fe80::1%eth0", "fe80::1%251"]),
    port=st.integers(1, 65535),
    export=NAMES,
)
def test_tcp_uri_survives_being_written_and_read(tls: bool, host: str, port: int, export: str) -> None:
    uri = URI(tls=tls, host=host, port=port, socket=None, export=export)
    assert URI.parse(str(uri)) == uri
    assert str(uri).isascii()
    assert str(uri).isprintable()


@given(path=NAMES.filter(lambda path: len(path.encode()) < MAX_SOCKET_PATH), export=NAMES, hostname=NAMES.filter(bool))
def test_unix_uri_survives_being_written_and_read(path: str, export: str, hostname: str) -> None:
    options = (("tls-hostname", hostname),)
    uri = URI(tls=True, host=None, port=DEFAULT_PORT, socket="/" + path, export=export, options=options)
    assert URI.parse(str(uri)) == uri
    assert str(uri).isprintable()


@given(st.one_of(st.text(), st.text().map("nbd://".__add__), st.text("nbdsu+ix:/[]@?=&%250aA.#", max_size=30)))
def test_uri_of_any_text_is_read_or_refused(text: str) -> None:
    try:
        uri = URI.parse(text)
    except InvalidURI as error:
        assert str(error).isprintable()  # noqa: PT017 - most texts are refused, some are not
    else:
        assert URI.parse(str(uri)) == uri


def test_import_of_the_server_side_stays_light() -> None:
    """Each of many workers imports it: what is not loaded costs no memory."""
    code = "import sys, nbdd.server.connect; print(*sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    heavy = {"asyncio", "ssl", "yaml", "jsonschema", "dbus_next", "urllib.parse", "ipaddress", "encodings.idna"}
    assert not heavy & set(done.stdout.split())
