# SPDX-License-Identifier: MIT
"""Property tests here are about what holds, not about how fast a busy machine shows it."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("nbdd", deadline=None)
settings.load_profile("nbdd")
