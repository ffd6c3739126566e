# SPDX-License-Identifier: MIT
"""`nbdctl doctor`: what is missing is named, with what to do; what is there is not called ill."""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from dbus_next.constants import MessageFlag
from dbus_next.signature import Variant

from nbdd import __version__
from nbdd.bus.caller.device import DeviceView
from nbdd.ctl import checks, doctor
from nbdd.ctl.checks import Finding, Verdict
from nbdd.errors import KernelError
from nbdd.protocol.constants import Opt, RepErr
from nbdd.uri import URI
from tests.fakes.manager import ABSENT, PRESENT, FakeManager
from tests.fakes.servers import MIB, Server, ack, entry, greeting, offers, receive, reply, says_and_closes
from tests.fakes.terminal import Run

OK, WARNING, FAULT = Verdict.OK, Verdict.WARNING, Verdict.FAULT


def told(finding: Finding, verdict: Verdict, *words: str) -> bool:
    """Whether a finding has a verdict and says all these words."""
    assert finding.text.isprintable()
    return finding.verdict is verdict and all(word in finding.text for word in words)


class Machine:
    """A made-up root directory."""

    def __init__(self, root: Path) -> None:
        self.path = root
        self.root = f"{root}/"

    def file(self, name: str, text: str = "x") -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# The kernel


def test_kernel_module_not_loaded_differs_from_not_there(machine: Machine) -> None:
    assert told(checks.kernel_module(machine.root, "6.1"), FAULT, "modprobe nbd")
    machine.file("lib/modules/6.1/modules.dep", "kernel/drivers/block/loop.ko:\n")
    assert told(checks.kernel_module(machine.root, "6.1"), FAULT, "this kernel (6.1) has no NBD driver")
    machine.file("lib/modules/6.1/modules.dep", "kernel/drivers/block/nbd.ko.xz:\n")
    assert told(checks.kernel_module(machine.root, "6.1"), FAULT, "modprobe nbd")
    (machine.path / "sys/module/nbd").mkdir(parents=True)
    assert checks.kernel_module(machine.root, "6.1").verdict is OK


