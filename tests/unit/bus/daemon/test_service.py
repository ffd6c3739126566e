# SPDX-License-Identifier: MIT
"""What callers of the service may rely on, whatever they send: above all that dbus-next's own faults do not show."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdd.bus.daemon.connection import BusConnection
from nbdd.bus.daemon.service import Caller as Asker
from nbdd.bus.daemon.service import ExportedInterface, ServiceBus, clean
from nbdd.bus.wire.calls import DBUS
from nbdd.bus.wire.interface import Interface
from nbdd.bus.wire.names import BUS_NAME
from nbdd.bus.wire.reader import MAX_BODY, Reader
from nbdd.errors import Busy, InvalidConfig
from tests.fakes.asserts import until
from tests.fakes.bus import (
    DEADLINE,
    ERROR,
    INTERACTIVE,
    INTROSPECTABLE,
    NO_REPLY,
    OBJECT_MANAGER,
    PEER,
    PROPERTIES,
    BusDaemon,
    BusError,
    Caller,
    RawCaller,
    caller,
    close,
)

# isort: split
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

ROOT = "/org/example"
ITEM = "/org/example/item"
TEST = "org.example.Test"
XML = """<node><interface name="org.example.Test">
  <method name="WhoAmI"><arg name="who" type="s" direction="out"/><arg name="asked" type="b" direction="out"/></method>
  <method name="Add">
    <arg name="one" type="i" direction="in"/><arg name="other" type="i" direction="in"/>
    <arg name="sum" type="i" direction="out"/>
  </method>
  <method name="Nothing"/>
  <method name="Fail"/>
  <method name="Say"><arg name="what" type="aa{sv}" direction="out"/></method>
  <method name="Pair"><arg name="pair" type="(ss)" direction="out"/></method>
  <property name="Text" type="s" access="read"/>
  <property name="Pair" type="(ss)" access="read"/>
  <property name="Size" type="t" access="read">
    <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/>
  </property>
</interface></node>"""

HOSTILE = "nul\0, alone \udcff, \x1b[2J, ü and 💾"
CLEANED = "nul\ufffd, alone ?, \x1b[2J, ü and 💾"


class Test(ExportedInterface):
    """An object that does what a test tells it."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__(
            Interface.parse(XML),
            {
                "WhoAmI": self._who_am_i,
                "Add": self._add,
                "Nothing": self._nothing,
                "Fail": self._fail,
                "Say": self._say,
                "Pair": self._say,
            },
        )
        self.text = "hello"
        self.said: list[Any] = []
        self.error: Exception = Busy("in use")
        self.meet = asyncio.Barrier(1)
        """WhoAmI and Nothing are answered when so many calls have come."""
        self.came = 0

    def values(self) -> dict[str, Any]:
        return {"Text": self.text, "Pair": ("a", "b"), "Size": 1 << 63}

    async def _who_am_i(self, caller: Asker, _arguments: list[Any]) -> list[Any]:
        self.came += 1
        await self.meet.wait()
        await asyncio.sleep(0)
        return [caller.name, caller.interactive]

    async def _add(self, _caller: Asker, arguments: list[Any]) -> list[Any]:
        return [sum(arguments)]

    async def _nothing(self, _caller: Asker, _arguments: list[Any]) -> list[Any]:
        self.came += 1
        await self.meet.wait()
        return []

    async def _fail(self, _caller: Asker, _arguments: list[Any]) -> list[Any]:
        self.came += 1
        raise self.error

    async def _say(self, _caller: Asker, _arguments: list[Any]) -> list[Any]:
        return self.said


class Service:
    """A ServiceBus with a Test object at its root."""

    def __init__(self) -> None:
        self.bus: Any = ServiceBus(ROOT)
        self.root = Test()
        self.bus.add_object(ROOT, self.root)

    @property
    def name(self) -> str:
        return str(self.bus.unique_name)


