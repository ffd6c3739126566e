# SPDX-License-Identifier: MIT
"""A screen without a monitor (Xvfb), and pictures of it."""

from __future__ import annotations

import os
import struct
import subprocess
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

DEADLINE = 30.0
"""Seconds after which a test gives up on something that takes a moment."""

_PAUSE = 0.05


@dataclass(frozen=True)
class Picture:
    """Pixels, three bytes each, in rows from the top."""

    width: int
    height: int
    rows: tuple[bytes, ...]

    @staticmethod
    def of_xwd(data: bytes) -> Picture:
        """A picture from what is in a file of xwd(1)'s format."""
        # X11/XWDFile.h: 25 words in the byte order of the network.
        head = struct.unpack_from(">25I", data)
        size, width, height, order, bits, line, colours = (head[at] for at in (0, 4, 5, 7, 11, 12, 19))
        assert (bits, order) == (32, 0), "not the pixels of a little-endian machine"
        start = size + colours * 12
        rows = []
        for y in range(height):
            row = data[start + y * line : start + y * line + width * 4]
            pixels = bytearray(width * 3)
            pixels[0::3], pixels[1::3], pixels[2::3] = row[2::4], row[1::4], row[0::4]
            rows.append(bytes(pixels))
        return Picture(width, height, tuple(rows))

    def part(self, left: int, top: int, right: int, bottom: int) -> Picture:
        """What is inside of these edges, in pixels."""
        rows = tuple(row[left * 3 : right * 3] for row in self.rows[top:bottom])
        return Picture(right - left, bottom - top, rows)

    @property
    def colours(self) -> int:
        """How many different colours there are: 1 on an empty screen, some hundred where text is."""
        return len({row[at : at + 3] for row in self.rows for at in range(0, len(row), 3)})

    def png(self) -> bytes:
        """The picture as a PNG file (https://www.w3.org/TR/png/)."""
        raw = b"".join(b"\0" + row for row in self.rows)
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )


class Screen:
    """An Xvfb; use it in ``with``. Its frame buffer is a file in `folder`, in the format of xwd(1)."""

    def __init__(self, folder: Path, width: int = 480, height: int = 140) -> None:
        self._buffer = folder / "Xvfb_screen0"
        reader, writer = os.pipe()
        self._process = subprocess.Popen(
            ["Xvfb", "-displayfd", str(writer), "-screen", "0", f"{width}x{height}x24", "-fbdir", str(folder),
             "-nolisten", "tcp", "-nocursor", "-wr"],
            pass_fds=[writer], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(writer)
        with open(reader, encoding="ascii") as numbers:
            number = numbers.readline().strip()
        assert number, "Xvfb did not start"
        self.display = f":{number}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def picture(self) -> Picture:
        """What is to be seen now."""
        return Picture.of_xwd(self._buffer.read_bytes())

    def wait_until(self, true: Callable[[Picture], object]) -> Picture:
        """The first picture that is as awaited and then stands still. Nothing tells when something was drawn."""
        end = time.monotonic() + DEADLINE
        before = self.picture()
        while time.monotonic() < end:
            time.sleep(_PAUSE)
            now = self.picture()
            if true(now) and now == before:
                return now
            before = now
        raise AssertionError(f"the screen, of {before.colours} colours, did not become what was awaited")
