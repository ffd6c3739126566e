# SPDX-License-Identifier: MIT
"""The one error of the proving ground."""

from __future__ import annotations


class GuestError(Exception):
    """A guest, or what it is made with, did not do what was asked; the text says what and shows the evidence."""
