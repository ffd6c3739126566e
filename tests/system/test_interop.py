# SPDX-License-Identifier: MIT
"""What nbdd says of other people's servers is what nbdinfo says, and what docs/interop.md says."""

from __future__ import annotations

import difflib

import pytest

from tests.conftest import Show
from tests.interop.report import WRITE, run_in, table, versions, written
from tests.system.lab import Lab


@pytest.mark.prove_only
def test_interop_matrix_agrees_with_nbdinfo_and_the_document_says_so(lab: Lab, show: Show) -> None:
    result = run_in(lab.guest)
    release, seconds = result["system"]["release"], result["seconds"]
    show(f"{release}: {versions(result)}; seconds: {seconds}\n{table(result)}")
    faults = {fault for row in result["rows"] for fault in row["faults"]}
    assert not faults, "\n".join(sorted(faults))
    # Versions are not compared: a newer one that says the same is no news.
    drift = list(difflib.unified_diff(written(release), table(result).splitlines(), n=0, lineterm=""))
    assert not drift, f"docs/interop.md is out of date; write it again with {WRITE}\n" + "\n".join(drift)
