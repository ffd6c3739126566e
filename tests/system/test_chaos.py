# SPDX-License-Identifier: MIT
"""A short campaign, with the same faults in each run of the tests; `make chaos` plays longer ones, with new ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.chaos.driver import MORE_SECONDS, campaign
from tests.scale import times
from tests.system.lab import Lab

SECONDS = times(60, 600)
SEED = 1


@pytest.mark.prove_only
@pytest.mark.timeout(SECONDS + MORE_SECONDS, func_only=True)
def test_chaos_of_servers_network_and_nbdd_loses_nothing(lab: Lab, show: Callable[[str], None]) -> None:
    told = campaign(lab.guest, SECONDS, SEED)
    assert told["wrong"] == [], told
    assert all(told["rounds"].values()), "every load did something"
    show(f"chaos, seed {SEED}: {sum(told['faults'].values())} faults in {SECONDS} s, nothing lost; {told['rounds']}")
