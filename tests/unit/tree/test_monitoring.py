# SPDX-License-Identifier: MIT
"""The dashboard, the alerts and the reference of the metrics are about metrics that there are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nbdd.bus.caller.device import DeviceView
from nbdd.manager.status import State
from nbdd.metrics.families import text
from nbdd.metrics.gather import Snapshot
from tests.fakes.manager import PRESENT
from tests.fakes.metrics import COUNTS

TREE = Path(__file__).resolve().parents[3]
RULES = TREE / "config/prometheus/nbdd.rules.yaml"
DASHBOARD = TREE / "config/grafana/nbdd.json"
REFERENCE = TREE / "docs/metrics.md"

PROMTOOL = shutil.which("promtool", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
"""`make host-tools` puts it beside the Python of the tests."""
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, of Debian's package prometheus")

EVERYTHING = Snapshot(
    at=1, version="0.1.0", devices=(DeviceView.of(PRESENT | {"Name": "a", "FailsAt": 1}),), counts={"a": COUNTS}
)  # fmt: skip
"""Every metric that there is has a sample in it."""


def promtool(*arguments: str, said: str | None = None) -> None:
    """Fails with what promtool says if it says that something is wrong."""
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *arguments], input=said, capture_output=True, text=True, check=False, timeout=60, cwd=TREE
    )
    assert done.returncode == 0, done.stdout + done.stderr


def metrics() -> set[str]:
    return set(re.findall(r"^(nbdd_\w+)(?:\{.*\})? \S+$", text(EVERYTHING).decode(), re.MULTILINE))


def named(source: str) -> set[str]:
    """The metrics in a text. A label may look like one: the label of a state set does."""
    return set(re.findall(r"\bnbdd_\w+\b(?!=)", source))


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def found(document: Any, key: str) -> Iterator[str]:
    """Every text under a key, anywhere in a JSON document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for name, value in items:
        if name == key and isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            yield from found(value, key)


def expressions() -> list[str]:
    """What the dashboard asks Prometheus, its variables replaced."""
    values = {"$instance": ".*", "$device": ".*", "$__rate_interval": "5m"}
    asked = list(found(json.loads(DASHBOARD.read_text()), "expr"))
    return [re.sub(r"\$\w+", lambda variable: values[variable[0]], one) for one in asked]


def test_dashboard_shows_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    shown = named("\n".join([*found(dashboard, "expr"), *found(dashboard, "definition")]))
    assert shown - metrics() == set()
    assert metrics() - shown == {"nbdd_build_info"}


def test_alerts_look_at_metrics_that_exist() -> None:
    looked_at = named("\n".join(rule["expr"] for rule in rules()))
    assert looked_at
    assert looked_at - metrics() == set()


def test_reference_has_every_metric_and_no_other() -> None:
    table = re.findall(r"^\| `(nbdd_\w+)` \|", REFERENCE.read_text(), re.MULTILINE)
    assert sorted(table) == sorted(metrics())
    assert named(REFERENCE.read_text()) - metrics() == {"nbdd_device_", "nbdd_device_state"} - metrics()


def test_reference_has_every_alert_and_no_other() -> None:
    table = re.findall(r"^\| `(Nbdd\w+)` \|", REFERENCE.read_text(), re.MULTILINE)
    assert table == [rule["alert"] for rule in rules()]


def test_alerts_have_a_severity_and_a_description() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
        assert rule["annotations"]["description"].endswith(".")


def test_states_in_alerts_and_dashboard_are_those_of_devices() -> None:
    source = "\n".join([*(rule["expr"] for rule in rules()), *expressions()])
    states = set(re.findall(r'nbdd_device_state=~?"([\w|]+)"', source))
    assert states
    assert states <= set(State)


def test_dashboard_panels_do_not_overlap_and_have_their_own_numbers() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


@needs_promtool
def test_metrics_pass_promtool() -> None:
    promtool("check", "metrics", said=text(EVERYTHING).decode())


@needs_promtool
def test_alerts_pass_promtool() -> None:
    promtool("check", "rules", str(RULES))


@needs_promtool
def test_alerts_ring_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "tests/unit/tree/nbdd.rules.test.yaml")


@needs_promtool
def test_dashboard_queries_are_understood_by_prometheus(tmp_path: Path) -> None:
    asked = [{"record": f"panel:{number}", "expr": one} for number, one in enumerate(expressions())]
    assert asked
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": asked}]}))
    promtool("check", "rules", str(tmp_path / "rules.yaml"))
