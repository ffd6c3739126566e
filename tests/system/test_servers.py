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
    """How a server is reached; `{port}` and `{unit}` are the lab's to fill in."""

    name: str
    uri: str
    nbdkit: str
    nbd_server: str
    qemu: str


TRANSPORTS = (
    Transport(
        "tcp4",
        "nbd://127.0.0.1:{port}/%s",
        "-i 127.0.0.1 -p {port}",
        "port = {port}\nlistenaddr = 127.0.0.1",
        "-b 127.0.0.1 -p {port}",
    ),
    Transport(
        "tcp6", "nbd://[::1]:{port}/%s", "-i ::1 -p {port}", "port = {port}\nlistenaddr = ::1", "-b ::1 -p {port}"
    ),
    Transport(
        "unix",
        "nbd+unix:///%s?socket=/run/{unit}.sock",
        "-U /run/{unit}.sock",
        "unixsock = /run/{unit}.sock",
        "-k /run/{unit}.sock",
    ),
)

WRITABLE = ("nbdkit-file", "nbdkit-memory", "nbd-server", "qemu-nbd-raw", "qemu-nbd-qcow2")
READ_ONLY = ("nbdkit-file-read-only", "nbd-server-read-only")


@pytest.fixture(scope="module")
def servers(guest: Guest) -> Iterator[Lab]:
    """A lab for all cells of one release, with the data that they write."""
    lab = Lab(guest)
    lab.mark()
    guest.run(
        f"mkdir -p /root/servers; head -c {MIB}M /dev/urandom >{PATTERN}; truncate -s {MIB}M {ZEROES};"
        f"sha256sum <{PATTERN} >{PATTERN}.sum"
    )
    yield lab
    lab.cleanup()
    guest.run("rm -rf /root/servers")


def start(lab: Lab, kind: str, transport: Transport, image: str, content: str) -> Server:
    """Start a server of that kind on an image made from `content`."""
    copy = f"qemu-img convert -f raw -O qcow2 {content} {image}" if "qcow2" in kind else f"cp {content} {image}"
    lab.guest.run(copy)
    match kind.split("-", 1):
        case "nbdkit", "memory":
            command = f"nbdkit -f {transport.nbdkit} memory {MIB}M"
        case "nbdkit", _:
            read_only = "-r " if kind in READ_ONLY else ""
            command = f"nbdkit -f {read_only}{transport.nbdkit} file {image}"
        case "nbd", _:
            # Two exports, and the second is the one that is asked for: the name counts.
            read_only = "true" if kind in READ_ONLY else "false"
            config = (
                f"[generic]\n{transport.nbd_server}\n"
                f"[other]\nexportname = {ZEROES}\nreadonly = true\n"
                f"[named]\nexportname = {image}\nreadonly = {read_only}\n"
            )
            script = f"echo {shlex.quote(config)} >{image}.conf; exec nbd-server -C {image}.conf"
            # It closes every descriptor that it might have: where the limit is high, that takes it many seconds.
            command = f"-p Type=forking -p LimitNOFILE=1024 sh -c {shlex.quote(script)}"
        case _:
            disk_format = kind.removeprefix("qemu-nbd-")
            command = f"qemu-nbd -t -f {disk_format} {transport.qemu} -x named {image}"
    return lab.serve(command, transport.uri % ("" if kind.startswith("nbdkit") else "named"))


def connect(lab: Lab, kind: str, transport: Transport, content: str, more: str = "") -> tuple[str, str, Server]:
    """Start a server and attach its export; returns the name, the path of the server's image, the server."""
    name = f"{kind}-{transport.name}"
    image = f"/root/servers/{name}"
    server = start(lab, kind, transport, image, content)
    assert lab.attach_uri(server.uri, name, more) == object_path(name)
    return name, image, server


