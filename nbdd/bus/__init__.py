# SPDX-License-Identifier: MIT
"""The D-Bus face of nbdd, and the only package that imports dbus_next.

dbus-next has had no release since 2021. Its message layer is sound and is what we use; its service layer is not
(callers are hidden from methods, tracebacks go to callers, signals come from the wrong path, introspection shows
ghosts), so `service.ServiceBus` serves calls itself, from the XML files that are the reference.
"""

from __future__ import annotations

import typing

# Python 3.15 removed this decorator, which dbus_next.service imports and which did nothing at run time.
if not hasattr(typing, "no_type_check_decorator"):
    typing.no_type_check_decorator = lambda decorator: decorator
