# SPDX-License-Identifier: MIT
"""How long a person waits for nbdctl, against what else they could have typed, side by side in one run."""

from __future__ import annotations

import json
import statistics

import pytest

from tests.conftest import Show
from tests.system.lab import Lab

DEVICES = 200
ROUNDS = 5

COMMANDS = {
    "list": "nbdctl list",
    "tree": "busctl tree org.nbdd1",
    "start": "python3 -c pass",
}

# In turn, so that what else the machine does is everybody's. The first round reads the programs from the disk: it does
# not count.
MEASURE = """\
import json, subprocess, sys, time
took = {name: [] for name in json.loads(sys.argv[1])}
for _ in range(int(sys.argv[2]) + 1):
    for name, command in json.loads(sys.argv[1]).items():
        start = time.monotonic()
        subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL)
        took[name].append(time.monotonic() - start)
print(json.dumps({name: times[1:] for name, times in took.items()}))
"""


@pytest.mark.prove_only
def test_list_of_200_devices_takes_at_most_twice_the_time_of_busctls_tree_and_pythons_start(
    lab: Lab, show: Show, release: str
) -> None:
    lines = "".join(f"  disk{number:03}: {{uri: 'nbd://storage.example/{number}'}}\n" for number in range(DEVICES))
    lab.define(f"devices:\n{lines}")
    assert len(lab.guest.run("nbdctl list").stdout.splitlines()) == DEVICES + 1
    lab.guest.write("/run/measure.py", MEASURE)
    done = lab.guest.run(f"python3 /run/measure.py '{json.dumps(COMMANDS)}' {ROUNDS}", timeout=300)
    took = {name: statistics.median(times) for name, times in json.loads(done.stdout).items()}
    show(
        f"{release}: with {DEVICES} devices, nbdctl list takes {took['list']:.2f} s, busctl tree {took['tree']:.2f} s,"
        f" the start of Python {took['start']:.2f} s"
    )
    assert took["list"] <= 2 * took["tree"] + took["start"]
