# SPDX-License-Identifier: MIT
"""The D-Bus contract: what the XML in dbus/ promises, the running service keeps, to any program and any user."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.guest import Guest
from tests.system.lab import BusError, Call, Lab, Server, object_path

DBUS = Path(__file__).parents[2] / "dbus"
MANAGER, DEVICE = "org.nbdd1.Manager", "org.nbdd1.Device"
ROOT = "/org/nbdd1"
PROPERTIES = "org.freedesktop.DBus.Properties"
EMITS_CHANGED = "org.freedesktop.DBus.Property.EmitsChangedSignal"
FREEDESKTOP = "org.freedesktop.DBus.Error."
ODD = "a.b_c-d:e"
"""A name with every kind of character that a path can't have."""

REFERENCE: dict[str, ET.Element] = {
    interface.attrib["name"]: interface
    for path in sorted(DBUS.glob("*.xml"))
    for interface in ET.parse(path).getroot().iter("interface")
}


@dataclass(frozen=True)
class Scene:
    """Three devices: `idle` has a definition and is detached, `work` is attached, ODD was attached by its URI."""

    lab: Lab
    server: Server
    other: Server
    began: int
    """When they were attached, in microseconds, by the guest's clock."""


@pytest.fixture(scope="module")
def lab(guest: Guest) -> Iterator[Lab]:
    """One for the whole file: its tests ask more than they change."""
    lab = Lab(guest)
    lab.mark()
    yield lab
    lab.cleanup()


@pytest.fixture(scope="module")
def scene(lab: Lab) -> Scene:
    server = lab.nbdkit("memory 64M")
    other = lab.serve(
        "nbdkit -f -r -U /run/{unit}.sock --filter=blocksize-policy memory 8M blocksize-minimum=4096",
        "nbd+unix:///?socket=/run/{unit}.sock",
    )
    lab.define(
        f"devices:\n  idle:\n    uri: {server.uri}\n    timeout: 11\n"
        f"  work:\n    uri: {server.uri}\n    timeout: 7\n    dead-timeout: 60\n    connections: 2\n"
    )
    began = int(lab.guest.run("date +%s%6N").stdout)
    assert lab.attach("work") == object_path("work")
    assert lab.attach_uri(other.uri, ODD) == object_path(ODD)
    return Scene(lab, server, other, began)


# Introspection


def described(interface: ET.Element) -> dict[str, Any]:
    """Everything that an interface says of its members; comments are not part of it."""
    return {
        f"{member.tag} {member.attrib['name']}": {
            "attributes": dict(member.attrib),
            "args": [dict(arg.attrib) for arg in member.findall("arg")],
            "annotations": {note.attrib["name"]: note.attrib["value"] for note in member.findall("annotation")},
        }
        for member in interface
    }


def introspected(lab: Lab, path: str) -> ET.Element:
    reply = lab.guest.run(
        f"busctl --json=short call org.nbdd1 {path} org.freedesktop.DBus.Introspectable Introspect"
    ).stdout
    return ET.fromstring(json.loads(reply)["data"][0])


@pytest.mark.parametrize("name", ["", "idle", "work", ODD])
def test_introspection_is_the_xml_member_by_member(scene: Scene, name: str) -> None:
    path, expected = (object_path(name), DEVICE) if name else (ROOT, MANAGER)
    found = {element.attrib["name"]: element for element in introspected(scene.lab, path).iter("interface")}
    assert described(found.pop(expected)) == described(REFERENCE[expected])
    standard = {"Introspectable", "Peer", "Properties"} | (set() if name else {"ObjectManager"})
    assert found.keys() == {f"org.freedesktop.DBus.{interface}" for interface in standard}


