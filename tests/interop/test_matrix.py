# SPDX-License-Identifier: MIT
"""The judge of the matrix, judged: what it must not let pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nbdd.protocol import Flags
from tests.interop.cells import SERVERS, Caveat
from tests.interop.matrix import Answers, Listing, Told, differences, rows
from tests.interop.servers import Place

OURS = Told("", 1 << 20, int(Flags.NBD_FLAG_SEND_FLUSH), (512, 4096, 1 << 20), "")
DF = int(Flags.NBD_FLAG_SEND_DF)
THEIRS = replace(OURS, flags=OURS.flags | DF)
PROBLEM = "The server gives its size as 0."


def place(about: str) -> Place:
    """One of the matrix, over a Unix socket."""
    return Place(next(server for server in SERVERS if server.about == about), "unix", 0, "/run/x.sock")


def answers(ours: Listing, theirs: Listing, opened: Told | str = OURS, *, extra: int = DF) -> Answers:
    """What all say about a server with the one export ""."""
    told = theirs[0] if isinstance(theirs, list) and theirs else THEIRS
    return Answers(theirs, extra, {"library": ours, "bus": ours}, {"": told}, {"": opened})


def test_cell_shows_agreement_and_its_caveat() -> None:
    assert set(differences(place("plain"), answers([OURS], [THEIRS]))) == {Caveat.REPLIES}
    assert set(differences(place("--no-sr"), answers([OURS], [OURS], extra=0))) == set()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "x"},
        {"size": 1 << 21},
        {"size": None},
        {"size": None, "problem": PROBLEM},
        {"flags": 0},
        {"flags": THEIRS.flags | Flags.NBD_FLAG_READ_ONLY},
        {"flags": Flags.NBD_FLAG_READ_ONLY},
        {"blocks": (512, 4096, None)},
        {"blocks": (1, 4096, 1 << 20)},
        {"description": "another"},
    ],
    ids=str,
)
def test_cell_is_a_fault_if_list_or_opened_export_differ(change: dict[str, Any]) -> None:
    changed = replace(OURS, **change)
    for found in answers([changed], [THEIRS]), answers([OURS], [THEIRS], changed):
        assert [fault for fault in differences(place("plain"), found) if isinstance(fault, str)]


def test_cell_is_a_fault_if_df_is_set_without_structured_replies() -> None:
    found = list(differences(place("--no-sr"), answers([OURS], [THEIRS], extra=0)))
    assert [fault for fault in found if isinstance(fault, str)]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([], []),
        ([OURS], []),
        ([OURS, OURS], [THEIRS]),
        ("The NBD server /run/x.sock broke.", [THEIRS]),
        ("The NBD server /run/x.sock broke.", "and for nbdinfo, too"),
        ([OURS], "nbdinfo: broke"),
    ],
    ids=str,
)
def test_cell_is_a_fault_if_the_list_differs_or_is_missing(ours: Listing, theirs: Listing) -> None:
    found = differences(place("plain"), answers(ours, theirs))
    assert [fault for fault in found if isinstance(fault, str)]


def test_cell_is_a_fault_if_the_ways_to_nbdd_disagree() -> None:
    found = answers([OURS], [THEIRS])
    found.nbdd["bus"] = [replace(OURS, size=1)]
    assert [fault for fault in differences(place("plain"), found) if isinstance(fault, str)]


def test_refusal_must_be_the_expected_sentence_for_list_and_export() -> None:
    where = place("oldstyle, -o")
    sentence = (
        "The NBD server /run/x.sock speaks the oldstyle NBD protocol, which has no export names; nbdd needs newstyle."
    )
    right = answers(sentence, "nbdinfo: no list", sentence)
    assert set(differences(where, right)) == {Caveat.OLDSTYLE}
    for wrong in (
        answers("The NBD server /run/x.sock broke.", "nbdinfo: no list", sentence),
        answers(sentence, "nbdinfo: no list", "The NBD server /run/x.sock broke."),
        answers([OURS], "nbdinfo: no list", OURS),
        answers(sentence, [THEIRS], sentence),
    ):
        assert [fault for fault in differences(where, wrong) if isinstance(fault, str)]


def test_cell_is_a_fault_if_an_expected_caveat_is_not_seen() -> None:
    (row,) = rows({place("plain"): answers([OURS], [OURS])})
    assert row["cells"] == {"unix": {"refused": False, "notes": []}}
    assert row["faults"]
