# SPDX-License-Identifier: MIT
"""Every kind of server, over every transport: attached, used, compared with what the server has, and detached.

One lab serves the whole matrix, and is checked for leftovers once, at its end: each cell takes a port and a name of
its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.guest import Guest
from tests.system.lab import Lab, Server, object_path

MIB = 8
"""Size of every export."""

PATTERN, ZEROES = "/root/servers/pattern", "/root/servers/zeroes"


@dataclass(frozen=True)
class Transport:
    """How a server is reached; `{port}` and `{unit}` are the lab's to fill in, `{name}` is the export."""

    name: str
    uri: str
    nbdkit: str
    qemu: str


TCP4 = Transport("tcp4", "nbd://127.0.0.1:{port}/{name}", "-i 127.0.0.1 -p {port}", "-b 127.0.0.1 -p {port}")
TCP6 = Transport("tcp6", "nbd://[::1]:{port}/{name}", "-i ::1 -p {port}", "-b ::1 -p {port}")
UNIX = Transport("unix", "nbd+unix:///{name}?socket=/run/{unit}.sock", "-U /run/{unit}.sock", "-k /run/{unit}.sock")
TRANSPORTS = (TCP4, TCP6, UNIX)

WRITABLE = ("nbdkit-file", "nbdkit-memory", "qemu-nbd-raw", "qemu-nbd-qcow2", "nbd-server")
READ_ONLY = ("nbdkit-file-read-only", "nbd-server-read-only")


@dataclass(frozen=True)
class Servers:
    """The lab of one release's cells, and the two nbd-servers that they share."""

    lab: Lab
    nbd_tcp: Server
    nbd_unix: Server


@pytest.fixture(scope="module")
def servers(guest: Guest) -> Iterator[Servers]:
    """A lab for all cells of one release, with the data that they write."""
    lab = Lab(guest)
    lab.mark()
    guest.run(
        f"mkdir -p /root/servers; head -c {MIB}M /dev/urandom >{PATTERN}; truncate -s {MIB}M {ZEROES};"
        f"sha256sum <{PATTERN} >{PATTERN}.sum"
    )
    yield Servers(lab, nbd_server(lab, "port = {port}"), nbd_server(lab, "unixsock = /run/{unit}.sock"))
    lab.cleanup()
    guest.run("rm -rf /root/servers")


def nbd_server(lab: Lab, where: str) -> Server:
    """Start an nbd-server with all exports that its cells ask for by name.

    It listens, and then makes parameters for a TLS that nobody uses, before it greets anybody: seconds of computing,
    where processors are emulated ten and more. So one serves all cells of TCP, and these two are busy with it while
    the cells of the other servers run.
    """
    exports = "".join(
        f"[{kind}-{transport.name}]\nexportname = /root/servers/{kind}-{transport.name}\n"
        f"readonly = {'true' if kind in READ_ONLY else 'false'}\n"
        for kind in (WRITABLE[-1], READ_ONLY[-1])
        for transport in TRANSPORTS
    )
    config = "/root/servers/{unit}.conf"
    content = f"[generic]\n{where}\n{exports}"
    # A socket that a server of an earlier test left is in its way: it does not take over, it ends.
    script = f"rm -f /run/{{unit}}.sock; echo {shlex.quote(content)} >{config}; exec nbd-server -C {config}"
    # It closes every descriptor that it might have, and where the limit is high, that takes seconds too.
    options = "-p Type=forking -p LimitNOFILE=1024"
    # What the lab takes for the URI is the port alone: each cell makes its own from it.
    return lab.serve(f"{options} sh -c {shlex.quote(script)}", "{port}", ready="true")


@dataclass(frozen=True)
class Cell:
    """One attached export."""

    name: str
    image: str
    server: Server
    stop: str
    """A shell command that ends the server, if it is this cell's own."""

    @property
    def link(self) -> str:
        """The device."""
        return f"/dev/disk/by-nbd/{self.name}"


