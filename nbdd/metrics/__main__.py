# SPDX-License-Identifier: MIT
"""Entry point of nbdd-metrics: metrics to stdout, into a file, or over HTTP. Every error becomes one sentence here."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from nbdd import __version__
from nbdd.errors import NbddError
from nbdd.system.stdio import complain, discard_stdout

PROGRAM = "nbdd-metrics"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run nbdd-metrics with `arguments` (default: those of the process); return its exit status."""
    parser = argparse.ArgumentParser(
        prog="nbdd-metrics",
        description="Print metrics of nbdd's devices for Prometheus, write them to a file, or serve them.",
    )
    parser.add_argument("--version", action="version", version=f"nbdd-metrics {__version__}")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--textfile",
        type=Path,
        metavar="PATH",
        help="write a file for the textfile collector of the node exporter; its name ends in .prom",
    )
    output.add_argument(
        "--serve", action="store_true", help="answer GET /metrics on the sockets that systemd passes; see the unit"
    )
    chosen = parser.parse_args(arguments)
    # dbus-next logs tracebacks when a bus goes away; nbdd-metrics logs one sentence.
    logging.getLogger("dbus_next").addHandler(logging.NullHandler())
    logging.getLogger("dbus_next").propagate = False
    try:
        _run(chosen)
    except NbddError as error:
        complain(PROGRAM, str(error))
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "prometheus_client":
            raise
        complain(PROGRAM, "The Prometheus client library is missing: apt install python3-prometheus-client.")
        return 1
    except BrokenPipeError:
        discard_stdout()
        return 1
    except OSError as error:
        complain(PROGRAM, f"The output can't be written: {error.strerror or error}.")
        discard_stdout()
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(chosen: argparse.Namespace) -> None:
    # Imported here: --help and --version need none of it, and the Prometheus library may be missing.
    from nbdd.metrics.families import text  # noqa: PLC0415
    from nbdd.metrics.gather import gather  # noqa: PLC0415

    if chosen.serve:
        from nbdd.metrics.server import Server  # noqa: PLC0415
        from nbdd.system.journal import stderr_handler  # noqa: PLC0415

        logging.basicConfig(level=logging.INFO, handlers=[stderr_handler()])
        listeners = _listeners()

        async def serve() -> None:
            server = Server(gather)
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
            await server.run(listeners)

        asyncio.run(serve())
        return
    snapshot = asyncio.run(gather())
    if snapshot.problem:
        complain(PROGRAM, snapshot.problem)
    if chosen.textfile is not None:
        from nbdd.metrics.textfile import write  # noqa: PLC0415

        write(chosen.textfile, text(snapshot))
    elif sys.stdout is None:
        raise NbddError("There is no standard output to write to.")
    else:
        sys.stdout.write(text(snapshot).decode())
        sys.stdout.flush()


def _listeners() -> list[socket.socket]:
    """The listening sockets that systemd passed."""
    from nbdd.system.notify import kept_sockets  # noqa: PLC0415

    found = [socket.socket(fileno=fd) for fds in kept_sockets().values() for fd in fds]
    if not found or not all(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for one in found):
        raise NbddError("systemd passed no listening socket; --serve is for nbdd-metrics.socket.")
    return found


if __name__ == "__main__":
    sys.exit(main())
