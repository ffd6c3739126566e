# SPDX-License-Identifier: MIT
"""Commits since the last release have the form that CONTRIBUTING.md asks for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[3]

RULE_SINCE = "35145fb"
"""The last commit before there was a rule: releases are tagged, and until the first one this is where to begin."""

LONGEST_SUBJECT = 72
# An area, and then a verb; or the name of a class, which begins with a capital letter and has another.
SUBJECT = re.compile(r"[a-z0-9_.,/ -]+: (?:[a-z]|[A-Z]\w*[A-Z])")


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-c", f"safe.directory={TREE}", "-C", str(TREE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def faults(message: str) -> list[str]:
    """What is wrong with a commit's message."""
    subject, _, body = message.partition("\n")
    found = []
    if len(subject) > LONGEST_SUBJECT:
        found.append(f"the subject has {len(subject)} characters, more than {LONGEST_SUBJECT}")
    if not SUBJECT.match(subject):
        found.append('the subject is not "area: imperative"')
    if not body.strip():
        found.append("no body says why, and what was run")
    return found


@pytest.fixture
def first() -> str:
    """The commit after which the rule holds."""
    try:
        shallow = git("rev-parse", "--is-shallow-repository")
    except FileNotFoundError:
        pytest.skip("needs git")
    if not (TREE / ".git").exists() or shallow.returncode != 0:
        pytest.skip("needs the repository: this tree has no .git")
    if shallow.stdout.strip() != "false":
        pytest.skip("needs the history since the last release: this clone is shallow")
    tag = git("describe", "--tags", "--abbrev=0", "--match=v*")
    found = tag.stdout.strip() if tag.returncode == 0 else RULE_SINCE
    if git("merge-base", "--is-ancestor", found, "HEAD").returncode != 0:
        pytest.skip(f"needs the history since {found}, which is not in this repository")
    return found


def test_commits_since_the_last_release_have_the_form_of_the_rule(first: str) -> None:
    log = git("log", "--no-merges", "-z", "--format=%H %B", f"{first}..HEAD")
    assert log.returncode == 0, log.stderr
    wrong: dict[str, list[str]] = {}
    for commit in filter(None, log.stdout.split("\0")):
        name, _, message = commit.partition(" ")
        if found := faults(message):
            wrong[f"{name[:7]} {message.partition(chr(10))[0]}"] = found
    assert wrong == {}


@pytest.mark.parametrize(
    ("message", "number"),
    [
        ("kernel: only its modules know where /dev has NBD nodes\n\nWhy.", 0),
        ("errors, server: ExportChanged replaces OtherExport\n\nWhy.", 0),
        ("man/generate.py: wrap long lines\n\nWhy.\n\nRun: this.", 0),
        ("kernel: wrap a docstring", 1),
        ("kernel: wrap a docstring\n\n \n", 1),
        ("kernel: Wrap a docstring\n\nWhy.", 1),
        ("wrap a docstring\n\nWhy.", 1),
        ("what an attack found: " + "long signals and floods of questions hold nobody up\n\nWhy.", 1),
        ("Wrap a docstring and say so in a subject that does not end where a line of the log does", 3),
    ],
)
def test_commit_message_has_its_faults_named(message: str, number: int) -> None:
    assert len(faults(message)) == number
