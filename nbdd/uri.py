# SPDX-License-Identifier: MIT
"""NBD URIs: nbd://, nbds://, nbd+unix:// and nbds+unix://.

The form is doc/uri.md of the NBD project on top of RFC 3986. It is read by hand: urllib.parse accepts much that
is no URI, and costs a worker process several milliseconds and its own pages of memory.

Stricter than the RFC if leniency would connect somewhere else than meant: a relative socket path, half an IPv4 address,
an unknown query key. More lenient if that is harmless: raw non-ASCII letters in an export name are taken as UTF-8.
"""

from __future__ import annotations

from dataclasses import dataclass
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import NoReturn

from nbdd.errors import InvalidURI
from nbdd.text import printable, quoted

DEFAULT_PORT = 10809
"""The port that IANA assigned to NBD."""

MAX_TEXT = 65536
"""Characters of a URI. An export name of the full length, percent-encoded, needs 12 KiB; the rest is paths."""

MAX_EXPORT = 4096
"""Bytes of an export name: the limit that the NBD protocol puts on every string."""

MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's path: sun_path holds 108, the last is NUL (unix(7))."""

MAX_HOST = 253
"""Characters of a host name, as DNS has it."""

MAX_ZONE = 15
"""Characters of an IPv6 zone, which is the name of a network interface: IFNAMSIZ less the NUL."""

_SHOWN = 120
"""Characters of a URI, or of a part of it, that an error repeats."""

_SCHEMES = {"nbd": (False, False), "nbds": (True, False), "nbd+unix": (False, True), "nbds+unix": (True, True)}
"""Scheme to (tls, unix)."""

_TLS_KEYS = ("tls-certificates", "tls-psk-file", "tls-hostname", "tls-type", "tls-verify-peer")
_TLS_VALUES = {"tls-type": ("anon", "x509", "psk"), "tls-verify-peer": ("0", "1")}

_LETTERS_DIGITS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_HEX = frozenset("0123456789abcdefABCDEF")
_HOST = _LETTERS_DIGITS | frozenset("-_.")
_UNRESERVED = _LETTERS_DIGITS | frozenset("-._~")
# What RFC 3986 lets stand in a path (pchar and "/"), and what is left of that for one value of a query.
_IN_PATH = _UNRESERVED | frozenset("!$&'()*+,;=:@/")
_IN_QUERY = _IN_PATH - frozenset("&+=;")
# Never raw in a URI, though they are printable ASCII.
_FORBIDDEN = frozenset(' "<>\\^`{|}')


@dataclass(frozen=True, slots=True)
class URI:
    """One export on one server. `parse` checks its text; the constructor checks nothing."""

    tls: bool
    """Whether encryption was asked for. Then nothing may ever go in the clear."""
    host: str | None
    """Host name or address in lower case, IPv6 without brackets, perhaps with %zone; None for a Unix socket."""
    port: int
    """TCP port; DEFAULT_PORT, and of no use, for a Unix socket."""
    socket: str | None
    """Absolute path of the Unix socket, or None for TCP."""
    export: str = ""
    """The export name; empty is the server's default export."""
    options: tuple[tuple[str, str], ...] = ()
    """The tls-* keys of the query, sorted."""
    user: str = ""
    """The user name for pre-shared keys; only ever with TLS."""

    @classmethod
    def parse(cls, text: str) -> URI:
        """Read a URI; raise `InvalidURI` with one thing that is wrong with it, and no secret in the sentence."""
        return _Parser(text).parse()

    def __str__(self) -> str:
        """The canonical text; parsing it gives an equal URI. It holds no secret, since a URI with one is refused."""
        scheme = ("nbds" if self.tls else "nbd") + ("+unix" if self.socket is not None else "")
        authority = ""
        if self.host is not None:
            host = "[" + self.host.replace("%", "%25") + "]" if ":" in self.host else self.host
            port = f":{self.port}" if self.port != DEFAULT_PORT else ""
            authority = f"{_quote(self.user, _UNRESERVED)}@{host}{port}" if self.user else host + port
        query = [f"{key}={_quote(value, _IN_QUERY)}" for key, value in self.options]
        if self.socket is not None:
            query.insert(0, "socket=" + _quote(self.socket, _IN_QUERY))
        return f"{scheme}://{authority}/{_quote(self.export, _IN_PATH)}" + ("?" + "&".join(query) if query else "")

    @property
    def address(self) -> str:
        """Where the server is, for messages: host:port, [IPv6]:port or the socket's path."""
        if self.socket is not None:
            # A path may hold any byte but NUL; a message shall hold no control character.
            return printable(self.socket)
        host = f"[{self.host}]" if self.host is not None and ":" in self.host else self.host
        return f"{host}:{self.port}"


