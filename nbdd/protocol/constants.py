# SPDX-License-Identifier: MIT
"""Numbers of the NBD protocol, by their names in doc/proto.md of the NBD project.

Only what a client needs that passes its socket to the kernel: the handshake phase, the transmission flags, and the few
requests that nbdd itself sends or answers.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

NBDMAGIC = b"NBDMAGIC"
"""The first eight bytes of every NBD server."""

IHAVEOPT = b"IHAVEOPT"
"""What a newstyle server sends next, and what every option of a client begins with."""

OLDSTYLE_MAGIC = (0x00420281861253).to_bytes(8, "big")
"""What an oldstyle server sends there instead (cliserv_magic)."""

REPLY_MAGIC = 0x0003E889045565A9
"""What every reply to an option begins with."""

REQUEST_MAGIC = 0x25609513
"""What every request of the transmission phase begins with (NBD_REQUEST_MAGIC)."""

SIMPLE_REPLY_MAGIC = 0x67446698
"""What every reply to a request begins with, as we negotiate nothing else (NBD_SIMPLE_REPLY_MAGIC)."""

NBD_CMD_READ = 0
NBD_CMD_WRITE = 1
"""The type of the one request that has data behind it."""
NBD_CMD_DISC = 2
"""A client disconnects; there is no reply."""

EXPORT_NAME_PADDING = 124
"""Zero bytes after the answer to NBD_OPT_EXPORT_NAME, unless both sides set NO_ZEROES."""

REP_FLAG_ERROR = 1 << 31
"""Set in the type of every reply that is an error, the unknown ones too."""


class HandshakeFlags(IntFlag):
    """Handshake flags of the server, 16 bits, in its greeting."""

    NBD_FLAG_FIXED_NEWSTYLE = 1 << 0
    NBD_FLAG_NO_ZEROES = 1 << 1


class ClientFlags(IntFlag):
    """Client flags, 32 bits, the answer to the greeting."""

    NBD_FLAG_C_FIXED_NEWSTYLE = 1 << 0
    NBD_FLAG_C_NO_ZEROES = 1 << 1


class Flags(IntFlag):
    """Transmission flags, 16 bits: what an export is and what its server can do. Unknown bits are kept."""

    NBD_FLAG_HAS_FLAGS = 1 << 0
    NBD_FLAG_READ_ONLY = 1 << 1
    NBD_FLAG_SEND_FLUSH = 1 << 2
    NBD_FLAG_SEND_FUA = 1 << 3
    NBD_FLAG_ROTATIONAL = 1 << 4
    NBD_FLAG_SEND_TRIM = 1 << 5
    NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6
    NBD_FLAG_SEND_DF = 1 << 7
    NBD_FLAG_CAN_MULTI_CONN = 1 << 8
    NBD_FLAG_SEND_RESIZE = 1 << 9
    NBD_FLAG_SEND_CACHE = 1 << 10
    NBD_FLAG_SEND_FAST_ZERO = 1 << 11
    NBD_FLAG_BLOCK_STATUS_PAYLOAD = 1 << 12


class Opt(IntEnum):
    """The options that nbdd sends."""

    NBD_OPT_EXPORT_NAME = 1
    NBD_OPT_ABORT = 2
    NBD_OPT_LIST = 3
    NBD_OPT_INFO = 6
    NBD_OPT_GO = 7


class Rep(IntEnum):
    """Types of replies that are no errors."""

    NBD_REP_ACK = 1
    NBD_REP_SERVER = 2
    NBD_REP_INFO = 3
    NBD_REP_META_CONTEXT = 4


class RepErr(IntEnum):
    """Types of replies that are errors."""

    NBD_REP_ERR_UNSUP = REP_FLAG_ERROR + 1
    NBD_REP_ERR_POLICY = REP_FLAG_ERROR + 2
    NBD_REP_ERR_INVALID = REP_FLAG_ERROR + 3
    NBD_REP_ERR_PLATFORM = REP_FLAG_ERROR + 4
    NBD_REP_ERR_TLS_REQD = REP_FLAG_ERROR + 5
    NBD_REP_ERR_UNKNOWN = REP_FLAG_ERROR + 6
    NBD_REP_ERR_SHUTDOWN = REP_FLAG_ERROR + 7
    NBD_REP_ERR_BLOCK_SIZE_REQD = REP_FLAG_ERROR + 8
    NBD_REP_ERR_TOO_BIG = REP_FLAG_ERROR + 9
    NBD_REP_ERR_EXT_HEADER_REQD = REP_FLAG_ERROR + 10


class Info(IntEnum):
    """What NBD_OPT_GO and NBD_OPT_INFO report about an export."""

    NBD_INFO_EXPORT = 0
    NBD_INFO_NAME = 1
    NBD_INFO_DESCRIPTION = 2
    NBD_INFO_BLOCK_SIZE = 3
