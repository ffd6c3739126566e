# SPDX-License-Identifier: MIT
"""Run the matrix on this machine and print what came of it, as JSON.

    python3 -m tests.interop.matrix [--without-daemon]

One process starts every server, asks nbdinfo, nbdd's library and, over D-Bus, the running nbdd what each exports, opens
the exports of the table, and compares. In the tests, the machine is a guest.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Self

from nbdd.errors import NbddError, ServerError
from nbdd.protocol import Export as Described
from nbdd.protocol import Flags
from nbdd.server.connect import Deadline, list_exports, open_export
from nbdd.uri import URI
from tests.interop.cells import BY_COMMAND, MANY, REFUSALS, SERVERS, Caveat
from tests.interop.servers import Place, serving

SECONDS = 120.0
"""For one question to one server, on an emulated processor that others want as well."""

PACKAGES = ("nbdkit", "qemu-utils", "nbd-server", "libnbd-bin")

FLAGS = {
    "is_read_only": Flags.NBD_FLAG_READ_ONLY,
    "can_flush": Flags.NBD_FLAG_SEND_FLUSH,
    "can_fua": Flags.NBD_FLAG_SEND_FUA,
    "is_rotational": Flags.NBD_FLAG_ROTATIONAL,
    "can_trim": Flags.NBD_FLAG_SEND_TRIM,
    "can_zero": Flags.NBD_FLAG_SEND_WRITE_ZEROES,
    "can_df": Flags.NBD_FLAG_SEND_DF,
    "can_multi_conn": Flags.NBD_FLAG_CAN_MULTI_CONN,
    "can_cache": Flags.NBD_FLAG_SEND_CACHE,
    "can_fast_zero": Flags.NBD_FLAG_SEND_FAST_ZERO,
    "can_block_status_payload": Flags.NBD_FLAG_BLOCK_STATUS_PAYLOAD,
}
"""nbdinfo's words. It has none for NBD_FLAG_HAS_FLAGS and NBD_FLAG_SEND_RESIZE."""

MODES = {"structured": Flags.NBD_FLAG_SEND_DF, "extended": Flags.NBD_FLAG_BLOCK_STATUS_PAYLOAD}
"""What nbdinfo says that it negotiated, with the flag that a server gives to those only who did."""

_NAMED = sum(FLAGS.values())

_BOUNDS = ("minimum", "preferred", "maximum")


@dataclass(frozen=True, slots=True)
class Told:
    """An export in the words of one of those who tell."""

    name: str
    size: int | None
    """Bytes; None where it is not known."""
    flags: int
    """Those of `FLAGS`."""
    blocks: tuple[int | None, ...]
    """Minimum, preferred, maximum; None where the server says nothing."""
    description: str
    problem: str = ""

    @classmethod
    def by_nbdinfo(cls, entry: Mapping[str, Any]) -> Self:
        """One of the "exports" of `nbdinfo --json`."""
        flags = sum(flag for word, flag in FLAGS.items() if entry.get(word))
        blocks = tuple(entry.get(f"block_size_{bound}") for bound in _BOUNDS)
        return cls(entry["export-name"], entry["export-size"], flags, blocks, entry.get("description", ""))

    @classmethod
    def by_nbdctl(cls, entry: Mapping[str, Any]) -> Self:
        """One of the "exports" of `nbdctl exports --json`."""
        blocks = tuple(entry.get(f"{bound}-block-size") for bound in _BOUNDS)
        flags, problem = entry.get("flags", 0) & _NAMED, entry.get("problem", "")
        return cls(entry["name"], entry.get("size"), flags, blocks, entry["description"], problem)

    @classmethod
    def by_library(cls, export: Described) -> Self:
        """One that nbdd's library listed or opened."""
        size = None if export.problem else export.size
        blocks = (export.minimum, export.preferred, export.maximum)
        return cls(export.name, size, export.flags & _NAMED, blocks, export.description, export.problem)


Listing = list[Told] | str
"""What a server exports, or the sentence why that can't be said."""


@dataclass(slots=True)
class Answers:
    """What all say about one place."""

    nbdinfo: Listing
    extra: int
    """Flags that the server gives nbdinfo for what that negotiates and nbdd does not."""
    nbdd: dict[str, Listing]
    """What nbdd says: by its library, over the bus, as a command."""
    theirs: dict[str, Told] = field(default_factory=dict)
    """By name, the exports of the table as nbdinfo has them."""
    opened: dict[str, Told | str] = field(default_factory=dict)
    """The same, opened by nbdd's library."""


def look(place: Place) -> Answers:
    """Ask nbdinfo and the library."""
    # Over TCP, nbdinfo waits for a delayed acknowledgement of every export: minutes for thousands. So it is asked once.
    asked = replace(place, transport="unix") if place.server.listed == MANY else place
    listing, extra = ask(asked.uri(), "--list")
    answers = Answers(listing, extra, {"library": _list(place.uri())})
    listed = {told.name: told for told in listing} if isinstance(listing, list) else {}
    for export in place.server.exports:
        uri = place.uri(export.name)
        answers.opened[export.name] = _open(uri)
        theirs = listed.get(export.name)
        if theirs is None:
            alone, answers.extra = ask(uri, "--no-content")
            assert isinstance(alone, list), alone
            theirs = alone[0]
        answers.theirs[export.name] = opened_by_nbdinfo(theirs, uri) if place.server.peer == "nbd-server" else theirs
    return answers