def served(kind: str, image: str, server: Server) -> str:
    """A shell command that prints what the server has now, asked of somebody else than nbdd."""
    if kind == "nbdkit-memory":
        return f"nbdcopy {shlex.quote(server.uri)} -"
    if kind == "qemu-nbd-qcow2":
        return f"{{ qemu-img convert -f qcow2 -O raw {image} {image}.raw; cat {image}.raw; }}"
    return f"cat {image}"


def write_and_compare(link: str) -> str:
    """A shell command that fills a device with the pattern and reads it back, both around the page cache."""
    return (
        f"dd if={PATTERN} of={link} bs=1M oflag=direct conv=fsync status=none;"
        f"dd if={link} bs=1M iflag=direct status=none | sha256sum --check --status {PATTERN}.sum"
    )


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda transport: transport.name)
@pytest.mark.parametrize("kind", WRITABLE)
def test_what_is_written_to_the_device_is_what_the_server_has(servers: Lab, kind: str, transport: Transport) -> None:
    name, image, server = connect(servers, kind, transport, ZEROES)
    link = f"/dev/disk/by-nbd/{name}"
    told = servers.guest.run(f"set -e; {write_and_compare(link)}; blockdev --getsize64 --getro {link}")
    assert told.stdout.split() == [str(MIB << 20), "0"]
    servers.detach(name)
    # The server first: qemu-nbd holds a lock on its image, and nothing may be only in its memory.
    stop = "" if kind == "nbdkit-memory" else f"systemctl stop {server.unit};"
    servers.guest.run(f"set -e; {stop} {served(kind, image, server)} | cmp {PATTERN}; rm -f {image}*")
    servers.stop(server)


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda transport: transport.name)
@pytest.mark.parametrize("kind", READ_ONLY)
def test_a_read_only_export_is_a_read_only_device(servers: Lab, kind: str, transport: Transport) -> None:
    name, image, server = connect(servers, kind, transport, PATTERN)
    link = f"/dev/disk/by-nbd/{name}"
    told = servers.guest.run(
        f"set -e; dd if={link} bs=1M iflag=direct status=none | sha256sum --check --status {PATTERN}.sum;"
        f"blockdev --getro {link}; ! dd if={ZEROES} of={link} bs=1M count=1 oflag=direct status=none 2>&1;"
        f"busctl get-property org.nbdd1 {object_path(name)} org.nbdd1.Device ReadOnly"
    )
    assert told.stdout.startswith("1\n"), told
    assert told.stdout.endswith("b true\n"), told
    servers.detach(name)
    servers.guest.run(f"cmp {PATTERN} {image}; rm -f {image}*")
    servers.stop(server)


def test_four_connections_carry_one_device(servers: Lab) -> None:
    name, image, server = connect(servers, "nbdkit-file", TRANSPORTS[0], ZEROES, "'connections': <uint32 4>")
    port = server.uri.split(":")[2].rstrip("/")
    seen = servers.guest.run(f"ss -tnH state established dport = :{port} | wc -l").stdout
    assert (seen, servers.device(name)["LiveConnections"], servers.device(name)["Connections"]) == ("4\n", 4, 4)
    servers.guest.run(f"set -e; {write_and_compare(f'/dev/disk/by-nbd/{name}')}")
    servers.detach(name)
    servers.guest.run(f'cmp {PATTERN} {image}; [ -z "$(ss -tnH state established dport = :{port})" ]; rm -f {image}')
    servers.stop(server)


def test_a_server_that_allows_one_connection_only_gets_one(servers: Lab) -> None:
    # Several links to a server that keeps a cache for each would read old data.
    server = servers.nbdkit("--filter=multi-conn memory 8M multi-conn-mode=disable")
    servers.attach_uri(server.uri, "single", "'connections': <uint32 4>")
    assert servers.device("single")["Connections"] == servers.device("single")["LiveConnections"] == 1
    assert "one is used instead of 4" in servers.guest.journal("nbdd", 20)
    servers.detach("single")
    servers.stop(server)
