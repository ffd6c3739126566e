# SPDX-License-Identifier: MIT
"""The daemon's own process: what each device is, what it shall be, and the worker that looks after it."""
