# SPDX-License-Identifier: MIT
"""Generic netlink, as much as one small family needs: resolve a name, send a request, read its answer.

Layout from Documentation/userspace-api/netlink/intro.rst, include/uapi/linux/netlink.h and genetlink.h.
Everything is native-endian. Failures of a request are `OSError` here; `nbdd.kernel.netlink` puts them into words.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

from nbdd.errors import TimedOut
from nbdd.kernel.bounded import bounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NETLINK_GENERIC = 16
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11

NLMSG_NOOP = 1
NLMSG_ERROR = 2
NLMSG_DONE = 3

NLM_F_REQUEST = 0x001
NLM_F_ACK = 0x004
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200

NLMSGERR_ATTR_MSG = 1
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

GENL_ID_CTRL = 0x10
CTRL_CMD_GETFAMILY = 3
CTRL_VERSION = 2
CTRL_ATTR_FAMILY_ID = 1
CTRL_ATTR_FAMILY_NAME = 2
CTRL_ATTR_MCAST_GROUPS = 7
CTRL_ATTR_MCAST_GRP_NAME = 1
CTRL_ATTR_MCAST_GRP_ID = 2

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_GENL = struct.Struct("=BBH")  # command, version, reserved
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ERROR = struct.Struct("=i")

# The largest answer of the nbd family is one attribute; the controller's answer stays far below this.
_RECEIVE = 65536


class Family(NamedTuple):
    """A generic netlink family as the kernel numbers it since it was loaded."""

    identifier: int
    groups: dict[str, int]


class Message(NamedTuple):
    """One generic netlink message: the command and its attributes, undecoded."""

    command: int
    attributes: dict[int, bytes]


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(_aligned(length) - length)


def u32(kind: int, value: int) -> bytes:
    """An attribute of type NLA_U32."""
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    """An attribute of type NLA_U64."""
    return attribute(kind, struct.pack("=Q", value))


def string(kind: int, value: str) -> bytes:
    """An attribute of type NLA_STRING, NUL-terminated."""
    return attribute(kind, value.encode() + b"\0")


def nested(kind: int, *children: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(children))


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in `data` as (type, value); stops where the lengths stop making sense."""
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size or offset + length > len(data):
            return
        yield kind & NLA_TYPE_MASK, data[offset + _ATTRIBUTE.size : offset + length]
        offset += _aligned(length)


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """The netlink messages in one datagram as (type, flags, sequence, payload)."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _port = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            return
        yield kind, flags, sequence, data[offset + _HEADER.size : offset + length]
        offset += _aligned(length)


def generic(payload: bytes) -> Message | None:
    """Payload of a family's message, or None if it is too short to be one."""
    if len(payload) < _GENL.size:
        return None
    command, _version, _reserved = _GENL.unpack_from(payload)
    return Message(command, dict(attributes(payload[_GENL.size :])))


