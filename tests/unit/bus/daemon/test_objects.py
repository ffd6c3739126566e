# SPDX-License-Identifier: MIT
"""org.nbdd1.Manager and org.nbdd1.Device on a bus: what the XML promises is there, and nothing else gets through."""

from __future__ import annotations

import ctypes
import inspect
import re
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nbdd.errors
from nbdd import __version__
from nbdd.bus.daemon.objects import (
    ATTACH_OPTIONS,
    ATTACH_URI_OPTIONS,
    DETACH_OPTIONS,
    MAX_WAIT,
    ManagerInterface,
    ObjectExporter,
    read_options,
)
from nbdd.bus.daemon.polkit import Authority, Polkit
from nbdd.bus.daemon.service import Caller as Asker
from nbdd.bus.daemon.service import ServiceBus
from nbdd.bus.wire.names import ROOT_PATH, device_path
from nbdd.config.definition import NAME_PATTERN
from nbdd.config.schema import shipped
from nbdd.errors import (
    AccessDenied,
    ConnectionNotServiced,
    ExportChanged,
    InvalidArgs,
    InvalidConfig,
    NbddError,
    NoSuchDevice,
    NotAttached,
)
from nbdd.manager.device import Device
from nbdd.manager.manager import Changes, Manager
from nbdd.manager.status import Phase, Status
from nbdd.protocol import Export, Flags
from tests.fakes.bus import (
    ERROR,
    INTERACTIVE,
    INTROSPECTABLE,
    OBJECT_MANAGER,
    PROPERTIES,
    BusDaemon,
    BusError,
    Caller,
    caller,
    close,
    private_bus,
    variants,
)
from tests.fakes.signatures import differences

# isort: split
from dbus_next.message import Message
from dbus_next.signature import SignatureTree, Variant

TREE = Path(__file__).parents[4]
MANAGER = "org.nbdd1.Manager"
DEVICE = "org.nbdd1.Device"
BACKUP = f"{ROOT_PATH}/device/backup"

STATUS = Status(
    name="backup",
    uri="nbd://storage.example/backup",
    uris=("nbd://storage.example/backup", "nbd://two.example/backup"),
    phase=Phase.DETACHED,
    read_only=False,
    timeout=0,
    dead_timeout=300,
    connections=1,
    configured=True,
)
ATTACHED = replace(
    STATUS,
    phase=Phase.DEGRADED,
    node="/dev/nbd7",
    size=1 << 62,
    block_size=4096,
    read_only=True,
    timeout=2_000_000,
    connections=16,
    live_connections=15,
    worker_pid=1 << 22,
    reconnects=3,
    attached_since=1_700_000_000_000_000,
    attached_by=1000,
    last_error=("org.nbdd1.Error.ConnectFailed", "It refused."),
    desktop=True,
    display_name="Photos",
    icon_name="folder-pictures",
)


class FakeDevice:
    def __init__(self, status: Status = STATUS) -> None:
        self.status = status
        self.name = status.name
        self.counted: dict[str, int] = {"reads": 1, "read-bytes": 1 << 40}
        self.error: NbddError | None = None

    async def statistics(self) -> dict[str, int]:
        if self.error is not None:
            raise self.error
        return self.counted


class FakeManager:
    """Records its calls, and answers as a test sets it."""

    def __init__(self) -> None:
        self.known = {"backup": FakeDevice(), "a-b.c": FakeDevice(replace(STATUS, name="a-b.c"))}
        self.calls: list[tuple[Any, ...]] = []
        self.error: NbddError | None = None
        self.exports: list[Export] = []

    def device(self, name: str) -> FakeDevice:
        if name not in self.known:
            raise NoSuchDevice(f"There is no device {name!r}.")
        return self.known[name]

    def _asked(self, *call: Any) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    async def attach(self, name: str, options: Mapping[str, object], *, by: int = 0) -> FakeDevice:
        self._asked("attach", name, options, by)
        return self.known[name]

    async def attach_uri(self, uri: str, options: Mapping[str, object], *, by: int = 0) -> FakeDevice:
        self._asked("attach_uri", uri, options, by)
        return self.known["a-b.c"]

    async def detach(self, name: str, *, force: bool = False, wait: float = 0) -> None:
        self._asked("detach", name, force, wait)

    async def set_timeout(self, name: str, seconds: int) -> None:
        self._asked("set_timeout", name, seconds)

    async def reconnect(self, name: str) -> None:
        self._asked("reconnect", name)

    async def resize(self, name: str) -> int:
        self._asked("resize", name)
        return 2 << 20

    async def reload(self) -> Changes:
        self._asked("reload")
        return Changes(("new",), ("other", "another"), ())

    async def list_exports(self, uri: str) -> list[Export]:
        self._asked("list_exports", uri)
        return self.exports