@asynccontextmanager
async def serving(*, opened: bool = True) -> AsyncIterator[Service]:
    service = Service()
    await service.bus.connect()
    if opened:
        service.bus.open()
    try:
        yield service
    finally:
        await service.bus.finish()
        await close(service.bus)


@asynccontextmanager
async def both(address: str, *, opened: bool = True) -> AsyncIterator[tuple[Service, Caller]]:
    async with serving(opened=opened) as service, caller(address) as client:
        yield service, client


def machine_id() -> str | None:
    file = Path("/etc/machine-id")
    return file.read_text().strip() if file.is_file() else None


async def fails(work: Any) -> tuple[str, str]:
    """The name, without what all standard errors begin with, and the text of the error that a call ends with."""
    with pytest.raises(BusError) as caught:
        await work
    return caught.value.name.removeprefix(ERROR), str(caught.value)


# Who calls: fault 1


async def test_method_sees_its_caller_across_awaits_and_concurrent_calls(address: str) -> None:
    async with both(address) as (service, one), caller(address) as other:
        service.root.meet = asyncio.Barrier(4)
        answers: Any = await asyncio.gather(
            one.ask(service.name, ROOT, TEST, "WhoAmI"),
            other.ask(service.name, ROOT, TEST, "WhoAmI", flags=INTERACTIVE),
            one.ask(service.name, ROOT, TEST, "WhoAmI", flags=INTERACTIVE),
            other.ask(service.name, ROOT, TEST, "WhoAmI"),
        )
        assert answers == [[one.name, False], [other.name, True], [one.name, True], [other.name, False]]


# The object manager: fault 2


async def test_objects_added_and_removed_are_signalled_from_the_root_path(address: str) -> None:
    async with both(address) as (service, client):
        await client.listen(service.name)
        service.bus.add_object(ITEM, Test())
        service.bus.remove_object(ITEM)
        added, removed = await client.signals.get(), await client.signals.get()
        assert (added.path, added.interface, added.member) == (ROOT, OBJECT_MANAGER, "InterfacesAdded")
        assert added.signature == "oa{sa{sv}}"
        path, interfaces = added.body
        assert path == ITEM
        assert interfaces[TEST] == {
            "Text": Variant("s", "hello"),
            "Pair": Variant("(ss)", ["a", "b"]),
            "Size": Variant("t", 1 << 63),
        }
        assert (removed.path, removed.interface, removed.member) == (ROOT, OBJECT_MANAGER, "InterfacesRemoved")
        assert removed.signature == "oas"
        assert removed.body == [ITEM, [TEST]]


async def test_signals_beyond_the_socket_buffer_are_all_sent(address: str) -> None:
    async with both(address) as (service, client):
        service.bus._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await client.listen(service.name)
        for number in range(1000):
            service.bus.add_object(f"{ROOT}/many/n{number}", Test())
        for number in range(1000):
            assert (await client.signals.get()).body[0] == f"{ROOT}/many/n{number}"
        assert service.bus.connected


async def test_managed_objects_are_listed_at_the_root_alone(address: str) -> None:
    async with both(address) as (service, client):
        service.bus.add_object(ITEM, Test())
        objects = await client.ask(service.name, ROOT, OBJECT_MANAGER, "GetManagedObjects")
        assert list(objects) == [ITEM]
        assert objects[ITEM][TEST]["Text"] == Variant("s", "hello")
        for path in (ITEM, "/org", "/"):
            name, _ = await fails(client.ask(service.name, path, OBJECT_MANAGER, "GetManagedObjects"))
            assert name == "UnknownInterface", path
        service.bus.remove_object(ITEM)
        assert await client.ask(service.name, ROOT, OBJECT_MANAGER, "GetManagedObjects") == {}


