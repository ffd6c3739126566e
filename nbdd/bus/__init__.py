# SPDX-License-Identifier: MIT
"""The D-Bus API of nbdd: what both sides share (wire), the service (daemon) and its callers (caller)."""
