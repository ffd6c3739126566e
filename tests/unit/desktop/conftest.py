# SPDX-License-Identifier: MIT
"""The two buses of a desktop."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.manager import private_bus


@pytest.fixture(scope="module")
def buses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The addresses of a system bus and of a session's."""
    with (
        private_bus(tmp_path_factory.mktemp("s")) as (system, _),
        private_bus(tmp_path_factory.mktemp("u")) as (own, _),
    ):
        yield system, own