EVE, BOB = 1000, 1001


class FakeAuthority:
    def __init__(self) -> None:
        self.asked: list[tuple[str, bool, str, Mapping[str, str]]] = []
        self.error: NbddError | None = None
        self.uid = EVE

    async def user(self, _caller: Asker) -> int:
        return self.uid

    async def check(self, caller: Asker, action: str, details: Mapping[str, str]) -> None:
        self.asked.append((caller.name, caller.interactive, action, details))
        if self.error is not None:
            raise self.error


class World:
    """The service under test with its fakes, and a caller."""

    def __init__(self, bus: Any, client: Caller) -> None:
        self.bus = bus
        self.client = client
        self.manager = FakeManager()
        self.authority = FakeAuthority()
        self.exporter = ObjectExporter(bus)

    async def call(self, member: str, *body: Any, types: str = "", **more: Any) -> Any:
        return await self.client.ask(self.bus.unique_name, ROOT_PATH, MANAGER, member, *body, types=types, **more)

    async def fails(self, member: str, *body: Any, types: str = "") -> tuple[str, str]:
        with pytest.raises(BusError) as caught:
            await self.call(member, *body, types=types)
        return caught.value.name, str(caught.value)


@pytest.fixture(scope="module")
def bus() -> Iterator[BusDaemon]:
    with private_bus() as daemon:
        yield daemon


@asynccontextmanager
async def world(address: str) -> AsyncIterator[World]:
    bus: Any = ServiceBus(ROOT_PATH)
    await bus.connect()
    async with caller(address) as client:
        made = World(bus, client)
        bus.add_object(ROOT_PATH, ManagerInterface(cast("Manager", made.manager), made.authority))
        bus.open()
        try:
            yield made
        finally:
            await bus.finish()
            await close(bus)


def written(interface: str) -> ET.Element:
    found = ET.parse(TREE / "dbus" / f"{interface}.xml").getroot().find("interface")
    assert found is not None
    return found


def members(interface: ET.Element) -> dict[str, Any]:
    """Everything that a caller can see of an interface."""
    return {
        f"{element.tag} {element.attrib['name']}": (
            element.attrib.get("type"),
            element.attrib.get("access"),
            [(arg.attrib["name"], arg.attrib["type"], arg.attrib["direction"]) for arg in element.iter("arg")],
            {note.attrib["name"]: note.attrib["value"] for note in element.iter("annotation")},
        )
        for element in interface
    }


@pytest.mark.parametrize(
    ("fake", "real"),
    [(FakeManager, Manager), (FakeDevice, Device), (FakeAuthority, Authority), (FakeAuthority, Polkit)],
)
def test_fakes_have_the_signatures_of_the_classes(fake: type, real: type) -> None:
    assert differences(fake, real) == []


# The XML is the reference


@pytest.mark.parametrize(("path", "interface"), [(ROOT_PATH, MANAGER), (BACKUP, DEVICE)])
async def test_introspection_equals_the_xml_member_by_member(address: str, path: str, interface: str) -> None:
    async with world(address) as here:
        here.exporter.added(cast("Device", FakeDevice()))
        told = ET.fromstring(await here.client.ask(here.bus.unique_name, path, INTROSPECTABLE, "Introspect"))
        found = [element for element in told.findall("interface") if element.attrib["name"] == interface]
        assert [members(element) for element in found] == [members(written(interface))]


@pytest.mark.parametrize("interface", [MANAGER, DEVICE])
def test_xml_names_every_argument_and_follows_the_conventions(interface: str) -> None:
    for element in written(interface):
        if element.tag == "annotation":
            continue
        assert element.attrib["name"][0].isupper()
        assert element.attrib["name"].isalnum()
        for arg in element.iter("arg"):
            assert arg.attrib["name"].isidentifier()
            SignatureTree._get(arg.attrib["type"])
        if element.tag == "property":
            assert element.attrib["access"] == "read"


