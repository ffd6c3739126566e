# SPDX-License-Identifier: MIT
"""Options of a call to definitions: the YAML keys with plain values, validated by the same schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from nbdd.config.definition import Definition, check_name, fields_of
from nbdd.config.schema import TLS_REFUSED, key_of, parse_uris, shipped
from nbdd.errors import InvalidArgs, InvalidURI, TLSFailed
from nbdd.uri import URI


def definition_from_options(
    name: str, options: Mapping[str, object], defaults: Mapping[str, object] = MappingProxyType({})
) -> Definition:
    """The definition of a device that no file names, from the YAML keys with plain values; `uri` is needed.

    `defaults` (of `Configuration`) stand in for options that are not given, except `attach`, which is for files only.
    Raises `InvalidArgs`, `InvalidURI`, or `TLSFailed` if encryption was asked for.
    """
    check_name(name)
    uris = _check(options, set(shipped().device_keys) - {"attach"}, required=("uri",))
    settings = {key: value for key, value in defaults.items() if key != "attach"} | dict(options)
    return Definition(name=name, uri=uris, **fields_of(settings))


def options_with(definition: Definition, options: Mapping[str, object]) -> Definition:
    """The definition with the options of one call in it; `uri`, `attach` and `desktop` can't be given.

    Raises `InvalidArgs`.
    """
    _check(options, set(shipped().device_keys) - {"uri", "attach", "desktop"})
    return replace(definition, **fields_of(options))


def _check(options: Mapping[str, object], allowed: set[str], required: tuple[str, ...] = ()) -> tuple[URI, ...]:
    """The URIs of valid options; otherwise raise one error that names every fault."""
    uris, uri_faults = parse_uris(options.get("uri"), ())
    faults = list(shipped().option_faults(dict(options), allowed, required))
    if any(fault.tls for fault in [*faults, *uri_faults]):
        raise TLSFailed(TLS_REFUSED)
    if faults:
        raise InvalidArgs(" ".join(f"Option {key_of(fault.path)} {fault.sentence}" for fault in faults))
    if uri_faults:
        raise InvalidURI(" ".join(fault.sentence for fault in uri_faults))
    return uris
