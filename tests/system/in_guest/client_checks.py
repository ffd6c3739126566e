# SPDX-License-Identifier: MIT
"""Every method of `nbdd.Client` on a real device; put into a guest and run there as root.

    python3 -m tests.system.in_guest.client_checks [NAME...]

Each check is one promise; its name says whose method it is about. What a check leaves behind counts as its failure.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from functools import partial
from pathlib import Path

from nbdd import Client, connect
from nbdd.errors import AlreadyAttached, Busy, ConnectFailed, InvalidArgs, NotAttached
from tests.system.in_guest.client_rig import (
    MIB,
    Elsewhere,
    a_client,
    bound,
    each_refused,
    geometry,
    held_open,
    in_flight,
    main,
    name_of,
    nbdkit,
    refused,
    shutdown,
    sysfs,
    until,
    use,
)
from tests.system.in_guest.data_server import DISC, MULTI, WRITE, DataServer

PAGE = os.sysconf("SC_PAGE_SIZE")


def new_calls_the_method_of_each_keyword() -> None:
    with DataServer(MIB + 1000) as server, a_client(server, device="/dev/nbd7", timeout=9, blocksize=1024) as client:
        client.bind()
        assert client.device() == "/dev/nbd7"
        assert geometry("nbd7") == (MIB, 1024)
        assert sysfs("nbd7", "queue/io_timeout") == "9000"
        assert sysfs("nbd7", "ro") == "0"
    with DataServer() as server, a_client(server, size=None, blocks=3, read_only=True, backend="by-name") as client:
        client.bind()
        assert geometry(name_of(client)) == (3 * 512, 512)
        assert sysfs(name_of(client), "ro") == "1"
        assert bound() == {name_of(client): "by-name"}
        assert Path("/dev/disk/by-nbd/by-name").resolve() == Path(client.device())


def new_without_a_device_gets_a_free_one_however_many_ask() -> None:
    with tempfile.TemporaryDirectory() as directory:
        enough = Path(directory, "enough")

        def bind_one() -> str:
            with DataServer() as server, a_client(server) as client:
                client.bind()
                until(enough.exists, "the others", 60)
                return name_of(client)

        with Elsewhere(bind_one) as one, Elsewhere(bind_one) as two, Elsewhere(bind_one) as three:
            until(lambda: len(bound()) == 3, "three devices")
            enough.touch()
            assert len({one.result(), two.result(), three.result()}) == 3


def socket_takes_tcp_unix_and_pairs() -> None:
    for way in ("pair", "unix", "tcp"):
        with DataServer(way=way) as server, a_client(server, socket=None) as client:
            assert client.socket() is None
            assert client.socket(server.sockets[0]) is server.sockets[0]
            client.bind()
            use(client.device(), b"by way of " + way.encode())
            assert server.data(0, 20).rstrip(b"\0") == b"by way of " + way.encode()


def socket_takes_one_for_each_connection() -> None:
    with DataServer(connections=3, way="tcp") as server, a_client(server, flags=MULTI) as client:
        assert client.socket() is server.sockets[0]
        assert list(client.sockets) == server.sockets
        client.bind()
        shutdown(server.sockets[0])
        use(client.device(), b"over what is left")
        assert server.data(0, 17) == b"over what is left"
        client.disconnect()
        # Each user that is left is named.
        until(lambda: server.asked(DISC) == 2, "two disconnect messages")


def socket_may_be_served_by_the_program_itself() -> None:
    with DataServer(way="thread") as server, a_client(server) as client:
        client.bind()
        use(client.device(), b"to ourselves")
        assert server.data(0, 12) == b"to ourselves"
        client.disconnect()
        assert server.asked(DISC) == 1
    with DataServer(way="thread") as server, a_client(server, device="/dev/nbd1") as client:
        end = threading.Thread(target=_disconnect_once_usable)
        end.start()
        assert str(client.run()) == "disconnected"
        end.join()


def _disconnect_once_usable() -> None:
    until(lambda: sysfs("nbd1", "size") == str(MIB // 512), "it has its size")
    use("/dev/nbd1", b"used")
    with Client(device="/dev/nbd1") as client:
        client.disconnect()


def socket_refuses_all_else() -> None:
    held: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.connect(("127.0.0.1", 9))
    closed, gone = socket.socketpair()
    closed.close()
    left, peer = socket.socketpair()
    peer.close()
    datagrams = socket.socketpair(type=socket.SOCK_DGRAM)
    packets = socket.socketpair(type=socket.SOCK_SEQPACKET)
    held += [listener, udp, gone, left, *datagrams, *packets, socket.socket(), socket.socket(socket.AF_UNIX)]
    with Client(size=MIB) as client, tempfile.TemporaryFile() as file:
        refused(InvalidArgs, lambda: client.socket(listener), "accept()")
        refused(InvalidArgs, lambda: client.socket(udp), "SOCK_DGRAM")
        refused(InvalidArgs, lambda: client.socket(closed), "closed")
        refused(ConnectFailed, lambda: client.socket(left), "hung up")
        refused(InvalidArgs, lambda: client.socket(datagrams[0]), "SOCK_DGRAM")
        refused(InvalidArgs, lambda: client.socket(packets[0]), "SOCK_SEQPACKET")
        refused(InvalidArgs, lambda: client.socket(held[-1]), "not connected")
        refused(InvalidArgs, lambda: client.socket(held[-2]), "not connected")
        refused(InvalidArgs, lambda: client.socket(file), "TCP or Unix")  # type: ignore[arg-type]
        refused(InvalidArgs, lambda: client.socket([listener]), "accept()")
        assert client.socket() is None
        refused(InvalidArgs, client.run, "no socket")
    for sock in held:
        sock.close()
    assert bound() == {}


def socket_none_takes_it_away() -> None:
    with DataServer() as server, a_client(server) as client:
        assert client.socket(None) is None
        refused(InvalidArgs, client.bind, "no socket")
        assert server.sockets[0].fileno() >= 0
        client.socket(server.sockets[0])
        client.bind()
        refused(Busy, lambda: client.socket(None), client.device())
        refused(Busy, lambda: client.socket(server.sockets[0]), client.device())


def socket_of_a_bound_device_replaces_a_dead_one_without_an_error() -> None:
    with DataServer(way="unix") as server, a_client(server, dead_timeout=60) as client:
        client.bind()
        shutdown(server.sockets[0])
        written = threading.Thread(target=use, args=(client.device(), b"it waited"))
        written.start()
        client.clear_queue()
        client.socket(server.connect())
        written.join(30)
        assert server.data(0, 9) == b"it waited"


def device_is_got_and_set() -> None:
    with Client() as client:
        assert client.device() == ""
        assert client.device("/dev/nbd6") == "/dev/nbd6"
        assert client.device(None) == ""
        assert client.device(Path("/dev/nbd4")) == "/dev/nbd4"
        each_refused(InvalidArgs, client.device, ("/dev/null", "/dev/nbd4p1", "nbd4", "", "/dev/nbd", "/dev/nbd-1"))
        assert client.device() == "/dev/nbd4"
    with tempfile.TemporaryDirectory() as directory:
        link = Path(directory, "link")
        link.symlink_to("/dev/nbd3")
        with DataServer() as server, a_client(server, device=link) as client:
            assert client.device() == "/dev/nbd3"
            client.bind()
            assert list(bound()) == ["nbd3"]
            refused(AlreadyAttached, lambda: client.device("/dev/nbd5"), "/dev/nbd3")
            refused(AlreadyAttached, client.bind, "/dev/nbd3")


def device_that_is_taken_is_refused_with_the_name_of_who_has_it() -> None:
    with DataServer() as one, DataServer() as two, a_client(one, backend="the-first") as first:
        first.bind()
        with a_client(two, device=first.device()) as second:
            refused(Busy, second.bind, first.device(), "the-first")
            refused(Busy, second.run, first.device(), "the-first")
            assert second.socket() is two.sockets[0]
        with DataServer() as three, a_client(three, device=first.device()) as third:
            refused(Busy, third.run_async, first.device(), "the-first")
            # Its socket is as good as before.
            third.device(None)
            third.run_async()
            assert name_of(third) != name_of(first)
        with DataServer() as four, a_client(four, backend="the-first") as fourth:
            refused(Busy, fourth.run_async, first.device(), "the-first")


def disconnect_reaches_the_server_and_works_from_another_process() -> None:
    with DataServer() as server, a_client(server) as client:
        client.bind()
        path = client.device()

        def end_it() -> list[str]:
            with Client(device=path) as other:
                return other.disconnect()

        with Elsewhere(end_it) as process:
            assert process.result() == []
        assert bound() == {}
        until(lambda: server.asked(DISC) == 1, "the disconnect message")
        refused(NotAttached, client.disconnect, path)
        assert client.device() == ""
    with DataServer() as server, a_client(server, backend="its-name") as client:
        client.bind()
        with Client("its-name") as other:
            other.disconnect()
        assert bound() == {}
        with Client("its-name") as other, Client() as nothing:
            refused(NotAttached, other.disconnect, "its-name")
            refused(NotAttached, nothing.disconnect)


def disconnect_leaves_alone_what_is_not_the_same_any_more() -> None:
    with DataServer() as one, DataServer() as two, a_client(one, device="/dev/nbd2") as old:
        old.bind()
        with Client(device="/dev/nbd2") as other:
            other.disconnect()
        with a_client(two, device="/dev/nbd2") as new:
            new.bind()
            refused(NotAttached, old.disconnect, "/dev/nbd2")
            refused(NotAttached, lambda: old.set_timeout(5), "/dev/nbd2")
            with Client("another", device="/dev/nbd2") as named:
                refused(NotAttached, named.disconnect, "another")
            assert list(bound()) == ["nbd2"]


def disconnect_is_refused_while_somebody_uses_the_device() -> None:
    with DataServer() as server, a_client(server) as client:
        client.bind()
        with held_open(client.device()) as pid:
            refused(Busy, client.disconnect, client.device(), str(pid))
            assert sysfs(name_of(client), "pid")
            assert client.disconnect(force=True, seconds=0.5) != []
        until(lambda: not bound(), "the last user's end frees the node")


def clear_queue_does_no_harm() -> None:
    with DataServer() as server, a_client(server) as client:
        client.clear_queue()
        client.bind()
        os.kill(server.pid, signal.SIGSTOP)
        written = threading.Thread(target=use, args=(client.device(), b"in flight"))
        written.start()
        until(partial(in_flight, name_of(client)), "a request in flight")
        client.clear_queue()
        os.kill(server.pid, signal.SIGCONT)
        written.join(30)
        assert server.data(0, 9) == b"in flight"


def set_timeout_holds_before_and_while_running() -> None:
    with DataServer() as server, a_client(server) as client:
        client.set_timeout(30)
        client.set_timeout(40)
        client.run_async()
        name = name_of(client)
        for seconds, milliseconds in ((40, 40_000), (7, 7000), (2_000_000, 2_000_000_000), (1, 1000), (0, 30_000)):
            client.set_timeout(seconds)
            assert sysfs(name, "queue/io_timeout") == str(milliseconds)
        each_refused(InvalidArgs, client.set_timeout, (-1, 2_000_001, 2**63, 1.5))
        assert sysfs(name, "queue/io_timeout") == "30000"
        use(client.device(), b"still alive")


def set_timeout_gives_up_a_server_that_takes_longer() -> None:
    with DataServer() as server, a_client(server, timeout=1) as client:
        pid = client.run_async()
        os.kill(server.pid, signal.SIGSTOP)
        try:
            use(client.device(), b"never answered")
            raise AssertionError("the write succeeded")
        except OSError:
            pass
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
        assert bound() == {}


def set_blocksize_takes_powers_of_two_up_to_the_page_size() -> None:
    sizes = [size for size in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536) if size <= PAGE]
    for running in (False, True):
        for size in sizes:
            with DataServer(MIB + 3584) as server, a_client(server) as client:
                if running:
                    client.bind()
                client.set_blocksize(size)
                if not running:
                    client.bind()
                # The size was rounded down to a multiple.
                assert geometry(name_of(client)) == ((MIB + 3584) // size * size, size)
                use(client.device(), b"x" * size, MIB - size)
                assert server.data(MIB - size, size) == b"x" * size


def set_blocksize_refuses_all_others() -> None:
    with DataServer() as server, a_client(server, size=None) as client:
        for moment in ("before the size is known", "before", "while running"):
            each_refused(
                InvalidArgs,
                client.set_blocksize,
                (511, 513, 1000, 3 * 512, PAGE + 1, 2 * PAGE, 0, -1, -512, 256, 2**63, 2**64, 4096.0),
            )
            if moment == "before the size is known":
                client.set_size(1536)
                refused(InvalidArgs, lambda: client.set_blocksize(2048), "1536")
            elif moment == "before":
                client.bind()
            assert moment != "while running" or geometry(name_of(client)) == (1536, 512)
        refused(InvalidArgs, lambda: client.set_blocksize(2048), "1536")
        assert geometry(name_of(client)) == (1536, 512)


def set_blocksize_and_smaller_sizes_need_an_unused_device() -> None:
    with DataServer() as server, a_client(server) as client:
        client.bind()
        path = client.device()
        with held_open(path):
            refused(Busy, lambda: client.set_blocksize(4096), path)
            refused(Busy, lambda: client.set_size(MIB - 512), path)
            assert geometry(name_of(client)) == (MIB, 512)
            client.set_size(2 * MIB)
            assert geometry(name_of(client)) == (2 * MIB, 512)
        client.set_blocksize(4096)
        assert geometry(name_of(client)) == (2 * MIB, 4096)


def set_size_is_rounded_down_and_counts_to_the_end_of_63_bits() -> None:
    wanted = {
        512: {512: 512, 513: 512, 1023: 512, 4096: 4096, 4097: 4096, MIB + 511: MIB, 2**63 - 1: 2**63 - 512},
        4096: {4096: 4096, 4097: 4096, 8191: 4096, MIB + 4095: MIB, 2**63 - 1: 2**63 - 4096},
    }
    for blocksize, sizes in wanted.items():
        with DataServer(2**63 - 1) as server, a_client(server, blocksize=blocksize) as running:
            running.bind()
            for size, rounded in sizes.items():
                running.set_size(size)
                assert geometry(name_of(running)) == (rounded, blocksize)
            each_refused(InvalidArgs, running.set_size, (0, -1, 1, blocksize - 1, 2**63, 2**64, 1e6))
            assert geometry(name_of(running)) == (2**63 - blocksize, blocksize)
        for size, rounded in sizes.items():
            with DataServer(2**63 - 1) as server, a_client(server, blocksize=blocksize, size=size) as client:
                client.bind()
                assert geometry(name_of(client)) == (rounded, blocksize)


def set_size_reaches_the_last_byte_and_no_further() -> None:
    with DataServer(MIB) as server, a_client(server, size=4096) as client:
        client.bind()
        for size in (4096, MIB, 8192):
            client.set_size(size)
            use(client.device(), b"last", size - 4)
            assert server.data(size - 4, 4) == b"last"
            written = server.asked(WRITE)
            try:
                use(client.device(), b"beyond", size)
                raise AssertionError("a write beyond the end succeeded")
            except OSError:
                assert server.asked(WRITE) == written


def set_blocks_counts_in_blocks() -> None:
    with DataServer(2**63 - 1) as server, a_client(server, blocksize=2048, size=None) as client:
        each_refused(InvalidArgs, client.set_blocks, (0, -1, 2**63 // 2048, 2**63, 0.5))
        client.set_blocks(5)
        client.bind()
        assert geometry(name_of(client)) == (5 * 2048, 2048)
        for number in (1, 7, 2**63 // 2048 - 1):
            client.set_blocks(number)
            assert geometry(name_of(client)) == (number * 2048, 2048)
        each_refused(InvalidArgs, client.set_blocks, (0, -1, 2**63 // 2048, 2**63))
        assert geometry(name_of(client)) == (2**63 - 2048, 2048)


def a_value_set_from_another_process_holds() -> None:
    with DataServer(2 * MIB) as server, a_client(server, size=MIB) as client:
        client.run_async()

        def change() -> None:
            with Client(device=client.device()) as other:
                other.adopt()
                other.set_size(2 * MIB)
                other.set_timeout(11)

        with Elsewhere(change) as process:
            process.result()
        assert geometry(name_of(client)) == (2 * MIB, 512)
        assert sysfs(name_of(client), "queue/io_timeout") == "11000"


def connect_gives_sockets_and_what_the_server_says() -> None:
    with nbdkit("--filter=blocksize-policy", "memory", "8M", "blocksize-minimum=1024") as path:
        with connect(f"nbd+unix:///an%20export?socket={path}", connections=2) as disk:
            assert (disk.name, disk.size, disk.blocksize, len(disk.sockets)) == ("an export", 8 * MIB, 1024, 2)
            assert disk.minimum == 1024
            client = Client(socket=disk.sockets, blocksize=disk.blocksize, size=disk.size, flags=disk.flags)
            client.run_async()
        # Our ends of the sockets are closed; the kernel and the service have theirs.
        with client:
            assert geometry(name_of(client)) == (8 * MIB, 1024)
            assert len(list(Path("/sys/block", name_of(client), "mq").iterdir())) == 2
            use(client.device(), b"y" * 1024)
            client.set_size(4 * MIB)
            assert geometry(name_of(client)) == (4 * MIB, 1024)
            client.kill_async()
            assert bound() == {}
        disk = connect(f"nbd+unix:///?socket={path}")
        with Client(socket=disk.sockets, blocksize=1024, size=disk.size) as client:
            client.run_async()
            assert Path(client.device()).read_bytes()[:1025] == b"y" * 1024 + b"\0"
    refused(ConnectFailed, lambda: connect(f"nbd+unix:///?socket={path}"), path)


CHECKS = {
    check.__name__: check
    for check in (
        new_calls_the_method_of_each_keyword,
        new_without_a_device_gets_a_free_one_however_many_ask,
        socket_takes_tcp_unix_and_pairs,
        socket_takes_one_for_each_connection,
        socket_may_be_served_by_the_program_itself,
        socket_refuses_all_else,
        socket_none_takes_it_away,
        socket_of_a_bound_device_replaces_a_dead_one_without_an_error,
        device_is_got_and_set,
        device_that_is_taken_is_refused_with_the_name_of_who_has_it,
        disconnect_reaches_the_server_and_works_from_another_process,
        disconnect_leaves_alone_what_is_not_the_same_any_more,
        disconnect_is_refused_while_somebody_uses_the_device,
        clear_queue_does_no_harm,
        set_timeout_holds_before_and_while_running,
        set_timeout_gives_up_a_server_that_takes_longer,
        set_blocksize_takes_powers_of_two_up_to_the_page_size,
        set_blocksize_refuses_all_others,
        set_blocksize_and_smaller_sizes_need_an_unused_device,
        set_size_is_rounded_down_and_counts_to_the_end_of_63_bits,
        set_size_reaches_the_last_byte_and_no_further,
        set_blocks_counts_in_blocks,
        a_value_set_from_another_process_holds,
        connect_gives_sockets_and_what_the_server_says,
    )
}

if __name__ == "__main__":
    main(CHECKS)
