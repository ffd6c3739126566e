# SPDX-License-Identifier: MIT
"""The manual pages name what the programs and the schema have, and nothing else."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from man import generate
from nbdd import __main__ as nbdd
from nbdd import errors
from nbdd.ctl import __main__ as nbdctl
from nbdd.ctl.cli import cli
from nbdd.desktop import notifier, opener
from nbdd.metrics import __main__ as nbdd_metrics

TREE = Path(__file__).resolve().parents[3]
BY_HAND = ("nbdd-metrics.8", "nbdd-notify.1", "nbdd-open.1")
PAGES = (*generate.PAGES, *BY_HAND)
LINTERS = (("mandoc", "-Tlint", "-Wwarning"), ("groff", "-ww", "-z", "-mdoc", "-Tutf8"))


class Item(NamedTuple):
    """One entry of a list in a page."""

    section: str
    depth: int
    tag: str
    """As a reader sees it: "--name NAME"."""
    body: list[str]
    """The source below the tag, nested lists included."""


def items(page: str) -> list[Item]:
    """Every list entry of a page, in its order."""
    found: list[Item] = []
    section, open_items = "", list[Item | None]()
    for line in (TREE / "man" / page).read_text().splitlines():
        macro, _, rest = line.partition(" ")
        if macro == ".It":
            tag = re.sub(r"\bOp Ar (\w+)", r"[\1]", rest)
            tag = re.sub(r"\b(Ar|Cm|Li|Ql|Pa|Dv|Ev) ", "", tag.replace("Fl Fl ", "--").replace("Fl ", "-"))
            found.append(Item(section, len(open_items), tag.replace(" , ", ", ").replace(" | ", "|"), []))
            open_items[-1] = found[-1]
            continue
        if macro == ".El":
            open_items.pop()
        for item in open_items:
            if item is not None:
                item.body.append(line)
        if macro == ".Bl":
            open_items.append(None)
        if macro == ".Sh":
            section = rest
    return found


def section(page: str, title: str) -> dict[str, str]:
    """Tag to body of the outer entries in one section."""
    chosen = [item for item in items(page) if item.section == title and item.depth == 1]
    return {item.tag: "\n".join(item.body) for item in chosen}


def options(command: click.Command) -> set[str]:
    """The options of a command with their metavars, those of click itself included."""
    context = click.Context(command, info_name="", **command.context_settings)
    # --help is settled by the group, for the commands as well.
    context.help_option_names = ["-h", "--help"]
    found = set()
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            found.add(" ".join([", ".join(parameter.opts), *([parameter.metavar] if parameter.metavar else [])]))
    return found


def test_nbdctl_has_the_commands_and_options_of_its_page_and_no_others() -> None:
    in_page: dict[str, set[str]] = {}
    for item in items("nbdctl.1"):
        if item.section == "COMMANDS" and item.depth == 1:
            current = in_page.setdefault(item.tag, set())
        elif item.section == "COMMANDS":
            current.add(item.tag)
    host, common = {"-H, --host [USER@]HOST"}, {"--json", "-h, --help"}
    in_program = {}
    for name, command in cli.commands.items():
        arguments = [str(one.metavar) for one in command.params if isinstance(one, click.Argument)]
        assert common <= options(command), name
        # What is about this machine is not done on another.
        assert (host <= options(command)) == (name not in {"doctor", "import"}), name
        in_program[" ".join([name, *arguments])] = options(command) - common - host
    assert in_page == in_program
    assert section("nbdctl.1", "OPTIONS").keys() == options(cli) | common | host


def test_nbdd_has_the_options_of_its_page_and_no_others() -> None:
    in_program = {", ".join(each.option_strings) or str(each.metavar) for each in nbdd.arguments()._actions}
    in_page = section("nbdd.8", "OPTIONS")
    assert in_page.keys() == in_program
    assert f"(default: {nbdd.DEFAULT_DIRECTORY})" in in_page["DIR"]


def arguments_of(main: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The options of a program that argparse reads for, and what its other arguments are called."""
    parsers: list[argparse.ArgumentParser] = []

    def parse_args(self: argparse.ArgumentParser, _arguments: object = None) -> None:
        parsers.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(KeyboardInterrupt):
        main()
    return {", ".join(action.option_strings) or str(action.metavar) for action in parsers[0]._actions}


def test_nbdd_metrics_has_the_options_of_its_page_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    in_page = {
        head.partition(" ")[0] if head.startswith("--") else head for head in section("nbdd-metrics.8", "OPTIONS")
    }
    assert in_page == arguments_of(nbdd_metrics.main, monkeypatch)


def test_desktop_programs_have_the_options_of_their_pages_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert section("nbdd-notify.1", "OPTIONS").keys() == arguments_of(notifier.main, monkeypatch)
    assert section("nbdd-open.1", "OPTIONS").keys() | {"URI"} == arguments_of(opener.main, monkeypatch)
    assert section("nbdd-notify.1", "EXIT STATUS").keys() == {"0", "1", "2"}
    assert section("nbdd-open.1", "EXIT STATUS").keys() == {"0", "1", "2", str(opener.INTERRUPTED)}


def test_exit_codes_are_those_of_the_pages() -> None:
    in_program = {nbdctl.DONE, nbdctl.FAILED, nbdctl.USAGE, nbdctl.INTERRUPTED, nbdctl.UNREAD}
    assert section("nbdctl.1", "EXIT STATUS").keys() == set(map(str, in_program))
    assert section("nbdd.8", "EXIT STATUS").keys() == {"0", "1", "2", str(nbdd.EXIT_CONFIG)}


