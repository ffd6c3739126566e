# SPDX-License-Identifier: MIT
"""Run the examples of docs/client.md; for a guest in which its server can be reached.

    python3 -m tests.system.in_guest.client_examples docs/client.md

What an example prints must be what its comments say. Prints one JSON object: heading to what was wrong, or "".
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import re
import signal
import sys
import threading
import traceback
from pathlib import Path

import nbdd


def examples(text: str) -> list[tuple[str, str]]:
    """Heading and code of each, in order."""
    found = []
    heading = "synopsis"
    for part in re.finditer(r"^## ([^\n]*)$|^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if part[1]:
            heading = part[1]
        else:
            found.append((heading, part[2]))
    return found


def promised(code: str) -> str:
    """What it says it prints."""
    return "".join(f"{words}\n" for words in re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE))


def main() -> None:
    """Run them all; each by itself, after the two lines that they share."""
    (_, synopsis), (_, shared), *others = examples(Path(sys.argv[1]).read_text())
    faulthandler.register(signal.SIGUSR1, chain=True)
    report = {}
    for heading, before, code in [("synopsis", "", synopsis), *((name, shared, code) for name, code in others)]:
        names: dict[str, object] = {
            "Client": nbdd.Client,
            "connect": nbdd.connect,
            "os": os,
            "signal": signal,
            "threading": threading,
        }
        printed = io.StringIO()
        problem = ""
        try:
            with contextlib.redirect_stdout(printed):
                exec(before + code + "client.close()\n", names)
        except Exception:  # noqa: BLE001 - report
            problem = traceback.format_exc()
        names.clear()
        for thread in set(threading.enumerate()) - {threading.main_thread()}:
            thread.join()
        if printed.getvalue() != promised(code):
            problem += f"It printed {printed.getvalue()!r}, and says {promised(code)!r}."
        report[heading] = problem
    print(json.dumps(report))


if __name__ == "__main__":
    main()
