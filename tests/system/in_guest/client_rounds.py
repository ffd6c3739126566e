# SPDX-License-Identifier: MIT
"""Many rounds of `run_async` and `kill_async` on one client, or of a service that is killed; for a guest, as root.

    python3 -m tests.system.in_guest.client_rounds rounds 500
    python3 -m tests.system.in_guest.client_rounds kills 40

Prints one JSON object: the seconds of every round, and what the process holds after the first rounds and at the end.
Ends with 1 and a sentence at the first thing that is not as it should be.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from nbdd import Client
from nbdd.errors import NbddError
from tests.system.in_guest.client_rig import (
    MIB,
    TROUBLE,
    Elsewhere,
    bound,
    children,
    fds,
    is_dead,
    kernel_lines,
    until,
    use,
)
from tests.system.in_guest.data_server import DISC, FLAGS, DataServer

WARM_UP = 10
WITH_UDEV = 10
"""One round in so many is with udev at work, the first ones; it takes longer than all the rest of a round."""

ORDINARY = re.compile(
    r"block nbd\d+: (NBD_DISCONNECT|Disconnected due to user request\.|shutting down sockets)$"
    r"|nbd\d+: detected capacity change from \d+ to \d+$"
    r"|\w+: \d+ callbacks suppressed$"
)
CUT_OFF = re.compile(
    ORDINARY.pattern + r"|block nbd\d+: (Receive control failed|Send disconnect failed|Send control failed) "
    r"|(Buffer )?I/O error(,| on) dev nbd\d+"
    r"|\s*nbd\d+: unable to read partition table|ldm_validate_partition_table\(\): Disk read failed"
    r"|Dev nbd\d+: unable to read RDB block"
)
"""What the kernel says when somebody, udev, was reading."""

OURS = re.compile(r"nbd|block|disk|I/O|partition|suppressed|sock|netlink|python|udev", re.IGNORECASE)

UDEV = ("systemd-udevd-control.socket", "systemd-udevd-kernel.socket", "systemd-udevd.service")


@contextmanager
def no_udev() -> Iterator[None]:
    """While nobody looks at devices that come and go."""
    subprocess.run(["systemctl", "stop", *UDEV], check=True, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run(["systemctl", "start", *UDEV], check=True)


def held() -> dict[str, Any]:
    """What this process has."""
    return {
        "descriptors": sorted(fds()),
        "children": len(children()),
        "threads": threading.active_count(),
        "resident": int(Path("/proc/self/statm").read_text().split()[1]),
        "bound": bound(),
    }


def unusual(pattern: re.Pattern[str]) -> list[str]:
    """What the kernel has said beyond the ordinary since the last call, about disks and sockets, or as trouble.

    Emulated, on a busy machine, it has more to say: of clocks that ran late, for one.
    """
    return [line for line in kernel_lines() if (OURS.search(line) or TROUBLE.search(line)) and not pattern.match(line)]


def rounds(number: int) -> dict[str, Any]:
    """Start and kill, again and again."""
    seconds: list[float] = []
    kernel_lines()
    with DataServer(way="unix") as server, Client(size=MIB, flags=FLAGS) as client:
        server.sockets.pop().close()

        def go(count: int) -> None:
            for _ in range(count):
                start = time.monotonic()
                client.socket(server.connect())
                pid = client.run_async()
                assert not is_dead(pid)
                assert len(bound()) == 1
                client.kill_async()
                assert bound() == {}
                assert children() == [server.pid]
                seconds.append(time.monotonic() - start)

        go(WARM_UP)
        before = held()
        live = max(number // WITH_UDEV, 1)
        go(live)
        with no_udev():
            go(number - live)
        until(lambda: server.asked(DISC) == WARM_UP + number, "a disconnect message for each")
        after, log = held(), unusual(ORDINARY)
        client.socket(server.connect())
        client.run_async()
        use(client.device(), b"as good as new")
        assert server.data(0, 14) == b"as good as new"
    return {"seconds": seconds[WARM_UP:], "live": live, "before": before, "after": after, "log": log}


def kills(number: int) -> dict[str, Any]:
    """Kill the service at moments spread over its start and a little beyond, always on the same node."""
    kernel_lines()
    outcomes: list[str] = []
    with DataServer(way="unix") as server, Client(device="/dev/nbd1", size=MIB, flags=FLAGS) as client:
        server.sockets.pop().close()
        usual = min(_one_start(client, server) for _ in range(3))
        before = held()
        for turn in range(number):
            client.socket(server.connect())
            # The last ones well beyond it: on a busy machine a start takes longer than those that were measured.
            share = 1.2 * turn / number if turn < number * 0.9 else 6
            with Elsewhere(partial(_kill_after, os.getpid(), {server.pid}, usual * share)):
                try:
                    pid = client.run_async()
                except NbddError as error:
                    outcomes.append(type(error).__name__)
                    for sock in client.sockets:
                        sock.close()
                else:
                    outcomes.append("killed later")
                    until(partial(is_dead, pid), "its death")
                    assert list(bound()) == ["nbd1"]
                    client.kill_async()
            assert bound() == {}, outcomes
            assert children() == [server.pid]
        after, log = held(), unusual(CUT_OFF)
        client.socket(server.connect())
        client.run_async()
        use("/dev/nbd1", b"as good as new")
        assert server.data(0, 14) == b"as good as new"
    return {"outcomes": outcomes, "before": before, "after": after, "log": log}


def _one_start(client: Client, server: DataServer) -> float:
    start = time.monotonic()
    client.socket(server.connect())
    client.run_async()
    seconds = time.monotonic() - start
    client.kill_async()
    return seconds


def _kill_after(parent: int, known: set[int], seconds: float) -> None:
    """Kill the next child that the parent gets."""
    task = Path(f"/proc/{parent}/task/{parent}/children")
    known = known | {os.getpid()}
    while not (found := {int(word) for word in task.read_text().split()} - known):
        time.sleep(0.0005)
    time.sleep(seconds)
    os.kill(found.pop(), signal.SIGKILL)


if __name__ == "__main__":
    print(json.dumps({"rounds": rounds, "kills": kills}[sys.argv[1]](int(sys.argv[2]))))