@pytest.mark.parametrize("device", ["", "work"])
def test_introspection_by_busctl_shows_the_members_of_the_xml(scene: Scene, device: str) -> None:
    path, expected = (object_path(device), DEVICE) if device else (ROOT, MANAGER)
    table = scene.lab.guest.run(f"busctl --no-legend introspect org.nbdd1 {path} {expected}").stdout
    found = {}
    for line in table.splitlines():
        member, kind, signature, rest = line.split(None, 3)
        value, flags = rest.rsplit(None, 1)
        found[member.removeprefix(".")] = (kind, signature, value if kind == "method" else flags)
    wanted = {}
    for name, member in described(REFERENCE[expected]).items():
        kind, _, title = name.partition(" ")
        if kind == "method":
            sides = {"in": "", "out": ""}
            for arg in member["args"]:
                sides[arg["direction"]] += arg["type"]
            wanted[title] = (kind, sides["in"] or "-", sides["out"] or "-")
        else:
            constant = member["annotations"].get(EMITS_CHANGED) == "const"
            wanted[title] = (kind, member["attributes"]["type"], "const" if constant else "emits-change")
    assert found == wanted


def test_introspection_of_each_node_has_its_children_and_no_others(scene: Scene) -> None:
    def children(path: str) -> list[str]:
        return [node.attrib["name"] for node in introspected(scene.lab, path).findall("node")]

    assert children(ROOT) == ["device"]
    assert sorted(children(f"{ROOT}/device")) == ["a_2eb_5fc_2dd_3ae", "idle", "work"]
    assert children(f"{ROOT}/device/work") == []


def test_object_paths_are_escaped_as_systemd_does_it(scene: Scene) -> None:
    assert object_path(ODD) == "/org/nbdd1/device/a_2eb_5fc_2dd_3ae"
    told = scene.lab.guest.run(f"busctl get-property org.nbdd1 {object_path(ODD)} {DEVICE} Name").stdout
    assert told.strip() == f's "{ODD}"'


# Properties


def managed(lab: Lab) -> dict[str, dict[str, dict[str, Any]]]:
    """Path to interface to property to {type, data}."""
    reply = lab.guest.run(
        f"busctl --json=short call org.nbdd1 {ROOT} org.freedesktop.DBus.ObjectManager GetManagedObjects"
    ).stdout
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(reply)["data"][0]
    return found


def test_object_manager_lists_idle_attached_and_ad_hoc_devices_with_every_property(scene: Scene) -> None:
    objects = managed(scene.lab)
    assert objects.keys() == {object_path(name) for name in ("idle", "work", ODD)}
    types = {member.attrib["name"]: member.attrib["type"] for member in REFERENCE[DEVICE].findall("property")}
    for interfaces in objects.values():
        assert interfaces.keys() == {DEVICE}
        assert {name: value["type"] for name, value in interfaces[DEVICE].items()} == types


def test_properties_of_an_attached_device_are_true(scene: Scene) -> None:
    told = scene.lab.device("work")
    node, worker = told["Node"], told["WorkerPID"]
    checked = scene.lab.guest.run(
        f"blockdev --getsize64 --getss --getro {node}; readlink -f /dev/disk/by-nbd/work; cat /proc/{worker}/comm;"
        "date +%s%6N"
    ).stdout.splitlines()
    size, block_size, read_only, link, worker_name, now = checked
    since = told.pop("AttachedSince")
    assert scene.began <= since <= int(now)
    assert worker_name == "nbdd:work"
    assert link == node
    assert told == {
        "Name": "work",
        "URI": scene.server.uri,
        "URIs": [scene.server.uri],
        "State": "attached",
        "Node": node,
        "Size": int(size),
        "BlockSize": int(block_size),
        "ReadOnly": read_only == "1",
        "Timeout": 7,
        "DeadTimeout": 60,
        "Connections": 2,
        "LiveConnections": 2,
        "Encryption": "none",
        "WorkerPID": worker,
        "Reconnects": 0,
        "AttachedBy": 0,
        "FailsAt": 0,
        "Configured": True,
        "LastError": ["", ""],
        "Desktop": False,
        "DisplayName": "work",
        "IconName": "",
    }
    assert (told["Size"], told["BlockSize"], told["ReadOnly"]) == (64 << 20, 512, False)


def test_properties_of_an_ad_hoc_device_are_those_of_its_export(scene: Scene) -> None:
    told = scene.lab.device(ODD)
    checked = scene.lab.guest.run(f"blockdev --getsize64 --getss --getro {told['Node']}").stdout.split()
    assert checked == ["8388608", "4096", "1"]
    expected = {
        "URI": scene.other.uri,
        "Size": 8 << 20,
        "BlockSize": 4096,
        "ReadOnly": True,
        "Timeout": 0,
        "DeadTimeout": 300,
        "Configured": False,
    }
    assert {key: told[key] for key in expected} == expected