def look_all(places: Sequence[Place]) -> dict[Place, Answers]:
    """Ask them about several places, one after the other."""
    return {place: look(place) for place in places}


@functools.cache
def ask(uri: str, how: str) -> tuple[Listing, int]:
    """What `nbdinfo --json` says, and the flags that come with what it negotiated."""
    words = ["nbdinfo", "--json", how, uri]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        return done.stderr, 0
    document = json.loads(done.stdout)
    extra = sum(flag for mode, flag in MODES.items() if document.get(mode))
    return [Told.by_nbdinfo(entry) for entry in document["exports"]], extra


def opened_by_nbdinfo(told: Told, uri: str) -> Told:
    """The export with size and flags as a server tells them only to who opens it.

    What nbdinfo prints is the answer to NBD_OPT_INFO. With --map it goes on to NBD_OPT_GO; where the server has no
    map that prints nothing, but the log of libnbd has what it was told, and has it last.
    """
    words = ["env", "LIBNBD_DEBUG=1", "nbdinfo", "--map", uri]
    done = subprocess.run(words, capture_output=True, timeout=SECONDS, check=False)
    *_, (size, flags) = re.findall(rb"exportsize: (\d+) eflags: 0x([0-9a-f]+)", done.stderr)
    return replace(told, size=int(size), flags=int(flags, 16) & _NAMED)


def _list(uri: str) -> Listing:
    try:
        return [Told.by_library(export) for export in list_exports(URI.parse(uri), Deadline(SECONDS))]
    except ServerError as error:
        return str(error)


def _open(uri: str) -> Told | str:
    try:
        sock, export = open_export(URI.parse(uri), Deadline(SECONDS))
    except ServerError as error:
        return str(error)
    sock.close()
    return Told.by_library(export)


async def ask_daemon(places: Mapping[Place, Answers]) -> None:
    """Ask the running nbdd about all places, over one connection to the bus; it is what nbdctl does."""
    from nbdd.bus.caller.client import ManagerProxy  # noqa: PLC0415 - dbus_next is not everywhere

    async with ManagerProxy() as client:
        for place, answers in places.items():
            if place.server.listed == MANY and place.transport != "tcp4":
                # It takes dbus_next seconds on an emulated processor.
                continue
            try:
                found: Listing = [Told.by_nbdctl(entry) for entry in await client.exports(place.uri())]
            except NbddError as error:
                found = str(error)
            answers.nbdd["bus"] = found


