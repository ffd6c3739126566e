# SPDX-License-Identifier: MIT
"""What the tests of the configuration share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.config import Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write nbdd.yaml, and files of devices.d by their names; give the directory."""

    def _write(main: str | bytes | None = None, **devices: str | bytes) -> Path:
        named = {f"devices.d/{name}.yaml": text for name, text in devices.items()}
        if main is not None:
            named["nbdd.yaml"] = main
        for name, text in named.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path

    return _write
