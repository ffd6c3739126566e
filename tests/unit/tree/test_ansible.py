# SPDX-License-Identifier: MIT
"""The playbook of docs/ansible.md can be copied: it is YAML, it is a play, and its definitions are nbdd's."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import yaml

from nbdd.config.loader import check
from nbdd.ctl.cli import cli

TEXT = (Path(__file__).parents[3] / "docs" / "ansible.md").read_text()
MODULES = {
    f"ansible.{name}"
    for name in ("builtin.apt", "builtin.assert", "builtin.command", "builtin.copy", "builtin.systemd", "posix.mount")
}
WORDS = {"name", "register", "changed_when", "loop", "loop_control"}


def blocks() -> list[Any]:
    """What stands between fences, parsed."""
    return [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)]


def play() -> dict[str, Any]:
    [[found], _] = blocks()
    assert isinstance(found, dict)
    return found


def task(module: str) -> Any:
    """The arguments of the one task that uses the module."""
    [found] = [task[f"ansible.{module}"] for task in play()["tasks"] if f"ansible.{module}" in task]
    return found


def test_playbook_tasks_have_a_name_one_module_and_words_that_ansible_knows() -> None:
    assert play().keys() == {"name", "hosts", "become", "vars", "tasks"}
    _, tasks = blocks()
    assert len(tasks) == 2
    for one in [*play()["tasks"], *tasks]:
        assert "name" in one
        assert len(one.keys() & MODULES) == 1, one["name"]
        assert one.keys() <= MODULES | WORDS, one["name"]


def test_playbook_definitions_are_valid(tmp_path: Path) -> None:
    assert task("builtin.apt")["deb"] == "/var/cache/{{ nbdd_package }}"
    [written] = [found for one in play()["tasks"] if "content" in (found := one.get("ansible.builtin.copy", {}))]
    assert written["content"] == "{{ {'devices': nbdd_devices} | to_nice_yaml }}"
    assert Path(written["dest"]).parent == Path("/etc/nbdd/devices.d")
    file = tmp_path / "devices.d" / Path(written["dest"]).name
    file.parent.mkdir()
    file.write_text(yaml.safe_dump({"devices": play()["vars"]["nbdd_devices"]}))
    told = io.StringIO()
    assert check(tmp_path, told) == 0, told.getvalue()
    assert "2 devices" in told.getvalue()


def test_playbook_mount_is_that_of_a_defined_device() -> None:
    mount = task("posix.mount")
    name = mount["src"].removeprefix("/dev/disk/by-nbd/")
    assert name in play()["vars"]["nbdd_devices"]
    assert f"x-systemd.requires=nbdd-attach@{name}.service" in mount["opts"].split(",")
    assert task("builtin.systemd")["name"] == mount["path"].strip("/").replace("/", "-") + ".mount"


def test_playbook_commands_are_those_of_nbdctl() -> None:
    _, tasks = blocks()
    commands = [
        one["ansible.builtin.command"] for one in [*play()["tasks"], *tasks] if "ansible.builtin.command" in one
    ]
    assert len(commands) == 2
    for program, command, option in map(str.split, commands):
        assert (program, option) == ("nbdctl", "--json")
        assert command in cli.commands
