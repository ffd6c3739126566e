# SPDX-License-Identifier: MIT
"""The generic netlink family "nbd" in numbers (include/uapi/linux/nbd-netlink.h and nbd.h)."""

from __future__ import annotations

from enum import IntEnum, IntFlag

FAMILY = "nbd"
VERSION = 1
GROUP = "nbd_mc_group"


class Cmd(IntEnum):
    """NBD_CMD_* of nbd-netlink.h."""

    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3
    LINK_DEAD = 4
    STATUS = 5


class Attr(IntEnum):
    """NBD_ATTR_* of nbd-netlink.h."""

    INDEX = 1
    SIZE_BYTES = 2
    BLOCK_SIZE_BYTES = 3
    TIMEOUT = 4
    SERVER_FLAGS = 5
    CLIENT_FLAGS = 6
    SOCKETS = 7
    DEAD_CONN_TIMEOUT = 8
    DEVICE_LIST = 9
    BACKEND_IDENTIFIER = 10


NBD_SOCK_ITEM = 1
NBD_SOCK_FD = 1


class ServerFlags(IntFlag):
    """The transmission flags of the NBD protocol that the kernel acts on; all others are masked."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    CAN_MULTI_CONN = 1 << 8


SERVER_FLAGS = int(
    ServerFlags.HAS_FLAGS
    | ServerFlags.READ_ONLY
    | ServerFlags.SEND_FLUSH
    | ServerFlags.SEND_FUA
    | ServerFlags.ROTATIONAL
    | ServerFlags.SEND_TRIM
    | ServerFlags.SEND_WRITE_ZEROES
    | ServerFlags.CAN_MULTI_CONN
)
