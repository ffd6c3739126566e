# SPDX-License-Identifier: MIT
"""nbdd keeps remote disks attached to Linux."""

from __future__ import annotations

__version__ = "0.1.0"
