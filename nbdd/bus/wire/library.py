# SPDX-License-Identifier: MIT
"""What nbdd uses of dbus-next. All other packages import it from here, so that the library can be replaced."""

from dbus_next import AuthError, BusType, InvalidAddressError, Message, MessageFlag, MessageType, Variant
from dbus_next.aio.message_bus import MessageBus
from dbus_next.auth import Authenticator

__all__ = [
    "AuthError",
    "Authenticator",
    "BusType",
    "InvalidAddressError",
    "Message",
    "MessageBus",
    "MessageFlag",
    "MessageType",
    "Variant",
]