def open_socket() -> socket.socket:
    """A generic netlink socket that asks the kernel for its reasons in words."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC)
    try:
        sock.bind((0, 0))
        # Without the copy of our request in each answer the reasons follow at a fixed place.
        sock.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        sock.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
    except OSError:
        sock.close()
        raise
    return sock


def receive(sock: socket.socket) -> bytes:
    """One datagram from the kernel, without waiting; b"" if there is none or it isn't the kernel's."""
    try:
        data, sender = sock.recvfrom(_RECEIVE, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""
    # Port 0 is the kernel. Any process may write to our port.
    if isinstance(sender, tuple) and sender[0] != 0:
        return b""
    return data


class GenericNetlink:
    """A request and answer channel; one request at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        # A start that differs between processes, so that a stray answer can't fit.
        self._sequence = int.from_bytes(os.urandom(3), "little")

    def close(self) -> None:
        """Close the socket; bound devices live on."""
        self._socket.close()

    def family(self, name: str, seconds: float) -> Family:
        """The family called `name`; `OSError` ENOENT if it isn't there."""
        payload = string(CTRL_ATTR_FAMILY_NAME, name)
        for answer in self.request(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_VERSION, payload, seconds):
            raw = answer.attributes.get(CTRL_ATTR_FAMILY_ID, b"")
            if len(raw) != 2:  # a u16
                continue
            groups: dict[str, int] = {}
            for _, entry in attributes(answer.attributes.get(CTRL_ATTR_MCAST_GROUPS, b"")):
                group = dict(attributes(entry))
                number = group.get(CTRL_ATTR_MCAST_GRP_ID, b"")
                label = group.get(CTRL_ATTR_MCAST_GRP_NAME, b"").rstrip(b"\0").decode(errors="replace")
                if len(number) == 4 and label:  # a u32
                    groups[label] = struct.unpack("=I", number)[0]
            return Family(struct.unpack("=H", raw)[0], groups)
        raise OSError(errno.ENOENT, f"no generic netlink family {name!r}")

    def request(
        self,
        family: int,
        command: int,
        version: int,
        payload: bytes,
        seconds: float,
        *,
        more: Callable[[], bytes] | None = None,
        sent: Callable[[], None] | None = None,
        nudge: Callable[[], None] | None = None,
    ) -> list[Message]:
        """Send one command, return the messages that came before its acknowledgement.

        `OSError` carries the kernel's errno, with its reason as text if it gave one. `TimedOut` after `seconds`:
        the command may still take effect. `more`, the rest of the payload, is called in the thread that sends, where
        no signal handler interrupts; `sent` is called there, possibly much later, when the kernel has finished with
        the request; `nudge` after two seconds without an end, see `bounded`.
        """
        end = time.monotonic() + seconds
        self._sequence = self._sequence + 1 & 0xFFFFFFFF or 1
        sequence = self._sequence
        stuck = f"The kernel did not finish a netlink command within {seconds:g} seconds."
        # Taken by whichever comes first: the thread that sends, or an interruption before it does.
        turn = [None]

        def send() -> None:
            try:
                turn.pop()
            except IndexError:
                return
            # The kernel runs the whole command in here. Only sending is left to the thread: if it read as
            # well, one that was given up could take a later command's answer away.
            try:
                body = _GENL.pack(command, version, 0) + payload + (more() if more is not None else b"")
                header = _HEADER.pack(_HEADER.size + len(body), family, NLM_F_REQUEST | NLM_F_ACK, sequence, 0)
                self._socket.send(header + body)
            finally:
                if sent is not None:
                    sent()

        try:
            bounded(send, seconds, stuck, nudge=nudge)
        finally:
            turn.clear()
        answers: list[Message] = []
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while True:
            left = end - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise TimedOut(stuck)
            for kind, flags, number, content in messages(receive(self._socket)):
                if number != sequence or kind == NLMSG_NOOP:
                    continue
                if kind == NLMSG_ERROR:
                    _raise_error(flags, content)
                    return answers
                if kind == NLMSG_DONE:
                    return answers
                answer = generic(content)
                if answer is not None:
                    answers.append(answer)


def _raise_error(flags: int, content: bytes) -> None:
    """Raise the failure in an NLMSG_ERROR; code 0 is the acknowledgement."""
    if len(content) < _ERROR.size:
        raise OSError(errno.EBADMSG, "a cut netlink answer")
    (code,) = _ERROR.unpack_from(content)
    if code == 0:
        return
    reason = ""
    if flags & NLM_F_ACK_TLVS:
        offset = _ERROR.size + _HEADER.size
        if not flags & NLM_F_CAPPED and len(content) >= offset:
            offset = _ERROR.size + _aligned(_HEADER.unpack_from(content, _ERROR.size)[0])
        reason = dict(attributes(content[offset:])).get(NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode(errors="replace")
    raise OSError(-code, reason)


def reason(error: OSError) -> str:
    """The words for an errno, and the kernel's own if it had any."""
    words = os.strerror(error.errno) if error.errno else "unknown reason"
    return f"{words}: {error.strerror}" if error.strerror and error.strerror != words else words