async def test_properties_changed_has_the_changed_ones_alone(address: str) -> None:
    async with both(address) as (service, client):
        await client.listen(service.name)
        service.root.text = "new"
        service.bus.properties_changed(ROOT, service.root, set())
        service.bus.properties_changed(ROOT, service.root, {"Text"})
        told = await client.signals.get()
        assert (told.path, told.interface, told.member) == (ROOT, PROPERTIES, "PropertiesChanged")
        assert told.signature == "sa{sv}as"
        assert told.body == [TEST, {"Text": Variant("s", "new")}, []]
        await client.ask(service.name, ROOT, PEER, "Ping")
        assert client.signals.empty()


# Introspection: faults 3 and 9


async def introspect(client: Caller, to: str, path: str) -> ET.Element:
    return ET.fromstring(await client.ask(to, path, INTROSPECTABLE, "Introspect"))


async def test_introspection_children_are_whole_path_elements(address: str) -> None:
    async with both(address) as (service, client):
        for name in ("nbd1", "nbd10", "nbd"):
            service.bus.add_object(f"{ITEM}/{name}", Test())

        async def children(path: str) -> list[str]:
            return [node.attrib["name"] for node in (await introspect(client, service.name, path)).findall("node")]

        assert await children("/") == ["org"]
        assert await children("/org") == ["example"]
        assert await children(ROOT) == ["item"]
        assert await children(ITEM) == ["nbd", "nbd1", "nbd10"]
        for leaf in ("nbd", "nbd1", "nbd10"):
            assert await children(f"{ITEM}/{leaf}") == []
        assert (await fails(introspect(client, service.name, f"{ITEM}/nbd10/0")))[0] == "UnknownObject"


async def test_introspection_is_the_xml_with_argument_names_and_annotations(address: str) -> None:
    async with both(address) as (service, client):
        service.bus.add_object(ITEM, Test())
        told = await introspect(client, service.name, ITEM)
        written = ET.fromstring(XML).find("interface")
        assert written is not None
        found = next(element for element in told.findall("interface") if element.attrib["name"] == TEST)
        assert ET.canonicalize(ET.tostring(found), strip_text=True) == ET.canonicalize(
            ET.tostring(written), strip_text=True
        )
        names = [element.attrib["name"] for element in told.findall("interface")]
        assert sorted(names) == sorted([TEST, PEER, INTROSPECTABLE, PROPERTIES])
        root = await introspect(client, service.name, ROOT)
        assert OBJECT_MANAGER in [element.attrib["name"] for element in root.findall("interface")]


# Errors: fault 4