class _Parser:
    """Parses one text; errors about a part of it repeat the whole."""

    def __init__(self, text: str) -> None:
        self.text = text

    def fail(self, why: str) -> NoReturn:
        raise InvalidURI(f"{quoted(_without_secrets(self.text), _SHOWN)} is not a URI that nbdd can use: {why}")

    def parse(self) -> URI:
        text = self.text
        if len(text) > MAX_TEXT:
            self.fail(f"it has {len(text)} characters; the limit is {MAX_TEXT}.")
        if not text:
            self.fail("it is empty; write for example nbd://server.example/export.")
        self.check_characters()
        scheme, colon, rest = text.partition("://")
        if not colon:
            self.fail("it does not begin with a scheme such as nbd:// or nbd+unix://.")
        if scheme.lower() not in _SCHEMES:
            self.fail(f"the scheme must be one of {', '.join(_SCHEMES)}, not {quoted(scheme, _SHOWN)}.")
        tls, unix = _SCHEMES[scheme.lower()]
        if "#" in rest:
            self.fail("an NBD URI has no #fragment; a # in a name is written %23.")
        rest, question, query = rest.partition("?")
        authority, _, path = rest.partition("/")
        socket, options = self.query(query if question else None, tls, unix)
        user, host, port = self.authority(authority, tls, unix)
        export = self.decode(path, "export name")
        length = len(export.encode())
        if length > MAX_EXPORT:
            self.fail(f"the export name has {length} bytes; NBD allows {MAX_EXPORT}.")
        return URI(tls, host, port, socket, export, options, user)

    def check_characters(self) -> None:
        for char in self.text:
            if char in _FORBIDDEN:
                self.fail(f"the character {char!r} must be written %{ord(char):02X}.")
            if char < " " or char == "\x7f":
                self.fail(f"the control character {char!r} is not allowed in it.")
            if "\ud800" <= char <= "\udfff":
                self.fail("it is not valid UTF-8.")

    def authority(self, authority: str, tls: bool, unix: bool) -> tuple[str, str | None, int]:
        """The user name, the host and the port."""
        userinfo, at, host = authority.rpartition("@")
        user = ""
        if at:
            if ":" in userinfo:
                self.fail("a password must not be in a URI, which everyone can read.")
            if not tls:
                self.fail("a user name is of use with TLS only; leave it out, or use nbds://.")
            user = self.decode(userinfo, "user name")
            if not user:
                self.fail("there is no user name before the @.")
        if unix:
            if authority:
                self.fail("with a Unix socket there is no host: write nbd+unix:///export?socket=/path.")
            return "", None, DEFAULT_PORT
        if host.startswith("["):
            literal, bracket, after = host[1:].partition("]")
            if not bracket:
                self.fail("the ] after the IPv6 address is missing.")
            if after and not after.startswith(":"):
                self.fail("after the ] of an IPv6 address only :PORT may follow.")
            return user, self.ipv6(literal), self.port(after[1:])
        if host.count(":") > 1:
            self.fail("an IPv6 address must be in brackets, as in nbd://[::1]:10809/export.")
        name, _, port = host.partition(":")
        return user, self.host(name), self.port(port)

    def host(self, name: str) -> str:
        if not name:
            self.fail("the host is missing; for this machine write nbd://localhost/export.")
        # The host is not repeated: it may be the beginning of user:password@.
        bad = next((char for char in name if char not in _HOST), None)
        if bad is not None:
            hint = "; write an international name in its xn-- form" if not bad.isascii() else ""
            self.fail(f"the character {bad!r} can't stand in a host name{hint}.")
        if len(name) > MAX_HOST:
            self.fail(f"the host name has {len(name)} characters; the limit is {MAX_HOST}.")
        labels = name.removesuffix(".").split(".")
        if not all(0 < len(label) <= 63 for label in labels):
            self.fail("each part of a host name between dots has 1 to 63 characters.")
        if labels[-1].isdigit():
            # The resolver would read 10.1 as 10.0.0.1 and 010.0.0.1 as 8.0.0.1.
            try:
                inet_pton(AF_INET, name)
            except OSError:
                self.fail("the host looks like an IPv4 address but is none (four numbers from 0 to 255).")
        return name.lower()

    def ipv6(self, literal: str) -> str:
        address, percent, zone = literal.partition("%")
        try:
            packed = inet_pton(AF_INET6, address)
        except (OSError, ValueError):
            self.fail("the text in the brackets is not an IPv6 address.")
        canonical = inet_ntop(AF_INET6, packed)
        if not percent:
            return canonical
        # RFC 6874 writes the % before the zone as %25; most people type it raw. The RFC wins in doubt.
        zone = zone.removeprefix("25")
        if not 0 < len(zone) <= MAX_ZONE or not _UNRESERVED.issuperset(zone):
            self.fail("the zone after the % of an IPv6 address must be a network interface, as in [fe80::1%25eth0].")
        return f"{canonical}%{zone}"

    def port(self, digits: str) -> int:
        if not digits:
            return DEFAULT_PORT
        if not (digits.isascii() and digits.isdigit()):
            # Perhaps a password with a "/" in it; then the "@" is further on, and the text must not be repeated.
            what = "what follows the colon" if "@" in self.text else quoted(digits, _SHOWN)
            self.fail(f"the port must be a number from 1 to 65535, and {what} is not.")
        # Only so many digits go to int(): it refuses thousands of them with a ValueError.
        number = int(digits) if len(digits) <= 10 else 0
        if not 1 <= number <= 65535:
            self.fail(f"the port must be a number from 1 to 65535, not {quoted(digits, _SHOWN)}.")
        return number

    def query(self, query: str | None, tls: bool, unix: bool) -> tuple[str | None, tuple[tuple[str, str], ...]]:
        """The path of the socket and the tls-* options."""
        found: dict[str, str] = {}
        for item in query.split("&") if query else ():
            key, equals, raw = item.partition("=")
            if not equals:
                self.fail("everything after the ? has the form key=value, and values are separated by &.")
            key = self.decode(key, "query")
            if key in found:
                self.fail(f"the key {quoted(key, _SHOWN)} is given twice.")
            if key != "socket" and key not in _TLS_KEYS:
                self.fail(f"the key {quoted(key, _SHOWN)} is unknown; known are socket, {', '.join(_TLS_KEYS)}.")
            value = self.decode(raw, f"value of {key}")
            if not value:
                self.fail(f"the key {key} has no value.")
            if key in _TLS_VALUES and value not in _TLS_VALUES[key]:
                self.fail(f"{key} must be one of {', '.join(_TLS_VALUES[key])}.")
            found[key] = value
        socket = found.pop("socket", None)
        if unix:
            self.check_socket(socket)
        elif socket is not None:
            self.fail("the key socket needs the scheme nbd+unix:// or nbds+unix://.")
        if found and not tls:
            # Encryption is expected here. Never go on without it.
            self.fail(f"the key {min(found)} asks for TLS; use nbds:// or nbds+unix:// with it, or leave it out.")
        return socket, tuple(sorted(found.items()))

    def check_socket(self, path: str | None) -> None:
        if path is None:
            self.fail("the path of the Unix socket is missing: write nbd+unix:///export?socket=/path.")
        if not path.startswith("/"):
            self.fail("the path of the Unix socket must be absolute: a daemon has no directory of its own.")
        length = len(path.encode())
        if length > MAX_SOCKET_PATH:
            self.fail(f"the path of the Unix socket has {length} bytes; Linux allows {MAX_SOCKET_PATH}.")

    def decode(self, raw: str, what: str) -> str:
        """Undo the percent-encoding; a + stays a plus."""
        if "%" not in raw:
            return raw
        first, *escaped = raw.split("%")
        octets = bytearray(first.encode())
        for piece in escaped:
            if len(piece) < 2 or piece[0] not in _HEX or piece[1] not in _HEX:
                self.fail(f"a % in the {what} is not followed by two hexadecimal digits; a plain % is written %25.")
            octets.append(int(piece[:2], 16))
            octets += piece[2:].encode()
        if 0 in octets:
            self.fail(f"the {what} contains %00, the NUL character.")
        try:
            return octets.decode()
        except UnicodeDecodeError:
            self.fail(f"the percent-encoding of the {what} is not valid UTF-8.")


def _quote(text: str, safe: frozenset[str]) -> str:
    if safe.issuperset(text):
        return text
    return "".join(char if char in safe else "".join(f"%{octet:02X}" for octet in char.encode()) for char in text)


def _without_secrets(text: str) -> str:
    """The text without what may be a password: all before the last @, wherever that is, and all after the ?."""
    # The @ is looked for first, since a password may well hold a "?".
    before, at, after = text.rpartition("@")
    scheme, colon, rest = before.partition("://")
    if at and ":" in rest:
        text = scheme + colon + "...@" + after
    text, question, _ = text.partition("?")
    return text + ("?..." if question else "")


def same_export(one: str, other: str) -> bool:
    """Whether two URIs mean the same export; for texts that are not URIs, whether they are equal."""
    try:
        return URI.parse(one) == URI.parse(other)
    except InvalidURI:
        return one == other
