# SPDX-License-Identifier: MIT
"""NBD negotiation without I/O, sockets or the kernel."""

from __future__ import annotations

from nbdd.protocol.constants import Flags
from nbdd.protocol.export import Export
from nbdd.protocol.negotiation import Receive, Send, Steps, go, info, list_exports

__all__ = ["Export", "Flags", "Receive", "Send", "Steps", "go", "info", "list_exports"]
