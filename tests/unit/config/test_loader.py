# SPDX-License-Identifier: MIT
"""The configuration of a directory: its files, devices, defaults and problems."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdd.config.definition import Attach, Definition, Desktop
from nbdd.config.loader import MAX_PROBLEMS, Configuration, check, load
from nbdd.config.options import definition_from_options
from nbdd.errors import InvalidConfig
from nbdd.uri import URI
from tests.fakes.config import Write, device, problems

ROOT = Path(__file__).parents[3]


def test_device_has_every_key_of_its_file(write: Write) -> None:
    configuration = load(
        write(
            """\
devices:
  backup:
    uri: [nbd://a.example/x, "nbd+unix:///y?socket=/run/s"]
    attach: boot
    device: /dev/nbd3
    read-only: true
    connections: 16
    timeout: 30
    dead-timeout: 0
    block-size: 4096
    desktop: {name: Eve's photos (2026), icon: folder-pictures, user-mountable: false}
"""
        )
    )
    assert dict(configuration.devices) == {
        "backup": Definition(
            name="backup",
            uri=(URI.parse("nbd://a.example/x"), URI.parse("nbd+unix:///y?socket=/run/s")),
            attach=Attach.BOOT,
            device=3,
            read_only=True,
            connections=16,
            timeout=30,
            dead_timeout=0,
            block_size=4096,
            desktop=Desktop("Eve's photos (2026)", "folder-pictures", user_mountable=False),
        )
    }


def test_desktop_may_be_empty_and_is_none_without_the_key(write: Write) -> None:
    devices = load(write("devices:\n  a: {uri: nbd://h/x, desktop: {}}\n  b: {uri: nbd://h/y}\n")).devices
    assert devices["a"].desktop == Desktop()
    assert devices["b"].desktop is None


def test_device_needs_a_uri_alone(write: Write) -> None:
    configuration = load(write(device(device="auto", block_size="auto")))
    assert configuration.devices["a"] == Definition(name="a", uri=(URI.parse("nbd://h/x"),))


def test_defaults_hold_for_every_file_and_yield_to_the_device(write: Write) -> None:
    directory = write(
        "defaults: {timeout: 7, dead-timeout: 8, connections: 2, read-only: on, attach: boot, block-size: 512}\n"
        "devices: {a: {uri: nbd://h/a, timeout: 0}}\n",
        more="devices: {b: {uri: nbd://h/b, read-only: off, attach: manual, block-size: auto}}\n",
    )
    configuration = load(directory)
    a, b = configuration.devices["a"], configuration.devices["b"]
    assert (a.timeout, a.dead_timeout, a.connections, a.read_only, a.attach, a.block_size) == (
        0, 8, 2, True, Attach.BOOT, 512,
    )  # fmt: skip
    assert (b.timeout, b.dead_timeout, b.connections, b.read_only, b.attach, b.block_size) == (
        7, 8, 2, False, Attach.MANUAL, None,
    )  # fmt: skip
    assert configuration.defaults["timeout"] == 7


def test_files_are_read_in_name_order_and_devices_keep_theirs(write: Write) -> None:
    one = "devices: {%s: {uri: nbd://h/x}}"
    directory = write("devices: {z: {uri: nbd://h/x}, a: {uri: nbd://h/x}}", b=one % "y", a=one % "x", B=one % "w")
    (directory / "devices.d" / ".hidden.yaml").write_text("[")
    (directory / "devices.d" / "backup.yaml~").write_text("[")
    (directory / "devices.d" / "backup.yaml.dpkg-old").write_text("[")
    configuration = load(directory)
    assert list(configuration.devices) == ["z", "a", "w", "x", "y"]
    assert [path.name for path in configuration.files] == ["nbdd.yaml", "B.yaml", "a.yaml", "b.yaml"]


@pytest.mark.parametrize(
    "text", ["", "\n", "# nothing\n", "---\n", "devices:\n", "defaults:\ndevices: {}\n", "\ufeff", "~"]
)
def test_empty_file_is_an_empty_configuration(write: Write, text: str) -> None:
    configuration = load(write(text, more=text.replace("defaults:\n", "")))
    assert not configuration.devices
    assert not configuration.defaults


def test_missing_directory_is_empty_for_the_daemon_and_an_error_for_a_check(tmp_path: Path) -> None:
    assert load(tmp_path / "none") == Configuration()
    with pytest.raises(InvalidConfig, match=r"none: the directory can't be read: no such file or directory\."):
        load(tmp_path / "none", must_exist=True)


def test_whole_number_with_a_decimal_point_is_an_integer_as_in_editors(write: Write) -> None:
    timeout = load(write(device(timeout="30.0"))).devices["a"].timeout
    assert (timeout, type(timeout)) == (30, int)


def test_load_twice_gives_equal_configurations(write: Write) -> None:
    directory = write(device(timeout="3"), more="devices: {b: {uri: nbd://h/b}}")
    assert load(directory) == load(directory)


def test_load_takes_seconds_for_ten_thousand_devices(
    write: Write, record_property: Callable[[str, object], None]
) -> None:
    block = "  d{0}:\n    uri: nbd://h{0}.example/e\n    attach: boot\n    timeout: 30\n    block-size: 4096\n"
    directory = write("devices:\n" + "".join(block.format(number) for number in range(10_000)))
    begin = time.monotonic()
    configuration = load(directory)
    took = time.monotonic() - begin
    record_property("seconds", took)
    print(f"10,000 devices: {took:.2f} s")
    assert len(configuration.devices) == 10_000
    assert took < 20  # about 1 on a desk, and this may be emulated


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,62}", fullmatch=True),
        st.fixed_dictionaries(
            {"uri": st.sampled_from(["nbd://h/x", ["nbd://[::1]:5/", "nbd+unix:///?socket=/s"]])},
            optional={
                "attach": st.sampled_from(["boot", "manual"]),
                "read-only": st.booleans(),
                "connections": st.integers(1, 16),
                "timeout": st.integers(0, 2_000_000),
                "dead-timeout": st.integers(0, 2_000_000),
                "block-size": st.sampled_from(["auto", 512, 4096, 65536]),
            },
        ),
        max_size=5,
    ),
    st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
def test_file_of_another_yaml_writer_is_read_as_it_was_meant(
    tmp_path: Path, devices: dict[str, dict[str, Any]], flow: bool
) -> None:
    (tmp_path / "nbdd.yaml").write_text(yaml.safe_dump({"devices": devices}, default_flow_style=flow, sort_keys=False))
    configuration = load(tmp_path)
    assert list(configuration.devices) == list(devices)
    for name, wanted in devices.items():
        options = {key: value for key, value in wanted.items() if key != "attach"}
        attach = Attach(wanted.get("attach", "manual"))
        assert configuration.devices[name] == replace(definition_from_options(name, options), attach=attach)


@pytest.mark.parametrize(
    "name", ["a b", "a/b", "bücher", "x" * 255, "x" * 64, ".a", "-a", '"a\\n"', '""', "?", '"\\u202e"', "~"]
)
def test_name_that_can_not_name_a_device_is_reported_at_its_place(write: Write, name: str) -> None:
    (found,) = problems(write(f"devices:\n  {name}: {{uri: nbd://h/x}}\n"))
    assert found.startswith("nbdd.yaml:2:3: device ")
    assert "can't name a device: use 1 to 63 letters" in found


def test_device_defined_in_two_files_is_reported_with_both_places(write: Write) -> None:
    one = "devices:\n  a: {uri: nbd://h/x}\n"
    directory = write(one, more="\n" + one)
    (found,) = problems(directory)
    assert found == (
        "devices.d/more.yaml:3:3: device 'a': is already defined at nbdd.yaml:2:3; a name stands for one device."
    )


def test_node_belongs_to_one_device(write: Write) -> None:
    directory = write(
        "devices:\n  a: {uri: nbd://h/x, device: /dev/nbd3}\n", more="devices: {b: {uri: nbd://h/y, device: /dev/nbd3}}"
    )
    (found,) = problems(directory)
    assert found == (
        "devices.d/more.yaml:1:39: device 'b': key 'device': /dev/nbd3 is given to the device 'a' already; "
        "choose another, or auto."
    )


def test_defaults_outside_of_nbdd_yaml_are_refused(write: Write) -> None:
    (found,) = problems(write(more="defaults: {timeout: 3}\n"))
    assert found == "devices.d/more.yaml:1:1: key 'defaults': belongs in nbdd.yaml, where it holds for all files."


def test_problems_of_every_file_are_reported_in_the_order_of_the_lines(write: Write) -> None:
    directory = write(
        "defaults: {timeout: x}\ndevices:\n  a b: {uri: 'nbd://h:0/', timout: 1, device: /dev/nbd1}\n  c:\n",
        one="devices: [",
        two="devices:\n  a:\n    uri: nbds://h/x\n    device: /dev/nbd1\n    connections: 99\n  a: {}\n",
    )
    found = problems(directory)
    assert [line.split(": ")[0] for line in found] == [
        "nbdd.yaml:1:21",
        "nbdd.yaml:3:3",
        "nbdd.yaml:3:14",
        "nbdd.yaml:3:28",
        "nbdd.yaml:4:5",
        "devices.d/one.yaml:1:10",
        "devices.d/two.yaml:3:10",
        "devices.d/two.yaml:4:13",
        "devices.d/two.yaml:5:18",
        "devices.d/two.yaml:6:3",
    ]


@pytest.mark.parametrize("name", ["nbdd.yml", "devices.d/a.yml"])
def test_file_with_the_wrong_ending_is_reported(tmp_path: Path, name: str) -> None:
    (tmp_path / "devices.d").mkdir()
    (tmp_path / name).write_text(device())
    assert problems(tmp_path) == [f"{name}: the name must end in .yaml; rename the file."]


def test_file_in_place_of_a_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "devices.d").write_text("")
    assert problems(tmp_path) == ["devices.d: the directory can't be read: not a directory."]


def test_path_of_any_bytes_is_reported_in_printable_characters(tmp_path: Path) -> None:
    directory = tmp_path / "devices.d"
    directory.mkdir()
    (directory / os.fsdecode(b"a\xff\n.yaml")).write_text("[")
    (found,) = problems(tmp_path)
    assert r"a\xff\n.yaml:1:1: " in found


def test_problems_beyond_the_bound_are_cut_and_the_last_line_says_so(write: Write) -> None:
    found = problems(write("devices:\n" + "".join(f"  d{number}: x\n" for number in range(MAX_PROBLEMS + 500))))
    assert len(found) == MAX_PROBLEMS + 1
    assert found[0].startswith("nbdd.yaml:2:")
    assert found[-2].startswith(f"nbdd.yaml:{MAX_PROBLEMS + 1}:")
    assert found[-1] == f"nbdd.yaml: there are more problems; these are the first {MAX_PROBLEMS}."


def test_check_of_a_good_directory_says_so_and_returns_0(write: Write) -> None:
    out = io.StringIO()
    directory = write(device(), more="devices: {b: {uri: nbd://h/x}}")
    assert check(directory, out) == 0
    assert out.getvalue() == f"{directory}: 2 devices in 2 files, all well.\n"


def test_check_of_a_bad_directory_prints_every_problem_and_returns_1(write: Write) -> None:
    out = io.StringIO()
    assert check(write("devices: {a: 3, b: 4}"), out) == 1
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[-1] == "2 problems."


def test_check_of_a_missing_directory_returns_1(tmp_path: Path) -> None:
    out = io.StringIO()
    assert check(tmp_path / "none", out) == 1
    assert "none: the directory can't be read" in out.getvalue()


def test_shipped_nbdd_yaml_is_valid_and_attaches_nothing(write: Write) -> None:
    configuration = load(write((ROOT / "config" / "nbdd.yaml").read_bytes()))
    assert configuration.devices == {}
    assert configuration.defaults == {}


def test_shipped_nbdd_yaml_is_valid_with_every_comment_undone(write: Write) -> None:
    text = (ROOT / "config" / "nbdd.yaml").read_text()
    _, begin, settings = text.partition("#defaults:")
    configuration = load(write(re.sub(r"(?m)^#", "", begin + settings)))
    assert list(configuration.devices) == ["backup", "media", "scratch"]
    assert configuration.devices["backup"].attach is Attach.BOOT
    assert set(configuration.defaults) >= {"timeout", "dead-timeout"}


@pytest.mark.parametrize("path", sorted((ROOT / "config" / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_example_is_valid_in_its_place(tmp_path: Path, path: Path) -> None:
    (tmp_path / "devices.d").mkdir()
    (tmp_path / "devices.d" / path.name).write_bytes(path.read_bytes())
    assert load(tmp_path).devices
