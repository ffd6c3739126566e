# SPDX-License-Identifier: MIT
"""The schema: its sentences, and what it gives to editors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nbdd import data
from nbdd.config.definition import Definition
from nbdd.config.schema import shipped
from nbdd.errors import NbddError
from nbdd.uri import URI
from tests.fakes.config import Write, device, problems

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"timout": "3"}, "4:5: device 'a': key 'timout': is not known; did you mean timeout?"),
        ({"READ_ONLY": "yes"}, "4:5: device 'a': key 'READ-ONLY': is not known; did you mean read-only?"),
        ({"colour": "red"}, "4:5: device 'a': key 'colour': is not known; known are uri, attach, "),
        ({"timeout": "soon"}, ("4:14: device 'a': key 'timeout': must be a whole number of seconds from 0 to 2000000, "
                              "but 'soon' is text.")),
        ({"timeout": "'30'"}, "but '30' is text; leave the quotes out."),
        ({"timeout": "-1"}, "from 0 to 2000000, but it is -1."),
        ({"timeout": "2000001"}, "from 0 to 2000000, but it is 2000001."),
        ({"timeout": "9" * 5000}, "from 0 to 2000000, but it is 9999999"),
        ({"timeout": "1.5"}, "from 0 to 2000000, but it is 1.5."),
        ({"timeout": ".inf"}, "from 0 to 2000000, but it is .inf."),
        ({"timeout": ".NaN"}, "from 0 to 2000000, but it is .NaN."),
        ({"timeout": "on"}, "from 0 to 2000000, but 'on' means true in YAML."),
        ({"timeout": "true"}, "from 0 to 2000000, but it is true."),
        ({"timeout": ""}, "from 0 to 2000000, but it has no value."),
        ({"timeout": "[3]"}, "from 0 to 2000000, but it is a list."),
        ({"timeout": "{s: 3}"}, "from 0 to 2000000, but it is a mapping."),
        ({"timeout": "1:30"}, ("4:14: device 'a': key 'timeout': '1:30' is not taken, since YAML reads digits with "
                              "colons between them as a number in base 60; write a plain decimal number")),
        ({"timeout": "1:30.5"}, "in base 60"),
        ({"timeout": "010"}, "'010' is not taken, since YAML reads a number that begins with 0 in base 8"),
        ({"timeout": "0x10"}, "'0x10' is not taken, since YAML reads it in another base than ten"),
        ({"timeout": "0b1"}, "another base than ten"),
        ({"timeout": "1_000"}, "'1_000' is not taken, since YAML reads digits with underscores"),
        ({"timeout": "!!int soon"}, "'soon' is not a number."),
        ({"timeout": "!!bool soon"}, "the tag 'tag:yaml.org,2002:bool' means nothing to nbdd"),
        ({"timeout": "!seconds 3"}, "the tag '!seconds' means nothing to nbdd; leave it out."),
        ({"timeout": "!!python/object/apply:os.getpid []"}, "means nothing to nbdd; leave it out."),
        ({"dead_timeout": "x"}, "key 'dead-timeout': must be a whole number of seconds from 0 to 2000000, but 'x'"),
        ({"connections": "0"}, "must be a whole number of connections from 1 to 16, but it is 0."),
        ({"connections": "17"}, "must be a whole number of connections from 1 to 16, but it is 17."),
        ({"read_only": "'yes'"}, "key 'read-only': must be true or false, but 'yes' is text; leave the quotes out."),
        ({"read_only": "maybe"}, "must be true or false, but 'maybe' is text."),
        ({"read_only": "1"}, "must be true or false, but 1 is a number."),
        ({"attach": "on"}, "key 'attach': must be boot or manual, but 'on' means true in YAML."),
        ({"attach": "later"}, "must be boot or manual, but it is 'later'."),
        ({"device": "3"}, "key 'device': must be auto or a device such as /dev/nbd3, but 3 is a number."),
        ({"device": "/dev/sda"}, "must be auto or a device such as /dev/nbd3, but it is '/dev/sda'."),
        ({"device": "/dev/nbd3p1"}, "must be auto or a device such as /dev/nbd3, but it is '/dev/nbd3p1'."),
        ({"device": "/dev/nbd03"}, "must be auto or a device"),
        ({"device": '"/dev/nbd3\\n"'}, "must be auto or a device"),
        ({"block_size": "1000"}, "must be auto or a power of two from 512 to 65536, but it is 1000."),
        ({"block_size": "256"}, "must be auto or a power of two"),
        ({"block_size": "131072"}, "must be auto or a power of two"),
        ({"block_size": "'512'"}, "but '512' is text; leave the quotes out."),
        ({"block_size": "on"}, "must be auto or a power of two from 512 to 65536, but 'on' means true"),
        ({"uri": "7"}, ("3:10: device 'a': key 'uri': must be an NBD URI such as nbd://server.example/export, "
                       "or a list of them, but 7 is a number.")),
        ({"uri": "[]"}, "3:10: device 'a': key 'uri': must be an NBD URI"),
        ({"uri": "[nbd://h/x, 10.5]"}, ("3:22: device 'a': key 'uri': must be an NBD URI such as "
                                       "nbd://server.example/export, but 10.5 is a number.")),
        ({"uri": ""}, ("key 'uri': must be an NBD URI such as nbd://server.example/export, or a list of them, "
                      "but it has no value.")),
        ({"uri": "http://h/x"}, "3:10: device 'a': key 'uri': 'http://h/x' is not a URI that nbdd can use: the scheme"),
        ({"uri": "nbd://h:99999/x"}, "the port must be a number from 1 to 65535, not '99999'."),
        ({"uri": "nbd:///x"}, "the host is missing"),
        ({"uri": "nbd://h/%zz"}, "is not followed by two hexadecimal digits"),
        ({"uri": "[nbd://h/x, 'nbd://h:no/']"}, "3:22: device 'a': key 'uri': 'nbd://h:no/' is not a URI"),
        ({"uri": "nbds://h/x"}, "3:10: device 'a': key 'uri': TLS is not supported by this version of nbdd"),
        ({"uri": "nbds+unix:///x?socket=/s"}, "never connects in the clear where encryption was asked for"),
        ({"desktop": ""}, "key 'desktop': must be a mapping such as {name: Photos}, or {}, but it has no value."),
        ({"desktop": "yes"}, "key 'desktop': must be a mapping such as {name: Photos}, or {}, but 'yes' means true"),
        ({"desktop": "{name: 3}"}, "4:21: device 'a': key 'desktop.name': must be a text of 1 to 64 characters"),
        ({"desktop": "{name: ''}"}, "key 'desktop.name': must be a text of 1 to 64 characters"),
        ({"desktop": "{nam: x}"}, "4:15: device 'a': key 'desktop.nam': is not known; did you mean name?"),
        ({"desktop": "{timeout: 3}"}, "key 'desktop.timeout': is not known; known are name, icon, user-mountable."),
        ({"desktop": "{icon: a/b}"}, "key 'desktop.icon': must be the name of an icon such as drive-harddisk, of"),
        ({"desktop": "{user-mountable: 1}"}, "key 'desktop.user-mountable': must be true or false, but 1 is a number."),
        ({"tls": "{certificates: /etc/pki}"}, "4:5: device 'a': key 'tls': TLS is not supported by this version"),
        ({"tls": "off"}, "4:5: device 'a': key 'tls': TLS is not supported"),
    ],
)  # fmt: skip
def test_wrong_setting_is_reported_once_with_its_place_and_what_was_expected(
    write: Write, settings: dict[str, str], expected: str
) -> None:
    found = problems(write(device(**settings)))
    assert len(found) == 1
    assert expected in found[0]
    assert found[0].startswith("nbdd.yaml:")
    assert ": device 'a': key " in found[0]


def _rules() -> dict[str, Any]:
    rules: dict[str, Any] = json.loads(data.read("nbdd.schema.json"))
    return rules


def test_schema_is_a_valid_schema() -> None:
    jsonschema.Draft7Validator.check_schema(_rules())


def test_schema_gives_editors_every_key_with_its_unit_and_true_default() -> None:
    rules = _rules()
    defaults = {field.name.replace("_", "-"): field.default for field in fields(Definition)}
    for key, reference in rules["definitions"]["device"]["properties"].items():
        rule = rules["definitions"][reference["$ref"].rpartition("/")[2]]
        assert rule["description"].endswith(".")
        assert rule["errorMessage"].startswith("must be ")
        if "default" in rule:
            assert defaults[key] == (None if rule["default"] == "auto" else rule["default"])
        else:
            assert defaults[key] in (MISSING, None)
        for bound in ("minimum", "maximum"):
            if bound in rule:
                assert str(rule[bound]) in re.findall(r"\d+", rule["errorMessage"])
                assert str(rule[bound]) in re.findall(r"\d+", rule["description"])


def test_unknown_shipped_file_is_an_error_with_a_sentence() -> None:
    with pytest.raises(NbddError, match=r"is no file that nbdd ships"):
        data.read("../../etc/passwd")


def test_import_of_config_does_not_load_jsonschema() -> None:
    read = "nbdd.data.read('nbdd.schema.json')"
    script = f"import sys, nbdd.config.loader, nbdd.data; {read}; sys.exit('jsonschema' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_schema_and_definition_have_the_same_keys() -> None:
    wire = Definition(name="a", uri=(URI.parse("nbd://h/"),)).to_wire()
    assert list(wire) == ["name", *shipped().device_keys]
