# SPDX-License-Identifier: MIT
"""A command on a terminal, with a person at it, in a guest: python3 at_terminal.py ANSWERS COMMAND...

ANSWERS is a JSON list of [words, answer]: as soon as the words are on the screen, the answer is typed. Where
the words end in ": " they ask for a secret: what is typed before the terminal stops to show it is thrown away, so we
wait for that.

What was on the screen is printed, and the status is that of the command; 99 where words did not come within a minute.
"""

from __future__ import annotations

import json
import os
import pty
import select
import sys
import termios
import time

LIMIT = 60.0


def main() -> int:
    """Run the command of this program's own command line."""
    answers = json.loads(sys.argv[1])
    child, screen = pty.fork()
    if child == 0:
        os.execvp(sys.argv[2], sys.argv[2:])
    seen, all_seen, end = b"", b"", time.monotonic() + LIMIT
    while select.select([screen], [], [], max(end - time.monotonic(), 0))[0]:
        try:
            piece = os.read(screen, 4096)
        except OSError:  # EIO: nobody has the terminal any more
            piece = b""
        if not piece:
            sys.stdout.buffer.write(all_seen)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen, all_seen = seen + piece, all_seen + piece
        if answers and answers[0][0].encode() in seen:
            seen = b""
            while answers[0][0].endswith(": ") and termios.tcgetattr(screen)[3] & termios.ECHO:
                time.sleep(0.01)
            os.write(screen, answers.pop(0)[1].encode())
            end = time.monotonic() + LIMIT
    sys.stdout.buffer.write(all_seen + b"\n[nothing more came]\n")
    return 99


if __name__ == "__main__":
    sys.exit(main())
