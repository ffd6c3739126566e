# SPDX-License-Identifier: MIT
"""`nbdd.Client` without a kernel: what it takes and refuses before it binds anything, and how it reads."""

from __future__ import annotations

import ast
import contextlib
import os
import pydoc
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import nbdd
import nbdd.kernel.binding
import nbdd.kernel.usable
from nbdd import Client, Connection, NbddError, connect
from nbdd.errors import (
    Busy,
    ConnectFailed,
    ConnectionNotServiced,
    InvalidArgs,
    InvalidURI,
    KernelError,
    NegotiationFailed,
    NotAttached,
)
from nbdd.kernel.arguments import largest_block_size
from nbdd.kernel.sysfs import Node
from nbdd.protocol import Flags
from tests.fakes.servers import GO, HAS_FLAGS, MIB, Server, ack, greeting, info_blocks, info_export, offers, says
from tests.fakes.worker import open_fds

TREE = Path(__file__).resolve().parents[3]
PAGE = os.sysconf("SC_PAGE_SIZE")

MANUAL = (
    "socket",
    "device",
    "disconnect",
    "clear_queue",
    "set_timeout",
    "set_blocksize",
    "set_blocks",
    "set_size",
    "run",
    "run_async",
    "kill_async",
)
"""The methods of Linux::NBD::Client."""

BEYOND = (
    "adopt", "backend", "bind", "claims", "close", "drop_connection", "node", "replace_connections",
    "set_dead_timeout", "sockets", "watch_connections",
)  # fmt: skip
"""What Client has besides; docs/client.md names it all."""


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may reach the kernel's driver, if there is one."""

    def refuse() -> None:
        raise AssertionError("the kernel was asked")

    monkeypatch.setattr(nbdd.kernel.binding, "NetlinkNBD", refuse)


def check_refused(call: Callable[[], object], *words: str, error: type[NbddError] = InvalidArgs) -> None:
    """It raises that error, and its sentence holds the words."""
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_bind_with_connections_that_the_kernel_leaves_unread_frees_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = zip(*(socket.socketpair() for _ in range(3)), strict=True)
    asked: list[str] = []

    class Kernel:
        def connect(self, **_: object) -> int:
            asked.append("connect")
            return 7

        def disconnect(self, _index: int) -> None:
            asked.append("disconnect")

        def close(self) -> None:
            pass

    def settle(node: Node, _seconds: float, *, nudge: Callable[[], None]) -> bool:
        nudge()
        assert asked == ["connect"], "what is read is left in peace"
        theirs[1].send(b"an answer")
        nudge()
        # As whoever waits for that answer hears it, when the device is ended.
        raise KernelError(f"{node.path} can't be read.")

    monkeypatch.setattr(nbdd.kernel.binding, "NetlinkNBD", Kernel)
    monkeypatch.setattr(nbdd.kernel.usable, "settle", settle)
    monkeypatch.setattr(nbdd.kernel.binding, "release", lambda *_, **__: asked.append("release"))
    monkeypatch.setattr(Node, "bound", property(lambda _: True))
    client = Client(socket=ours, size=MIB, flags=int(Flags.NBD_FLAG_CAN_MULTI_CONN))
    check_refused(client.bind, "does not read from all 3 connections of /dev/nbd7", error=ConnectionNotServiced)
    assert asked == ["connect", "disconnect", "release"]
    for sock in theirs:
        assert sock.recv(1) == b"", "the connections are shut down, which ends the work items that wait"
    for sock in ours + theirs:
        sock.close()


