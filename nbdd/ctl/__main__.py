# SPDX-License-Identifier: MIT
"""Entry point of nbdctl: every error becomes one sentence and an exit status here."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from nbdd.ctl.cli import cli
from nbdd.ctl.common import say
from nbdd.errors import InvalidConfig, NbddError
from nbdd.text import printable

DONE, FAILED, USAGE = 0, 1, 2
INTERRUPTED = 128 + signal.SIGINT
UNREAD = 128 + signal.SIGPIPE
"""What a shell reports for other commands whose reader left, as in `nbdctl list | head -1`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run nbdctl with `arguments` (default: those of the process); return its exit status."""
    _prepare()
    if "_NBDCTL_COMPLETE" in os.environ:
        cli.main(prog_name="nbdctl")  # completion only; it exits
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        status = UNREAD
    except KeyboardInterrupt:
        status = INTERRUPTED
    except OSError as problem:
        _complain(f"The output can't be written: {problem.strerror or problem}.")
        status = FAILED
    except Exception as problem:  # noqa: BLE001 - a person at a terminal gets no traceback
        _complain(f"This is a bug in nbdctl, please report it: {type(problem).__name__}: {problem}")
        status = FAILED
    return status


def _run(arguments: list[str]) -> int:
    try:
        with cli.make_context("nbdctl", arguments) as context:
            cli.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.UsageError as problem:
        with contextlib.suppress(OSError):  # stderr is closed, but the status still says it
            problem.show()
        return USAGE
    except click.ClickException as problem:
        _complain(problem.format_message())
        return FAILED
    except InvalidConfig as problem:
        _complain(*problem.problems)
        return FAILED
    except NbddError as problem:
        _complain(" ".join(str(problem).split("\n")))
        return FAILED
    return DONE


def _complain(*problems: str) -> None:
    """Say what went wrong: one line, or one for each fault in a configuration that has several."""
    for problem in problems:
        say(printable(problem))


def _prepare() -> None:
    # A character that the terminal's encoding lacks is escaped; it is no error.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    # dbus-next logs tracebacks when a bus goes away; nbdctl prints one sentence.
    logging.getLogger().addHandler(logging.NullHandler())


def command() -> NoReturn:
    """Run `main` and end the process."""
    # A command ends before there is anything to collect, and the search costs a tenth of the time that imports take.
    gc.set_threshold(50_000)
    status = main()
    # Skip the interpreter's own clean-up, a fifth of the time that `nbdctl list` takes. Nothing needs it: main has
    # flushed stdout, and stderr buffers no whole line.
    os._exit(status)


if __name__ == "__main__":
    command()
