# SPDX-License-Identifier: MIT
"""What the scripts that try `nbdd.Client` in a guest have in common. Effects are read from the kernel, not from us."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

from nbdd import Client, NbddError
from tests.system.in_guest.data_server import FLAGS, DataServer

MIB = 1 << 20
TROUBLE = re.compile(r"WARNING:|BUG:|Oops|blocked for more than|general protection|refcount_t|list_del corruption")


def sysfs(name: str, attribute: str) -> str:
    """One of the kernel's files about a disk, such as `sysfs("nbd0", "queue/io_timeout")`; "" if it is not there."""
    try:
        return Path("/sys/block", name, attribute).read_text().strip()
    except OSError:
        return ""


def geometry(name: str) -> tuple[int, int]:
    """Bytes and bytes in a block, as the kernel has them."""
    return int(sysfs(name, "size")) * 512, int(sysfs(name, "queue/logical_block_size"))


def bound() -> dict[str, str]:
    """Kernel name and identifier of every device that is bound, whoever bound it."""
    return {path.parent.name: sysfs(path.parent.name, "backend") for path in Path("/sys/block").glob("nbd*/pid")}


def in_flight(name: str) -> bool:
    """Whether the driver has requests that are not answered."""
    return any(int(word) for word in sysfs(name, "inflight").split())


def name_of(client: Client) -> str:
    """The kernel's name of its device."""
    return Path(client.device()).name


def until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def refused(error: type[NbddError], call: Callable[[], object], *words: str) -> str:
    """The sentence of the error that the call must raise."""
    try:
        result = call()
    except error as caught:
        sentence = str(caught)
    else:
        raise AssertionError(f"{error.__name__} was not raised; the result is {result!r}")
    for word in words:
        assert word in sentence, f"{word!r} is not in: {sentence}"
    return sentence


def each_refused(error: type[NbddError], call: Callable[[Any], object], values: Iterable[Any]) -> None:
    """So it must be with each of these values, and the sentence names the value."""
    for value in values:
        refused(error, partial(call, value), str(value))


@contextmanager
def a_client(server: DataServer, **keywords: Any) -> Iterator[Client]:
    """A client of that server, with its size; its device is taken away at the end, if it bound one itself."""
    keywords = {"socket": server.sockets, "flags": FLAGS, "size": server.size, **keywords}
    with Client(**keywords) as client:
        try:
            yield client
        finally:
            if client.node is not None and sysfs(client.node.name, "pid"):
                client.disconnect(force=True)


class Elsewhere:
    """Work that is done in another process, which is killed at the end of the block."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._reader, writer = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._reader)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                answer = {"result": work()}
            except BaseException as error:  # noqa: BLE001 - reported to the parent
                answer = {"error": f"{type(error).__name__}: {error}"}
            try:
                os.write(writer, json.dumps(answer).encode())
            finally:
                os._exit(0)
        os.close(writer)

    def result(self, seconds: float = 30) -> Any:
        """Wait for what the work returned."""
        assert select.select([self._reader], [], [], seconds)[0], "the other process did not come to an end"
        answer = json.loads(os.read(self._reader, 1 << 20) or b'{"error": "killed"}')
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._reader)


@contextmanager
def held_open(path: str) -> Iterator[int]:
    """Another process has the device open; the value is its id."""

    def hold() -> None:
        os.open(path, os.O_RDONLY)
        signal.pause()

    with Elsewhere(hold) as other:
        until(lambda: path in fds(other.pid).values(), f"{path} is open")
        yield other.pid


@contextmanager
def nbdkit(*arguments: str) -> Iterator[str]:
    """A server on a Unix socket, whose path is the value."""
    path = "/run/client-checks.sock"
    server = subprocess.Popen(["nbdkit", "-f", "-U", path, *arguments], stdin=subprocess.DEVNULL)
    try:
        until(Path(path).is_socket, path)
        yield path
    finally:
        server.kill()
        server.wait()
        Path(path).unlink(missing_ok=True)


def use(path: str, data: bytes, offset: int = 0) -> None:
    """Write through to the server."""
    fd = os.open(path, os.O_WRONLY | os.O_SYNC)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
    finally:
        os.close(fd)


def fds(pid: int | str = "self") -> dict[str, str]:
    """What a process has open."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[link.name] = os.readlink(link)
        except OSError:
            continue  # the one that listed them
    return found


def children() -> list[int]:
    """Child processes of this one, the dead among them too."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(word) for word in text.split()]


def is_dead(pid: int) -> bool:
    """Whether a process has ended; it may not have been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def kernel_lines() -> list[str]:
    """What the kernel has said about anything since the last call."""
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found: list[str] = []
    try:
        while True:
            try:
                record = os.read(fd, 8192).decode(errors="replace")
            except BlockingIOError:
                return found
            except BrokenPipeError:
                continue  # it was overwritten meanwhile
            # "priority,number,microseconds,flags;text"; what follows the first line are properties.
            head, _, text = record.partition(";")
            number = int(head.split(",")[1])
            if number > _seen[0]:
                _seen[0] = number
                found.append(text.splitlines()[0])
    finally:
        os.close(fd)


_seen = [-1]


def kernel_trouble() -> list[str]:
    """Lines of it that no kernel should write."""
    return [line for line in kernel_lines() if TROUBLE.search(line)]


def left_over(before: Mapping[str, str]) -> str:
    """What is there that was not there before, in words; "" is nothing."""
    gc.collect()
    now = fds()
    found = [f"descriptor {fd} is {what}" for fd, what in now.items() if before.get(fd) != what]
    found += [f"process {pid} is there" for pid in children()]
    found += [f"{name} is bound as {backend!r}" for name, backend in bound().items()]
    return "; ".join(found)


Check = Callable[[], object]


def main(checks: Mapping[str, Check]) -> None:
    """Run them, print one JSON object: name to seconds and what was wrong, "" if all was as it should be."""
    # No watchdog of its own: that would be a thread, and `run_async` forks.
    faulthandler.register(signal.SIGUSR1, chain=True)
    kernel_trouble()
    reports: dict[str, tuple[float, str]] = {}
    for name in sys.argv[1:] or checks:
        start, before, problem = time.monotonic(), fds(), ""
        try:
            checks[name]()
        except Exception:  # noqa: BLE001 - one that fails must not hide the next
            problem = traceback.format_exc()
        for left in (left_over(before), *kernel_trouble()):
            problem += left
        reports[name] = (time.monotonic() - start, problem)
        if problem:
            print(f"{name}: {problem}", file=sys.stderr, flush=True)
            for node in bound():
                with Client(device=f"/dev/{node}") as client, suppress(NbddError):
                    client.disconnect(force=True)
    print(json.dumps(reports))


def shutdown(sock: socket.socket) -> None:
    """End a connection under the other end's feet."""
    sock.shutdown(socket.SHUT_RDWR)
