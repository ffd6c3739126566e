# SPDX-License-Identifier: MIT
"""The records of bound devices: whole or absent, and one bad file is nobody else's loss."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from nbdd.config.definition import Attach
from nbdd.errors import NbddError
from nbdd.manager.records import Record, Records, runtime_directory
from nbdd.protocol import Export, Flags
from nbdd.worker.binding import Binding
from tests.fakes.worker import definition

FULL = Record(
    definition("data", attach=Attach.BOOT, device=3, read_only=True, connections=4, timeout=5, block_size=4096),
    configured=True,
    binding=Binding(
        index=3,
        diskseq=9,
        export=Export("\udcff", 1, Flags(0x8001)),
        live=1,
        connections=1,
        uri="nbd://storage.example",
        node="/dev/nbd3",
    ),
    attached_since=1_700_000_000_000_000,
    attached_by=1000,
)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "run" / "devices")


def test_record_written_is_loaded_again(records: Records) -> None:
    bare = Record(definition("bare"), configured=False)
    records.write(FULL)
    records.write(bare)
    assert records.load() == [bare, FULL]


def test_record_of_earlier_version_has_no_attached_by() -> None:
    wire = FULL.to_wire()
    del wire["attached-by"]
    assert Record.from_wire(wire) == replace(FULL, attached_by=0)


def test_record_written_again_replaces_the_first(records: Records, tmp_path: Path) -> None:
    for since in range(3):
        records.write(Record(definition(), configured=True, attached_since=since))
    assert [record.attached_since for record in records.load()] == [2]
    assert [path.name for path in (tmp_path / "run" / "devices").iterdir()] == ["disk.json"]


def test_record_names_that_look_alike_are_separate_files(records: Records) -> None:
    names = ["a", "a.b", "a.json", "a.json.new", "a.new", "A", "a:b"]
    for name in names:
        records.write(Record(definition(name), configured=True))
    assert {record.definition.name for record in records.load()} == set(names)
    records.remove("a")
    assert {record.definition.name for record in records.load()} == set(names) - {"a"}


def test_records_without_directory_are_none(records: Records) -> None:
    assert records.load() == []
    records.remove("never")


def test_record_that_can_not_be_written_raises_and_old_one_stays(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    records = Records(directory)
    records.write(FULL)
    (directory / "data.json.new").mkdir()
    (directory / "data.new").mkdir()
    with pytest.raises(NbddError, match=r"data\.json can't be written: Is a directory\."):
        records.write(Record(definition("data"), configured=True))
    assert records.load() == [FULL]


def test_record_remove_never_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "disk.json").mkdir()
    Records(tmp_path).remove("disk")
    assert "can't be removed" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "\x00",
        '{"definition": {}}',
        '{"definition": [], "configured": true, "binding": null, "attached-since": 0}',
        '{"definition": null, "configured": true, "binding": null, "attached-since": 0}',
        json.dumps(FULL.to_wire() | {"binding": "nbd0"}),
        json.dumps(FULL.to_wire() | {"attached-since": None}),
        json.dumps(FULL.to_wire() | {"definition": FULL.definition.to_wire() | {"uri": ["http://x/y"]}}),
        json.dumps(FULL.to_wire() | {"definition": FULL.definition.to_wire() | {"uri": [5]}}),
        json.dumps(FULL.to_wire() | {"definition": FULL.definition.to_wire() | {"attach": "never"}}),
    ],
)
def test_record_that_is_bad_is_logged_and_kept_and_others_load(
    records: Records, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    caplog.set_level(logging.ERROR)
    records.write(FULL)
    bad = tmp_path / "run" / "devices" / "bad.json"
    bad.write_text(text)
    assert records.load() == [FULL]
    assert f"{bad} can't be read" in caplog.text
    assert bad.read_text() == text


def test_record_draft_left_by_crash_is_ignored(records: Records, tmp_path: Path) -> None:
    records.write(FULL)
    (tmp_path / "run" / "devices" / "other.new").write_text("{")
    assert records.load() == [FULL]


def test_records_directory_follows_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/elsewhere")
    assert runtime_directory() == Path("/run/elsewhere/devices")
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    assert runtime_directory() == Path("/run/nbdd/devices")