def properties(interface: str) -> dict[str, str]:
    return {element.attrib["name"]: element.attrib["type"] for element in written(interface).iter("property")}


@pytest.mark.parametrize("status", [STATUS, ATTACHED], ids=["detached", "attached"])
async def test_device_has_every_property_of_the_xml_with_its_type(address: str, status: Status) -> None:
    async with world(address) as here:
        here.exporter.added(cast("Device", FakeDevice(status)))
        to = here.bus.unique_name
        told = await here.client.ask(to, BACKUP, PROPERTIES, "GetAll", DEVICE, types="s")
        assert {name: variant.signature for name, variant in told.items()} == properties(DEVICE)
        assert {name: variant.value for name, variant in told.items()} == {
            "Name": "backup",
            "URI": "nbd://storage.example/backup",
            "URIs": ["nbd://storage.example/backup", "nbd://two.example/backup"],
            "State": str(status.state),
            "Node": status.node,
            "Size": status.size,
            "BlockSize": status.block_size,
            "ReadOnly": status.read_only,
            "Timeout": status.timeout,
            "DeadTimeout": 300,
            "Connections": status.connections,
            "LiveConnections": status.live_connections,
            "Encryption": "none",
            "WorkerPID": status.worker_pid,
            "Reconnects": status.reconnects,
            "AttachedSince": status.attached_since,
            "AttachedBy": status.attached_by,
            "FailsAt": 0,
            "Configured": True,
            "LastError": list(status.last_error),
            "Desktop": status.desktop,
            "DisplayName": status.display_name or "backup",
            "IconName": status.icon_name,
        }
        objects = await here.client.ask(to, ROOT_PATH, OBJECT_MANAGER, "GetManagedObjects")
        assert objects == {BACKUP: {DEVICE: told}}


def test_status_fields_are_all_properties() -> None:
    assert len(fields(Status)) == len(properties(DEVICE))


async def test_manager_has_every_property_of_the_xml(address: str) -> None:
    async with world(address) as here:
        told = await here.client.ask(here.bus.unique_name, ROOT_PATH, PROPERTIES, "GetAll", MANAGER, types="s")
        assert told == {"Version": Variant("s", __version__)}
        assert properties(MANAGER) == {"Version": "s"}


# Devices come, change and go


async def test_exporter_adds_changes_and_removes_objects_of_devices(address: str) -> None:
    async with world(address) as here:
        await here.client.listen(here.bus.unique_name)
        device = FakeDevice()
        there = cast("Device", device)
        here.exporter.added(there)
        signal = await here.client.signals.get()
        assert (signal.path, signal.member, signal.body[0]) == (ROOT_PATH, "InterfacesAdded", BACKUP)
        assert {name: value.signature for name, value in signal.body[1][DEVICE].items()} == properties(DEVICE)

        old, device.status = device.status, replace(STATUS, phase=Phase.ATTACHING, worker_pid=42)
        here.exporter.changed(there, old)
        here.exporter.changed(there, device.status)
        signal = await here.client.signals.get()
        assert (signal.path, signal.interface, signal.member) == (BACKUP, PROPERTIES, "PropertiesChanged")
        assert signal.body == [DEVICE, {"State": Variant("s", "connecting"), "WorkerPID": Variant("u", 42)}, []]

        old, device.status = device.status, replace(STATUS, last_error=("a.b", "x\0y"))
        here.exporter.changed(there, old)
        signal = await here.client.signals.get()
        assert signal.body[1]["LastError"] == Variant("(ss)", ["a.b", "x\ufffdy"])

        here.exporter.removed(there)
        signal = await here.client.signals.get()
        assert (signal.path, signal.member, signal.body) == (ROOT_PATH, "InterfacesRemoved", [BACKUP, [DEVICE]])
        # Whoever speaks of it later finds nobody, and harms nothing.
        here.exporter.changed(there, old)
        assert await here.client.ask(here.bus.unique_name, ROOT_PATH, OBJECT_MANAGER, "GetManagedObjects") == {}
        assert here.client.signals.empty()


async def test_statistics_are_returned_to_every_caller(address: str) -> None:
    async with world(address) as here:
        device = FakeDevice()
        here.exporter.added(cast("Device", device))
        here.authority.error = AccessDenied("No.")
        told = await here.client.ask(here.bus.unique_name, BACKUP, DEVICE, "GetStatistics")
        assert told == {"reads": 1, "read-bytes": 1 << 40}
        device.error = NotAttached("It is not.")
        with pytest.raises(BusError) as caught:
            await here.client.ask(here.bus.unique_name, BACKUP, DEVICE, "GetStatistics")
        assert (caught.value.name, str(caught.value)) == ("org.nbdd1.Error.NotAttached", "It is not.")