@pytest.mark.parametrize(("device", "index"), [("/dev/nbd3", 3), (None, None)])
def test_run_and_bind_ask_for_the_device_that_was_named(
    monkeypatch: pytest.MonkeyPatch, *, device: str | None, index: int | None
) -> None:
    asked: list[object] = []

    class Kernel:
        def watch_connections(self) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

        def connect(self, *, index: int | None, **_: object) -> int:
            asked.append(index)
            raise Busy("It is taken.")

        def close(self) -> None:
            pass

    monkeypatch.setattr(nbdd.kernel.binding, "NetlinkNBD", Kernel)
    for method in (Client.run, Client.bind):
        ours, theirs = socket.socketpair()
        with theirs, Client(socket=ours, size=MIB, device=device) as client:
            check_refused(partial(method, client), "It is taken.", error=Busy)
    assert asked == [index, index]


# How it is found


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=TREE, timeout=60
    )
    return done.stdout.strip()


def test_package_import_loads_nothing_until_a_name_is_used() -> None:
    loaded = "[name for name in sys.modules if name.startswith('nbdd')]"
    assert ast.literal_eval(python(f"import sys, nbdd; print({loaded})")) == ["nbdd"]
    assert "nbdd.client.client" in ast.literal_eval(python(f"import sys; from nbdd import Client; print({loaded})"))
    assert python("import nbdd; print(nbdd.__version__)") == nbdd.__version__


def test_worker_imports_neither_service_nor_asyncio_nor_yaml() -> None:
    heavy = {
        "nbdd.client",
        "nbdd.client.service",
        "nbdd.client.open",
        "asyncio",
        "subprocess",
        "yaml",
        "jsonschema",
        "dbus_next",
    }
    assert set(ast.literal_eval(python("import sys, nbdd.worker.worker; print(list(sys.modules))"))).isdisjoint(heavy)


