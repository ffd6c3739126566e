# SPDX-License-Identifier: MIT
"""Rules for polkit, ours and the example, run as polkitd runs them, by an engine for JavaScript that is at hand."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

DESKTOP = Path(__file__).resolve().parents[3] / "desktop"
ENGINES = ("duk", "node", "qjs", "js")

# What polkitd gives to a rule (polkit(8), "AUTHORIZATION RULES"), as far as a rule like this one can see it.
POLKITD = """
var rules = [];
var polkit = {
    Result: { NO: "no", YES: "yes", AUTH_ADMIN_KEEP: "auth_admin_keep", NOT_HANDLED: null },
    addRule: function(rule) { rules.push(rule); },
    log: function() {}
};
"""
ASK = """
var say = typeof print === "function" ? print : console.log;
say(JSON.stringify(questions.map(function(question) {
    var action = { id: question.action, lookup: function(key) { return question.details[key]; } };
    var subject = {
        user: "eve", groups: question.groups, local: question.local, active: question.active,
        isInGroup: function(group) { return question.groups.indexOf(group) >= 0; }
    };
    return rules.map(function(rule) { return rule(action, subject); });
})));
"""


def answers(tmp_path: Path, rule: str, questions: list[dict[str, object]]) -> list[object]:
    """What the rule says to each question: "yes", or None where it leaves that to others."""
    engine = next(filter(shutil.which, ENGINES), None)
    if engine is None:
        pytest.skip(f"needs one of {', '.join(ENGINES)}: apt-get install duktape")
    script = tmp_path / "rule.js"
    script.write_text(POLKITD + (DESKTOP / rule).read_text() + f"var questions = {json.dumps(questions)};" + ASK)
    done = subprocess.run([engine, str(script)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert all(len(one) == 1 for one in found), "it is one rule"
    return [one[0] for one in found]


def question(
    action: str, *, configured: str | None = "yes", groups: str = "eve disks", **seat: bool
) -> dict[str, object]:
    details = {"device": "photos"} | ({"configured": configured} if configured else {})
    there = {"local": True, "active": True} | seat
    return {"action": f"org.nbdd1.{action}", "details": details, "groups": groups.split(), **there}


def test_polkit_example_lets_the_group_attach_and_detach_what_is_configured_and_nothing_else(tmp_path: Path) -> None:
    allowed = [question("attach"), question("detach")]
    left = [
        question("attach-uri", configured=None),
        question("force-detach"),
        question("set-timeout"),
        question("reload", configured=None),
        question("list-exports", configured=None),
        question("attach", configured="no"),
        question("detach", configured=None),
        question("attach", groups="eve"),
        question("attach", groups="eve disk"),
        question("attach", local=False),
        question("attach", active=False),
        {**question("attach"), "action": "org.freedesktop.udisks2.filesystem-mount"},
        {**question("attach"), "action": "org.nbdd1.attach.evil"},
    ]
    assert answers(tmp_path, "60-nbdd-group.rules", allowed + left) == ["yes"] * len(allowed) + [None] * len(left)


def mount(device: str | None, how: str = "-other-seat", **seat: bool) -> dict[str, object]:
    details = {"device": device} if device is not None else {}
    there = {"local": True, "active": True} | seat
    return {"action": f"org.freedesktop.udisks2.filesystem-mount{how}", "details": details, "groups": [], **there}


def test_polkit_rule_lets_the_person_at_the_machine_mount_a_disk_of_the_desktop_and_nothing_else(
    tmp_path: Path,
) -> None:
    allowed = [mount("/dev/nbd0"), mount("/dev/nbd12p3")]
    left = [
        mount("/dev/nbd0", "-system"),
        mount("/dev/nbd0", ""),
        mount("/dev/sda1"),
        mount("/dev/nbd0/../sda1"),
        mount("/dev/nbd0\n/dev/sda"),
        mount("/dev/nbd"),
        mount(None),
        mount("/dev/nbd0", local=False),
        mount("/dev/nbd0", active=False),
        question("attach"),
    ]
    assert answers(tmp_path, "org.nbdd1.rules", allowed + left) == ["yes"] * len(allowed) + [None] * len(left)
