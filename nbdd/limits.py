# SPDX-License-Identifier: MIT
"""The bounds that the kernel, the protocol and the configuration share. Sizes in bytes, times in seconds."""

from __future__ import annotations

MAX_SIZE = 2**63 - 1
"""The largest size of a device and of an export. The protocol allows 2^64-1, but offsets in the kernel are signed."""

MIN_BLOCK_SIZE = 512
"""The smallest logical block size; the kernel counts in sectors of this size."""

BLK_MAX_BLOCK_SIZE = 65536
"""The largest logical block size, by the kernel's name for it; before Linux 6.15 it is the page size."""

MAX_TIMEOUT = 2_000_000
"""23 days. The kernel keeps time limits as 32 bits of its clock ticks: one far above would come out short."""

MAX_NETWORK_TIMEOUT = 32767
"""What TCP_KEEPIDLE and TCP_KEEPINTVL allow."""

MAX_CONNECTIONS = 16
"""How many connections one device may have."""

MAX_BACKEND = 255
"""The longest identifier that the kernel can keep with a device."""
