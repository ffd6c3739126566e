# SPDX-License-Identifier: MIT
"""The manual pages: prose from *.in, and where a line begins with @, what the programs say of themselves.

    @command NAME       a command of nbdctl: its arguments and its help
    @options NAME       its options, but for those that every command has
    @argument OPTION    an option or argument of nbdd
    @key NAME           a key of the YAML files, or NAME/KEY for one below it: what the schema says
    @default NAME       its default
    @interface NAME     the methods and properties of a D-Bus interface, from the comments of its XML
    @errors             the errors on D-Bus, from the tree in nbdd.errors
    @actions            the actions that polkit decides on

Nothing that there is may be left out: generating fails then. `make man` writes the pages, a test holds them to this.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

TREE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TREE))

from nbdd.__main__ import arguments  # noqa: E402 - from this tree, wherever it is
from nbdd.ctl.cli import cli  # noqa: E402
from nbdd.errors import NbddError  # noqa: E402

PAGES = ("nbdctl.1", "nbdd.8", "nbdd.yaml.5", "org.nbdd1.5")
COMMON = {"--json", "--host", "--help"}
"""What the section on options says once for all commands."""

WIDTH = 80
"""Columns of a line of source, as mandoc wants them."""

_SENTENCE = re.compile(r"(?<=[^ .][.?!]) (?=[A-Z])")
_CODE = r"`(?P<code>[^`]+)`"
_OPTION = r"(?<![\w-])--(?P<option>[a-z][a-z-]*)"
_AFTER = r"(?P<after>[.,;:?!)]*)(?=\s|$)"


class Incomplete(Exception):
    """Something that there is stands on no page, or the other way round."""


# Text to mdoc(7)


def prose(text: str, names: Iterable[str] = ()) -> list[str]:
    """Sentences as lines of mdoc, each beginning its own; `names` are those of arguments."""
    marks = [_CODE, _OPTION]
    if names:
        marks.append(rf"(?<![\w/-])(?P<name>{'|'.join(map(re.escape, names))})(?![\w-])")
    mark = re.compile(f"(?:{'|'.join(marks)}){_AFTER}")
    lines: list[str] = []
    for sentence in _SENTENCE.split(" ".join(text.split())):
        end = 0
        for found in mark.finditer(sentence):
            lines += _plain(sentence[end : found.start()])
            parts = found.groupdict()
            macro = f"Ql {_quoted(parts['code'])}" if parts["code"] else ""
            macro = macro or (f"Fl Fl {parts['option']}" if parts["option"] else f"Ar {parts['name']}")
            lines.append(" ".join([f".{macro}", *parts["after"]]))
            end = found.end()
        lines += _plain(sentence[end:])
    return lines


def _plain(text: str) -> list[str]:
    text = text.strip().replace("\\", r"\e")
    # A line that began with one of these would be a request.
    return [rf"\&{text}" if text[:1] in {".", "'"} else text] if text else []


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", r"\e").replace('"', '""') + '"' if " " in text or '"' in text else text


def wrapped(lines: Iterable[str]) -> Iterator[str]:
    """The lines, those of text no longer than WIDTH."""
    literal = False
    for line in lines:
        literal = (literal or line.startswith(".Bd -literal")) and line != ".Ed"
        if literal or line.startswith((".", "'")) or len(line) <= WIDTH:
            yield line
            continue
        for piece in textwrap.wrap(line, WIDTH, break_long_words=False, break_on_hyphens=False):
            yield from _plain(piece) if piece[:1] in {".", "'"} else [piece]


def tag(text: str) -> str:
    """The tag of a list for an option or an argument, such as "--name NAME"."""
    words = []
    for word in text.replace(",", " ,").split():
        if word.startswith("--"):
            words.append(f"Fl Fl {word[2:]}")
        elif word.startswith("-"):
            words.append(f"Fl {word[1:]}")
        elif word.startswith("["):
            words.append(f"Op Ar {word.strip('[]')}")
        else:
            words.append(word if word == "," else f"Ar {word.replace('|', ' | ')}")
    return f".It {' '.join(words)}"


# What there is


def command(name: str) -> list[str]:
    """An item with the arguments and the help of a command."""
    found = cli.commands[name]
    metavars = [str(each.metavar) for each in found.params if isinstance(each, click.Argument)]
    options = [str(each.metavar) for each in found.params if isinstance(each, click.Option) and each.metavar]
    names = {word for metavar in (*metavars, *options) for word in re.findall(r"[A-Z]+", metavar)}
    lines = [" ".join([f".It Cm {name}", *(tag(metavar)[4:] for metavar in metavars)])]
    # click's \b begins a paragraph that keeps its lines: the examples, which have their section here.
    for number, paragraph in enumerate(inspect.cleandoc(found.help or "").split("\n\n")):
        if not paragraph.startswith("\b"):
            lines += [".Pp"] * (number > 0) + prose(paragraph, sorted(names, key=len, reverse=True))
    return lines


def options(name: str) -> list[str]:
    """The options of a command in a list."""
    lines = [".Pp", ".Bl -tag -width Ds -compact"]
    for each in cli.commands[name].params:
        if isinstance(each, click.Option) and not COMMON & set(each.opts):
            lines.append(tag(" ".join([", ".join(each.opts), each.metavar or ""])))
            lines += prose(each.help or "", [each.metavar] if each.metavar else [])
            if each.show_default:
                lines += ["The default is", f".Ql {each.default:g} ."]
    return [*lines, ".El"]


def argument(name: str) -> list[str]:
    """An item for an option or an argument of nbdd."""
    for action in arguments()._actions:  # noqa: SLF001 - argparse offers no other way to what it knows
        shown = ", ".join(action.option_strings) or str(action.metavar)
        if name in {*action.option_strings, action.metavar}:
            text = str(action.help or "")
            return [tag(shown), *prose(text[:1].upper() + text[1:].rstrip(".") + ".", ["DIR"])]
    raise Incomplete(f"nbdd has no argument {name}")


def schema() -> dict[str, Any]:
    """The schema of the YAML files."""
    found: dict[str, Any] = json.loads((TREE / "config/nbdd.schema.json").read_text(encoding="utf-8"))
    return found


def keys() -> dict[str, dict[str, Any]]:
    """Every key of a file or of a device, with what the schema says of it."""
    rules = schema()
    definitions = rules["definitions"]
    of_device = definitions["device"]["properties"]
    found = {key: definitions[value["$ref"].rpartition("/")[2]] for key, value in of_device.items()}
    nested = {
        f"{key}/{name}": part for key, facts in found.items() for name, part in facts.get("properties", {}).items()
    }
    return dict(rules["properties"]) | found | nested


def key(name: str) -> list[str]:
    """An item with what the schema says of a key."""
    facts = keys()[name]
    text = facts["description"]
    for word in facts.get("enum", ()):
        text = text.replace(f"{word}:", f"`{word}`:")
    return [f".It Cm {name.rpartition('/')[2]}", *prose(text)]


def default(name: str) -> list[str]:
    """The default of a key."""
    value = keys()[name]["default"]
    return ["The default is", f".Ql {str(value).lower() if isinstance(value, bool) else value} ."]


def interface(name: str) -> list[str]:
    """The methods and properties of an interface, each with the comment before it."""
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))  # noqa: S314 - a file of this tree
    root = ET.parse(TREE / f"dbus/{name}.xml", parser).getroot().find("interface")  # noqa: S314
    if root is None:
        raise Incomplete(f"{name} has no interface")
    lists: dict[str, list[str]] = {"method": [], "property": []}
    comment = ""
    for element in root:
        if callable(element.tag):  # a comment; elements have the name there
            comment = str(element.text)
        else:
            lists[element.tag] += [_member(element), *_documented(comment, element.attrib["name"])]
    lines = []
    for title, items in (("Methods", lists["method"]), ("Properties", lists["property"])):
        lines += [f".Ss {title} of {name}", ".Bl -tag -width Ds", *items, ".El"]
    return lines


def _member(element: ET.Element) -> str:
    name = element.attrib["name"]
    if element.tag == "property":
        return f".It Cm {name} Pq {element.attrib['type']}"
    into, out = (
        [f"No {each.attrib['type']} Ar {each.attrib['name']}" for each in element.iter("arg") if _goes(each, direction)]
        for direction in ("in", "out")
    )
    results = f" No \\(-> {' , '.join(out)}" if out else ""
    return f".It Cm {name} Po {' , '.join(into)} Pc{results}".replace("Po  Pc", "Po Pc")


def _goes(element: ET.Element, direction: str) -> bool:
    return element.attrib["direction"] == direction


def _documented(comment: str, name: str) -> list[str]:
    """The comment before a member: its sentences, @argument for each argument, and paragraphs."""
    text = inspect.cleandoc(comment).removeprefix(f"{name}:")
    if text == inspect.cleandoc(comment):
        raise Incomplete(f"the comment before {name} does not begin with its name")
    # Each @argument and each list of errors begins a paragraph of its own.
    paragraphs = re.split(r"\n\s*\n|\n(?=@|Errors:|Polkit:)", text)
    lines: list[str] = []
    for paragraph in paragraphs:
        found = re.match(r"@(\w+):", paragraph)
        body = " ".join(paragraph[found.end() if found else 0 :].split())
        if found:
            lines += [".Pp", f".Ar {found[1]} :", *prose(body)]
        else:
            lines += [".Pp"] * bool(lines) + prose(body[:1].upper() + body[1:])
    return lines


def errors() -> list[str]:
    """The errors that have a name of their own."""
    lines = [".Bl -tag -width Ds"]

    def tree(kind: type[NbddError]) -> Iterator[type[NbddError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from tree(child)

    for kind in tree(NbddError):
        if "dbus_name" in vars(kind):
            # What is said of Python's side of it is of no use here.
            text = re.sub(r"; ``[^.]*", "", inspect.getdoc(kind) or "")
            lines += [f".It Li {kind.dbus_name}", *prose(text)]
    return [*lines, ".El"]


def actions() -> list[str]:
    """What polkit decides on."""
    lines = [".Bl -tag -width Ds"]
    for action in ET.parse(TREE / "dbus/org.nbdd1.policy").getroot().iter("action"):  # noqa: S314
        lines += [f".It Li {action.attrib['id']}", *prose((action.findtext("description") or "").rstrip(".") + ".")]
    return [*lines, ".El"]


# The pages

_DIRECTIVES = {
    "command": command,
    "options": options,
    "argument": argument,
    "key": key,
    "default": default,
    "interface": interface,
}


def page(name: str) -> str:
    """The text of a page."""
    source = (TREE / "man" / f"{name}.in").read_text(encoding="utf-8").splitlines()
    used: set[tuple[str, str]] = set()
    lines: list[str] = []
    for line in source:
        word, _, rest = line.removeprefix("@").partition(" ")
        if not line.startswith("@"):
            lines.append(line)
        elif word in {"errors", "actions"}:
            lines += errors() if word == "errors" else actions()
        else:
            used.add((word, rest))
            lines += _DIRECTIVES[word](rest)
    _complete(name, used)
    head = f'.\\" Made from {name}.in by `make man`; edit that.'
    return "\n".join(wrapped([lines[0], head, *lines[1:]])) + "\n"


def _complete(name: str, used: set[tuple[str, str]]) -> None:
    there: dict[str, set[tuple[str, str]]] = {
        "nbdctl.1": {("command", each) for each in cli.commands} | {("options", each) for each in _with_options()},
        "nbdd.8": {("argument", _name(each)) for each in arguments()._actions},  # noqa: SLF001
        "nbdd.yaml.5": {
            (word, each)
            for each, facts in keys().items()
            for word in ("key", "default")
            if word == "key" or word in facts
        },
        "org.nbdd1.5": {("interface", path.stem) for path in (TREE / "dbus").glob("*.xml")},
    }
    if used != there[name]:
        missing = ", ".join(" ".join(each) for each in sorted(there[name] - used)) or "nothing"
        raise Incomplete(f"{name}.in lacks {missing}, and has {sorted(used - there[name]) or 'nothing'} too much.")


def _with_options() -> Iterator[str]:
    for name, each in cli.commands.items():
        if any(isinstance(one, click.Option) and not COMMON & set(one.opts) for one in each.params):
            yield name


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else str(action.metavar)


def main() -> None:
    """Write the pages."""
    for name in PAGES:
        (TREE / "man" / name).write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main()
