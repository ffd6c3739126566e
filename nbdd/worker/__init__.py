# SPDX-License-Identifier: MIT
"""One device, in a process of its own; what it imports is paid for by every attached device."""