def test_netlink_family_is_not_asked_while_that_could_load_the_driver(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Netlink:
        def __init__(self, *, seconds: float) -> None:
            asked.append(seconds)
            raise KernelError("No generic netlink socket: Operation not permitted.")

    monkeypatch.setattr(checks, "NetlinkNBD", Netlink)
    assert told(checks.netlink_family(machine.root), FAULT, "kernel module")
    assert not asked
    (machine.path / "sys/module/nbd").mkdir(parents=True)
    assert told(checks.netlink_family(machine.root), FAULT, "Operation not permitted")
    assert asked


def test_device_nodes_missing_are_a_fault(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nbd0", "nbd1", "sda"):
        (machine.path / "sys/block" / name).mkdir(parents=True)
    machine.file("sys/block/nbd0/pid", "12\n")
    assert told(checks.device_nodes(machine.root), FAULT, "dev/nbd0 and 1 more is not there")
    machine.file("dev/nbd0")
    machine.file("dev/nbd1")
    assert checks.device_nodes(machine.root).verdict is FAULT  # plain files
    monkeypatch.setattr(stat, "S_ISBLK", lambda _mode: True)
    assert told(checks.device_nodes(machine.root), OK, "2 in", "1 of them bound")


# The system


@pytest.mark.parametrize(
    ("shown", "verdict", "says"),
    [
        ("LoadState=loaded\nActiveState=active\nUnitFileState=enabled\n", OK, "started at boot"),
        ("LoadState=loaded\nActiveState=active\nUnitFileState=disabled\n", WARNING, "systemctl enable nbdd"),
        ("LoadState=loaded\nActiveState=inactive\n", WARNING, "systemctl start nbdd"),
        ("LoadState=loaded\nActiveState=failed\nResult=exit-code\n", FAULT, "journalctl -u nbdd"),
        ("LoadState=masked\nActiveState=inactive\n", FAULT, "systemctl unmask nbdd"),
        ("LoadState=masked\nUnitFileState=masked-runtime\n", FAULT, "systemctl unmask --runtime nbdd"),
        ("LoadState=not-found\n", FAULT, "install"),
        ("", FAULT, "systemd does not run"),
    ],
)
def test_systemd_unit_state_becomes_what_to_do(shown: str, verdict: Verdict, says: str) -> None:
    assert told(checks.systemd_unit(lambda: shown), verdict, says)


@pytest.mark.parametrize(
    "problem", [FileNotFoundError(2, "No such file"), subprocess.TimeoutExpired("systemctl", 5), OSError("no\nbus")]
)
def test_systemd_unit_without_systemd_is_a_warning(problem: Exception) -> None:
    def show() -> str:
        raise problem

    assert told(checks.systemd_unit(show), WARNING, "systemd can't be asked")


def test_udev_rules_are_looked_for_where_udev_looks(machine: Machine) -> None:
    assert told(checks.udev_rules(machine.root), FAULT, "not installed")
    rules = machine.file("usr/lib/udev/rules.d/60-nbdd.rules")
    assert told(checks.udev_rules(machine.root), FAULT, "udevd does not run")
    machine.file("run/udev/control")
    assert checks.udev_rules(machine.root).verdict is OK
    over = machine.path / "etc/udev/rules.d/60-nbdd.rules"
    over.parent.mkdir(parents=True)
    over.symlink_to("/dev/null")
    assert told(checks.udev_rules(machine.root), FAULT, "switches the rules off", str(over))
    over.unlink()
    rules.write_text("")
    assert checks.udev_rules(machine.root).verdict is FAULT


def test_polkit_is_there_or_can_be_started_or_only_root_may_act(machine: Machine) -> None:
    assert told(checks.polkit([], [], machine.root), WARNING, "only root", "install polkitd")
    assert told(checks.polkit([], [checks.POLKIT], machine.root), WARNING, "actions are not installed")
    machine.file("usr/share/polkit-1/actions/org.nbdd1.policy")
    assert checks.polkit([], [checks.POLKIT], machine.root).verdict is OK
    assert checks.polkit([checks.POLKIT], [], machine.root).verdict is OK


def test_permissions_say_what_the_user_may_do() -> None:
    assert told(checks.permissions(0), OK, "root may do everything")
    assert told(checks.permissions(1000), OK, "polkit asks")


# Devices


def device(**properties: object) -> DeviceView:
    return DeviceView.of(PRESENT | {"Name": "backup"} | properties)


def test_states_omit_a_device_without_trouble() -> None:
    assert not list(checks.states([device(), DeviceView.of(ABSENT), device(State="connecting")]))


@pytest.mark.parametrize(
    ("properties", "verdict", "says"),
    [
        ({"State": "failed"}, FAULT, "its I/O fails: gone; nbdd keeps trying"),
        ({"State": "failed", "FailsAt": 1 << 60}, FAULT, "its I/O waits: gone; nbdd keeps trying"),
        ({"State": "failed", "Node": ""}, FAULT, "it is not attached: gone; `nbdctl attach backup`"),
        ({"State": "reconnecting"}, WARNING, "reconnecting: gone"),
        ({"State": "connecting", "Node": ""}, WARNING, "connecting: gone"),
    ],
)
def test_states_of_a_device_in_trouble_have_its_last_error(
    properties: dict[str, object], verdict: Verdict, says: str
) -> None:
    [finding] = checks.states([device(**properties, LastError=["x.Y", "gone."])])
    assert told(finding, verdict, says)


def test_links_of_attached_device_missing_are_a_fault(machine: Machine) -> None:
    [finding] = checks.links([device()], machine.root)
    assert told(finding, FAULT, "by-nbd/backup does not lead to /dev/nbd0")
    link = machine.path / "dev/disk/by-nbd/backup"
    link.parent.mkdir(parents=True)
    link.symlink_to("/dev/nbd0")
    assert not list(checks.links([device(), device(Node=""), device(Name="x", State="connecting")], machine.root))


# The configuration and the servers


def test_configuration_faults_are_a_line_each(machine: Machine) -> None:
    machine.file("nbdd.yaml", "devices:\n  a:\n    uri: nbd://h/\n    tiemout: 3\n  b: {}\n")
    found, findings = checks.configuration(machine.path)
    assert found is None
    assert len(findings) == 2
    assert told(findings[0], FAULT, "nbdd.yaml:4:5: device 'a'", "did you mean timeout?")


def test_configuration_that_others_can_change_is_a_warning(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    path = machine.file("nbdd.yaml", "devices:\n  a:\n    uri: nbd://h/\n")
    machine.path.chmod(0o755)
    path.chmod(0o644)
    found, findings = checks.configuration(machine.path)
    assert found is not None
    if os.geteuid() == 0:
        assert [finding.verdict for finding in findings] == [OK]
        assert told(findings[0], OK, "1 device in 1 file")
    path.chmod(0o666)
    assert told(checks.configuration(machine.path)[1][-1], WARNING, "everyone can write", "chmod o-w")
    path.chmod(0o644)
    monkeypatch.setattr(Path, "stat", lambda _path: os.stat_result((0o100644, 0, 0, 1, 1000, 0, 0, 0, 0, 0)))
    assert told(checks.configuration(machine.path)[1][-1], WARNING, "belongs to user 1000", "chown root:")


def test_configuration_that_only_root_may_read_is_a_warning(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    found, [finding] = checks.configuration(machine.path)
    assert found is None
    assert told(finding, WARNING, "only root can see")


def test_server_with_the_export_is_ok_with_its_size_and_not_opened() -> None:
    with Server(offers({b"disk": 5 * MIB})) as server:
        assert told(checks.server("x", server.uri("disk")), OK, "has it, 5 MiB")
        assert told(checks.server("x", server.uri("other")), FAULT, "no export called 'other'")


def test_server_of_old_style_is_asked_for_its_list() -> None:
    def serve(conn: socket.socket) -> None:
        conn.sendall(greeting())
        receive(conn, 4)
        while True:
            option, length = struct.unpack(">8xII", receive(conn, 16))
            receive(conn, length)
            listed = option == Opt.NBD_OPT_LIST
            conn.sendall(entry(b"disk") + ack(option) if listed else reply(option, RepErr.NBD_REP_ERR_UNSUP))

    with Server(serve) as server:
        assert told(checks.server("x", server.uri("disk")), OK, "in its list")
        assert told(checks.server("x", server.uri("other")), FAULT, "too old to describe")


def test_server_that_is_no_nbd_server_is_a_fault() -> None:
    with Server(says_and_closes(b"SSH-2.0-OpenSSH_9.2 Debian and so on\r\n")) as server:
        assert checks.server("x", server.uri("disk")).verdict is FAULT


def test_server_that_is_silent_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SERVER_SECONDS", 0.2)
    with Server(lambda conn: (conn.recv(1), None)[1]) as server:
        assert told(checks.server("x", server.uri("disk")), FAULT, "within 0.2 s")


def test_server_that_is_not_there_is_a_fault() -> None:
    with Server(lambda _conn: None) as server:
        uri = server.uri("disk")
    assert told(checks.server("x", uri), FAULT, "connection refused")
    assert told(checks.server("x", URI.parse("nbd+unix:///?socket=/nonexistent/s")), FAULT, "Can't connect")


def test_server_socket_of_another_user_is_not_called_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    with Server(offers({b"": MIB}), socket.AF_UNIX) as server:
        assert told(checks.server("x", server.uri()), WARNING, "only root, or its owner, may connect")


# All together


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which all is well, and an empty directory for the configuration."""
    for name in ("kernel_module", "netlink_family", "device_nodes", "udev_rules", "systemd_unit"):
        monkeypatch.setattr(checks, name, lambda name=name: checks.ok(name, "well"))
    monkeypatch.setattr(checks, "links", lambda _devices: [])
    monkeypatch.setattr(doctor, "DIRECTORY", tmp_path)
    tmp_path.chmod(0o755)
    return tmp_path


def lines(out: str) -> dict[str, str]:
    """Subject to verdict."""
    return {line[9:].split("  ")[0]: line[:9].strip() for line in out.splitlines()}


def configured(directory: Path, **uris: URI) -> None:
    text = "devices:\n" + "".join(f"  {name}:\n    uri: {uri}\n" for name, uri in uris.items())
    (directory / "nbdd.yaml").write_text(text)


def test_doctor_of_a_sound_machine_has_no_fault_and_status_0(fake: FakeManager, sound: Path, run: Run) -> None:
    fake.replies["Get"] = ("v", [Variant("s", __version__)])
    with Server(offers({b"disk": MIB})) as server:
        configured(sound, backup=server.uri("unused"), other=server.uri("disk"))
        status, out, err = run("doctor")
    assert (status, err) == (0, "")
    found = lines(out)
    assert found["nbdd"] == found["system bus"] == found["configuration"] == "ok"
    # It is connected to the one already; that one is not asked.
    assert found["server of backup"] == found["server of other"] == "ok"
    assert found["polkit"] == "warning"
    assert {call.flags for call in fake.calls} == {MessageFlag.NO_AUTOSTART}


def test_doctor_with_a_fault_is_status_1_and_a_document(fake: FakeManager, sound: Path, run: Run) -> None:
    fake.replies["Get"] = ("v", [Variant("s", "0.0.1")])
    with Server(offers({b"disk": MIB})) as server:
        configured(sound, a=server.uri("none"), b=server.uri("disk"))
        status, out, err = run("doctor", "--json")
    assert (status, err) == (1, "")
    found = json.loads(out)
    assert found["ok"] is False
    by_subject = {check["subject"]: check for check in found["checks"]}
    assert by_subject["server of a"]["verdict"] == "fault"
    assert by_subject["server of b"]["verdict"] == "ok"
    assert by_subject["nbdd"]["verdict"] == "warning"
    assert "systemctl restart nbdd" in by_subject["nbdd"]["text"]


def test_doctor_with_a_faulty_configuration_still_asks_the_servers_that_nbdd_knows(
    fake: FakeManager, sound: Path, run: Run
) -> None:
    (sound / "nbdd.yaml").write_text("devices: 5\n")
    with Server(offers({b"disk": MIB})) as server:
        fake.devices["other"] = ABSENT | {"Name": "other", "URI": str(server.uri("none"))}
        status, out, _ = run("doctor")
    found = lines(out)
    assert status == 1
    assert (found["configuration"], found["server of backup"], found["server of other"]) == ("fault", "ok", "fault")


@pytest.mark.usefixtures("no_service", "sound")
def test_doctor_starts_no_service(run: Run) -> None:
    status, out, _ = run("doctor")
    assert (status, lines(out)["nbdd"], lines(out)["activation"]) == (0, "warning", "warning")


@pytest.mark.usefixtures("sound")
def test_doctor_without_a_bus_still_checks_the_rest(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
    status, out, err = run("doctor")
    assert (status, err) == (1, "")
    assert (lines(out)["system bus"], lines(out)["configuration"]) == ("fault", "ok")


def test_doctor_calls_a_service_that_does_not_answer_a_fault(
    fake: FakeManager, sound: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.held.add("Get")
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 0.2)
    assert sound.exists()
    status, out, _ = run("doctor")
    assert (status, lines(out)["nbdd"]) == (1, "fault")


@pytest.mark.usefixtures("fake")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_doctor_may_be_run_by_every_user() -> None:
    # Loaded while still root: another user may not be able to read the interpreter's own files.
    code = (
        "import os, sys, nbdd.bus.caller.client, nbdd.config.loader, jsonschema, json; from nbdd.ctl import checks;"
        "from nbdd.ctl.__main__ import main; os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        "sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode in {0, 1}, done.stderr) == (True, "")
    subjects = {check["subject"]: check for check in json.loads(done.stdout)["checks"]}
    assert "polkit asks" in subjects["permissions"]["text"]
    assert {"kernel module", "system bus", "udev rules", "configuration"} <= subjects.keys()
