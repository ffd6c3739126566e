# SPDX-License-Identifier: MIT
"""The library, for other people's programs: `nbdd.Client` and `nbdd.connect`. See docs/client.md."""
