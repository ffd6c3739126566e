# SPDX-License-Identifier: MIT
"""What holds for all fast tests, on whatever machine and under whatever load they run."""

from __future__ import annotations

import signal

from hypothesis import settings

# Property tests here are about what holds, not about how fast a busy machine shows it.
settings.register_profile("nbdd", deadline=None)
settings.load_profile("nbdd")

# A shell starts what it puts in the background with SIGINT ignored, programs inherit that, and some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