def test_properties_of_a_detached_device_are_its_definition_and_nothing_more(scene: Scene) -> None:
    assert scene.lab.device("idle") == {
        "Name": "idle",
        "URI": scene.server.uri,
        "URIs": [scene.server.uri],
        "State": "detached",
        "Node": "",
        "Size": 0,
        "BlockSize": 0,
        "ReadOnly": False,
        "Timeout": 11,
        "DeadTimeout": 300,
        "Connections": 1,
        "LiveConnections": 0,
        "Encryption": "none",
        "WorkerPID": 0,
        "Reconnects": 0,
        "AttachedSince": 0,
        "AttachedBy": 0,
        "FailsAt": 0,
        "Configured": True,
        "LastError": ["", ""],
        "Desktop": False,
        "DisplayName": "idle",
        "IconName": "",
    }


def test_version_is_that_of_the_package(scene: Scene) -> None:
    told = scene.lab.guest.run(
        f"busctl get-property org.nbdd1 {ROOT} {MANAGER} Version; dpkg-query -Wf '${{Version}}' nbdd; nbdd --version"
    ).stdout.split()
    version = told[1].strip('"')
    assert told == ["s", f'"{version}"', version + "nbdd", version]


def test_last_error_is_that_of_the_attach_until_one_works(scene: Scene) -> None:
    lab = scene.lab
    lab.guest.write("/etc/nbdd/devices.d/late.yaml", "devices:\n  late:\n    uri: nbd+unix:///?socket=/run/late.sock\n")
    lab.guest.run("systemctl reload nbdd")
    with pytest.raises(BusError) as caught:
        lab.attach("late")
    failed = lab.device("late")
    assert failed["State"] == "failed"
    assert failed["LastError"] == [caught.value.name, caught.value.text]
    assert caught.value.name == "org.nbdd1.Error.ConnectFailed"
    assert (failed["Node"], failed["WorkerPID"], failed["AttachedSince"]) == ("", 0, 0)
    server = lab.serve("nbdkit -f -U /run/late.sock memory 1M", "nbd+unix:///?socket=/run/late.sock")
    lab.attach("late")
    attached = lab.device("late")
    lab.detach("late")
    lab.stop(server)
    lab.guest.run("rm /etc/nbdd/devices.d/late.yaml; systemctl reload nbdd")
    assert (attached["State"], attached["LastError"]) == ("attached", ["", ""])


# Calls


def test_attach_options_hold_until_the_device_is_detached(scene: Scene) -> None:
    lab = scene.lab
    options = {
        "device": "<'/dev/nbd9'>",
        "read-only": "<true>",
        "connections": "<uint32 3>",
        "timeout": "<uint32 21>",
        "dead-timeout": "<uint32 22>",
        "block-size": "<uint32 4096>",
    }
    before = lab.device("idle")
    lab.attach("idle", "{" + ", ".join(f"'{key}': {value}" for key, value in options.items()) + "}")
    told = lab.device("idle")
    lab.detach("idle")
    keys = ("Node", "ReadOnly", "Connections", "LiveConnections", "Timeout", "DeadTimeout", "BlockSize")
    assert [told[key] for key in keys] == ["/dev/nbd9", True, 3, 3, 21, 22, 4096]
    assert lab.device("idle") == before


def test_statistics_count_io_since_the_attach(scene: Scene) -> None:
    lab = scene.lab
    path = object_path("idle")

    def counted() -> dict[str, int]:
        reply = lab.guest.run(f"busctl --json=short call org.nbdd1 {path} {DEVICE} GetStatistics").stdout
        found: dict[str, int] = json.loads(reply)["data"][0]
        return found

    def use(node: str) -> None:
        lab.guest.run(
            f"set -e; dd if=/dev/zero of={node} bs=64k count=16 oflag=direct conv=fsync status=none;"
            f"dd if={node} of=/dev/null bs=64k count=8 iflag=direct status=none; blkdiscard -l 1M {node};"
            "udevadm settle"
        )

    for _ in range(2):
        # The second time on the same node, whose counters in the kernel go on from the first.
        lab.attach("idle", "{'device': <'/dev/nbd9'>}")
        before = counted()
        use("/dev/nbd9")
        after = counted()
        lab.detach("idle")
        keys = {"reads", "writes", "discards", "flushes", "read-bytes", "written-bytes", "discarded-bytes"}
        assert after.keys() == keys | {"in-flight", "io-time", "read-time", "write-time"}
        assert (before["writes"], before["written-bytes"], before["discarded-bytes"]) == (0, 0, 0)
        assert after["written-bytes"] == 1 << 20
        assert after["discarded-bytes"] == 1 << 20
        # udev reads too, when a writer has closed the device.
        assert after["read-bytes"] - before["read-bytes"] >= 512 << 10
        assert after["flushes"] >= 1
        assert after["in-flight"] == 0
        assert 0 < after["io-time"] < 60_000