# Methods


async def test_manager_gets_the_arguments_and_the_caller_its_replies(address: str) -> None:
    async with world(address) as here:
        assert await here.call("Attach", "backup", {}, types="sa{sv}") == BACKUP
        assert await here.call("AttachURI", "nbd://x/y", {}, types="sa{sv}") == f"{ROOT_PATH}/device/a_2db_2ec"
        assert await here.call("Detach", "backup", {}, types="sa{sv}") is None
        options = variants({"force": ("b", True), "wait": ("u", 7)})
        assert await here.call("Detach", "backup", options, types="sa{sv}") is None
        assert await here.call("SetTimeout", "backup", 30, types="su") is None
        assert await here.call("Reconnect", "backup", {}, types="sa{sv}") is None
        assert await here.call("Resize", "backup", {}, types="sa{sv}") == 2 << 20
        assert await here.call("Reload") == [["new"], ["other", "another"], []]
        assert here.manager.calls == [
            ("attach", "backup", {}, EVE),
            ("attach_uri", "nbd://x/y", {}, EVE),
            ("detach", "backup", False, 0),
            ("detach", "backup", True, 7),
            ("set_timeout", "backup", 30),
            ("reconnect", "backup"),
            ("resize", "backup"),
            ("reload",),
        ]


async def test_list_exports_leaves_out_what_the_server_did_not_say(address: str) -> None:
    said = Flags(0xFFFF)
    async with world(address) as here:
        here.manager.exports = [
            Export("", 512, said),
            Export("a\udcffb", (1 << 63) - 1, said, 1, 4096, 0xFFFFFFFF, description="x\0y\x1b[31m"),
            Export("x", 0, Flags(0), problem="It was not asked."),
        ]
        told = await here.call("ListExports", "nbd://x", {}, types="sa{sv}")
        assert told == [
            variants({"name": ("s", ""), "description": ("s", ""), "size": ("t", 512), "flags": ("u", 0xFFFF)}),
            variants(
                {
                    "name": ("s", "a?b"),
                    "description": ("s", "x\ufffdy\x1b[31m"),
                    "size": ("t", (1 << 63) - 1),
                    "flags": ("u", 0xFFFF),
                    "minimum-block-size": ("u", 1),
                    "preferred-block-size": ("u", 4096),
                    "maximum-block-size": ("u", 0xFFFFFFFF),
                }
            ),
            variants({"name": ("s", "x"), "description": ("s", ""), "problem": ("s", "It was not asked.")}),
        ]


async def test_list_exports_too_long_for_the_bus_is_an_error(address: str) -> None:
    async with world(address) as here:
        # As much as fits: 4000 bytes of name, and what goes with them.
        fits = (30 << 20) // 4100
        here.manager.exports = [Export("x" * 4000, 0, Flags(0))] * fits
        assert len(await here.call("ListExports", "nbd://x", {}, types="sa{sv}")) == fits
        here.manager.exports *= 2
        name, text = await here.fails("ListExports", "nbd://x", {}, types="sa{sv}")
        assert name == "org.nbdd1.Error.NegotiationFailed"
        assert f"{2 * fits} exports" in text


# Options


MAPPING = {"name": Variant("s", "Photos"), "user-mountable": Variant("b", False)}
VALUES: dict[str, list[Any]] = {"s": ["text"], "b": [True, False], "u": [0, 4294967295], "a{sv}": [{}, MAPPING]}
WRONG = {"s": Variant("u", 1), "b": Variant("u", 1), "u": Variant("i", 1), "a{sv}": Variant("a{ss}", {})}
TAKES = {"Attach": ATTACH_OPTIONS, "AttachURI": ATTACH_URI_OPTIONS, "Detach": DETACH_OPTIONS, "ListExports": {}}
FIRST = {"Attach": "backup", "AttachURI": "nbd://x/y", "Detach": "backup", "ListExports": "nbd://x"}