def test_package_has_every_public_name_and_no_other() -> None:
    for name in nbdd.__all__:
        assert getattr(nbdd, name) is not None
        assert name in dir(nbdd)
    for name in ("Clinet", "os", "TYPE"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(nbdd, name)


USER = """
    from nbdd import Client, Connection, End, NbddError, Reason, connect

    def attach(uri: str) -> str:
        disk: Connection = connect(uri, timeout=5.0, connections=2)
        with Client(
            "backup", socket=disk.sockets, device=None, timeout=30, blocksize=disk.blocksize, size=disk.size,
            flags=disk.flags, read_only=True, dead_timeout=60,
        ) as client:
            pid: int = client.run_async()
            client.set_timeout(pid)
            client.set_blocksize(4096)
            client.set_blocks(3)
            client.set_size(4096)
            client.clear_queue()
            sock = client.socket()
            if sock is not None:
                client.socket([sock, sock])
                client.socket(sock)
            client.socket(None)
            client.kill_async()
            left: list[str] = client.disconnect(seconds=1.5, force=True)
            return client.device("/dev/nbd1") + client.device() + client.device(None) + "".join(left)

    def serve(client: Client) -> int:
        try:
            end: End = client.run(close_fds=True)
        except NbddError as error:
            raise SystemExit(str(error)) from error
        return end.signal if end.reason is Reason.SIGNAL else end.status
"""
MISUSER = """
    from nbdd import Client, Clinet
    Client(soket=None)
    Client().set_size("1G")
    Client().run().reasons
"""


def test_library_types_are_checked_strictly_by_mypy(tmp_path: Path) -> None:
    mypy = Path(sys.executable).with_name("mypy")
    if not mypy.exists():
        pytest.skip("mypy is not installed beside this Python")
    # As an installed package, not as a part of this tree: only then does py.typed count.
    site = tmp_path / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    shutil.copytree(TREE / "nbdd", site / "nbdd", ignore=shutil.ignore_patterns("__pycache__", "bus", "ctl"))
    (tmp_path / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(Path(sys.executable).resolve())
    found = {}
    for name, program in (("user", USER), ("misuser", MISUSER)):
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(program))
        done = subprocess.run(
            [mypy, "--strict", "--config-file=", "--python-executable", tmp_path / "bin/python", path],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            timeout=110,
        )
        found[name] = done.stdout
    assert found["user"] == "Success: no issues found in 1 source file\n"
    assert len(re.findall(r"^misuser.py:\d+: error:", found["misuser"], re.MULTILINE)) == 4, found["misuser"]


def test_client_help_text_reads_like_a_manual() -> None:
    text = pydoc.plain(pydoc.render_doc(nbdd.Client))
    for name in MANUAL:
        # Python 3.13 breaks a long signature into lines.
        assert re.search(rf"^ \|  {name}\((\s*\|)?\s*self", text, re.MULTILINE), name
        words = getattr(Client, name).__doc__
        assert words.splitlines()[0].endswith((".", ":")), name
        assert len(words) > 60, name
    for name in re.findall(r"^ \|  (_[a-z]\w*)\(", text, re.MULTILINE):
        raise AssertionError(f"{name} is nobody's business")
    assert "from nbdd import Client, connect" in text


def test_client_has_the_methods_of_the_manual_and_what_its_documentation_names() -> None:
    public = {name for name in dir(Client) if not name.startswith("_")}
    assert public == {*MANUAL, *BEYOND}
    text = (TREE / "docs/client.md").read_text()
    for name in public:
        assert re.search(rf"`{name}\b|\bclient\.{name}\(", text), name


def test_client_documentation_has_an_example_for_every_method() -> None:
    text = (TREE / "docs/client.md").read_text()
    sections = dict(re.findall(r"^## ([\w ]+)[^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    for name in MANUAL:
        assert re.search(r"^\*Manual\*: ", sections[name], re.MULTILINE), name
        assert re.search(r"^\*Today\*: ", sections[name], re.MULTILINE), name
        assert "*Errors*: " in sections[name], name
        example = re.search(r"^```python\n(.*?)^```", sections[name], re.MULTILINE | re.DOTALL)
        assert example is not None, name
        assert f"client.{name}(" in example[1] or f"other.{name}(" in example[1], name
        assert example[1].count("\n") == 3, name


# What it takes


def test_client_needs_no_kernel_until_it_binds(pair: tuple[socket.socket, socket.socket]) -> None:
    with Client(socket=pair[0], device="/dev/nbd3", timeout=5, blocksize=1024, blocks=7, dead_timeout=9) as client:
        client.set_timeout(0)
        client.set_size(10_000)
        client.clear_queue()
        assert client.device() == "/dev/nbd3"
    assert pair[0].fileno() == -1


def test_client_backend_not_given_is_unique_and_unlike_a_name() -> None:
    with Client() as one, Client() as other, Client("mine") as named:
        assert one.backend != other.backend
        assert not one.backend[0].isalnum()
        assert named.backend == "mine"


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([("size", 10_000)], (9728, 512)),
        ([("size", 10_000), ("blocksize", 4096)], (8192, 4096)),
        # Rounding is for good.
        ([("size", 10_000), ("blocksize", 4096), ("blocksize", 512)], (8192, 512)),
        ([("blocksize", 4096), ("size", 10_000)], (8192, 4096)),
        ([("blocksize", 2048), ("blocks", 3), ("blocksize", 4096)], (4096, 4096)),
        ([("blocks", 3), ("blocksize", 1024), ("blocks", 3)], (3072, 1024)),
        ([("size", 2**63 - 1)], (2**63 - 512, 512)),
        ([("blocksize", 4096), ("size", 2**63 - 1)], (2**63 - 4096, 4096)),
        ([("blocks", 2**54 - 1)], (2**63 - 512, 512)),
    ],
)
def test_client_size_is_rounded_down_to_whole_blocks(calls: list[tuple[str, int]], expected: tuple[int, int]) -> None:
    with Client() as client:
        for what, value in calls:
            getattr(client, f"set_{what}")(value)
        assert (client._device.size, client._device.block_size) == expected


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("set_blocksize", (511, 513, 0, -1, 1000, largest_block_size() + 1, 2 * largest_block_size(), 2**63, 512.0)),
        ("set_size", (0, -1, 1, 511, 2**63, 2**64, 1e6, "1G")),
        ("set_blocks", (0, -1, 2**54, 2**63, 0.5)),
        ("set_timeout", (-1, 2_000_001, 2**31, 2**63, 1.5, None)),
    ],
)
def test_client_setter_refuses_values_out_of_range_and_changes_nothing(method: str, values: tuple[Any, ...]) -> None:
    with Client(timeout=5, blocksize=1024, size=MIB) as client:
        for value in values:
            check_refused(partial(getattr(client, method), value), str(value))
        assert (client._device.size, client._device.block_size, client._device.timeout) == (MIB, 1024, 5)


