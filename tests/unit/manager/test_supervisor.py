# SPDX-License-Identifier: MIT
"""The fork server and its workers, as real processes that are killed, stopped, fed rubbish and counted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import nbdd.manager.supervisor
from nbdd.errors import Busy, ConnectFailed, InvalidConfig, NbddError, WorkerFailed
from nbdd.ipc.channel import Channel, Message
from nbdd.manager.supervisor import Ending, How, Supervisor, WorkerProcess, backoff
from tests.fakes.servers import Server, offers
from tests.fakes.worker import open_fds

SECONDS = 30.0


def unheard(message: Message, fds: list[int]) -> None:
    """For workers that are expected to say nothing."""
    raise AssertionError(message, fds)


@contextlib.asynccontextmanager
async def supervised() -> AsyncIterator[Supervisor]:
    supervisor = Supervisor()
    try:
        await supervisor.start()
        yield supervisor
    finally:
        await supervisor.close()


@pytest.fixture
def supervisor() -> contextlib.AbstractAsyncContextManager[Supervisor]:
    return supervised()


def server_pid(supervisor: Supervisor) -> int:
    """The fork server's process id; 0 while there is none."""
    return supervisor._server.pid if supervisor._server else 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def private_memory(pid: int) -> int:
    """KiB that the process shares with nobody."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def stop(pid: int) -> None:
    """Stop a process, and return when it stands."""
    os.kill(pid, signal.SIGSTOP)
    while ") T " not in Path(f"/proc/{pid}/stat").read_text():
        os.sched_yield()


class Puppet:
    """A real worker that stands still, and the test speaks in its place."""

    def __init__(self, worker: WorkerProcess, channel: Channel, sock: socket.socket) -> None:
        self.worker = worker
        self.sock = sock
        self._channel = channel

    async def hear(self) -> tuple[Message, list[int]]:
        """The next order, with its descriptors."""
        found = await asyncio.to_thread(self._channel.wait)
        assert found is not None
        return found

    def say(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        self._channel.send(message, fds)


@pytest.fixture
def puppet(monkeypatch: pytest.MonkeyPatch) -> Callable[..., contextlib.AbstractAsyncContextManager[Puppet]]:
    @contextlib.asynccontextmanager
    async def make(
        supervisor: Supervisor, on_event: Callable[[Message, list[int]], None] = unheard
    ) -> AsyncIterator[Puppet]:
        pair = Channel.pair
        mouths: list[socket.socket] = []

        def tapped() -> tuple[socket.socket, socket.socket]:
            ours, theirs = pair()
            mouths.append(theirs.dup())
            return ours, theirs

        with monkeypatch.context() as patch:
            patch.setattr(Channel, "pair", staticmethod(tapped))
            worker = await supervisor.spawn("puppet", on_event)
        stop(worker.pid)
        channel = Channel(mouths[0])
        yield Puppet(worker, channel, mouths[0])
        channel.close()

    return make


MakePuppet = Callable[..., contextlib.AbstractAsyncContextManager[Puppet]]


# Life


async def test_worker_answers_and_is_child_of_fork_server(supervisor: Supervisor) -> None:
    worker = await supervisor.spawn("disk", unheard)
    assert await worker.request("ping", deadline=SECONDS) == {}
    assert children(server_pid(supervisor)) == [worker.pid]
    assert title(worker.pid) == "nbdd:disk"


async def test_worker_has_no_descriptor_but_its_channel(supervisor: Supervisor) -> None:
    for name in ("one", "two", "three"):
        worker = await supervisor.spawn(name, unheard)
        await worker.request("ping", deadline=SECONDS)
        links = [os.readlink(f"/proc/{worker.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{worker.pid}/fd")]
        assert len([link for link in links if link.startswith("socket:")]) <= 1 + _std_sockets()
        # The standard three, the channel, and the pipe by which the fork server sees its end.
        assert descriptors(worker.pid) == 5


def _std_sockets() -> int:
    return sum(os.readlink(f"/proc/self/fd/{fd}").startswith("socket:") for fd in range(3))


async def test_workers_answer_independently(supervisor: Supervisor) -> None:
    workers = await asyncio.gather(*(supervisor.spawn(f"disk{number}", unheard) for number in range(20)))
    assert len({worker.pid for worker in workers}) == 20
    await asyncio.gather(*(worker.request("ping", deadline=SECONDS) for worker in workers for _ in range(20)))


async def test_worker_event_comes_before_its_reply(supervisor: Supervisor) -> None:
    told: list[Message] = []
    with Server(offers({b"one": 1, b"two": 2})) as server:
        worker = await supervisor.spawn("exports", lambda message, _fds: told.append(message))
        await worker.request("list-exports", deadline=SECONDS, uri=str(server.uri()))
    assert [export["name"] for message in told for export in message["exports"]] == ["one", "two"]


async def test_worker_error_is_raised_by_its_class_and_worker_lives(
    supervisor: Supervisor,
) -> None:
    with Server(offers({})) as server:
        gone = str(server.uri())
    worker = await supervisor.spawn("exports", unheard)
    with pytest.raises(ConnectFailed, match="nothing listens"):
        await worker.request("list-exports", deadline=SECONDS, uri=gone)
    with pytest.raises(NbddError, match="no order 'dance'"):
        await worker.request("dance", deadline=SECONDS)
    await worker.request("ping", deadline=SECONDS)


# Ends


async def test_worker_killed_ends_with_that_signal(supervisor: Supervisor) -> None:
    worker = await supervisor.spawn("disk", unheard)
    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM):
        worker = await supervisor.spawn("disk", unheard)
        os.kill(worker.pid, number)
        assert await worker.ended == Ending(How.SIGNAL, number)
        assert str(worker.ended.result()) == f"was killed by {number.name}"


async def test_worker_exit_ends_with_its_code(supervisor: Supervisor) -> None:
    for _ in range(20):
        worker = await supervisor.spawn("disk", unheard)
        worker._channel._sock.shutdown(socket.SHUT_WR)
        assert await worker.ended == Ending(How.EXIT, 0)


async def test_worker_exception_ends_with_code_1(supervisor: Supervisor) -> None:
    worker = await supervisor.spawn("disk", unheard)
    worker._channel._sock.send(b"rubbish\n")
    assert await worker.ended == Ending(How.EXIT, 1)
    assert str(worker.ended.result()) == "exited with code 1"


async def test_request_to_dead_worker_fails_at_once_and_under_way_when_it_dies(supervisor: Supervisor) -> None:
    worker = await supervisor.spawn("disk", unheard)
    stop(worker.pid)
    order = asyncio.create_task(worker.request("ping", deadline=SECONDS))
    await asyncio.sleep(0)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerFailed, match="'disk' was killed by SIGKILL"):
        await order
    with pytest.raises(WorkerFailed, match="'disk' was killed by SIGKILL"):
        await worker.request("ping", deadline=SECONDS)


async def test_request_past_deadline_kills_worker(supervisor: Supervisor) -> None:
    worker = await supervisor.spawn("disk", unheard)
    stop(worker.pid)
    with pytest.raises(WorkerFailed, match=r"did not finish 'ping' in 0\.05 s"):
        await worker.request("ping", deadline=0.05)
    assert (await worker.ended).how is How.HANG


async def test_ping_kills_idle_worker_that_hangs(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbdd.manager.supervisor, "PING_INTERVAL", 0.02)
    monkeypatch.setattr(nbdd.manager.supervisor, "PING_DEADLINE", 0.2)
    worker = await supervisor.spawn("disk", unheard)
    stop(worker.pid)
    ending = await worker.ended
    assert ending.how is How.HANG
    assert str(ending) == "did not answer and was killed"
    assert children(server_pid(supervisor)) == []


async def test_ping_keeps_idle_worker_that_answers(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbdd.manager.supervisor, "PING_INTERVAL", 0.001)
    worker = await supervisor.spawn("disk", unheard)
    pinged = asyncio.Event()
    handle = worker._handle

    def count(message: Message, fds: list[int]) -> None:
        if message.get("id", 0) >= 20:
            pinged.set()
        handle(message, fds)

    monkeypatch.setattr(worker, "_handle", count)
    await pinged.wait()
    assert not worker.ended.done()


async def test_request_to_worker_that_reads_nothing_kills_it(supervisor: Supervisor) -> None:
    worker = await supervisor.spawn("disk", unheard)
    stop(worker.pid)
    orders = [asyncio.create_task(worker.request("x" * 50_000, deadline=SECONDS)) for _ in range(20)]
    assert (await worker.ended).how is How.HANG
    assert all(isinstance(error, WorkerFailed) for error in await asyncio.gather(*orders, return_exceptions=True))


async def test_kill_gives_up_on_process_that_does_not_die(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nbdd.manager.supervisor, "KILL_DEADLINE", 0.05)
    worker = await supervisor.spawn("disk", unheard)
    stop(server_pid(supervisor))  # nobody tells that it ended
    assert (await worker.close()).how is How.HANG
    os.kill(server_pid(supervisor), signal.SIGCONT)
    other = await supervisor.spawn("disk", unheard)
    await other.request("ping", deadline=SECONDS)
    assert "does not die" in caplog.text


async def test_close_works_for_many_callers_at_any_time(supervisor: Supervisor) -> None:
    worker = await supervisor.spawn("disk", unheard)
    endings = await asyncio.gather(worker.close(), worker.close())
    assert set(endings) == {Ending(How.SIGNAL, signal.SIGKILL)}
    assert await worker.close() == endings[0]
    worker.kill()


# What a worker may say


@pytest.mark.parametrize(
    "rubbish",
    [
        b"rubbish\n",
        b"[]\n",
        b"[" * 100_000 + b"\n",
        b'{"fds":7}\n',
        b'{"id":[],"event":"connections"}\n',
        b'{"event":"connections"}\n',
        b'{"event":"exports","exports":5}\n',
        b"\x00" * 100 + b"\n",
    ],
)
async def test_worker_with_bad_messages_is_killed_and_others_live(
    supervisor: Supervisor, puppet: MakePuppet, rubbish: bytes
) -> None:
    def on_event(message: Message, fds: list[int]) -> None:
        assert fds == []
        list(message["exports"])

    other = await supervisor.spawn("other", unheard)
    async with puppet(supervisor, on_event) as bad:
        order = asyncio.create_task(bad.worker.request("ping", deadline=SECONDS))
        await bad.hear()
        bad.sock.sendall(rubbish)
        assert await bad.worker.ended == Ending(How.SIGNAL, signal.SIGKILL)
        with pytest.raises(WorkerFailed):
            await order
    await other.request("ping", deadline=SECONDS)


async def test_worker_with_endless_messages_is_killed_and_loop_runs_meanwhile(
    supervisor: Supervisor, puppet: MakePuppet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nbdd.manager.supervisor, "MAX_MESSAGES", 200_000)
    other = await supervisor.spawn("other", unheard)
    async with puppet(supervisor, lambda _message, _fds: None) as bad:

        def flood() -> None:
            with contextlib.suppress(OSError):
                while True:
                    bad.sock.sendall(b'{"event":"x"}\n' * 1000)

        flooding = asyncio.create_task(asyncio.to_thread(flood))
        turns = 0
        while not bad.worker.ended.done():
            await other.request("ping", deadline=SECONDS)
            turns += 1
        assert turns > 1
        assert (await bad.worker.ended).how is How.HANG
        await flooding
    assert "it sends too many messages" in caplog.text


async def test_worker_events_are_handled_a_few_at_a_time(supervisor: Supervisor, puppet: MakePuppet) -> None:
    heard: list[int] = []

    def on_event(message: Message, fds: list[int]) -> None:
        heard.append(message["n"])
        os.close(fds[0])

    async with puppet(supervisor, on_event) as it:
        for number in range(50):
            it.say({"event": "x", "n": number}, (0,))  # with a descriptor: a read of its own
        it.worker._readable(reads=3)
        assert heard == [0, 1, 2]
        it.worker._readable(reads=100)
        assert heard == list(range(50))


async def test_worker_reply_without_request_is_ignored(supervisor: Supervisor, puppet: MakePuppet) -> None:
    async with puppet(supervisor) as it:
        order = asyncio.create_task(it.worker.request("ping", deadline=SECONDS))
        message, _ = await it.hear()
        it.say({"id": 999}, (0,))
        it.say({"id": "x"}, (0,))
        it.say({}, (0,))
        it.say({"id": message["id"], "answer": 42})
        assert (await order)["answer"] == 42
        it.say({"id": message["id"], "again": True}, (0,))


@pytest.mark.parametrize(
    ("wire", "kind"),
    [
        ({"error": "Busy", "message": "in use"}, Busy),
        ({"error": "InvalidConfig", "message": 5}, InvalidConfig),
        ({"error": [], "message": {}}, NbddError),
        ({"error": "OSError"}, NbddError),
    ],
)
async def test_worker_error_of_any_content_is_an_nbdd_error(
    supervisor: Supervisor, puppet: MakePuppet, wire: Message, kind: type[NbddError]
) -> None:
    async with puppet(supervisor) as it:
        order = asyncio.create_task(it.worker.request("ping", deadline=SECONDS))
        message, _ = await it.hear()
        it.say({"id": message["id"], **wire}, (0,))
        with pytest.raises(NbddError) as caught:
            await order
        assert type(caught.value) is kind


async def test_request_fds_go_both_ways(supervisor: Supervisor, puppet: MakePuppet) -> None:
    heard: list[int] = []
    async with puppet(supervisor, lambda _message, fds: heard.extend(fds)) as it:
        read, write = os.pipe()
        order = asyncio.create_task(it.worker.request_fds("adopt", deadline=SECONDS, fds=(write,)))
        message, fds = await it.hear()
        assert "fds" not in message
        it.say({"event": "connections"}, (fds[0],))
        it.say({"id": message["id"]}, (fds[0], fds[0]))
        reply, back = await order
        assert reply == {}
        os.write(back[1], b"there and back")
        os.write(heard[0], b", told")
        assert os.read(read, 99) == b"there and back, told"
        for fd in [read, write, *fds, *back, *heard]:
            os.close(fd)


async def test_request_cancelled_closes_descriptors_of_its_reply(supervisor: Supervisor, puppet: MakePuppet) -> None:
    async with puppet(supervisor) as it:
        order = asyncio.create_task(it.worker.request_fds("adopt", deadline=SECONDS))
        message, _ = await it.hear()
        it.say({"id": message["id"]}, (0, 0))
        # As if both happened in one turn of the loop.
        it.worker._readable()
        order.cancel()
        await asyncio.wait({order})
        assert order.cancelled()


async def test_worker_messages_before_its_end_are_handled(supervisor: Supervisor, puppet: MakePuppet) -> None:
    heard: list[Message] = []
    async with puppet(supervisor, lambda message, _fds: heard.append(message)) as it:
        for number in range(100):
            it.say({"event": "x", "n": number})
        it.worker.kill()
        await it.worker.ended
    assert [message["n"] for message in heard] == list(range(100))


# The fork server


async def test_fork_server_killed_orphans_workers_and_next_spawn_works(
    supervisor: Supervisor,
) -> None:
    for _ in range(3):
        first = server_pid(supervisor)
        workers = [await supervisor.spawn("disk", unheard) for _ in range(3)]
        stop(workers[0].pid)
        order = asyncio.create_task(workers[0].request("ping", deadline=SECONDS))
        await asyncio.sleep(0)
        os.kill(first, signal.SIGKILL)
        assert {(await worker.ended).how for worker in workers} == {How.ORPHANED}
        with pytest.raises(WorkerFailed, match="lost its fork server"):
            await order
        worker = await supervisor.spawn("disk", unheard)
        await worker.request("ping", deadline=SECONDS)
        assert server_pid(supervisor) != first
        assert children(server_pid(supervisor)) == [worker.pid]
        await worker.close()


async def test_fork_server_end_is_seen_while_its_channel_is_held_open(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Channel.pair
    held: list[socket.socket] = []

    def tapped() -> tuple[socket.socket, socket.socket]:
        ours, theirs = pair()
        held.append(theirs.dup())
        return ours, theirs

    worker = await supervisor.spawn("disk", unheard)
    os.kill(server_pid(supervisor), signal.SIGKILL)
    await worker.ended
    with monkeypatch.context() as patch:
        patch.setattr(Channel, "pair", staticmethod(tapped))
        worker = await supervisor.spawn("disk", unheard)
    os.kill(server_pid(supervisor), signal.SIGKILL)
    assert (await worker.ended).how is How.ORPHANED
    for sock in held:
        sock.close()


async def test_spawn_fails_if_fork_server_dies_and_the_next_works(supervisor: Supervisor) -> None:
    stop(server_pid(supervisor))
    spawning = asyncio.create_task(supervisor.spawn("disk", unheard))
    await asyncio.sleep(0)
    os.kill(server_pid(supervisor), signal.SIGKILL)
    with pytest.raises(WorkerFailed):
        await spawning
    await (await supervisor.spawn("disk", unheard)).request("ping", deadline=SECONDS)


async def test_fork_server_that_hangs_is_replaced(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = await supervisor.spawn("disk", unheard)
    stop(server_pid(supervisor))
    with monkeypatch.context() as patch:
        patch.setattr(nbdd.manager.supervisor, "SPAWN_DEADLINE", 0.05)
        with pytest.raises(WorkerFailed, match="'disk': the fork server does not answer"):
            await supervisor.spawn("disk", unheard)
    assert (await worker.ended).how is How.ORPHANED
    await (await supervisor.spawn("disk", unheard)).request("ping", deadline=SECONDS)


async def test_fork_server_end_ends_idle_workers(supervisor: Supervisor) -> None:
    worker = await supervisor.spawn("disk", unheard)
    pidfd = os.pidfd_open(worker.pid)
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, gone.set)
    os.kill(server_pid(supervisor), signal.SIGKILL)
    await gone.wait()
    asyncio.get_running_loop().remove_reader(pidfd)
    os.close(pidfd)
    await worker.ended


async def test_worker_that_dies_at_once_has_an_ending_and_others_live(supervisor: Supervisor) -> None:
    other = await supervisor.spawn("other", unheard)
    server = server_pid(supervisor)
    stop(server)
    spawning = asyncio.create_task(supervisor.spawn("disk", unheard))
    await asyncio.sleep(0)
    # The loop stands until the worker was born, has died, and was reaped.
    os.kill(server, signal.SIGCONT)
    while len(born := children(server)) < 2:
        os.sched_yield()
    os.kill(max(born), signal.SIGKILL)
    while len(children(server)) > 1:
        os.sched_yield()
    worker = await spawning
    assert await worker.ended == Ending(How.SIGNAL, signal.SIGKILL)
    assert server_pid(supervisor) == server
    await other.request("ping", deadline=SECONDS)


async def test_fork_refused_is_an_error_and_fork_server_lives(supervisor: Supervisor) -> None:
    stop(server_pid(supervisor))
    spawning = asyncio.create_task(supervisor.spawn("disk", unheard))
    await asyncio.sleep(0)
    supervisor._handle({"event": "refused", "id": 1, "message": "Resource temporarily unavailable"}, [])
    with pytest.raises(WorkerFailed, match="for 'disk': Resource temporarily unavailable"):
        await spawning
    os.kill(server_pid(supervisor), signal.SIGCONT)
    await (await supervisor.spawn("disk", unheard)).request("ping", deadline=SECONDS)


async def test_fork_server_starts_in_any_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    async with supervised() as supervisor:
        worker = await supervisor.spawn("disk", unheard)
        assert await worker.request("ping", deadline=SECONDS) == {}


async def test_fork_server_without_python_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_fds()
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    supervisor = Supervisor()
    with pytest.raises(WorkerFailed, match="can't be started: No such file"):
        await supervisor.spawn("disk", unheard)
    await supervisor.close()
    assert open_fds() == before


async def test_spawn_without_free_descriptors_fails_and_ends_nothing(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> tuple[socket.socket, socket.socket]:
        raise OSError(24, "Too many open files")

    worker = await supervisor.spawn("disk", unheard)
    with monkeypatch.context() as patch:
        patch.setattr(Channel, "pair", staticmethod(full))
        with pytest.raises(WorkerFailed, match="Too many open files"):
            await supervisor.spawn("disk", unheard)
    await worker.request("ping", deadline=SECONDS)


# Cancelled, closed, repeated


async def test_spawn_cancelled_leaves_no_worker(supervisor: Supervisor) -> None:
    server = server_pid(supervisor)
    stop(server)
    cancelled = [asyncio.create_task(supervisor.spawn("disk", unheard)) for _ in range(5)]
    await asyncio.sleep(0)
    for spawning in cancelled:
        spawning.cancel()
    await asyncio.wait(cancelled)
    os.kill(server, signal.SIGCONT)
    # The fork server takes orders in their order; those that nobody wants end by themselves.
    last = await supervisor.spawn("disk", unheard)
    await all_gone([pid for pid in children(server) if pid != last.pid])
    await last.close()
    assert children(server) == []


async def test_spawn_cancelled_as_its_worker_starts_leaves_none(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = supervisor._handle
    spawning = asyncio.create_task(supervisor.spawn("disk", unheard))

    def handle_and_cancel(message: Message, fds: list[int]) -> None:
        handle(message, fds)
        spawning.cancel()

    with monkeypatch.context() as patch:
        patch.setattr(supervisor, "_handle", handle_and_cancel)
        await asyncio.wait({spawning})
    assert spawning.cancelled()
    await all_gone(children(server_pid(supervisor)))


async def all_gone(pids: list[int]) -> None:
    """Return when these processes have ended."""
    loop = asyncio.get_running_loop()
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        gone = asyncio.Event()
        loop.add_reader(pidfd, gone.set)
        await gone.wait()
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def test_close_while_spawning_leaves_no_worker_and_no_fork_server(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    async def once(turns: int) -> None:
        supervisor = Supervisor()
        spawns = [asyncio.create_task(supervisor.spawn("disk", unheard)) for _ in range(5)]
        for _ in range(turns):
            await asyncio.sleep(0)
        await supervisor.close()
        for outcome in await asyncio.gather(*spawns, return_exceptions=True):
            assert isinstance(outcome, WorkerFailed) or (
                isinstance(outcome, WorkerProcess) and (await outcome.ended) is not None
            )
        if server_pid(supervisor):
            with pytest.raises(ProcessLookupError):
                os.kill(server_pid(supervisor), 0)
        with pytest.raises(WorkerFailed, match="stopping"):
            await supervisor.spawn("disk", unheard)

    before = open_fds()
    for turns in range(12):
        await once(turns)
    assert open_fds() == before
    assert caplog.text == "", "an end that was wanted is no news"


async def test_workers_of_two_hundred_rounds_leave_no_descriptor_zombie_or_memory(supervisor: Supervisor) -> None:
    server = server_pid(supervisor)

    async def rounds(count: int) -> tuple[int, int, int]:
        for number in range(count):
            worker = await supervisor.spawn(f"disk{number}", unheard)
            await worker.request("ping", deadline=SECONDS)
            await worker.close()
        assert children(server) == []
        return open_fds(), descriptors(server), private_memory(server)

    first = await rounds(20)
    last = await rounds(180)
    assert last[:2] == first[:2]
    assert last[2] - first[2] < 256, "KiB of the fork server's own"


# Small things


def test_backoff_doubles_to_its_most_with_some_jitter() -> None:
    waits = backoff(1.0, 5.0)
    for full in (1.0, 2.0, 4.0, 5.0, 5.0):
        assert 0.75 * full <= next(waits) <= full


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (Ending(How.SIGNAL, 11), "was killed by SIGSEGV"),
        (Ending(How.SIGNAL, 250), "was killed by signal 250"),
        (Ending(How.EXIT, 3), "exited with code 3"),
        (Ending(How.ORPHANED), "lost its fork server and was killed"),
    ],
)
def test_ending_reads_as_part_of_a_sentence(ending: Ending, text: str) -> None:
    assert str(ending) == text
