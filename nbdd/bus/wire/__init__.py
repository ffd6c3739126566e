# SPDX-License-Identifier: MIT
"""dbus-next with its faults mended, and the names of org.nbdd1; the only package that imports dbus_next.

dbus-next has had no release since 2021. Its message layer is sound and is what we use; its service layer is not, so
`bus.daemon.service` answers calls itself.
"""

from __future__ import annotations

import typing

# Python 3.15 removed this decorator, which dbus_next.service imports and which did nothing at run time.
if not hasattr(typing, "no_type_check_decorator"):
    typing.no_type_check_decorator = lambda decorator: decorator