def test_client_block_size_above_the_size_is_refused() -> None:
    with Client(size=1024) as client:
        check_refused(lambda: client.set_blocksize(2048), "1024 bytes don't fill one block of 2048")


def test_largest_block_size_is_the_page_size_until_linux_6_15(monkeypatch: pytest.MonkeyPatch) -> None:
    for release, expected in (("6.1.0-9-amd64", PAGE), ("6.12.57+deb13", PAGE), ("6.15.1", 65536), ("7.0", 65536)):
        name = os.uname_result(("Linux", "host", release, "#1", "x86_64"))
        monkeypatch.setattr(os, "uname", lambda name=name: name)
        assert largest_block_size() == expected


def test_client_constructor_that_refuses_leaves_the_socket_to_its_caller(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    check_refused(lambda: Client(socket=pair[0], size=0))
    check_refused(lambda: Client(socket=pair[0], dead_timeout=-1))
    assert pair[0].fileno() >= 0


def test_client_socket_gets_sets_and_gives_back(pair: tuple[socket.socket, socket.socket]) -> None:
    with Client() as client:
        assert client.socket() is None
        assert client.socket(pair[0]) is pair[0]
        assert client.socket(pair) is pair[0]
        assert list(client.sockets) == list(pair)
        assert client.socket(list(pair)) is pair[0]
        assert client.socket(None) is None
    assert pair[0].fileno() >= 0
    with Client(socket=pair):
        pass
    assert (pair[0].fileno(), pair[1].fileno()) == (-1, -1)


def test_client_socket_that_the_kernel_could_not_use_is_refused(tmp_path: Path) -> None:
    unconnected, datagram = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener = socket.create_server(("127.0.0.1", 0))
    closed, widow = socket.socketpair()
    closed.close()
    packets = socket.socketpair(type=socket.SOCK_SEQPACKET)
    file = (tmp_path / "file").open("wb")
    with Client() as client, unconnected, datagram, listener, widow, packets[0], packets[1], file:
        check_refused(lambda: client.socket(unconnected), "not connected")
        check_refused(lambda: client.socket(datagram), "SOCK_DGRAM")
        check_refused(lambda: client.socket(listener), "accept()")
        check_refused(lambda: client.socket(closed), "closed")
        check_refused(lambda: client.socket(widow), "hung up", error=ConnectFailed)
        check_refused(lambda: client.socket(packets[0]), "SOCK_SEQPACKET")
        check_refused(lambda: client.socket(file), "BufferedWriter")  # type: ignore[arg-type]
        check_refused(lambda: client.socket(0), "int")  # type: ignore[arg-type]
        check_refused(lambda: client.socket([widow, "x"]), error=ConnectFailed)  # type: ignore[list-item]
        assert client.socket() is None


def test_client_socket_closed_here_does_not_count_as_dead(
    kernel: Kernel, pair: tuple[socket.socket, socket.socket]
) -> None:
    with Client("mine") as client:
        client.adopt(0, sockets=[pair[0]])
        pair[0].close()
        client.set_size(2 * MIB)
        assert len(kernel.asked) == 1


def test_client_socket_of_the_ssl_module_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    import ssl  # noqa: PLC0415 - only here

    context = ssl.create_default_context()
    context.check_hostname = False
    wrapped = context.wrap_socket(pair[0], do_handshake_on_connect=False)
    with Client() as client, wrapped:
        check_refused(lambda: client.socket(wrapped), "TLS")


def test_client_says_what_is_missing_before_the_kernel_is_asked(pair: tuple[socket.socket, socket.socket]) -> None:
    with Client() as client:
        for call in (client.bind, client.run, client.run_async):
            check_refused(call, "There is no socket")
        client.socket(pair[0])
        for call in (client.bind, client.run, client.run_async):
            check_refused(call, "size of the device is not known")
        client.set_size(MIB)
        pair[1].close()
        for call in (client.bind, client.run, client.run_async):
            check_refused(call, "hung up", error=ConnectFailed)


def test_client_device_takes_nodes_and_links_to_them(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/dev/nbd12")
    with Client() as client:
        assert client.device() == ""
        assert client.device("/dev/nbd0") == "/dev/nbd0"
        assert client.device(link) == "/dev/nbd12"
        for path in ("/dev/sda", "/dev/nbd0p1", "/dev/nbd", "nbd0", "", "/dev/nbd99999999", "/dev/nbd0/x"):
            check_refused(partial(client.device, path), repr(path))
        assert client.device() == "/dev/nbd12"
        assert client.device(None) == ""


def test_client_without_a_device_has_nothing_to_disconnect_or_kill() -> None:
    with Client() as client:
        client.kill_async()
        check_refused(client.disconnect, "no device was named", error=NotAttached)
        check_refused(client.adopt, "no device was named", error=NotAttached)
        check_refused(client.claims, "not bound", error=NotAttached)
    client.close()
    with Client(device="/dev/nbd1234567") as client:
        check_refused(client.disconnect, "/dev/nbd1234567", error=NotAttached)


class Kernel:
    """The kernel's driver with one bound device, and what it was asked."""

    def __init__(self, root: Path, *, size: int = MIB, block_size: int = 512) -> None:
        self.asked: list[dict[str, Any]] = []
        self.deaf = False
        self.directory = root / "block" / "nbd0"
        (self.directory / "queue").mkdir(parents=True)
        self.write("pid", 77)
        self.write("backend", "mine")
        self.set(size, block_size)
        self.node = Node(0, sysfs=str(root))

    def write(self, name: str, value: object) -> None:
        (self.directory / name).write_text(f"{value}\n")

    def set(self, size: int, block_size: int) -> None:
        self.write("size", size // 512)
        self.write("queue/logical_block_size", block_size)

    def close(self) -> None:
        pass

    def reconfigure(self, index: int, **what: Any) -> None:
        assert index == 0
        self.asked.append(what)
        if "size" in what and not self.deaf:
            self.set(what["size"], what["block_size"])


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(tmp_path)
    monkeypatch.setattr(nbdd.kernel.binding, "NetlinkNBD", lambda: kernel)
    monkeypatch.setattr(nbdd.kernel.binding, "Node", lambda _index: kernel.node)
    monkeypatch.setattr(nbdd.kernel.usable, "settle", lambda *_arguments, **_options: True)
    return kernel


def test_resize_of_a_bound_device_grows_it_at_once(kernel: Kernel) -> None:
    with Client("mine", device="/dev/nbd0") as client:
        client.adopt()
        client.set_size(2 * MIB + 100)
        assert kernel.asked == [{"backend": "mine", "size": 2 * MIB, "block_size": 512}]
        assert client.device() == kernel.node.path


def test_resize_that_the_kernel_did_not_do_is_an_error(kernel: Kernel) -> None:
    kernel.deaf = True
    with Client(device="/dev/nbd0") as client:
        client.adopt()
        with pytest.raises(NbddError, match="asked for 2097152 bytes"):
            client.set_size(2 * MIB)


def test_adopt_keeps_the_dead_timeout_unless_it_is_given(kernel: Kernel) -> None:
    for given in (None, 7):
        with Client("mine", dead_timeout=given) as client:
            client.adopt(0)
            client.set_timeout(3)
        assert kernel.asked.pop() == {"backend": "mine", "timeout": 3, "dead_timeout": given}


def test_client_leaves_a_device_that_was_bound_again_alone(kernel: Kernel) -> None:
    with Client("mine", device="/dev/nbd0") as client:
        client.adopt()
        kernel.write("pid", 78)
        check_refused(lambda: client.set_timeout(3), "bound again", error=NotAttached)
        check_refused(lambda: client.set_size(2 * MIB), "bound again", error=NotAttached)
        assert client.device() == "/dev/nbd0"
        assert kernel.asked == []


def test_resize_over_a_dead_connection_is_refused(kernel: Kernel, pair: tuple[socket.socket, socket.socket]) -> None:
    with Client("mine") as client:
        client.adopt(0, sockets=[pair[0]])
        pair[1].close()
        check_refused(lambda: client.set_size(2 * MIB), "dead", error=ConnectFailed)
        assert kernel.asked == []


# connect


def test_connect_returns_what_the_server_said() -> None:
    blocks = info_blocks(GO, 1024, 8192, 1 << 25)
    with Server(says(greeting() + info_export(GO, 5 * MIB, HAS_FLAGS | 8) + blocks + ack(GO))) as server:
        with connect(str(server.uri("a disk"))) as disk:
            assert isinstance(disk, Connection)
            assert (disk.name, disk.size, int(disk.flags), disk.blocksize) == ("a disk", 5 * MIB, HAS_FLAGS | 8, 1024)
            assert (disk.minimum, disk.preferred, disk.maximum) == (1024, 8192, 1 << 25)
            with Client(socket=disk.sockets, blocksize=disk.blocksize, size=disk.size, flags=disk.flags) as client:
                assert client.socket() is disk.sockets[0]
        assert disk.sockets[0].fileno() == -1


def test_connect_opens_several_connections_if_the_server_allows_them() -> None:
    with (
        Server(offers({b"": MIB}, flags=HAS_FLAGS | 1 << 8)) as server,
        connect(str(server.uri()), connections=3) as disk,
    ):
        assert len(disk.sockets) == 3
    with Server(offers({b"": MIB})) as server, connect(str(server.uri()), connections=3) as disk:
        assert len(disk.sockets) == 1


def test_connect_fails_with_the_reason_and_leaves_no_descriptor() -> None:
    before = open_fds()
    with pytest.raises(InvalidURI):
        connect("http://example.com")
    with pytest.raises(ConnectFailed):
        connect("nbd+unix:///?socket=/nonexistent/socket")
    with Server(says(b"HTTP/1.1 400 Bad Request\r\n")) as server, pytest.raises(NegotiationFailed):
        connect(str(server.uri()), timeout=5)
    assert open_fds() == before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"uri": None}, InvalidURI),
        ({"uri": b"nbd://h/x"}, InvalidURI),
        ({"connections": 0}, InvalidArgs),
        ({"connections": 17}, InvalidArgs),
        ({"connections": True}, InvalidArgs),
        ({"timeout": 0}, InvalidArgs),
        ({"timeout": "5"}, InvalidArgs),
        ({"timeout": float("nan")}, InvalidArgs),
    ],
)
def test_connect_refuses_arguments_that_make_no_sense_before_it_connects(
    arguments: dict[str, Any], error: type[NbddError]
) -> None:
    with pytest.raises(error):
        connect(**{"uri": "nbd://127.0.0.1:1/x", **arguments})


@pytest.mark.parametrize(
    "arguments",
    [{"backend": ""}, {"backend": "a\0b"}, {"socket": []}, {"flags": -1}, {"flags": 1 << 16}, {"timeout": True}],
)
def test_client_refuses_arguments_that_make_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgs):
        Client(**arguments)