def test_set_timeout_is_live_and_costs_no_io(scene: Scene) -> None:
    lab = scene.lab
    lab.attach("idle", "{'device': <'/dev/nbd9'>}")
    lab.guest.run(
        "systemd-run --quiet --collect --unit=steady -p StandardOutput=file:/run/steady "
        "fio --name=x --filename=/dev/nbd9 --rw=randrw --bs=4k --size=8M --direct=1 --iodepth=8 --ioengine=libaio "
        "--rate_iops=200 --verify=crc32c --verify_fatal=1 --time_based --runtime=600"
    )
    written = "$(awk '{print $5}' /sys/block/nbd9/stat)"
    property_now = f"busctl get-property org.nbdd1 {object_path('idle')} {DEVICE} Timeout"
    told = []
    try:
        lab.until(f"[ {written} -gt 50 ]", what="fio's writes")
        for seconds in (3, 90, 0, 2_000_000, 5):
            lab.call("SetTimeout", "'idle'", str(seconds))
            told.append(lab.guest.run(f"cat /sys/block/nbd9/queue/io_timeout; {property_now}").stdout.splitlines())
            lab.until(f": ${{start:={written}}}; [ {written} -gt $((start + 10)) ]", what="more of fio's writes")
    finally:
        lab.guest.run("systemctl kill -s INT steady")
        lab.until("! systemctl --quiet is-active steady", what="the end of fio")
        lab.detach("idle", "{'wait': <uint32 10>}")
    assert told == [
        ["3000", "u 3"],
        ["90000", "u 90"],
        # No limit is something that nbd's driver knows of; this is only how often it looks.
        ["1000", "u 0"],
        ["2000000000", "u 2000000"],
        ["5000", "u 5"],
    ]
    assert "err= 0:" in lab.guest.read("/run/steady")
    assert lab.device("idle")["Timeout"] == 11


def test_reload_replies_with_what_is_new_changed_and_gone(scene: Scene) -> None:
    lab = scene.lab
    more = "/etc/nbdd/devices.d/more.yaml"
    lab.guest.write(more, "devices: {m1: {uri: 'nbd://a/b'}, m2: {uri: 'nbd://a/b'}, m3: {uri: 'nbd://a/b'}}\n")
    first = lab.call("Reload")
    again = lab.call("Reload")
    lab.guest.write(more, "devices: {m2: {uri: 'nbd://a/other'}, m3: {uri: 'nbd://a/b'}, m4: {uri: 'nbd://a/b'}}\n")
    second = lab.call("Reload")
    uri = lab.device("m2")["URI"]
    lab.guest.run(f"rm {more}")
    third = lab.call("Reload")
    assert first == "(['m1', 'm2', 'm3'], @as [], @as [])"
    assert again == "(@as [], @as [], @as [])"
    assert second == "(['m4'], ['m2'], ['m1'])"
    assert uri == "nbd://a/other"
    assert third == "(@as [], @as [], ['m2', 'm3', 'm4'])"
    assert lab.devices().keys() == {"idle", "work", ODD}


