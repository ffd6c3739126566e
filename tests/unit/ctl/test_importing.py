# SPDX-License-Identifier: MIT
"""`nbdctl import`: what nbd-client attaches from its nbdtab, nbdd attaches from the YAML; nothing goes in silence."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nbdd.config.definition import Definition
from nbdd.config.loader import check, load
from nbdd.ctl import nbdtab
from nbdd.errors import InvalidConfig
from tests.fakes.terminal import NBDCTL, Run

MANUAL = """\
# swap space, called "swapexport" on the server
nbd0 nbdserver.example.com swapexport swap,persist
# other export, called "data" on the server. No options for this one.
nbd1 nbdserver.example.com data
"""


@pytest.fixture
def tab(tmp_path: Path) -> Path:
    """A place for an nbdtab; the directory beside it is for the configuration."""
    (tmp_path / "devices.d").mkdir()
    return tmp_path / "nbdtab"


def imported(run: Run, tab: Path, text: str) -> dict[str, Definition]:
    """The definitions that nbdd reads from what the command prints."""
    tab.write_text(text)
    status, out, err = run("import", str(tab))
    assert (status, err) == (0, "")
    (tab.parent / "devices.d" / "nbdtab.yaml").write_text(out)
    assert check(tab.parent, io.StringIO()) == 0
    return dict(load(tab.parent).devices)


def test_import_of_the_example_of_the_manual_gives_definitions(run: Run, tab: Path) -> None:
    found = imported(run, tab, MANUAL)
    assert {name: str(each.uri[0]) for name, each in found.items()} == {
        "nbd0": "nbd://nbdserver.example.com/swapexport",
        "nbd1": "nbd://nbdserver.example.com/data",
    }
    assert {name: each.device for name, each in found.items()} == {"nbd0": 0, "nbd1": 1}
    out = (tab.parent / "devices.d" / "nbdtab.yaml").read_text()
    assert "    # persist: nbdd always connects again" in out
    assert "    # swap: " in out


@pytest.mark.parametrize(
    ("line", "uri"),
    [
        ("nbd0 h x port=2000", "nbd://h:2000/x"),
        ("/dev/nbd0\th\tx", "nbd://h/x"),
        ("  nbd0 h x  # why", "nbd://h/x"),
        ("nbd0 2001:db8::1 x", "nbd://[2001:db8::1]/x"),
        ("nbd0 fe80::1%eth0 x", "nbd://[fe80::1%25eth0]/x"),
        ("nbd0 /run/nbd.sock x unix", "nbd+unix:///x?socket=/run/nbd.sock"),
        ("nbd0 h a?b/%41:", "nbd://h/a%3Fb/%2541:"),
        ("nbd0 h ü", "nbd://h/%C3%BC"),
        ("nbd0 h a\u00a0b\r", "nbd://h/a%C2%A0b"),
    ],
)
def test_import_makes_a_uri_of_host_port_and_export(run: Run, tab: Path, line: str, uri: str) -> None:
    [found] = imported(run, tab, line).values()
    assert str(found.uri[0]) == uri


def test_import_keeps_the_meaning_of_numbers(run: Run, tab: Path) -> None:
    [found] = imported(run, tab, "nbd7 h x bs=4096,timeout=30,dead-timeout=60,conns=4\n").values()
    assert (found.device, found.block_size, found.timeout, found.dead_timeout, found.connections) == (
        7,
        4096,
        30,
        60,
        4,
    )


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("persist", "always connects again"),
        ("swap", "needs no memory"),
        ("sdp", "gone from Linux"),
        ("no_optgo", "finds out by itself"),
        ("_netdev", "leaves names with _ to others"),
        ("_site=4", "leaves names with _ to others"),
        ("frob", "does not know it either"),
        ("frob=1", "does not know it either"),
        ("persist=1", "does not know it either"),
        ("bs", "does not know it either"),
        ("bs=1000", "block-size must be auto or a power of two"),
        ("conns=99", "connections must be a whole number"),
        ("timeout=soon", "it is no number"),
    ],
)
def test_import_makes_a_comment_with_the_reason_of_an_option_without_a_meaning(
    run: Run, tab: Path, option: str, reason: str
) -> None:
    assert len(imported(run, tab, f"nbd0 h x {option}\n")) == 1
    out = (tab.parent / "devices.d" / "nbdtab.yaml").read_text()
    [comment] = [line for line in out.splitlines() if line.startswith(f"    # {option}: ")]
    assert reason in comment


def test_import_takes_the_first_of_two_lines_as_nbd_client_does(run: Run, tab: Path) -> None:
    found = imported(run, tab, "nbd0 h first\nnbd0 h second\n/dev/nbd0 h third certfile=/x\n")
    assert [str(each.uri[0]) for each in found.values()] == ["nbd://h/first"]


@pytest.mark.parametrize("option", ["tls", "certfile=/a", "keyfile=/a", "cacertfile=/a", "tlshostname=h", "preinit"])
def test_import_of_device_that_nbdd_can_not_have_is_a_comment_and_status_1(run: Run, tab: Path, option: str) -> None:
    tab.write_text(f"nbd0 h secret {option}\nnbd1 h data\n")
    status, out, err = run("import", str(tab))
    assert status == 1
    assert err.startswith(f"nbdctl: {tab}:1: nbd0 is left out: {option} ")
    assert err.count("\n") == 1
    assert list(yaml.safe_load(out)["devices"]) == ["nbd1"]
    assert "# nbd0:\n" in out


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("nbd0 h", "and, without blanks, options), not 2."),
        ("nbd0 h x a, b", "options), not 5."),
        ("sda h x", "'sda' is no device such as nbd0"),
        ("nbd01 h x", "no device"),
        ("nbd0 h x port=ssh", "the port must be a number"),
        ("nbd0 h x port=0", "the port must be a number"),
        (f"nbd0 h x port=00000000{'1' * 5000}", "the port must be a number"),
        ("nbd0 h x a,,b", "an empty place"),
        ("nbd0 h x bs=", "an empty place"),
        ("nbd0 h/y x", "'h/y' is no host"),
        ("nbd0 h_ö x", "can't stand in a host name"),
        ("nbd0 s x unix", "must be absolute"),
    ],
)
def test_import_names_file_and_line_of_what_it_can_not_read(run: Run, tab: Path, line: str, problem: str) -> None:
    tab.write_text(f"# one\n\n{line}\nnbd9 h x\nnbd9\n")
    status, out, err = run("import", str(tab))
    assert (status, out) == (1, "")
    first, second = err.splitlines()
    assert first.startswith(f"nbdctl: {tab}:3: ")
    assert problem in first
    assert second.startswith(f"nbdctl: {tab}:5: a line has 3 or 4 fields")


def test_import_of_unreadable_file_is_a_sentence(run: Run, tab: Path) -> None:
    assert run("import", str(tab)) == (1, "", f"nbdctl: {tab} can't be read: No such file or directory.\n")
    tab.write_bytes(b"\nnbd0 h \xff\n")
    assert run("import", str(tab)) == (1, "", f"nbdctl: {tab}:2: it is not valid UTF-8.\n")


def test_import_of_empty_file_gives_no_devices(run: Run, tab: Path) -> None:
    assert imported(run, tab, "# nothing\n") == {}


def test_import_of_a_dash_reads_standard_input() -> None:
    done = subprocess.run([*NBDCTL, "import", "-"], input=MANUAL, capture_output=True, text=True, check=True)
    assert "  nbd1:\n" in done.stdout


def test_import_as_json_is_a_document(run: Run, tab: Path) -> None:
    tab.write_text("nbd0 h x persist,bs=512\nnbd1 h y tls\n")
    status, out, _ = run("import", "--json", str(tab))
    first, second = json.loads(out)["devices"]
    assert status == 1
    assert first["settings"] == {"uri": "nbd://h/x", "device": "/dev/nbd0", "block-size": 512}
    assert (list(first["remarks"]), first["left-out"], first["line"]) == (["persist"], None, 1)
    assert "encryption" in second["left-out"]


WORDS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["nbd0", "nbd1", "h", "::1", "unix", "bs=512", "port=1", "persist,swap", "conns=0", "a:", "#", "tls", "x=y,z", "/s"]
)


@given(st.lists(st.lists(WORDS, max_size=5), max_size=5))
def test_import_of_any_file_gives_what_nbdd_takes(
    tmp_path_factory: pytest.TempPathFactory, lines: list[list[str]]
) -> None:
    text = "\n".join(" ".join(words) for words in lines)
    entries, problems = list[nbdtab.NbdtabEntry](), tuple[str, ...]()
    try:
        entries = nbdtab.read(text, "/etc/nbdtab\n")
    except InvalidConfig as error:
        problems = error.problems
    assert all(problem.isprintable() for problem in problems)
    folder = tmp_path_factory.mktemp("x")
    (folder / "nbdd.yaml").write_text(nbdtab.yaml(entries, "/etc/nbdtab\n"))
    out = io.StringIO()
    assert check(folder, out) == 0, out.getvalue()
    found: dict[str, Any] = yaml.safe_load((folder / "nbdd.yaml").read_text())["devices"]
    assert found == {entry.name: entry.settings for entry in entries if not entry.left_out}
