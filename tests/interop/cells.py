# SPDX-License-Identifier: MIT
"""The matrix as data: which servers there are, what each exports, and where agreement ends, with the reason.

A row of the table is one export of one server, a cell is a row over one transport. What stands here is expected: a
caveat that is named must be seen, and one that is not named must not.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from enum import Enum

from nbdd.protocol.negotiation import MAX_DESCRIBED

TRANSPORTS = ("tcp4", "tcp6", "unix")

MANY = 3000
"""Exports of the server that has thousands."""

LARGEST = 2**63 - 1
"""Bytes: the largest export that nbdkit offers and that a kernel can have."""

QEMU_LARGEST = (2**63 - 1) // 2**30 * 2**30
"""Bytes: the largest that QEMU offers (BDRV_MAX_LENGTH in its block/io.c)."""

LONG = "n" * 4096
"""A name as long as the protocol allows."""

NAMES = ("", "ünï-号-💾", "a/b//c d ", "100%?&#=+\"'\\<", LONG)


class Caveat(Enum):
    """Why a cell is not plain agreement. The value is the footnote."""

    REPLIES = (
        "nbdinfo negotiates structured replies and, where it can, extended headers; the server gives NBD_FLAG_SEND_DF"
        " and NBD_FLAG_BLOCK_STATUS_PAYLOAD to those only who do. The kernel's driver knows neither, so nbdd does not."
        " All else agrees."
    )
    SIZE = (
        "The server answers 0 to a question for the size (NBD_OPT_INFO), and nbdinfo shows that; nbdctl says that the"
        " size is not known. Opened (NBD_OPT_GO), both have the size in the table."
    )
    UNLISTED = "The server is configured not to list, and refuses that to both. Opened by name, both have the same."
    CUT = (
        "nbd-server cuts a name in its list at 1020 bytes and fills it up with what happens to be in its memory. nbdd"
        " refuses such a list; nbdinfo fails at that name. Opened by name, both have the same."
    )
    ASKED = (
        f"All names agree. nbdd asks about the first {MAX_DESCRIBED} exports of a list, one question each, and says"
        " so for the rest. What it tells agrees. nbdinfo is asked over the Unix socket alone, since over TCP it needs"
        " minutes, and the daemon over tcp4 alone."
    )
    OLD = (
        "Newstyle as it was before 2012: there is no list, for nbdinfo neither, and no way for a server to say no."
        " nbdd refuses it in a sentence; nbdinfo can open an export."
    )
    OLDSTYLE = (
        "Oldstyle: one export without a name and no negotiation. nbdd refuses it in a sentence; nbdinfo can open it."
    )

    @property
    def number(self) -> int:
        """Of the footnote."""
        return list(Caveat).index(self) + 1


REFUSALS = {
    Caveat.UNLISTED: ("is configured not to list its exports",),
    # What is in its memory is not always the same; once it is killed over it.
    Caveat.CUT: ("sent an export name ", "closed the connection when its reply to NBD_OPT_LIST was due."),
    Caveat.OLD: ("speaks newstyle NBD as it was before 2012; nbdd needs the fixed newstyle.",),
    Caveat.OLDSTYLE: ("speaks the oldstyle NBD protocol, which has no export names; nbdd needs newstyle.",),
}
"""The sentences, or their beginnings, that follows "The NBD server <address> " where `nbdctl exports` has to refuse."""


@dataclass(frozen=True, slots=True)
class Export:
    """One row: an export to list, to open and to compare."""

    name: str
    size: int
    """Bytes that it must have."""
    about: str = ""
    """What is special about it; empty where that is the server."""


@dataclass(frozen=True, slots=True)
class Server:
    """One server, reached over every transport, and what to expect of it."""

    peer: str
    """nbdkit, nbd-server or qemu-nbd."""
    about: str
    command: str
    """For sh, in a folder that holds the files of `FILES`. For nbd-server its configuration, with {folder}, {port} and
    {socket}: it opens its sockets by itself. The others are handed theirs as systemd does, and are ready at once."""
    exports: tuple[Export, ...]
    caveats: frozenset[Caveat] = frozenset()
    """But for REPLIES, which depends on the release."""
    listed: int = 0
    """How many exports it lists; 0 where those are its `exports`, or where nobody gets a list."""


FILES: dict[str, int] = {"8M": 8 << 20, "1": 1, "513": 513, "4097": 4097}
"""Sparse files, name to size. Beside them stands 8M.qcow2 and the folder `many`."""

MEBIBYTE = 1 << 20


def _nbdkit(about: str, arguments: str, size: int = MEBIBYTE, *caveats: Caveat) -> Server:
    return Server("nbdkit", about, f"nbdkit -f {arguments}", (Export("", size),), frozenset(caveats))


def _policy(minimum: int, preferred: int, maximum: int, size: int = MEBIBYTE, more: str = "") -> Server:
    sizes = f"blocksize-minimum={minimum} blocksize-preferred={preferred} blocksize-maximum={maximum}"
    about = "blocksize-policy" + (f", {size} bytes" if size % minimum else "") + (f", {more}" if more else "")
    return _nbdkit(about, f"--filter=blocksize-policy memory {size} {sizes} {more}", size)


def _names() -> Server:
    listed = " ".join(f"exportname={shlex.quote(name)}" for name in NAMES)
    command = f"nbdkit -f --filter=exportname memory 1M exportname-list=explicit exportname-strict=true {listed}"
    exports = tuple(Export(name, MEBIBYTE, "name, --filter=exportname") for name in NAMES)
    return Server("nbdkit", "names", command, exports)


def many_name(number: int) -> str:
    """The name of one of the thousands."""
    return f"disk {number:04} é"


def many_size(number: int) -> int:
    """Bytes of that one; all differ."""
    return 512 * number + 1


def _many() -> Server:
    # Without structured replies nbdinfo asks half as many questions.
    exports = tuple(Export(many_name(number), many_size(number), f"one of {MANY}") for number in (0, MANY - 1))
    return Server("nbdkit", "many", "nbdkit -f --no-sr file dir=many", exports, frozenset({Caveat.ASKED}), listed=MANY)


NBDKIT = (
    Server("nbdkit", "plain", "nbdkit -f memory 1M", (Export("", MEBIBYTE),)),
    _nbdkit("read-only, -r", "-r memory 1M"),
    _nbdkit(
        "fewer flags",
        "--filter=multi-conn --filter=fua --filter=nocache --filter=nozero memory 1M"
        " multi-conn-mode=disable cachemode=none zeromode=none",
    ),
    _nbdkit("file", "file 8M", FILES["8M"]),
    _nbdkit("--no-sr", "--no-sr memory 1M"),
    _nbdkit("--mask-handshake=0", "--mask-handshake=0 memory 1M", MEBIBYTE, Caveat.OLD),
    _nbdkit("--mask-handshake=1", "--mask-handshake=1 memory 1M"),
    _nbdkit("--mask-handshake=2", "--mask-handshake=2 memory 1M", MEBIBYTE, Caveat.OLD),
    _nbdkit("--mask-handshake=3", "--mask-handshake=3 memory 1M"),
    _nbdkit("--mask-handshake=1 --no-sr", "--mask-handshake=1 --no-sr memory 1M"),
    _nbdkit("oldstyle, -o", "-o memory 1M", MEBIBYTE, Caveat.OLDSTYLE),
    _policy(512, 4096, MEBIBYTE),
    _policy(4096, 65536, 32 * MEBIBYTE, more="blocksize-error-policy=error"),
    _policy(65536, 65536, 65536),
    _policy(4096, 4096, 2**32 - 1, size=4097),
    *(_nbdkit("odd size", f"memory {size}", size) for size in (1, 513, 4097, LARGEST)),
    _names(),
    _many(),
)


def _qemu(about: str, arguments: str, size: int = FILES["8M"], name: str = "") -> Server:
    command = f"qemu-nbd -t -x {shlex.quote(name)} {arguments}"
    return Server("qemu-nbd", about, command, (Export(name, size),))


QEMU = (
    _qemu("raw, with a description", "-D 'the backup of été' -f raw 8M"),
    _qemu("qcow2, four clients", "-e 4 --image-opts driver=qcow2,file.filename=8M.qcow2,file.locking=off"),
    _qemu("read-only, -r", "-r -f raw 8M"),
    # QEMU rounds a file up to whole sectors.
    _qemu("a file of 1 byte", "-f raw 1", 512),
    _qemu("a file of 513 bytes", "-f raw 513", 1024),
    _qemu("as large as QEMU can", f"--image-opts driver=null-co,read-zeroes=on,size={QEMU_LARGEST}", QEMU_LARGEST),
    *(_qemu("name", "-f raw 8M", name=name) for name in NAMES[1:]),
)


LONG_LISTED = "n" * 1020
"""As long as a name in the list of nbd-server can be."""


def _export(about: str, name: str, file: str = "8M", more: str = "") -> tuple[Export, str]:
    """An export of nbd-server and its section of the configuration, where the name stands raw in the brackets."""
    return Export(name, FILES[file], about), f"[{name}]\nexportname = {{folder}}/{file}\n{more}\n"


def _nbd_server(about: str, allowlist: str, caveat: Caveat, *exports: tuple[Export, str]) -> Server:
    generic = (
        "[generic]\nlistenaddr = 127.0.0.1, ::1\nport = {port}\nunixsock = {socket}\nduallisten = true\n"
        f"allowlist = {allowlist}\n"
    )
    text = generic + "".join(section for _, section in exports)
    return Server("nbd-server", about, text, tuple(export for export, _ in exports), frozenset({caveat}))


NBD_SERVER = (
    _nbd_server(
        "lists",
        "true",
        Caveat.SIZE,
        _export("plain", "plain"),
        _export("readonly", "ro", more="readonly = true"),
        _export("all flags", "all", more="flush = true\nfua = true\ntrim = true\nrotational = true"),
        _export("copyonwrite", "cow", more="copyonwrite = true"),
        *(_export("odd size", size, size) for size in ("1", "513", "4097")),
        *(_export("name", name) for name in (*NAMES[1:-1], LONG_LISTED)),
    ),
    _nbd_server(
        "unlisted", "false", Caveat.UNLISTED, *(_export("allowlist = false", name) for name in ("plain", LONG))
    ),
    _nbd_server("cut", "true", Caveat.CUT, _export("name in a list", LONG)),
)

SERVERS = (*NBDKIT, *QEMU, *NBD_SERVER)

BY_COMMAND = ("plain", "names", "oldstyle, -o", "lists")
"""Of these, by what is special about them, `nbdctl exports --json` is run as a command, too."""