async def test_error_reaches_the_caller_by_name_and_text_and_not_the_journal(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with both(address) as (service, client):
            name, text = await fails(client.ask(service.name, ROOT, TEST, "Fail"))
            assert (name, text) == ("org.nbdd1.Error.Busy", "in use")
    assert not caplog.records


@pytest.mark.parametrize("error", [ValueError("secret"), EOFError("secret"), OSError(5, "secret"), TimeoutError()])
async def test_internal_error_is_traced_in_the_journal_and_not_to_the_caller(
    address: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with both(address) as (service, client):
        service.root.error = error
        name, text = await fails(client.ask(service.name, ROOT, TEST, "Fail"))
        assert name == "Failed"
        assert text == "Internal error of nbdd; the journal has its trace."
        assert await client.ask(service.name, ROOT, TEST, "Add", 1, 2, types="ii") == 3
    assert "in _fail" in caplog.text
    assert "org.example.Test.Fail" in caplog.text


@pytest.mark.parametrize("said", [[], [[{"a": 1}]], ["text"], [[], []], [None]])
async def test_reply_of_a_wrong_type_is_an_internal_error(
    address: str, said: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with both(address) as (service, client):
        service.root.said = said
        name, text = await fails(client.ask(service.name, ROOT, TEST, "Say"))
        assert (name, text) == ("Failed", "Internal error of nbdd; the journal has its trace.")
        assert await client.ask(service.name, ROOT, TEST, "Add", 1, 2, types="ii") == 3
    assert "org.example.Test.Say" in caplog.text


# Every call is answered, once: fault 5


async def test_finish_answers_running_calls(address: str) -> None:
    async with serving() as service, caller(address) as client:
        service.root.meet = asyncio.Barrier(9)
        open_calls = [asyncio.create_task(fails(client.ask(service.name, ROOT, TEST, "Nothing"))) for _ in range(3)]
        await until(lambda: service.root.came == 3)
        await service.bus.finish()
        for call in open_calls:
            assert await call == ("Failed", "nbdd is stopping; try again when it runs.")
        assert len(client.replies) == 3


async def test_finish_answers_early_calls_with_the_reason(address: str) -> None:
    async with serving(opened=False) as service, caller(address) as client:
        call = asyncio.create_task(fails(client.ask(service.name, ROOT, TEST, "Nothing")))
        await until(lambda: bool(service.bus._calls))
        await service.bus.finish(InvalidConfig("a.yaml:1:2: it is bad.", "nbdd does not start with that."))
        assert await call == (InvalidConfig.dbus_name, "a.yaml:1:2: it is bad.\nnbdd does not start with that.")


async def test_finish_answers_a_call_of_the_last_moment(address: str) -> None:
    async with serving(opened=False) as service, caller(address) as client:
        call = asyncio.create_task(fails(client.ask(service.name, ROOT, TEST, "Nothing")))
        await until(lambda: bool(service.bus._calls))
        # Its task has not begun: it was made in this turn of the loop.
        await service.bus.finish()
        assert (await call)[0] == "Failed"
        assert service.root.came == 0


async def test_finish_answers_no_call_twice(address: str) -> None:
    async with serving() as service, caller(address) as client:
        before = len(client.replies)
        calls = [asyncio.create_task(client.ask(service.name, ROOT, TEST, "Add", 1, 2, types="ii")) for _ in range(20)]
        await until(lambda: bool(service.bus._calls))
        await service.bus.finish()
        done = await asyncio.gather(*calls, return_exceptions=True)
        assert all(answer == 3 or isinstance(answer, BusError) for answer in done)
        # What came after the end began is answered as ever; by the next call, all answers are in.
        await client.ask(service.name, ROOT, PEER, "Ping")
        assert len(client.replies) - before == 21


async def test_call_without_reply_expected_gets_none(address: str) -> None:
    async with both(address) as (service, client):
        service.bus._on_message = noted = Noted(service.bus._on_message)
        for member in ("Nothing", "Fail", "Nonsense"):
            assert await client.ask(service.name, ROOT, TEST, member, flags=NO_REPLY) is None
        await client.ask(service.name, ROOT, PEER, "Ping")
        await until(lambda: service.root.came == 2)
        await client.ask(service.name, ROOT, PEER, "Ping")
        await DBUS.call(service.bus, "GetId", "", [], returns="s")
        # The bus would not have passed it on, and told us so.
        assert [message.error_name for message in noted.messages if message.error_name] == []


async def test_calls_before_open_wait(address: str) -> None:
    async with both(address, opened=False) as (service, client):
        await client.listen(service.name)
        ping = asyncio.create_task(client.ask(service.name, ROOT, PEER, "Ping"))
        listed = asyncio.create_task(client.ask(service.name, ROOT, OBJECT_MANAGER, "GetManagedObjects"))
        await until(lambda: len(service.bus._calls) == 2)
        # What was answered by now is here after two questions to the bus, one from each side.
        for side in (service.bus, client.bus):
            await DBUS.call(side, "GetId", "", [], returns="s")
        service.bus.add_object(ITEM, Test())
        assert not ping.done()
        assert not listed.done()
        service.bus.open()
        await ping
        assert list(await listed) == [ITEM]
        assert client.signals.empty(), "whoever asks is told all, there was nothing to tell of before"


# Descriptors: fault 6


async def test_descriptors_are_refused_by_the_bus(address: str) -> None:
    async with serving() as service, caller(address, fds=True) as client:
        before = len(os.listdir("/proc/self/fd"))
        message = Message(
            destination=service.name,
            path=ROOT,
            interface=TEST,
            member="Nonsense",
            signature="h",
            body=[0],
            unix_fds=[client.bus._fd],
        )
        reply = await client.bus.call(message)
        assert reply.error_name == f"{ERROR}NotSupported"
        await client.ask(service.name, ROOT, PEER, "Ping")
        assert len(os.listdir("/proc/self/fd")) == before


# Handlers are plain: faults 7 and 10


async def test_handler_can_be_called_without_a_bus() -> None:
    assert await Test().methods["Add"](Asker(":1.1", interactive=False), [1, 2]) == [3]


async def test_handler_may_return_nothing_or_tuples(address: str) -> None:
    async with both(address) as (service, client):
        assert await client.ask(service.name, ROOT, TEST, "Nothing") is None
        service.root.said = [("one", "two")]
        assert await client.ask(service.name, ROOT, TEST, "Pair") == ["one", "two"]
        assert await client.get(service.name, ROOT, TEST, "Pair") == ["a", "b"]


def test_exported_interface_with_methods_unlike_the_xml_is_refused() -> None:
    with pytest.raises(TypeError, match=r"org\.example\.Test"):
        ExportedInterface(Interface.parse(XML), {})


def test_interface_parse_refuses_a_document_without_an_interface() -> None:
    with pytest.raises(ValueError, match="no interface"):
        Interface.parse("<node/>")


# The bus goes away: fault 8


async def test_bus_loss_is_reported_and_ends_open_calls_quietly(
    address: str, bus: BusDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    connection = BusConnection()
    await connection.claim()
    service: Any = connection._bus
    lost = asyncio.create_task(connection.lost())
    async with caller(address) as client, caller(address) as silent:
        asked = asyncio.Event()
        silent.serve(lambda _call: asked.set())
        ping = Message(destination=silent.name, path="/", interface=PEER, member="Ping")

        async def ask_another(_caller: Asker, _arguments: list[Any]) -> list[Any]:
            await service.call(ping)
            return []

        root = Test()
        root.methods = {**root.methods, "Nothing": ask_another}
        service.add_object(ROOT, root)
        service.open()
        call = asyncio.create_task(client.ask(BUS_NAME, ROOT, TEST, "Nothing"))
        await asked.wait()
        bus.kill()
        await lost
        with pytest.raises((EOFError, OSError)):
            await call
    # Signals to nobody harm nothing.
    service.add_object(ITEM, Test())
    service.remove_object(ITEM)
    await service.finish()
    await close(service)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.usefixtures("address")
async def test_finish_does_not_wait_for_a_lost_bus(bus: BusDaemon) -> None:
    connection = BusConnection()
    await connection.claim()
    bus.kill()
    await connection.lost()
    async with asyncio.timeout(DEADLINE / 3):
        await connection._bus.finish()
    await close(connection._bus)


# Python 3.15: fault 11


def test_library_imports_without_no_type_check_decorator() -> None:
    code = (
        "import typing; vars(typing).pop('no_type_check_decorator', None); import nbdd.bus.daemon.service; "
        "from dbus_next.service import ServiceInterface"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE)


# Wrong calls


@pytest.mark.parametrize(
    ("path", "interface", "member", "types", "body", "error", "names"),
    [
        (ROOT, TEST, "Add", "", [], "InvalidArgs", "'ii'"),
        (ROOT, TEST, "Add", "i", [1], "InvalidArgs", "'ii'"),
        (ROOT, TEST, "Add", "iii", [1, 2, 3], "InvalidArgs", "'ii'"),
        (ROOT, TEST, "Add", "iu", [1, 2], "InvalidArgs", "'iu'"),
        (ROOT, TEST, "Add", "ss", ["1", "2"], "InvalidArgs", "'ss'"),
        (ROOT, TEST, "Add", "(ii)", [[1, 2]], "InvalidArgs", "'(ii)'"),
        (ROOT, TEST, "Nothing", "s", [""], "InvalidArgs", "'s'"),
        (ROOT, TEST, "add", "ii", [1, 2], "UnknownMethod", "add"),
        (ROOT, TEST, "Text", "", [], "UnknownMethod", "Text"),
        (ROOT, "org.example.Other", "Add", "ii", [1, 2], "UnknownInterface", "org.example.Other"),
        (ROOT, None, "Nonsense", "", [], "UnknownMethod", "Nonsense"),
        (ITEM, TEST, "Add", "ii", [1, 2], "UnknownObject", ITEM),
        ("/org", TEST, "Add", "ii", [1, 2], "UnknownInterface", TEST),
        ("/org", PROPERTIES, "GetAll", "s", [TEST], "UnknownInterface", PROPERTIES),
        (ROOT, PROPERTIES, "Get", "ss", [TEST, "Nonsense"], "UnknownProperty", "Nonsense"),
        (ROOT, PROPERTIES, "Get", "ss", ["", "Nonsense"], "UnknownProperty", "Nonsense"),
        (ROOT, PROPERTIES, "Get", "ss", [PEER, "Text"], "UnknownProperty", "Text"),
        (ROOT, PROPERTIES, "Get", "ss", ["org.example.Other", "Text"], "UnknownInterface", "org.example.Other"),
        (ROOT, PROPERTIES, "Get", "s", [TEST], "InvalidArgs", "'ss'"),
        (ROOT, PROPERTIES, "GetAll", "s", ["org.example.Other"], "UnknownInterface", "org.example.Other"),
        (ROOT, PROPERTIES, "Set", "ssv", [TEST, "Text", Variant("s", "x")], "PropertyReadOnly", "Text"),
        (ROOT, PROPERTIES, "Set", "ssv", [TEST, "Text", Variant("u", 1)], "PropertyReadOnly", "Text"),
        (ROOT, PROPERTIES, "Set", "ssv", [TEST, "Nonsense", Variant("s", "x")], "UnknownProperty", "Nonsense"),
        (ROOT, PROPERTIES, "Set", "ssv", ["a.b", "Text", Variant("s", "x")], "UnknownInterface", "a.b"),
        (ROOT, PROPERTIES, "Set", "sss", [TEST, "Text", "x"], "InvalidArgs", "'ssv'"),
    ],
)
async def test_call_of_something_unknown_gets_the_standard_error(
    address: str, *, path: str, interface: str | None, member: str, types: str, body: list[Any], error: str, names: str
) -> None:
    async with both(address) as (service, client):
        name, text = await fails(client.ask(service.name, path, interface, member, *body, types=types))
        assert name == error
        assert names in text
        assert text.endswith(".")
        assert await client.get(service.name, ROOT, TEST, "Text") == "hello"


async def test_call_without_an_interface_finds_its_method(address: str) -> None:
    async with both(address) as (service, client):
        assert await client.ask(service.name, ROOT, None, "Add", 1, 2, types="ii") == 3
        assert await client.ask(service.name, ROOT, None, "Ping") is None


async def test_properties_can_be_read_one_by_one_and_all_at_once(address: str) -> None:
    async with both(address) as (service, client):
        wanted = {"Text": "hello", "Pair": ["a", "b"], "Size": 1 << 63}
        for interface in (TEST, ""):
            for name, value in wanted.items():
                assert await client.get(service.name, ROOT, interface, name) == value
            told = await client.ask(service.name, ROOT, PROPERTIES, "GetAll", interface, types="s")
            assert {name: variant.value for name, variant in told.items()} == wanted
        assert await client.ask(service.name, ROOT, PROPERTIES, "GetAll", PEER, types="s") == {}


async def test_peer_interface_pings_and_knows_the_machine_id(address: str) -> None:
    known = machine_id()
    async with both(address) as (service, client):
        for path in ("/", "/org", ROOT):
            assert await client.ask(service.name, path, PEER, "Ping") is None
        if known is not None:
            assert await client.ask(service.name, ROOT, PEER, "GetMachineId") == known


# What servers say


async def test_strings_that_dbus_forbids_are_cleaned_in_replies_values_errors_and_signals(address: str) -> None:
    async with both(address) as (service, client):
        await client.listen(service.name)
        service.root.text = HOSTILE
        assert await client.get(service.name, ROOT, TEST, "Text") == CLEANED
        service.root.said = [[{HOSTILE: Variant("s", HOSTILE), "list": Variant("as", [HOSTILE])}]]
        told = await client.ask(service.name, ROOT, TEST, "Say")
        assert told == [{CLEANED: Variant("s", CLEANED), "list": Variant("as", [CLEANED])}]
        service.root.error = Busy(HOSTILE)
        assert await fails(client.ask(service.name, ROOT, TEST, "Fail")) == ("org.nbdd1.Error.Busy", CLEANED)
        service.bus.properties_changed(ROOT, service.root, {"Text"})
        assert (await client.signals.get()).body == [TEST, {"Text": Variant("s", CLEANED)}, []]
        service.bus.add_object(ITEM, service.root)
        assert (await client.signals.get()).body[1][TEST]["Text"] == Variant("s", CLEANED)


def test_clean_leaves_all_but_strings_alone() -> None:
    value = [1, True, 1.5, b"\0", None, {"a": (2, 3)}]
    assert clean(value) == [1, True, 1.5, b"\0", None, {"a": [2, 3]}]


# What strangers send: faults of dbus-next that facts never listed, found by sending it


async def test_call_over_the_size_limit_is_refused_unread(address: str) -> None:
    async with both(address) as (service, client):
        service.bus._on_message = note = Noted(service.bus._on_message)
        values = [[Variant("y", 1)] * (2 * MAX_BODY)]
        name, text = await fails(client.ask(service.name, ROOT, TEST, "Add", *values, types="av"))
        assert name == "LimitsExceeded"
        assert str(MAX_BODY) in text
        assert [message.body for message in note.messages if message.member == "Add"] == [[]]
        assert await client.ask(service.name, ROOT, TEST, "Add", 1, 2, types="ii") == 3
        # A wrong call that is not too long is told what is wrong.
        exact = "x" * (MAX_BODY - 5)
        assert (await fails(client.ask(service.name, ROOT, TEST, "Add", exact, types="s")))[0] == "InvalidArgs"
        assert (await fails(client.ask(service.name, ROOT, TEST, "Add", exact + "x", types="s")))[0] == (
            "LimitsExceeded"
        )


class Noted:
    """Notes the messages on their way to somebody."""

    def __init__(self, to: Callable[[Message], None]) -> None:
        self.messages: list[Message] = []
        self._to = to

    def __call__(self, message: Message) -> None:
        self.messages.append(message)
        self._to(message)


async def test_unexpected_messages_are_ignored(address: str) -> None:
    async with both(address) as (service, client):
        to: dict[str, Any] = {"destination": service.name, "path": ROOT, "interface": TEST, "member": "Add"}
        for message in (
            Message(message_type=MessageType.SIGNAL, signature="ii", body=[1, 2], **to),
            Message(message_type=MessageType.METHOD_RETURN, destination=service.name, reply_serial=1),
            Message(message_type=MessageType.ERROR, destination=service.name, reply_serial=99, error_name="a.b"),
        ):
            await client.bus.send(message)
        assert await client.ask(service.name, ROOT, TEST, "Add", 1, 2, types="ii") == 3


async def test_call_in_big_endian_is_answered(address: str) -> None:
    """A machine has one, but a caller need not use it."""

    def field(code: int, kind: str, text: str) -> bytes:
        return bytes([code, 1, ord(kind), 0]) + len(text).to_bytes(4, "big") + text.encode() + b"\0"

    def padded(octets: bytes) -> bytes:
        return octets + bytes(-len(octets) % 8)

    async with both(address) as (service, client):
        fields = padded(field(1, "o", ROOT)) + padded(field(3, "s", "Nothing")) + field(6, "s", service.name)
        head = b"B\1\0\1" + bytes(4) + (9).to_bytes(4, "big") + len(fields).to_bytes(4, "big")
        with RawCaller(address) as raw:
            await asyncio.to_thread(raw.say, padded(head + fields))
            await until(lambda: service.root.came == 1)
        assert await client.ask(service.name, ROOT, PEER, "Ping") is None


async def test_call_flood_leaves_turns_of_the_loop(address: str) -> None:
    """Else the watchdog would find the loop standing still, and systemd end nbdd."""

    count = 1000
    async with both(address) as (service, client):
        ping: Any = Message(destination=service.name, path=ROOT, interface=PEER, member="Ping", flags=NO_REPLY)
        ping.serial = 5
        service.bus._on_message = noted = Noted(service.bus._on_message)
        with RawCaller(address) as raw:
            # The loop stands still until all is there.
            raw.say(bytes(ping._marshall()) * count)
            raw.settle()
            seen = [0]
            while seen[-1] < count:
                await asyncio.sleep(0)
                seen.append(len(noted.messages))
        steps = [after - before for before, after in itertools.pairwise(seen)]
        # One callback for the socket and one for what is left may share a turn.
        assert max(steps) <= 16
        await client.ask(service.name, ROOT, PEER, "Ping")


@pytest.mark.parametrize("long_replies", [False, True])
def test_reader_passes_long_messages_only_as_replies(long_replies: bool) -> None:
    text = "x" * (MAX_BODY + 1)
    call: Any = Message(path="/", interface="a.b", member="Call", serial=1, signature="s", body=[text])
    call.sender = ":1.1"
    signal: Any = Message.new_signal("/", "a.b", "Signal", "s", [text])
    signal.serial = 2
    reply: Any = Message.new_method_return(call, "s", [text])
    reply.serial = 3
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("rwb") as stream:
        ours.setblocking(False)
        theirs.setblocking(False)
        reader = Reader(stream, long_replies=long_replies)
        left = memoryview(bytes(call._marshall()) + bytes(signal._marshall()) + bytes(reply._marshall()))
        got: list[tuple[str | None, int | None, int]] = []
        while len(got) < 2:
            if left:
                with contextlib.suppress(BlockingIOError):
                    left = left[theirs.send(left) :]
            if (message := reader.next()) is not None:
                got.append((message.member, message.reply_serial, len(message.body)))
    assert not left
    assert got == [("Call", None, 0), (None, 1, 1 if long_replies else 0)]


def test_reader_skips_a_message_that_cannot_be_read() -> None:
    good: Any = Message(path="/", member="Good", serial=7)
    bad = bytearray(good._marshall())
    bad[1] = 5  # a type that the specification has not, and wants ignored
    liar = bytearray(good._marshall())
    liar[16 + 4] = 200  # the path is longer than the message
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("rwb") as stream:
        ours.setblocking(False)
        reader = Reader(stream, long_replies=False)
        assert reader.next() is None
        octets = bytes(bad) + bytes(liar) + bytes(good._marshall())
        got = []
        for at in range(len(octets)):
            theirs.send(octets[at : at + 1])
            got.append(reader.next())
        assert [message for message in got[:-1] if message is not None] == []
        assert got[-1] is not None
        assert got[-1].member == "Good"
        theirs.close()
        with pytest.raises(EOFError):
            reader.next()
