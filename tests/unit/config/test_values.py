# SPDX-License-Identifier: MIT
"""YAML to located values: places, duplicates, aliases, merges, bounds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdd.config.loader import load
from nbdd.config.values import MAX_DEPTH
from nbdd.errors import InvalidConfig
from tests.fakes.config import Write, device, problems


def test_names_are_taken_as_written_whatever_yaml_makes_of_them(write: Write) -> None:
    names = ["on", "7", "1:30", "010", "null", "2001-01-01", "1.5", "true"]
    configuration = load(write("devices:\n" + "".join(f"  {name}: {{uri: nbd://h/x}}\n" for name in names)))
    assert list(configuration.devices) == names


def test_anchors_and_merge_keys_share_settings(write: Write) -> None:
    configuration = load(
        write(
            """\
devices:
  a: &base {uri: nbd://h/a, timeout: 5, connections: 2}
  b: {<<: *base, uri: nbd://h/b}
  c: {uri: nbd://h/c, <<: [{timeout: 9}, *base]}
"""
        )
    )
    found = configuration.devices
    assert [(str(item.uri[0]), item.timeout, item.connections) for item in found.values()] == [
        ("nbd://h/a", 5, 2),
        ("nbd://h/b", 5, 2),
        ("nbd://h/c", 9, 2),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "nbdd.yaml:1:1: the file must be a mapping with 'devices' and perhaps 'defaults', but it is a list."),
        ("nbd://h/x\n", ("nbdd.yaml:1:1: the file must be a mapping with 'devices' and perhaps 'defaults', "
                        "but 'nbd://h/x' is text.")),
        ("device: {}\n", "nbdd.yaml:1:1: key 'device': is not known; did you mean devices?"),
        ("backup: {uri: nbd://h/x}\n", "nbdd.yaml:1:1: key 'backup': is not known here; devices go below"),
        ("devices: [a]\n", "nbdd.yaml:1:10: key 'devices': must be a mapping from names to devices, but it is a list."),
        ("devices:\n  a:\n", "nbdd.yaml:2:5: device 'a': must be a mapping with a 'uri' at least, but it has no"),
        ("devices:\n  a: nbd://h/x\n", "nbdd.yaml:2:6: device 'a': must be a mapping with a 'uri' at least, but 'nbd"),
        ("devices:\n  a: {}\n", "nbdd.yaml:2:3: device 'a': key 'uri': is missing; write for example nbd://"),
        ("defaults: {uri: nbd://h/x}\n", "nbdd.yaml:1:12: defaults: key 'uri': can't have a default; give it to each"),
        ("defaults: {tls: {}}\n", "nbdd.yaml:1:12: defaults: key 'tls': TLS is not supported"),
        ("defaults: {timeout: x}\n", "nbdd.yaml:1:21: defaults: key 'timeout': must be a whole number"),
        ("defaults: 3\n", "nbdd.yaml:1:11: key 'defaults': must be a mapping from settings to values, but 3 is a"),
        ("devices:\n\ta: {}\n", "nbdd.yaml:2:1: the line is indented with a tab; use spaces."),
        ("devices:\n  a:\n  \turi: x\n", "nbdd.yaml:3:3: the line is indented with a tab; use spaces."),
        ("devices:\n  a:\n    uri: x\n\tb: y\n", "nbdd.yaml:4:1: the line is indented with a tab; use spaces."),
        ("a: 1\n---\nb: 2\n", "nbdd.yaml:2:1: a second YAML document begins here ('---'); one file holds one."),
        ("a: 1\n...\nb: 2\n", "nbdd.yaml:3:1: the file can't be read as YAML: something follows the end"),
        ("devices: {a: b: c}\n", "nbdd.yaml:1:15: the file can't be read as YAML: "),
        ("devices:\n  a: b: c\n", "nbdd.yaml:2:7: the file can't be read as YAML: a ': ' is out of place here"),
        ("devices:\n  a: {uri: x\n", "nbdd.yaml:2:6: the file can't be read as YAML: what begins here is never"),
        ("devices: 'x\n\n", "nbdd.yaml:1:10: the file can't be read as YAML: what begins here is never closed."),
        ("devices:\n  a: @x\n", "nbdd.yaml:2:6: the file can't be read as YAML: text that begins with this character"),
        ("devices:\n    a: {}\n  b: {}\n", "nbdd.yaml:3:3: the file can't be read as YAML: the indentation fits no"),
        ("devices: *all\n", "nbdd.yaml:1:10: key 'devices': '*all' refers to nothing; '&all' must come before it."),
        ("devices: &all [*all]\n", "nbdd.yaml:1:16: key 'devices': '*all' stands inside of what it refers to."),
        ("devices: !!omap []\n", "nbdd.yaml:1:10: key 'devices': the tag 'tag:yaml.org,2002:omap' means nothing"),
        ("devices:\n  [a]: {uri: x}\n", "nbdd.yaml:2:3: key 'devices': a key must be plain text."),
        ("devices:\n  a: {uri: nbd://h/x, <<: 3}\n", "nbdd.yaml:2:27: device 'a': key '<<': must be a mapping, or a"),
        ("devices:\n  a: {uri: nbd://h/x, <<: {}, <<: {}}\n", "nbdd.yaml:2:31: device 'a': key '<<': is given twice"),
        ("\0", "nbdd.yaml:1:1: the NUL character must not stand in a YAML file."),
        ("a: 1\nb: \x07\n", "nbdd.yaml:2:4: the control character '\\x07' must not stand in a YAML file."),
    ],
)  # fmt: skip
def test_wrong_file_is_reported_once_with_line_and_column(write: Write, text: str, expected: str) -> None:
    found = problems(write(text))
    assert [line for line in found if not line.startswith(expected)] == []
    assert len(found) == 1


def test_key_given_twice_is_reported_with_both_lines(write: Write) -> None:
    (found,) = problems(write("devices:\n  a:\n    uri: nbd://h/x\n    timeout: 1\n    timeout: 2\n"))
    assert found == "nbdd.yaml:5:5: device 'a': key 'timeout': is given twice, first in line 4; remove one."


def test_device_given_twice_in_a_file_is_reported_with_both_lines(write: Write) -> None:
    (found,) = problems(write("devices:\n  a: {uri: nbd://h/x}\n  a: {uri: nbd://h/y}\n"))
    assert found == "nbdd.yaml:3:3: device 'a': is given twice, first in line 2; remove one."


def test_place_of_a_value_from_an_alias_or_a_merge_is_where_it_can_be_mended(write: Write) -> None:
    found = problems(write("devices:\n  a: &a\n    uri: nbd://h/x\n    timeout: x\n  b:\n    <<: *a\n  c: *a\n"))
    assert [line.split(": key")[0] for line in found] == [
        "nbdd.yaml:4:14: device 'a'",
        "nbdd.yaml:4:14: device 'b'",
        "nbdd.yaml:4:14: device 'c'",
    ]


def test_key_that_is_not_text_is_reported_once_whatever_is_in_it(write: Write) -> None:
    (found,) = problems(write("devices:\n  ? {a: 010}\n  : {b: [!x 010]}\n"))
    assert found == "nbdd.yaml:2:5: key 'devices': a key must be plain text."


@pytest.mark.parametrize("text", ["[" * 100_000, "- " * 50_000 + "x", "{a: " * 50_000, "? " * 50_000])
def test_nesting_without_end_is_a_problem_and_not_the_end_of_the_process(write: Write, text: str) -> None:
    found = problems(write(text))[-1]
    assert f"nested more than {MAX_DEPTH} deep" in found


def test_aliases_in_a_few_lines_can_not_become_a_billion_values(write: Write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 40)]
    (found,) = problems(write("\n".join(lines)))
    assert "the file holds more than 500000 values, aliases counted as what they stand for." in found


def test_merges_in_a_few_lines_can_not_become_a_billion_values(write: Write) -> None:
    lines = ["a0: &a0 {b: 1, c: 2, d: 3}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 40)]
    (found,) = problems(write("\n".join(lines)))
    assert "more than 500000 values" in found


_TEXT = st.text(st.sampled_from(list("abdeiostuvcr:-[]{}&*<!|>'\"%@#?,~ \n\t0123/=.\\é\x85\u2028\ufeff")), max_size=60)


_LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "devices:",
                "defaults:",
                "  a:",
                "  a: &x",
                "    uri: nbd://h/x",
                "    <<: *x",
                "    timeout: 3",
                "  b: *x",
                "---",
                "...",
                "    - nbd://h/y",
                "    uri:",
                "  ? [a]",
                "    tls: {}",
                "    device: /dev/nbd3",
                "\t",
            ]
        ),
        _TEXT,
    ),
    max_size=12,
).map("\n".join)


@given(st.one_of(st.binary(max_size=80), _TEXT.map(str.encode), _LINES.map(str.encode)))
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_file_of_any_content_gives_a_configuration_or_problems_with_places(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "nbdd.yaml").write_bytes(content)
    try:
        load(tmp_path)
    except InvalidConfig as error:
        for problem in error.problems:
            assert re.match(re.escape(f"{tmp_path}/nbdd.yaml:") + r"[1-9][0-9]*:[1-9][0-9]*: \S", problem), problem
            assert problem.isprintable()


def test_file_is_read_alike_without_libyaml(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(device(timeout="3"), more="devices:\n  b: &b {uri: nbd://h/x}\n  c: {<<: *b, timeout: 010}\n")
    with_libyaml = problems(directory)
    monkeypatch.setattr("nbdd.config.values._LOADER", yaml.SafeLoader)
    assert problems(directory) == with_libyaml
