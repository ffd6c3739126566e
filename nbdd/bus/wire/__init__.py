# SPDX-License-Identifier: MIT
"""dbus-next with its faults mended, and the only package that imports it."""