SERVERS: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {
    # What is run before, the server, and what is told of each export, but for its flags.
    "nbdkit": (
        "rm -rf /run/listed; mkdir /run/listed; truncate -s 1M /run/listed/one; truncate -s 2M /run/listed/two",
        "nbdkit -f -i 127.0.0.1 -p {port} file dir=/run/listed",
        {
            "one": {"name": "one", "description": "", "size": 1 << 20},
            "two": {"name": "two", "description": "", "size": 2 << 20},
        },
    ),
    "nbd-server": (
        (
            "mkdir -p /run/exports; truncate -s 3M /run/exports/three;"
            "printf '[generic]\\nallowlist=true\\nport={port}\\nlistenaddr=127.0.0.1\\n' >/run/nbd-server.conf;"
            "printf '[three]\\nexportname=/run/exports/three\\n' >>/run/nbd-server.conf"
        ),
        "nbd-server -d -C /run/nbd-server.conf",
        {"three": {"name": "three", "description": ""}},
    ),
    "qemu-nbd": (
        "mkdir -p /run/exports; truncate -s 4M /run/exports/four",
        "qemu-nbd --persistent -f raw -x four -D Drawing -b 127.0.0.1 -p {port} /run/exports/four",
        {"four": {"name": "four", "description": "Drawing", "size": 4 << 20}},
    ),
}

EXPORT_TYPES = {
    "name": "s",
    "description": "s",
    "size": "t",
    "flags": "u",
    "minimum-block-size": "u",
    "preferred-block-size": "u",
    "maximum-block-size": "u",
    "problem": "s",
}


@pytest.mark.parametrize("server", SERVERS)
def test_list_exports_returns_what_the_server_lists(scene: Scene, server: str) -> None:
    lab = scene.lab
    prepare, command, expected = SERVERS[server]
    lab.guest.run(prepare.replace("{port}", "11800"))
    running = lab.serve(
        command.replace("{port}", "11800"), "nbd://127.0.0.1:11800/", ready="ss -ltnH sport = :11800 | grep -q ."
    )
    reply = lab.guest.run(
        f"busctl --json=short call org.nbdd1 {ROOT} {MANAGER} ListExports 'sa{{sv}}' {running.uri} 0"
    ).stdout
    lab.stop(running)
    exports = {export["name"]["data"]: export for export in json.loads(reply)["data"][0]}
    assert exports.keys() == expected.keys()
    for name, export in exports.items():
        assert {key: value["type"] for key, value in export.items()} == {key: EXPORT_TYPES[key] for key in export}
        values = {key: value["data"] for key, value in export.items()}
        assert {key: values[key] for key in expected[name]} == expected[name]
        # Each has its size, or the reason why not; and flags with NBD_FLAG_HAS_FLAGS, where the server described it.
        assert ("size" in values) != ("problem" in values)
        assert values.get("flags", 1) & 1
        sizes = [values[key] for key in EXPORT_TYPES if key.endswith("block-size") and key in values]
        assert sizes == sorted(sizes)


# Signals


def test_signals_cover_the_whole_life_of_a_device_and_add_up_to_its_properties(scene: Scene) -> None:
    lab = scene.lab
    path = object_path("brief")
    lab.guest.run(
        "systemd-run --quiet --collect --unit=monitor sh -c "
        "'exec busctl monitor --json=short --match=type=signal,sender=org.nbdd1 >/run/signals'"
    )
    try:
        # It does not say when it listens: that shows when it hears of a change.
        change = f"busctl call org.nbdd1 {ROOT} {MANAGER} SetTimeout su work $((RANDOM + 100))"
        lab.until(f"{{ {change}; grep -q Timeout /run/signals; }}", what="busctl monitor")
        lab.attach_uri(scene.server.uri, "brief")
        snapshot = managed(lab)[path][DEVICE]
        lab.call("SetTimeout", "'brief'", "44")
        lab.detach("brief")
        lab.until("grep -q InterfacesRemoved /run/signals", what="the last signal")
    finally:
        lab.guest.run("systemctl stop monitor")
        lab.call("SetTimeout", "'work'", "7")
    signals = [json.loads(line) for line in lab.guest.read("/run/signals").splitlines() if line.startswith("{")]
    ours = [each for each in signals if each["path"] != object_path("work")]
    added, *changes, removed = ours
    assert (added["path"], added["member"]) == (ROOT, "InterfacesAdded")
    assert added["payload"]["type"] == "oa{sa{sv}}"
    assert (removed["path"], removed["member"]) == (ROOT, "InterfacesRemoved")
    assert removed["payload"] == {"type": "oas", "data": [path, [DEVICE]]}
    told = added["payload"]["data"][1][DEVICE]
    assert told.keys() == snapshot.keys()
    states = []
    seen_snapshot = False
    for change in changes:
        assert (change["path"], change["interface"], change["member"]) == (path, PROPERTIES, "PropertiesChanged")
        interface, values, invalidated = change["payload"]["data"]
        assert (interface, invalidated) == (DEVICE, [])
        assert all(told[key] != value for key, value in values.items()), "nothing is told that did not change"
        assert "Name" not in values
        states += [values["State"]["data"]] if "State" in values else []
        told |= values
        seen_snapshot = seen_snapshot or told == snapshot
    assert [state for state in states if state != "detached"] == ["connecting", "attached", "detaching"]
    assert seen_snapshot
    assert any(change["payload"]["data"][1].get("Timeout", {}).get("data") == 44 for change in changes)


