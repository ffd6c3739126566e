# SPDX-License-Identifier: MIT
"""A real worker process in a world without NBD devices: what a server does to it, and nothing else, is left to see.

lone_worker.py FD SECONDS    serve the orders that come over the socket; a connection may take so long

At its end it prints how much memory it, or the largest of its children, had at most, in MiB.
"""

from __future__ import annotations

import resource
import socket
import sys
from typing import NoReturn

from nbdd.errors import KernelError
from nbdd.ipc.channel import Channel
from nbdd.worker import operations, request
from nbdd.worker.worker import main


def no_device(*_: object, **__: object) -> NoReturn:
    """In the place of nbdd.kernel.binding.KernelDevice."""
    raise KernelError("There is no kernel here.")


def peak() -> int:
    """KiB. What getrusage() says of the process itself knows also the one that it was before it became Python."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    vars(request).update(KernelDevice=no_device)
    vars(operations).update(find=lambda _: [], KernelDevice=no_device, CONNECT_SECONDS=float(sys.argv[2]))
    status = main(Channel(socket.socket(fileno=int(sys.argv[1]))), "hostile")
    print(max(peak(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) >> 10)
    sys.exit(status)