def connect(servers: Servers, kind: str, transport: Transport, content: str, more: str = "") -> Cell:
    """Start a server of that kind on an image made from `content`, and attach its export."""
    lab = servers.lab
    name = f"{kind}-{transport.name}"
    image = f"/root/servers/{name}"
    lab.guest.run(f"qemu-img convert -O qcow2 {content} {image}" if "qcow2" in kind else f"cp {content} {image}")
    if kind.startswith("nbd-server"):
        shared = servers.nbd_unix if transport is UNIX else servers.nbd_tcp
        server = Server(shared.unit, transport.uri.format(name=name, port=shared.uri, unit=shared.unit))
        # A search for large primes has no bound: seconds most often, minutes where chance and the emulation are unkind.
        lab.until(f"nbdinfo --size {shlex.quote(server.uri)} >/dev/null", 400, unit=shared.unit)
        stop = ":"
    else:
        if kind == "nbdkit-memory":
            command = f"nbdkit -f {transport.nbdkit} memory {MIB}M"
        elif kind.startswith("nbdkit"):
            command = f"nbdkit -f {'-r ' if kind in READ_ONLY else ''}{transport.nbdkit} file {image}"
        else:
            command = f"qemu-nbd -t -f {kind.removeprefix('qemu-nbd-')} {transport.qemu} -x {name} {image}"
        server = lab.serve(command, transport.uri.replace("{name}", name))
        stop = f"systemctl stop {server.unit}"
    assert lab.attach_uri(server.uri, name, more) == object_path(name)
    return Cell(name, image, server, stop)


def same(kind: str, cell: Cell) -> str:
    """A shell command that ends the server and compares what it had, as others see it, with the pattern."""
    if kind == "nbdkit-memory":
        return f"nbdcopy {shlex.quote(cell.server.uri)} - | cmp - {PATTERN}; {cell.stop}"
    if kind == "qemu-nbd-qcow2":
        return f"{cell.stop}; qemu-img convert -O raw {cell.image} {cell.image}.raw; cmp {cell.image}.raw {PATTERN}"
    return f"{cell.stop}; cmp {cell.image} {PATTERN}"


def write_and_compare(link: str) -> str:
    """A shell command that fills a device with the pattern and reads it back, both around the page cache."""
    return (
        f"dd if={PATTERN} of={link} bs=1M oflag=direct conv=fsync status=none;"
        f"dd if={link} bs=1M iflag=direct status=none | sha256sum --check --status {PATTERN}.sum"
    )


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda transport: transport.name)
@pytest.mark.parametrize("kind", WRITABLE)
def test_data_written_to_the_device_is_what_the_server_has(servers: Servers, kind: str, transport: Transport) -> None:
    cell = connect(servers, kind, transport, ZEROES)
    told = servers.lab.guest.run(
        f"set -e; {write_and_compare(cell.link)}; blockdev --getsize64 --getro {cell.link}", timeout=60
    )
    assert told.stdout.split() == [str(MIB << 20), "0"]
    servers.lab.detach(cell.name)
    servers.lab.guest.run(f"set -e; {same(kind, cell)}; rm -f {cell.image}*")


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda transport: transport.name)
@pytest.mark.parametrize("kind", READ_ONLY)
def test_read_only_export_is_a_read_only_device(servers: Servers, kind: str, transport: Transport) -> None:
    cell = connect(servers, kind, transport, PATTERN)
    told = servers.lab.guest.run(
        f"set -e; dd if={cell.link} bs=1M iflag=direct status=none | sha256sum --check --status {PATTERN}.sum;"
        f"blockdev --getro {cell.link}; ! dd if={ZEROES} of={cell.link} bs=1M count=1 oflag=direct status=none 2>&1;"
        f"busctl get-property org.nbdd1 {object_path(cell.name)} org.nbdd1.Device ReadOnly"
    )
    assert told.stdout.startswith("1\n"), told
    assert told.stdout.endswith("b true\n"), told
    servers.lab.detach(cell.name)
    servers.lab.guest.run(f"set -e; {same(kind, cell)}; rm -f {cell.image}*")


def test_connections_of_one_device_are_four(servers: Servers) -> None:
    lab = servers.lab
    cell = connect(servers, "nbdkit-file", TCP4, ZEROES, "'connections': <uint32 4>")
    port = cell.server.uri.split(":")[2].partition("/")[0]
    established = f"ss -tnH state established dport = :{port}"
    assert lab.guest.run(f"{established} | wc -l").stdout == "4\n"
    told = lab.device(cell.name)
    assert (told["LiveConnections"], told["Connections"]) == (4, 4)
    lab.guest.run(f"set -e; {write_and_compare(cell.link)}")
    lab.detach(cell.name)
    lab.guest.run(f'set -e; test -z "$({established})"; {same("nbdkit-file", cell)}; rm -f {cell.image}')


def test_server_that_allows_one_connection_gets_one(servers: Servers) -> None:
    # Several connections to a server that keeps a cache for each would read old data.
    lab = servers.lab
    server = lab.nbdkit("--filter=multi-conn memory 8M multi-conn-mode=disable")
    lab.attach_uri(server.uri, "single", "'connections': <uint32 4>")
    told = lab.device("single")
    assert (told["LiveConnections"], told["Connections"]) == (1, 1)
    assert "one is used instead of 4" in lab.guest.journal("nbdd", 20)
    lab.detach("single")
    lab.stop(server)