@pytest.mark.parametrize("member", TAKES)
async def test_options_of_their_types_get_through(address: str, member: str) -> None:
    async with world(address) as here:
        for key, kind in TAKES[member].items():
            for value in VALUES[kind] if key != "wait" else (0, 7, MAX_WAIT):
                await here.call(member, FIRST[member], {key: Variant(kind, value)}, types="sa{sv}")
                call = here.manager.calls[-1]
                if member == "Detach":
                    assert call[2:] == {"force": (value, 0), "wait": (False, value)}[key]
                else:
                    plain = {"name": "Photos", "user-mountable": False} if value is MAPPING else value
                    assert call[2] == {key: plain}
        everything = {key: Variant(kind, VALUES[kind][0]) for key, kind in TAKES[member].items()}
        await here.call(member, FIRST[member], everything, types="sa{sv}")


@pytest.mark.parametrize("member", TAKES)
async def test_options_unknown_or_of_wrong_types_are_refused_before_polkit_is_asked(address: str, member: str) -> None:
    async with world(address) as here:
        for options, named in [
            ({"colour": Variant("s", "red")}, "'colour'"),
            ({"": Variant("s", "red")}, "''"),
            ({"uri": Variant("s", "nbd://other")}, "'uri'"),
            ({"attach": Variant("s", "boot")}, "'attach'"),
            *(({key: WRONG[kind]}, f"'{key}'") for key, kind in TAKES[member].items()),
            *(({key: Variant("v", Variant(kind, VALUES[kind][0]))}, key) for key, kind in TAKES[member].items()),
        ]:
            name, text = await here.fails(member, FIRST[member], options, types="sa{sv}")
            assert name == f"{ERROR}InvalidArgs", options
            assert named in text
            assert text.endswith(".")
        assert here.manager.calls == []
        assert here.authority.asked == []


def test_options_error_names_the_type_and_the_known_options() -> None:
    with pytest.raises(InvalidArgs, match=r"^There is no option 'x'; known are force, wait\.$"):
        read_options({"x": Variant("s", "")}, DETACH_OPTIONS)
    with pytest.raises(InvalidArgs, match=r"^There is no option 'x'; known are none\.$"):
        read_options({"x": Variant("s", "")}, {})
    with pytest.raises(InvalidArgs, match=r"^The option 'wait' must be an unsigned number \(u\), not .* 'i'\.$"):
        read_options({"wait": Variant("i", 1)}, DETACH_OPTIONS)


def test_options_are_the_keys_of_the_yaml_files() -> None:
    """What attaches by hand can be written down, under the same name."""
    assert set(ATTACH_URI_OPTIONS) - {"name"} == set(shipped().device_keys) - {"uri", "attach", "tls"}
    assert set(ATTACH_OPTIONS) == set(ATTACH_URI_OPTIONS) - {"name", "desktop"}


def test_xml_documents_every_option_with_its_type() -> None:
    text = (TREE / "dbus" / "org.nbdd1.Manager.xml").read_text()
    for key, kind in (ATTACH_URI_OPTIONS | DETACH_OPTIONS).items():
        assert f'"{key}" ({kind}' in text


# Who may


DEVICE_TOLD = {"device": "backup", "configured": "yes"}
ASKS: list[tuple[str, tuple[Any, ...], str, str, Mapping[str, str]]] = [
    ("Attach", ("backup", {}), "sa{sv}", "org.nbdd1.attach", DEVICE_TOLD),
    ("AttachURI", ("nbd://x/y", {}), "sa{sv}", "org.nbdd1.attach-uri", {"uri": "nbd://x/y", "server": "x:10809"}),
    ("Detach", ("backup", {}), "sa{sv}", "org.nbdd1.detach", DEVICE_TOLD),
    ("Detach", ("backup", {"force": Variant("b", False)}), "sa{sv}", "org.nbdd1.detach", DEVICE_TOLD),
    ("Detach", ("backup", {"force": Variant("b", True)}), "sa{sv}", "org.nbdd1.force-detach", DEVICE_TOLD),
    ("SetTimeout", ("backup", 1), "su", "org.nbdd1.set-timeout", DEVICE_TOLD),
    ("Reconnect", ("backup", {}), "sa{sv}", "org.nbdd1.reconnect", DEVICE_TOLD),
    ("Resize", ("backup", {}), "sa{sv}", "org.nbdd1.resize", DEVICE_TOLD),
    ("Reload", (), "", "org.nbdd1.reload", {}),
    ("ListExports", ("nbd://x", {}), "sa{sv}", "org.nbdd1.list-exports", {"uri": "nbd://x/", "server": "x:10809"}),
]