# Who may

RULE = """
polkit.addRule(function(action, subject) {
    if (subject.user != "visitor") return polkit.Result.NOT_HANDLED;
    if (action.id == "org.nbdd1.set-timeout") return polkit.Result.YES;
    if (action.id == "org.nbdd1.detach") return polkit.Result.YES;
    if (action.id == "org.nbdd1.attach" && action.lookup("device") == "work") return polkit.Result.YES;
    if (action.id == "org.nbdd1.reload") return polkit.Result.AUTH_ADMIN;
});
"""
RULES_FILE = "/etc/polkit-1/rules.d/10-visitor.rules"


def test_polkit_rule_grants_a_user_exactly_what_it_names(scene: Scene) -> None:
    lab = scene.lab
    calls = {
        "granted": Call("SetTimeout", "su", ("work", 8)),
        "granted-for-this-device": Call("Attach", "sa{sv}", ("work", {})),
        "not-for-that-device": Call("Attach", "sa{sv}", ("idle", {})),
        "another-action": Call("AttachURI", "sa{sv}", (scene.server.uri, {})),
        "detach": Call("Detach", "sa{sv}", ("idle", {})),
        "force-detach": Call("Detach", "sa{sv}", ("idle", {"force": ("b", True)})),
        "needs-a-password": Call("Reload"),
    }
    lab.guest.write(RULES_FILE, RULE)
    try:
        lab.until(
            f"runuser -u visitor -- busctl call org.nbdd1 {ROOT} {MANAGER} SetTimeout su work 9 2>/dev/null",
            20,
            what="polkitd to take the rule",
        )
        told = lab.calls(calls, user="visitor")
        # busctl allows that a person is asked; here there is none.
        asked = lab.guest.run(f"busctl call org.nbdd1 {ROOT} {MANAGER} Reload", user="visitor", check=False)
    finally:
        lab.guest.run(f"rm {RULES_FILE}")
        lab.call("SetTimeout", "'work'", "7")
    names = {label: re.sub(r".*\.", "", outcome.error.name) if outcome.error else "" for label, outcome in told.items()}
    assert names == {
        "granted": "",
        "granted-for-this-device": "AlreadyAttached",
        "not-for-that-device": "AccessDenied",
        "another-action": "AccessDenied",
        "detach": "NotAttached",
        "force-detach": "AccessDenied",
        "needs-a-password": "InteractiveAuthorizationRequired",
    }
    error = told["needs-a-password"].error
    assert error is not None
    assert error.name.startswith(FREEDESKTOP)
    assert "org.nbdd1.reload needs an administrator's password" in error.text
    # These words are busctl's own; it has them for AccessDenied, whatever the text.
    assert (asked.returncode, asked.stderr.strip()) == (1, "Call failed: Access denied")


def test_user_without_privileges_may_read_everything(scene: Scene) -> None:
    work = object_path("work")
    calls = [
        Call("GetManagedObjects", interface="org.freedesktop.DBus.ObjectManager"),
        Call("GetAll", "s", (DEVICE,), PROPERTIES, work),
        Call("GetStatistics", interface=DEVICE, path=work),
        Call("Introspect", interface="org.freedesktop.DBus.Introspectable"),
    ]
    told = scene.lab.calls({call.member: call for call in calls}, user="visitor")
    assert {member: (outcome.error, bool(outcome.reply)) for member, outcome in told.items()} == dict.fromkeys(
        told, (None, True)
    )
