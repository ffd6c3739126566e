# SPDX-License-Identifier: MIT
"""Error replies to options, as sentences."""

from __future__ import annotations

from nbdd.errors import NegotiationFailed, NoSuchExport, ServerError, TLSFailed
from nbdd.protocol.constants import Opt, RepErr
from nbdd.protocol.text import MAX_SHOWN
from nbdd.text import quoted

TLS_REQUIRED = "accepts encrypted connections only (TLS), and nbdd does not speak TLS yet."

_TO_ANY: dict[int, str] = {
    RepErr.NBD_REP_ERR_UNSUP: "does not know {option}.",
    RepErr.NBD_REP_ERR_POLICY: "does not allow {option}; its policy forbids it.",
    RepErr.NBD_REP_ERR_INVALID: "calls our request {option} invalid.",
    RepErr.NBD_REP_ERR_PLATFORM: "can't serve {option} on the platform it runs on.",
    RepErr.NBD_REP_ERR_TLS_REQD: TLS_REQUIRED,
    RepErr.NBD_REP_ERR_UNKNOWN: "answered {option} with NBD_REP_ERR_UNKNOWN, though no export was named.",
    RepErr.NBD_REP_ERR_SHUTDOWN: "is shutting down; try again when it is back.",
    RepErr.NBD_REP_ERR_BLOCK_SIZE_REQD: "requires a request for its block sizes before {option}.",
    RepErr.NBD_REP_ERR_TOO_BIG: "calls our request {option}, or its own answer to it, too big.",
    RepErr.NBD_REP_ERR_EXT_HEADER_REQD: "requires extended headers, which the kernel's NBD driver does not have.",
}

_TO_LIST: dict[int, str] = {
    RepErr.NBD_REP_ERR_UNSUP: "can't list its exports.",
    RepErr.NBD_REP_ERR_POLICY: "is configured not to list its exports (for nbd-server, see allowlist).",
}

_TO_DESCRIBE: dict[int, str] = {
    RepErr.NBD_REP_ERR_UNSUP: "is too old to describe {name} without opening it ({option}).",
    RepErr.NBD_REP_ERR_POLICY: "does not let this machine use {name}; its policy forbids it.",
    RepErr.NBD_REP_ERR_UNKNOWN: "has no export called {name}.",
    RepErr.NBD_REP_ERR_BLOCK_SIZE_REQD: "requires its block sizes for {name}, but does not say them when asked.",
}
"""What follows "The NBD server <address> ", for NBD_OPT_INFO and NBD_OPT_GO."""


class ErrorReply:
    """An error reply to an option: its number, and the message of the server."""

    __slots__ = ("kind", "message", "option")

    def __init__(self, option: Opt, kind: int, message: bytes) -> None:
        self.option = option
        self.kind = kind
        self.message = message

    def error(self, export: str) -> ServerError:
        """The exception to raise; as everywhere in protocol/, its text is what follows "The NBD server <address> "."""
        text = self._text(export)
        if self.message:
            text += f" It says: {quoted(self.message, MAX_SHOWN)}."
        if self.kind == RepErr.NBD_REP_ERR_TLS_REQD:
            return TLSFailed(text)
        if self.kind == RepErr.NBD_REP_ERR_UNKNOWN:
            return NoSuchExport(text)
        return NegotiationFailed(text)

    def _text(self, export: str) -> str:
        texts = _TO_LIST if self.option is Opt.NBD_OPT_LIST else _TO_DESCRIBE
        if self.kind == RepErr.NBD_REP_ERR_UNKNOWN and not export and texts is _TO_DESCRIBE:
            return "has no default export; name one, as in nbd://server/NAME."
        text = texts.get(self.kind, _TO_ANY.get(self.kind, "refuses {option} with the unknown error {kind:#x}."))
        name = quoted(export, MAX_SHOWN) if export else "its default export"
        return text.format(option=self.option.name, name=name, kind=self.kind)