@pytest.mark.parametrize("member", ["AttachURI", "ListExports"])
async def test_polkit_details_never_hold_a_text_that_is_not_a_uri(address: str, member: str) -> None:
    """A person reads it and types a password."""
    async with world(address) as here:
        for text in ("nbd://x/\nAll is well", "nbd://a:secret@x/", "x" * 70000, ""):
            name, told = await here.fails(member, text, {}, types="sa{sv}")
            assert name == ("org.freedesktop.DBus.Error.LimitsExceeded" if len(text) > 65536 else
                            "org.nbdd1.Error.InvalidURI")  # fmt: skip
            assert "secret" not in told
        assert here.authority.asked == []
        await here.call(member, "NBD://X.Example:7/ä?", {}, types="sa{sv}")
        details = here.authority.asked[-1][-1]
        assert details == {"uri": "nbd://x.example:7/%C3%A4", "server": "x.example:7"}


def test_polkit_messages_use_only_the_details_of_each_call() -> None:
    told: dict[str, set[str]] = {}
    for _, _, _, action, details in ASKS:
        told.setdefault(action, set()).update(details)
    root = ET.parse(TREE / "dbus" / "org.nbdd1.policy").getroot()
    for element in root.iterfind("action"):
        named = set(re.findall(r"\$\((\w+)\)", element.findtext("message") or ""))
        known = told[element.attrib["id"]]
        assert named <= known
        assert bool(named) == bool(known), "it says which"


@pytest.mark.parametrize(("member", "body", "types", "action", "details"), ASKS)
async def test_methods_ask_for_their_own_action_and_do_nothing_if_denied(
    address: str, *, member: str, body: tuple[Any, ...], types: str, action: str, details: Mapping[str, str]
) -> None:
    async with world(address) as here:
        here.authority.error = AccessDenied("You may not.")
        assert await here.fails(member, *body, types=types) == (f"{ERROR}AccessDenied", "You may not.")
        assert here.manager.calls == []
        here.authority.error = None
        await here.call(member, *body, types=types, flags=INTERACTIVE)
        assert len(here.manager.calls) == 1
        name = here.client.name
        assert here.authority.asked == [(name, False, action, details), (name, True, action, details)]


async def test_detach_without_polkit_is_for_the_attaching_user_and_not_by_force(address: str) -> None:
    async with world(address) as here:
        here.authority.error = AccessDenied("You may not.")
        here.manager.known["backup"].status = ATTACHED
        await here.call("Detach", "backup", {}, types="sa{sv}")
        assert here.manager.calls == [("detach", "backup", False, 0)]
        assert here.authority.asked == []
        force = variants({"force": ("b", True)})
        assert (await here.fails("Detach", "backup", force, types="sa{sv}"))[1] == "You may not."
        here.authority.uid = BOB
        assert (await here.fails("Detach", "backup", {}, types="sa{sv}"))[1] == "You may not."
        assert len(here.manager.calls) == 1


def test_polkit_policy_has_an_action_for_every_method() -> None:
    policy = ET.parse(TREE / "dbus" / "org.nbdd1.policy").getroot()
    assert {action for *_, action, _ in ASKS} == {element.attrib["id"] for element in policy.findall("action")}
    assert {member for member, *_ in ASKS} == {element.attrib["name"] for element in written(MANAGER).iter("method")}
    # A message can show what it is about; it must not ask for details that are never sent.
    sent = {key for *_, details in ASKS for key in details}
    shown = " ".join(element.text or "" for element in policy.iter("message")).split("$(")[1:]
    assert {text.split(")")[0] for text in shown} <= sent


@pytest.mark.parametrize(("member", "body", "types"), [ask[:3] for ask in ASKS if ask[1][:1] == ("backup",)])
async def test_missing_device_is_an_error_before_polkit_is_asked(
    address: str, member: str, body: tuple[Any, ...], types: str
) -> None:
    async with world(address) as here:
        name, text = await here.fails(member, "nope", *body[1:], types=types)
        assert name == "org.nbdd1.Error.NoSuchDevice"
        assert "'nope'" in text
        assert here.authority.asked == []


# Errors


def errors() -> list[type[NbddError]]:
    return [found for _, found in inspect.getmembers(nbdd.errors, inspect.isclass) if issubclass(found, NbddError)]