def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((TREE / "config/nbdd.schema.json").read_text())
    return found


def test_schema_has_the_keys_of_its_page_and_no_others() -> None:
    of_device = schema()["definitions"]["device"]["properties"].keys()
    of_file = section("nbdd.yaml.5", "KEYS OF A FILE")
    assert of_file.keys() == schema()["properties"].keys()
    assert section("nbdd.yaml.5", "KEYS OF A DEVICE").keys() == of_device
    # What `defaults` must not hold is named there.
    in_defaults = schema()["properties"]["defaults"]["properties"].keys()
    assert set(re.findall(r"^\.Cm (\S+)", of_file["defaults"], re.MULTILINE)) == of_device - in_defaults


def test_page_of_the_keys_has_the_defaults_and_limits_of_the_schema() -> None:
    definitions = schema()["definitions"]
    for key, body in section("nbdd.yaml.5", "KEYS OF A DEVICE").items():
        facts = definitions["device-node" if key == "device" else key]
        own = body.partition("\n.Bl ")[0]  # keys below this one have theirs
        default = re.search(r"^The default is\n\.Ql (\S+)", own, re.MULTILINE)
        assert (default and default[1]) == (str(facts["default"]) if "default" in facts else None), key
        lists = [value for value in facts.get("enum", ()) if isinstance(value, int)]
        low, high = (min(lists), max(lists)) if lists else (facts.get("minimum"), facts.get("maximum"))
        assert low is None or f"from {low} to {high}" in body, key


def test_units_name_pages_that_exist() -> None:
    units = [path.read_text() for folder in ("systemd", "desktop") for path in (TREE / folder).glob("*.service")]
    named = re.findall(r"man:(\S+)\((\d)\)", "".join(units))
    assert {f"{name}.{number}" for name, number in named} == set(PAGES) - {"nbdd-open.1"}  # a click starts that
    sources = {f"{page}.in" for page in generate.PAGES} | {"generate.py"}
    assert {path.name for path in (TREE / "man").iterdir() if path.is_file()} == {*PAGES, *sources}


@pytest.mark.parametrize("page", generate.PAGES)
def test_pages_are_what_generate_makes(page: str) -> None:
    assert (TREE / "man" / page).read_text() == generate.page(page), "run `make man`"


@pytest.mark.parametrize(
    ("page", "line"),
    [
        ("nbdctl.1", "@command attach"),
        ("nbdctl.1", "@options detach"),
        ("nbdd.8", "@argument --check"),
        ("nbdd.yaml.5", "@key timeout"),
        ("nbdd.yaml.5", "@default timeout"),
        ("org.nbdd1.5", "@interface org.nbdd1.Device"),
    ],
)
def test_generate_fails_if_a_page_lacks_something(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (TREE / "man" / f"{page}.in").read_text()
    assert f"{line}\n" in source
    (tmp_path / "man").mkdir()
    for folder in ("config", "dbus"):
        (tmp_path / folder).symlink_to(TREE / folder)
    (tmp_path / "man" / f"{page}.in").write_text(source.replace(f"{line}\n", ""))
    monkeypatch.setattr(generate, "TREE", tmp_path)
    with pytest.raises(generate.Incomplete, match=line.removeprefix("@")):
        generate.page(page)


def test_page_of_the_bus_has_every_member_and_every_error() -> None:
    text = (TREE / "man/org.nbdd1.5").read_text()
    interfaces = [ET.parse(path).getroot() for path in (TREE / "dbus").glob("*.xml")]
    members = {
        each.attrib["name"] for root in interfaces for kind in ("method", "property") for each in root.iter(kind)
    }
    arguments = {each.attrib["name"] for root in interfaces for each in root.iter("arg")}
    assert members == set(re.findall(r"^\.It Cm (\w+)", text, re.MULTILINE))
    assert arguments == set(re.findall(r"^\.Ar (\w+) :", text, re.MULTILINE))
    assert set(re.findall(r"org\.nbdd1\.Error\.\w+", text)) == {
        kind.dbus_name for kind in vars(errors).values() if getattr(kind, "dbus_name", "").startswith("org.nbdd1.")
    }


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("One. Two `a b`, and --json.", ["One.", "Two", '.Ql "a b" ,', "and", ".Fl Fl json ."]),
        ("Give NAME, or N.", ["Give", ".Ar NAME ,", "or", ".Ar N ."]),
        (".start 'and \\ end", ["\\&.start 'and \\e end"]),
        ("NAMES are no NAME", ["NAMES are no", ".Ar NAME"]),
    ],
)
def test_generate_makes_lines_of_mdoc_from_sentences(text: str, lines: list[str]) -> None:
    assert generate.prose(text, ["NAME", "N"]) == lines


def test_pages_have_lines_as_long_as_mandoc_wants_them() -> None:
    long = "word " * 40
    made = list(generate.wrapped([long, ".Bd -literal", long, ".Ed"]))
    assert max(len(line) for line in made[:-3]) <= generate.WIDTH
    assert made[-3:] == [".Bd -literal", long, ".Ed"]


@pytest.mark.parametrize("linter", LINTERS, ids=lambda linter: linter[0])
@pytest.mark.parametrize("page", PAGES)
def test_pages_pass_the_formatters(page: str, linter: tuple[str, ...]) -> None:
    if shutil.which(linter[0]) is None:
        pytest.skip(f"{linter[0]} is not installed")
    done = subprocess.run([*linter, str(TREE / "man" / page)], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