def ask_command(place: Place) -> Listing:
    """Ask with `nbdctl exports --json`."""
    words = ["nbdctl", "exports", "--json", place.uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        return done.stderr.removeprefix("nbdctl: ").rstrip("\n")
    return [Told.by_nbdctl(entry) for entry in json.loads(done.stdout)["exports"]]


def compare(ours: Told, theirs: Told, extra: int) -> Iterator[Caveat | str]:
    """Where the two differ: the caveats that explain it, and sentences for what none explains."""
    if ours.problem.startswith("It was not asked"):
        yield Caveat.ASKED
        return
    if ours.problem and ours.size is None and theirs.size == 0:
        yield Caveat.SIZE
    elif ours.size != theirs.size:
        yield f"size {ours.size} ({ours.problem}), nbdinfo has {theirs.size}"
    if ours.flags | extra != theirs.flags or ours.flags & extra:
        yield f"flags {words(ours.flags)}, nbdinfo has {words(theirs.flags)}"
    elif extra:
        yield Caveat.REPLIES
    for what in ("name", "blocks", "description"):
        if getattr(ours, what) != getattr(theirs, what):
            yield f"{what} {getattr(ours, what)!r}, nbdinfo has {getattr(theirs, what)!r}"


def same(one: Listing, other: Listing, *, patient: bool) -> bool:
    """Whether the two are the same; not `patient`, one may know less for want of time, if it says so."""
    if patient or isinstance(one, str) or isinstance(other, str) or len(one) != len(other):
        return one == other
    return all(
        mine == yours or (mine.name == yours.name and "in time" in mine.problem)
        for mine, yours in zip(one, other, strict=True)
    )


def refusal(place: Place, listing: Listing) -> Caveat | None:
    """The caveat that lets nbdd refuse the list of a place, if it did so in the words that go with it."""
    start = f"The NBD server {URI.parse(place.uri()).address} "
    for caveat in place.server.caveats:
        texts = tuple(start + text for text in REFUSALS.get(caveat, ()))
        if isinstance(listing, str) and texts and listing.startswith(texts):
            return caveat
    return None


def differences(place: Place, answers: Answers) -> Iterator[Caveat | str]:
    """Where nbdd, in all its ways, and nbdinfo differ about one place."""
    ours = answers.nbdd["library"]
    refused = refusal(place, ours)
    for way, listing in answers.nbdd.items():
        if refused and refusal(place, listing) is refused:
            continue
        if not same(listing, ours, patient=place.server.listed != MANY):
            yield f"by its {way}, nbdd says {str(listing)[:200]}, and by its library {str(ours)[:200]}"
    for export in place.server.exports:
        name, opened, theirs = shown(export.name), answers.opened[export.name], answers.theirs[export.name]
        if isinstance(opened, str):
            # Where there is no negotiation at all, it is refused like the list.
            if opened != ours:
                yield f"{name} opened: {opened}"
            continue
        if opened.size != export.size:
            yield f"{name} opened: {opened.size} bytes, not {export.size}"
        for found in compare(opened, theirs, answers.extra):
            yield f"{name} opened: {found}" if isinstance(found, str) else found
    if isinstance(ours, str):
        yield refused or ours
        if isinstance(answers.nbdinfo, list):
            yield f"nbdinfo lists {len(answers.nbdinfo)} exports all the same"
        return
    if isinstance(answers.nbdinfo, str):
        yield f"nbdinfo does not list: {answers.nbdinfo}"
        return
    names, others = [told.name for told in ours], [told.name for told in answers.nbdinfo]
    if names != others or len(names) != (place.server.listed or len(place.server.exports)):
        yield f"it lists {len(names)} exports ({names[:10]}), nbdinfo {len(others)} ({others[:10]})"
        return
    for one, other in zip(ours, answers.nbdinfo, strict=True):
        for found in compare(one, other, answers.extra):
            yield f"{shown(one.name)} listed: {found}" if isinstance(found, str) else found


def words(flags: int) -> str:
    """Transmission flags, short."""
    return " ".join(word.split("_", 1)[1].replace("_", "-") for word, flag in FLAGS.items() if flags & flag)


def shown(name: str) -> str:
    """A name of an export, short."""
    return f"{name[0]!r}, {len(name)} times" if len(name) > 100 else repr(name)


def rows(places: Mapping[Place, Answers]) -> Iterator[dict[str, Any]]:
    """The table: for each export what it is, and for each transport the numbers of the caveats; beside that, faults."""
    for server in dict.fromkeys(place.server for place in places):
        cells: dict[str, dict[str, Any]] = {}
        faults: list[str] = []
        told: dict[str, set[Told]] = {export.name: set() for export in server.exports}
        for place, answers in places.items():
            if place.server is not server:
                continue
            found = list(differences(place, answers))
            caveats = {caveat for caveat in found if isinstance(caveat, Caveat)}
            refused = any(isinstance(opened, str) for opened in answers.opened.values())
            notes = sorted(caveat.number for caveat in caveats)
            cells[place.transport] = {"refused": refused, "notes": notes}
            faults += [f"{place.transport}: {fault}" for fault in found if isinstance(fault, str)]
            # Which servers know other replies, the document says.
            expected = server.caveats | ({Caveat.REPLIES} if answers.extra else set())
            if caveats != expected:
                faults.append(f"{place.transport}: seen {caveats or 'nothing'}, not {expected or 'nothing'}")
            for name, opened in answers.opened.items():
                told[name].add(opened if isinstance(opened, Told) else answers.theirs[name])
        for export in server.exports:
            one, *others = told[export.name]
            yield {
                "peer": server.peer,
                "about": export.about or server.about,
                "export": shown(export.name),
                "size": one.size,
                "flags": words(one.flags),
                "blocks": one.blocks,
                "cells": cells,
                "faults": faults + [f"{shown(export.name)} is {one}, and {other}" for other in others],
            }


def system() -> dict[str, str]:
    """The release, and the versions of what was run."""
    query = ["dpkg-query", "-W", "-f", "${Package} ${Version}\\n", *PACKAGES]
    listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    release = platform.freedesktop_os_release()
    return {"release": f"{release['NAME'].split()[0]} {release['VERSION_ID']}"} | dict(
        line.split(" ") for line in listed.splitlines()
    )


def run(*, daemon: bool) -> dict[str, Any]:
    """The whole matrix; the seconds are those since its start."""
    start = time.monotonic()
    seconds = {}

    def passed(what: str) -> None:
        seconds[what] = round(time.monotonic() - start, 1)

    with serving() as places:
        passed("servers started")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # By server: one is asked over one transport at a time.
            groups = [[place for place in places if place.server is server] for server in SERVERS]
            answers = {place: told for found in pool.map(look_all, groups) for place, told in found.items()}
        passed("nbdinfo and library asked")
        if daemon:
            asyncio.run(ask_daemon(answers))
            passed("daemon asked")
            for place in places:
                if place.server.about in BY_COMMAND and place.transport == "unix":
                    answers[place].nbdd["command"] = ask_command(place)
            passed("command asked")
    return {"system": system(), "seconds": seconds, "rows": list(rows(answers))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without-daemon", action="store_true", help="leave out the bus and nbdctl")
    print(json.dumps(run(daemon=not parser.parse_args().without_daemon)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