CONTRACT = {
    "NoSuchDevice", "AlreadyAttached", "NotAttached", "Busy", "NoFreeDevice", "ConnectFailed", "NegotiationFailed",
    "NoSuchExport", "TLSFailed", "TimedOut", "KernelError", "InvalidConfig", "InvalidURI",
}  # fmt: skip
"""org.nbdd1.Error.*, as the design fixes them."""
STANDARD = {"InvalidArgs", "AccessDenied", "InteractiveAuthorizationRequired"}


@pytest.mark.parametrize("kind", errors())
async def test_errors_cross_the_bus_by_name_and_text(address: str, kind: type[NbddError]) -> None:
    async with world(address) as here:
        here.manager.error = kind("First line.\nSecond, über\0 lines.")
        name, text = await here.fails("Attach", "backup", {}, types="sa{sv}")
        if kind in (ExportChanged, ConnectionNotServiced):
            # For callers it is what it is derived from.
            assert name == f"org.nbdd1.Error.{kind.__mro__[1].__name__}"
        elif kind.__name__ in CONTRACT:
            assert name == f"org.nbdd1.Error.{kind.__name__}"
        else:
            assert name == ERROR + (kind.__name__ if kind.__name__ in STANDARD else "Failed")
        assert text == "First line.\nSecond, über\ufffd lines."


def test_errors_are_those_of_the_contract() -> None:
    own = {kind.dbus_name.removeprefix("org.nbdd1.Error.") for kind in errors() if "nbdd1" in kind.dbus_name}
    assert own == CONTRACT
    assert {kind.dbus_name.removeprefix(ERROR) for kind in errors() if "nbdd1" not in kind.dbus_name} == {
        *STANDARD,
        "Failed",
    }


async def test_reload_of_a_bad_configuration_reports_all_its_problems(address: str) -> None:
    async with world(address) as here:
        here.manager.error = InvalidConfig("nbdd.yaml:1:1: one.", "nbdd.yaml:2:3: two.")
        assert await here.fails("Reload") == (
            "org.nbdd1.Error.InvalidConfig",
            "nbdd.yaml:1:1: one.\nnbdd.yaml:2:3: two.",
        )


@pytest.mark.parametrize("field", [0, 1])
def test_xml_texts_name_errors_that_there_are(field: int) -> None:
    interface = (MANAGER, DEVICE)[field]
    text = (TREE / "dbus" / f"{interface}.xml").read_text()
    named = {
        word
        for chunk in text.split("Errors: ")[1:]
        for word in chunk.split("-->")[0].split(".")[0].replace(",", " ").split()
        if word[0].isupper()
    }
    assert named <= CONTRACT | {"Attach", "Reconnect"}


# Object paths


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("backup", "backup"),
        ("nbd1", "nbd1"),
        ("dbus.service", "dbus_2eservice"),  # org.freedesktop.systemd1 has these two
        ("user-1000.slice", "user_2d1000_2eslice"),
        ("1st", "_31st"),
        ("0", "_30"),
        ("a_b", "a_5fb"),
        ("a:b", "a_3ab"),
        ("A-Z.", "A_2dZ_2e"),
    ],
)
def test_device_path_escapes_as_systemd_does(name: str, label: str) -> None:
    assert device_path(name) == f"{ROOT_PATH}/device/{label}"


@pytest.fixture(scope="module")
def encode() -> Callable[[str], str]:
    """sd_bus_path_encode(3) itself; libsystemd is there wherever dbus-daemon is."""
    library = ctypes.CDLL("libsystemd.so.0")
    library.sd_bus_path_encode.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)]
    libc = ctypes.CDLL(None)
    libc.free.argtypes = [ctypes.c_void_p]

    def encode(name: str) -> str:
        made = ctypes.c_void_p()
        assert library.sd_bus_path_encode(f"{ROOT_PATH}/device".encode(), name.encode(), ctypes.byref(made)) >= 0
        try:
            return ctypes.string_at(cast("int", made.value)).decode()
        finally:
            libc.free(made)

    return encode


@settings(deadline=None)  # a busy machine is no fault of the code
@given(name=st.from_regex(NAME_PATTERN, fullmatch=True))
def test_device_path_escapes_every_name_as_systemd_does(name: str, encode: Callable[[str], str]) -> None:
    name = name.removesuffix("\n")
    assert device_path(name) == encode(name)
    Message(path=device_path(name), member="CanBeSent")
