# SPDX-License-Identifier: MIT
"""Whatever nbdd is given, it answers with an error that has a name and a sentence, and harms nothing else.

All of it happens beside a healthy device with I/O on it, the bystander. After each test, or after the batch that
several tests look at, the bystander must have gone on without an error, and nothing but it may be left.

Not here: that the kernel has no device left to give (NoFreeDevice). It numbers at least 4096 of them, and no option of
the module makes that fewer; tests/unit/test_netlink.py has the answers of such a kernel.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.guest import Guest
from tests.scale import times
from tests.system.in_guest.bad_servers import PORTS
from tests.system.lab import BusError, Call, Lab, Outcome, object_path

# What nbdd says to nonsense is the same on both.
pytestmark = pytest.mark.quick_on("debian13")

OWN = "org.nbdd1.Error."
FREEDESKTOP = "org.freedesktop.DBus.Error."
URI = "nbd://server.example/export"
DEVICES_D = "/etc/nbdd/devices.d"
FIRST_PORT = 12000
MANY_SECONDS = 150
"""Most of what one call about ten thousand devices may take in an emulated guest; a real machine needs two seconds."""

DEAF_PORT = 12999
"""What is sent there is lost, as behind a firewall that drops."""


class Bystander:
    """A device at work that nobody here speaks of: /dev/nbd7, written and verified all the time."""

    NODE = "/dev/nbd7"
    IO = (
        f"fio --name=io --filename={NODE} --rw=randrw --bs=4k --size=8M --direct=1 --rate_iops=20 --verify=crc32c "
        "--verify_fatal=1 --do_verify=1 --time_based --runtime=3600"
    )

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.uri = lab.nbdkit("memory 64M").uri
        self.manager = lab.manager_pid()
        self.worker = 0
        self.expected = {"bystander"}
        """Names of the devices that should be there."""

    def start(self) -> None:
        self.lab.attach_uri(self.uri, "bystander", f"'device': <'{self.NODE}'>")
        self.worker = self.lab.device("bystander")["WorkerPID"]
        self.lab.guest.run(f"systemd-run --quiet --collect --unit=bystander-io {self.IO}")
        self.lab.until("[ $(awk '{print $5}' /sys/block/nbd7/stat) -gt 5 ]", what="the bystander's I/O")

    def stop(self) -> None:
        self.lab.guest.run("systemctl stop bystander-io")
        self.lab.detach("bystander", "{'wait': <uint32 10>}")

    def harm(self) -> list[str]:
        """What is not as it should be, in sentences."""
        io_done = "awk '{print $1 + $5}' /sys/block/nbd7/stat"
        script = f"""
            end=$(($(date +%s) + 20)); before=$({io_done})
            until [ "$({io_done})" -gt $before ] || [ $(date +%s) -ge $end ]; do sleep 0.05; done
            [ "$({io_done})" -gt $before ] && echo moves=yes || echo moves=no
            until [ "$(pgrep -xc 'nbdd:.*')" = 1 ] || [ $(date +%s) -ge $end ]; do sleep 0.05; done
            echo workers="$(pgrep -xl 'nbdd:.*' | tr '\\n' ' ')"
            echo io=$(systemctl is-active bystander-io)
            echo manager=$(systemctl show -P MainPID nbdd)
            echo bound=$(cd /sys/block; ls -d nbd*/pid)
            echo records=$(ls /run/nbdd/devices)
            echo errors="$(dmesg | grep -m1 'I/O error, dev nbd7')"
            busctl --json=short --timeout=60 call org.nbdd1 /org/nbdd1 \
                org.freedesktop.DBus.ObjectManager GetManagedObjects"""
        *lines, objects = self.lab.guest.run(script, timeout=150).stdout.splitlines()
        told = dict(line.split("=", 1) for line in lines)
        expected = {
            "moves": "yes",
            "workers": f"{self.worker} nbdd:bystander ",
            "io": "active",
            "manager": str(self.manager),
            "bound": "nbd7/pid",
            "records": "bystander.json",
            "errors": "",
        }
        harm = [f"{key} is {told.get(key)!r}, not {value!r}" for key, value in expected.items() if told[key] != value]
        found = {
            interfaces["org.nbdd1.Device"]["Name"]["data"]: interfaces["org.nbdd1.Device"]
            for interfaces in json.loads(objects)["data"][0].values()
        }
        if found.keys() != self.expected:
            harm.append(f"the devices are {sorted(found)}, not {sorted(self.expected)}")
        state = {
            key: found.get("bystander", {}).get(key, {}).get("data") for key in ("State", "WorkerPID", "Reconnects")
        }
        if state != {"State": "attached", "WorkerPID": self.worker, "Reconnects": 0}:
            harm.append(f"the bystander is {state}")
        return harm + self.lab.kernel_trouble()


@pytest.fixture(scope="module")
def lab(guest: Guest) -> Iterator[Lab]:
    """One for all tests of this file, since each of them is to leave things as they are."""
    lab = Lab(guest)
    lab.mark()
    yield lab
    lab.cleanup()


@pytest.fixture(scope="module")
def bystander(lab: Lab) -> Iterator[Bystander]:
    """See the class."""
    bystander = Bystander(lab)
    bystander.start()
    yield bystander
    bystander.stop()


@pytest.fixture
def unharmed(bystander: Bystander) -> Iterator[Bystander]:
    """For a test that does something: afterwards everything is as it was."""
    yield bystander
    assert bystander.harm() == []


@dataclass(frozen=True)
class Batch:
    """The outcomes of many calls, and what harm they did all together."""

    outcomes: Mapping[str, Outcome]
    harm: list[str]

    def error(self, label: str) -> BusError:
        assert self.harm == []
        outcome = self.outcomes[label]
        assert outcome.error is not None, f"it was taken: {outcome.reply}"
        return outcome.error


def check_sentence(error: BusError, name: str, *words: str) -> None:
    """The error has this name, and is a text for a person that holds these words."""
    assert error.name == name, error
    assert "Traceback" not in error.text
    assert not re.search(r"\b(None|Errno|Exception|object at 0x)\b", error.text), error.text
    assert re.match(r"[A-Z'/]|nbd|org\.", error.text), error.text
    assert error.text.endswith((".", "`")), error.text
    assert len(error.text) < 800, error.text
    missing = [word for word in words if word not in error.text]
    assert not missing, f"{missing} not in: {error.text}"


# Configuration


@dataclass(frozen=True)
class Faulty:
    """Files of devices.d with one fault, where it is (in the last of them) and what is said of it.

    In contents and words "@" stands for the name of the device.
    """

    content: str | bytes | None
    """What the file holds; None where `make` makes it."""
    place: str
    words: tuple[str, ...]
    before: str | None = None
    """A file that is read first."""
    make: str = ""
    """A command that makes the file, "@"."""
    extension: str = "yaml"


def device(line: str, uri: str = URI) -> str:
    return f"devices:\n  '@':\n    uri: {uri}\n    {line}\n"


def named(name: str) -> str:
    return f"devices:\n  {name}:\n    uri: {URI}\n"


NAME_RULE = "can't name a device: use 1 to 63 letters, digits"

FAULTY: dict[str, Faulty] = {
    "unknown-key": Faulty(device("tiemout: 5"), "4:5", ("device '@'", "key 'tiemout'", "did you mean timeout?")),
    "unknown-section": Faulty("device:\n  '@': {}\n", "1:1", ("key 'device'", "did you mean devices?")),
    "wrong-type": Faulty(device("timeout: soon"), "4:14", ("device '@'", "key 'timeout'", "whole number of seconds")),
    "wrong-type-of-device": Faulty(f"devices:\n  '@': {URI}\n", "2:", ("device '@'", "mapping with a 'uri'")),
    "out-of-range": Faulty(device("connections: 99"), "4:18", ("'@'", "'connections'", "from 1 to 16", "99")),
    "number-in-base-60": Faulty(device("timeout: 1:30"), "4:14", ("'@'", "'timeout'", "base 60")),
    "no-uri": Faulty("devices:\n  '@':\n    timeout: 5\n", "2:3", ("device '@'", "key 'uri'", "is missing")),
    "duplicate-device-in-two-files": Faulty(
        device("timeout: 1"), "2:3", ("'@'", "is already defined at", "-before.yaml:2:3"), before=device("timeout: 2")
    ),
    "duplicate-device-in-one-file": Faulty(
        device(f"timeout: 1\n  '@':\n    uri: {URI}"), "5:3", ("'@'", "given twice, first in line 2")
    ),
    "duplicate-key": Faulty(device(f"uri: {URI}"), "4:5", ("'@'", "'uri'", "given twice, first in line 3")),
    "two-devices-on-one-node": Faulty(
        device(f"device: /dev/nbd3\n  '@2':\n    uri: {URI}\n    device: /dev/nbd3"),
        "7:13",
        ("'@2'", "'device'", "/dev/nbd3 is given to the device '@' already"),
    ),
    "other-node": Faulty(device("device: /dev/sda"), "4:13", ("'@'", "'device'", "/dev/nbd3", "/dev/sda")),
    "defaults-in-devices.d": Faulty("defaults: {timeout: 5}\n", "1:1", ("'defaults'", "nbdd.yaml")),
    "tab": Faulty("devices:\n\t'@':\n", "2:1", ("indented with a tab; use spaces",)),
    "never-closed": Faulty("devices: {'@': {uri: x}\n", "1:10", ("never closed",)),
    "not-yaml": Faulty("devices:\n  '@': - }\n", "2:", ("can't be read as YAML",)),
    "not-utf8": Faulty(b"devices:\n  gr\xfcn: {}\n", "2:5", ("0xFC", "save the file as UTF-8")),
    "binary": Faulty(b"\x7fELF\x02\x01\x01\0\0\0\0", "1:1", ("must not stand in a YAML file",)),
    "second-document": Faulty("devices: {}\n---\ndevices: {}\n", "2:1", ("second YAML document",)),
    "unreadable-link": Faulty(None, "", ("a link to '/nowhere', which does not exist",), make="ln -s /nowhere @"),
    "unreadable-directory": Faulty(None, "", ("can't be read: it is a directory",), make="mkdir @"),
    "unreadable-pipe": Faulty(None, "", ("can't be read: it is a device, a pipe",), make="mkfifo @"),
    "wrong-ending": Faulty("devices: {}\n", "", ("must end in .yaml; rename the file",), extension="yml"),
    "uri-scheme": Faulty(device("timeout: 1", "http://server.example/x"), "3:10", ("'@'", "'uri'", "nbd+unix")),
    "uri-port": Faulty(device("timeout: 1", "nbd://server.example:99999/x"), "3:10", ("'@'", "'uri'", "1 to 65535")),
    "uri-host": Faulty(device("timeout: 1", "nbd://ser!ver/x"), "3:10", ("'@'", "'uri'", "'!'", "host name")),
    "uri-percent": Faulty(device("timeout: 1", "nbd://server/%zz"), "3:10", ("'@'", "'uri'", "two hexadecimal")),
    "uri-tls": Faulty(device("timeout: 1", "nbds://server/x"), "3:10", ("'@'", "'uri'", "TLS is not supported")),
    "tls-key": Faulty(device("tls: {verify: true}"), "4:5", ("'@'", "'tls'", "TLS is not supported")),
    "name-with-space": Faulty(named("my disk"), "2:3", ("'my disk'", NAME_RULE)),
    "name-with-slash": Faulty(named("a/b"), "2:3", ("'a/b'", NAME_RULE)),
    "name-with-dots-and-slash": Faulty(named("../../etc/passwd"), "2:3", ("'../../etc/passwd'", NAME_RULE)),
    "name-in-unicode": Faulty(named("plätte"), "2:3", ("'plätte'", NAME_RULE)),
    "name-of-255-bytes": Faulty(named("n" * 255), "2:3", ("nnnn...'", NAME_RULE)),
    "name-of-64-bytes": Faulty(named("m" * 64), "2:3", ("mmmm", NAME_RULE)),
    "empty-name": Faulty(named("''"), "2:3", ("''", NAME_RULE)),
    "name-with-newline": Faulty(named('"a\\nb"'), "2:3", (r"'a\nb'", NAME_RULE)),
}


@dataclass(frozen=True)
class Verdicts:
    """What was said of all faulty files together."""

    reload: BusError
    check: str
    check_code: int
    harm: list[str]


@pytest.fixture(scope="module")
def verdicts(lab: Lab, bystander: Bystander) -> Verdicts:
    make = "set -e; mkdir -p /root/bad/devices.d; cd /root/bad/devices.d; tar -x;"
    for label, faulty in FAULTY.items():
        make += faulty.make.replace("@", f"{label}.{faulty.extension}") + ";" if faulty.make else ""
    lab.guest.run(make, input=_archive(FAULTY))
    lab.define(f"devices:\n  kept:\n    uri: {URI}\n")
    bystander.expected = {"bystander", "kept"}
    lab.guest.run(
        # Beside the faults a device that would be new, and without one that is there.
        f"cp -a /root/bad/devices.d/. {DEVICES_D}/; printf 'devices:\\n  new: {{uri: {URI}}}\\n' >{DEVICES_D}/test.yaml"
    )
    with pytest.raises(BusError) as caught:
        lab.call("Reload")
    check = lab.guest.run("nbdd --check /root/bad", check=False)
    found = Verdicts(caught.value, check.stdout, check.returncode, bystander.harm())
    bystander.expected = {"bystander"}
    lab.guest.run(f"rm -rf {DEVICES_D}/* /root/bad; systemctl reload nbdd")
    return found


def _archive(faulty: Mapping[str, Faulty]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for label, case in faulty.items():
            files = {f"{label}-before.yaml": case.before, f"{label}.{case.extension}": case.content}
            for name, content in files.items():
                if content is not None:
                    data = content if isinstance(content, bytes) else content.replace("@", label).encode()
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


@pytest.mark.parametrize("label", FAULTY)
def test_reload_names_every_fault_with_file_line_and_column_and_changes_nothing(verdicts: Verdicts, label: str) -> None:
    assert verdicts.harm == []
    assert verdicts.reload.name == OWN + "InvalidConfig"
    check_fault(verdicts.reload.text, DEVICES_D, label)


@pytest.mark.parametrize("label", FAULTY)
def test_check_reports_the_same_faults_as_a_reload(verdicts: Verdicts, label: str) -> None:
    assert verdicts.check_code == 1
    check_fault(verdicts.check, "/root/bad/devices.d", label)


def check_fault(text: str, directory: str, label: str) -> None:
    """One line of the text is about this fault: its place first, then what it is."""
    faulty = FAULTY[label]
    place = f"{directory}/{label}.{faulty.extension}:{faulty.place}"
    lines = [line for line in text.splitlines() if line.startswith(place)]
    assert len(lines) == 1, text
    assert all(word.replace("@", label) in lines[0] for word in faulty.words), lines[0]
    assert lines[0].endswith((".", "?")), lines[0]


@pytest.mark.usefixtures("unharmed")
def test_reload_by_systemctl_fails_and_status_shows_file_line_and_column(lab: Lab) -> None:
    lab.guest.write(f"{DEVICES_D}/typo.yaml", device("tiemout: 5").replace("@", "typo"))
    reload = lab.guest.run("systemctl reload nbdd", check=False)
    status = lab.guest.run("systemctl status --no-pager --full nbdd", check=False).stdout
    lab.guest.run(f"rm {DEVICES_D}/typo.yaml")
    assert reload.returncode != 0
    assert f"{DEVICES_D}/typo.yaml:4:5: device 'typo': key 'tiemout': is not known; did you mean timeout?" in status
    assert "active (running)" in status


@pytest.mark.usefixtures("unharmed")
def test_files_that_are_empty_or_of_comments_are_no_fault(lab: Lab) -> None:
    lab.guest.run(
        f"cd {DEVICES_D}; : >empty.yaml; echo '# nothing yet' >comment.yaml; echo 'devices:' >no-devices.yaml;"
        "systemctl reload nbdd"
    )
    lab.guest.run(f"rm {DEVICES_D}/*")


def test_check_names_a_file_without_permission(lab: Lab) -> None:
    done = lab.guest.run(
        "umask 022; d=$(mktemp -d); chmod 755 $d; mkdir $d/devices.d; cd $d/devices.d; : >secret.yaml; chmod 600 *;"
        "runuser -u visitor -- nbdd --check $d; code=$?; rm -r $d; exit $code",
        check=False,
    )
    assert done.returncode == 1
    assert re.search(r"/devices\.d/secret\.yaml: .*can't be read: permission denied\.", done.stdout), done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("unharmed")
def test_reload_of_thousands_of_devices_lets_the_manager_answer_meanwhile(lab: Lab) -> None:
    names = [f"disk-{number:05d}" for number in range(times(2_000, 10_000))]
    lines = "".join(f"  {name}: {{uri: 'nbd://storage.example/{name}'}}\n" for name in names)
    lab.guest.write(f"{DEVICES_D}/many.yaml", f"devices:\n{lines}")
    call = f"busctl --json=short --timeout={MANY_SECONDS} call org.nbdd1 /org/nbdd1"
    version = "busctl --timeout=60 get-property org.nbdd1 /org/nbdd1 org.nbdd1.Manager Version"
    ask = f"s=$(date +%s%3N); {version} >/dev/null || echo no answer >&2; date +%s%3N | awk -v s=$s '{{print $1 - s}}'"
    reload = f"{call} org.nbdd1.Manager Reload & while kill -0 $!; do {ask}; sleep 1; done 2>/dev/null; wait $!"
    added = lab.guest.run(reload, check=False, timeout=2 * MANY_SECONDS)
    listed = lab.guest.run(
        f"{call} org.freedesktop.DBus.ObjectManager GetManagedObjects | jq '.data[0] | length'",
        check=False,
        timeout=2 * MANY_SECONDS,
    )
    last = object_path(names[-1])
    one = lab.guest.run(f"busctl get-property org.nbdd1 {last} org.nbdd1.Device URI", check=False)
    lab.guest.run(f"rm {DEVICES_D}/many.yaml")
    dropped = lab.guest.run(reload, check=False, timeout=2 * MANY_SECONDS)
    waits = [int(line) for line in (added.stdout + dropped.stdout).splitlines() if line.isdigit()]
    print(
        f"{lab.guest.release}: {len(names)} devices are added in {added.seconds:.1f} s, listed in "
        f"{listed.seconds:.1f} s, dropped in {dropped.seconds:.1f} s; meanwhile a call takes {max(waits)} ms at most"
    )
    assert added.returncode == 0, lab.guest.journal("nbdd", 20)
    assert f'"{names[-1]}"' in added.stdout
    assert listed.stdout.strip() == str(len(names) + 1), lab.guest.journal("nbdd", 20)
    assert one.stdout.strip() == f's "nbd://storage.example/{names[-1]}"', one.stderr
    assert dropped.returncode == 0, lab.guest.journal("nbdd", 20)
    # A reply may stand behind the signals that the bus has not taken yet, but it comes.
    assert max(waits) < 60_000


# URIs, names, types and options over D-Bus


def attach(name: str, **options: tuple[str, Any]) -> Call:
    return Call("Attach", "sa{sv}", (name, dashed(options)))


def attach_uri(uri: str, name: str, **options: tuple[str, Any]) -> Call:
    return Call("AttachURI", "sa{sv}", (uri, {"name": ("s", name)} | dashed(options)))


def detach(name: str, **options: tuple[str, Any]) -> Call:
    return Call("Detach", "sa{sv}", (name, dashed(options)))


def set_timeout(name: str, seconds: int = 5) -> Call:
    return Call("SetTimeout", "su", (name, seconds))


def list_exports(uri: str, **options: tuple[str, Any]) -> Call:
    return Call("ListExports", "sa{sv}", (uri, dashed(options)))


def dashed(options: Mapping[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    return {key.replace("_", "-"): option for key, option in options.items()}


URIS: dict[str, tuple[str, str, str]] = {
    # What is given, the error's name, and what its text says.
    "empty": ("", OWN + "InvalidURI", "it is empty; write for example nbd://"),
    "no-scheme": ("server.example/x", OWN + "InvalidURI", "does not begin with a scheme"),
    "scheme": ("http://server.example/x", OWN + "InvalidURI", "the scheme must be one of nbd,"),
    "port-too-high": ("nbd://server.example:65536/x", OWN + "InvalidURI", "from 1 to 65535"),
    "port-zero": ("nbd://server.example:0/x", OWN + "InvalidURI", "from 1 to 65535"),
    "port-text": ("nbd://server.example:nbd/x", OWN + "InvalidURI", "the port must be a number"),
    "no-host": ("nbd:///x", OWN + "InvalidURI", "the host is missing"),
    "host": ("nbd://ser!ver/x", OWN + "InvalidURI", "can't stand in a host name"),
    "host-unicode": ("nbd://sërver/x", OWN + "InvalidURI", "xn--"),
    "host-ipv4": ("nbd://1.2.3.256/x", OWN + "InvalidURI", "looks like an IPv4 address but is none"),
    "host-ipv6": ("nbd://[::g]/x", OWN + "InvalidURI", "not an IPv6 address"),
    "percent": ("nbd://server/%4", OWN + "InvalidURI", "two hexadecimal digits"),
    "percent-utf8": ("nbd://server/%ff", OWN + "InvalidURI", "not valid UTF-8"),
    "percent-nul": ("nbd://server/%00", OWN + "InvalidURI", "NUL"),
    "space": ("nbd://server/my disk", OWN + "InvalidURI", "must be written %20"),
    "newline": ("nbd://server/x\n", OWN + "InvalidURI", "control character"),
    "fragment": ("nbd://server/x#y", OWN + "InvalidURI", "fragment"),
    "query": ("nbd://server/x?sockt=/a", OWN + "InvalidURI", "'sockt' is unknown"),
    "socket-missing": ("nbd+unix:///x", OWN + "InvalidURI", "socket=/path"),
    "socket-relative": ("nbd+unix:///x?socket=a", OWN + "InvalidURI", "must be absolute"),
    "huge": ("nbd://server/" + "x" * 20000, OWN + "InvalidURI", "NBD allows 4096"),
    "password": ("nbd://me:hunter2@server/x", OWN + "InvalidURI", "a password must not be in a URI"),
    "tls": ("nbds://server.example/x", OWN + "TLSFailed", "TLS"),
    "tls-unix": ("nbds+unix:///x?socket=/a", OWN + "TLSFailed", "TLS"),
}

NAMES: dict[str, str] = {
    "empty": "",
    "space": "my disk",
    "slash": "a/b",
    "up-and-out": "../../etc/passwd",
    "unicode": "plätte",
    "255-bytes": "n" * 255,
    "64-bytes": "n" * 64,
    "newline": "a\n",
    "dash-first": "-a",
    "dot-first": ".a",
}

NAME_CALLS: dict[str, Callable[[str], Call]] = {
    "Attach": attach,
    "AttachURI": lambda name: attach_uri(URI, name),
    "Detach": detach,
    "SetTimeout": set_timeout,
}

OPTIONS: dict[str, tuple[Call, tuple[str, ...]]] = {
    # A call, and what its InvalidArgs says.
    "Attach-unknown": (attach("bystander", tiemout=("u", 5)), ("'tiemout'", "timeout")),
    "Attach-uri": (attach("bystander", uri=("s", URI)), ("'uri'", "known are")),
    "Attach-attach": (attach("bystander", attach=("s", "boot")), ("'attach'", "known are")),
    "Attach-signed": (attach("bystander", timeout=("i", 5)), ("'timeout'", "unsigned number (u)", "'i'")),
    "Attach-text": (attach("bystander", timeout=("s", "5")), ("'timeout'", "unsigned number (u)", "'s'")),
    "Attach-device-type": (attach("bystander", device=("u", 5)), ("'device'", "string (s)", "'u'")),
    "Attach-bool": (attach("bystander", read_only=("s", "yes")), ("'read-only'", "boolean (b)", "'s'")),
    "AttachURI-unknown": (attach_uri(URI, "x", nmae=("s", "y")), ("'nmae'", "name")),
    "AttachURI-name-type": (Call("AttachURI", "sa{sv}", (URI, {"name": ("u", 1)})), ("'name'", "string (s)")),
    "AttachURI-node": (attach_uri(URI, "x", device=("s", "/dev/sda")), ("'device'", "/dev/nbd3", "/dev/sda")),
    "AttachURI-connections": (attach_uri(URI, "x", connections=("u", 0)), ("'connections'", "1 to 16")),
    "AttachURI-block-size": (attach_uri(URI, "x", block_size=("u", 777)), ("'block-size'", "power of two")),
    "Detach-unknown": (detach("bystander", froce=("b", True)), ("'froce'", "force")),
    "Detach-force-type": (detach("bystander", force=("s", "yes")), ("'force'", "boolean (b)")),
    "Detach-wait-type": (detach("bystander", wait=("x", 5)), ("'wait'", "unsigned number (u)", "'x'")),
    "ListExports-unknown": (list_exports(URI, x=("u", 1)), ("'x'", "none")),
    "SetTimeout-too-long": (set_timeout("bystander", 2**32 - 1), ("4294967295", "2000000")),
}

TYPES: dict[str, tuple[Call, str, str]] = {
    # A call, the name of its error, and what that says.
    "Attach-number": (Call("Attach", "u", (5,)), "InvalidArgs", "Attach takes arguments of the types 'sa{sv}'"),
    "Attach-nothing": (Call("Attach"), "InvalidArgs", "Attach takes arguments of the types 'sa{sv}'"),
    "Attach-too-much": (Call("Attach", "sa{sv}s", ("x", {}, "y")), "InvalidArgs", "not 'sa{sv}s'"),
    "Attach-no-variants": (Call("Attach", "sas", ("x", ["y"])), "InvalidArgs", "not 'sas'"),
    "SetTimeout-signed": (Call("SetTimeout", "si", ("bystander", -5)), "InvalidArgs", "not 'si'"),
    "Reload-argument": (Call("Reload", "s", ("x",)), "InvalidArgs", "Reload takes arguments of the types ''"),
    "no-such-method": (Call("Atach", "s", ("x",)), "UnknownMethod", "Atach"),
    "no-such-interface": (Call("Attach", "s", ("x",), "org.nbdd2.Manager"), "UnknownInterface", "org.nbdd2.Manager"),
    "no-such-object": (Call("GetStatistics", path="/org/nbdd1/device/x"), "UnknownObject", "/org/nbdd1/device/x"),
    "no-such-property": (
        Call("Get", "ss", ("org.nbdd1.Manager", "Versio"), "org.freedesktop.DBus.Properties"),
        "UnknownProperty",
        "Versio",
    ),
    "set-a-property": (
        Call("Set", "ssv", ("org.nbdd1.Manager", "Version", {"": ("s", "x")}), "org.freedesktop.DBus.Properties"),
        "PropertyReadOnly",
        "Version can't be set",
    ),
}


@pytest.fixture(scope="module")
def nonsense(lab: Lab, bystander: Bystander) -> Batch:
    """Everything above, called."""
    calls: dict[str, Call] = {}
    for label, (uri, _, _) in URIS.items():
        calls[f"uri-{label}-AttachURI"] = attach_uri(uri, "nonsense")
        calls[f"uri-{label}-ListExports"] = list_exports(uri)
    for label, name in NAMES.items():
        for member, make in NAME_CALLS.items():
            calls[f"name-{label}-{member}"] = make(name)
    calls |= {f"option-{label}": call for label, (call, _) in OPTIONS.items()}
    calls |= {f"type-{label}": call for label, (call, _, _) in TYPES.items()}
    outcomes = lab.calls(calls)
    return Batch(outcomes, bystander.harm())


@pytest.mark.parametrize("member", ["AttachURI", "ListExports"])
@pytest.mark.parametrize("label", URIS)
def test_uri_that_is_invalid_is_refused_with_the_reason(nonsense: Batch, member: str, label: str) -> None:
    _, name, words = URIS[label]
    error = nonsense.error(f"uri-{label}-{member}")
    check_sentence(error, name, words)
    assert "hunter2" not in error.text


@pytest.mark.parametrize("member", NAME_CALLS)
@pytest.mark.parametrize("label", NAMES)
def test_name_that_is_invalid_is_refused_with_the_rule(nonsense: Batch, member: str, label: str) -> None:
    begin = repr(NAMES[label])[:60].removesuffix("'")
    check_sentence(nonsense.error(f"name-{label}-{member}"), FREEDESKTOP + "InvalidArgs", begin, NAME_RULE)


@pytest.mark.parametrize("label", OPTIONS)
def test_option_that_is_unknown_or_of_the_wrong_type_or_range_is_refused(nonsense: Batch, label: str) -> None:
    _, words = OPTIONS[label]
    check_sentence(nonsense.error(f"option-{label}"), FREEDESKTOP + "InvalidArgs", *words)


@pytest.mark.parametrize("label", TYPES)
def test_bus_call_with_wrong_types_or_members_gets_a_standard_error(nonsense: Batch, label: str) -> None:
    _, name, words = TYPES[label]
    check_sentence(nonsense.error(f"type-{label}"), FREEDESKTOP + name, words)


# Servers

ABSENT: dict[str, str] = {
    # Servers that are not there, by their URI; the others are in bad_servers.py.
    "refuses": "nbd://127.0.0.1:1/x",
    "refuses-on-ipv6": "nbd://[::1]:1/x",
    "does-not-resolve": "nbd://no-such-host.invalid/x",
    "unreachable": "nbd://198.51.100.1/x",
    "never-answers-the-connect": f"nbd://127.0.0.1:{DEAF_PORT}/x",
    "no-socket": "nbd+unix:///x?socket=/run/no-such.sock",
    "socket-is-a-file": "nbd+unix:///x?socket=/etc/hostname",
}

ASKED_FOR: dict[str, dict[str, tuple[str, bool]]] = {"read_only": {"read_only": ("b", False)}}
"""Options beside the name."""

TOLD: dict[str, tuple[str, str]] = {
    # The error's name, and what its text says beside the server's address.
    "refuses": ("ConnectFailed", "connection refused, nothing listens there"),
    "refuses-on-ipv6": ("ConnectFailed", "connection refused, nothing listens there"),
    "does-not-resolve": ("ConnectFailed", "can't be resolved now: no name server answers"),
    "unreachable": ("ConnectFailed", "the network is unreachable"),
    "never-answers-the-connect": ("TimedOut", "There was no connection"),
    "no-socket": ("ConnectFailed", "there is no such socket, the server may not be running"),
    "socket-is-a-file": ("ConnectFailed", "connection refused"),
    "read_only": ("NegotiationFailed", "is offered read-only"),
    "silent": ("TimedOut", "did not send its greeting within 15 s. Perhaps it is not an NBD server"),
    "slowly": ("TimedOut", "sent only"),
    "http": ("NegotiationFailed", "is not an NBD server but a web server"),
    "garbage": ("NegotiationFailed", "is not an NBD server"),
    "closes_at_once": ("NegotiationFailed", "closed the connection when its greeting was due. Perhaps it is not"),
    "resets": ("NegotiationFailed", "broke the connection when its reply to NBD_OPT_GO was due: connection reset"),
    "closes_in_greeting": ("NegotiationFailed", "closed the connection after only 3 of 8 bytes of its greeting"),
    "closes_after_greeting": ("NegotiationFailed", "NBD_OPT_GO"),
    "closes_when_asked": ("NegotiationFailed", "closed the connection when its reply to NBD_OPT_GO was due"),
    "closes_in_reply": ("NegotiationFailed", "after only 13 of 20 bytes of its reply to NBD_OPT_GO"),
    "closes_before_acknowledgement": ("NegotiationFailed", "when its reply to NBD_OPT_GO was due"),
    "closes_after_acknowledgement": ("ConnectFailed", "hung up before the device was usable"),
    "closes_at_first_read": ("ConnectFailed", "hung up before the device was usable"),
    "never_reads": ("TimedOut", "can't be read"),
    "empty": ("NegotiationFailed", "has a size of 0 bytes; there is nothing to attach"),
    "wants_tls": ("TLSFailed", "accepts encrypted connections only"),
    "shuts_down": ("NegotiationFailed", "is shutting down; try again when it is back"),
    "huge_reply": ("NegotiationFailed", "4294967295 bytes"),
    "too_large": ("NegotiationFailed", "more than any device can have"),
}

SERVER_SECONDS = 50
"""Most of what an attach may take: 15 s for the connection, 15 s for the kernel's first reads, and a busy machine."""

DETACH_SECONDS = 20
"""Most of what ending an attach may take, the killing of a worker that hangs in the kernel included."""


@pytest.fixture(scope="module")
def bad_servers(lab: Lab) -> Mapping[str, str]:
    """The URI of each server that misbehaves, by its behaviour."""
    lab.guest.put(Path(__file__).parent / "in_guest" / "bad_servers.py", "/run/bad_servers.py")
    last = FIRST_PORT + len(PORTS) - 1
    listening = f"ss -ltnH sport ge :{FIRST_PORT} and sport le :{last} | wc -l"
    lab.serve(f"python3 /run/bad_servers.py {FIRST_PORT}", "", ready=f"[ $({listening}) = {len(PORTS)} ]")
    return {behaviour: f"nbd://127.0.0.1:{FIRST_PORT + port}/x" for behaviour, port in PORTS.items()}


@pytest.fixture(scope="module")
def attempts(lab: Lab, bystander: Bystander, bad_servers: Mapping[str, str]) -> Iterator[Batch]:
    """One attach for each of them, all at the same time."""
    lab.guest.run(
        "nft 'add table inet deaf; add chain inet deaf out { type filter hook output priority 0; };"
        f"add rule inet deaf out tcp dport {DEAF_PORT} drop'"
    )
    calls = {
        label: attach_uri(uri, label, **ASKED_FOR.get(label, {})) for label, uri in {**ABSENT, **bad_servers}.items()
    }
    outcomes = lab.calls(calls, together=True)
    yield Batch(outcomes, bystander.harm())
    lab.guest.run("nft delete table inet deaf")


@pytest.mark.parametrize("label", [*ABSENT, *PORTS])
def test_error_of_an_absent_or_bad_server_has_its_address_and_what_it_did(
    attempts: Batch, bad_servers: Mapping[str, str], label: str
) -> None:
    name, words = TOLD[label]
    error = attempts.error(label)
    # What hangs in the kernel is told by its node, the rest by the server's address.
    uri = ABSENT.get(label) or bad_servers[label]
    address = re.sub(r"^.*(://|socket=)|/x$", "", uri)
    check_sentence(error, OWN + name, words, "/dev/nbd" if "can't be read" in words else address)
    assert attempts.outcomes[label].seconds < SERVER_SECONDS


@pytest.mark.usefixtures("unharmed")
def test_error_of_a_missing_export_has_its_name(lab: Lab) -> None:
    lab.guest.run("truncate -s 16M /run/right.img")
    server = lab.serve(
        "qemu-nbd --persistent -f raw -x right -b 127.0.0.1 -p {port} /run/right.img",
        "nbd://127.0.0.1:{port}/wrong",
    )
    with pytest.raises(BusError) as caught:
        lab.attach_uri(server.uri, "missing")
    lab.stop(server)
    check_sentence(caught.value, OWN + "NoSuchExport", "127.0.0.1", "has no export called 'wrong'")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("server", ["silent", "never_reads"])
def test_detach_during_an_attach_ends_it_and_leaves_nothing(
    lab: Lab, bad_servers: Mapping[str, str], server: str
) -> None:
    state = "busctl get-property org.nbdd1 /org/nbdd1/device/midway org.nbdd1.Device State"
    under_way = f"""[ "$({state} 2>/dev/null)" = 's "connecting"' ]"""
    if server == "never_reads":
        # Then the kernel has the device already, and reads from it hang.
        under_way = "[ $(cd /sys/block; ls -d nbd*/pid | wc -l) = 2 ]"
    outcomes = lab.calls(
        {
            "attach": attach_uri(bad_servers[server], "midway"),
            "detach": detach("midway"),
        },
        first={"detach": f"for i in $(seq 200); do ! {under_way} || break; sleep 0.05; done"},
        together=True,
    )
    assert outcomes["detach"].error is None, outcomes["detach"].error
    assert outcomes["detach"].seconds < DETACH_SECONDS, outcomes
    error = outcomes["attach"].error
    assert error is not None
    check_sentence(error, OWN + "NotAttached", "Attaching 'midway' was ended by a detach")


# The wrong call at the wrong time

MISUSE: dict[str, tuple[Call, str, tuple[str, ...]]] = {
    # In this order: a call, the name of its error ("" where it works), and what that says. "@" is a server.
    "detach-before-attach": (detach("plain"), "NotAttached", ("'plain'",)),
    "set-timeout-on-a-detached-device": (set_timeout("plain"), "NotAttached", ("'plain'",)),
    "statistics-of-a-detached-device": (
        Call("GetStatistics", interface="org.nbdd1.Device", path="/org/nbdd1/device/plain"),
        "NotAttached",
        ("'plain'",),
    ),
    "attach": (attach("plain"), "", ()),
    "attach-twice": (attach("plain"), "AlreadyAttached", ("'plain'", "/dev/nbd")),
    "attach-uri-with-a-configured-name": (attach_uri(URI, "plain"), "InvalidArgs", ("'plain'", "choose another")),
    "attach-uri-with-a-taken-name": (attach_uri(URI, "bystander"), "AlreadyAttached", ("'bystander'", "detach it")),
    "attach-an-ad-hoc-device-twice": (attach("bystander"), "AlreadyAttached", ("'bystander'", "/dev/nbd7")),
    "attach-to-a-node-that-is-taken": (
        attach_uri("@", "second", device=("s", "/dev/nbd7")),
        "Busy",
        ("/dev/nbd7 is taken", "'bystander'", "Name another device"),
    ),
    "attach-beyond-the-kernel's-numbers": (
        attach_uri("@", "far", device=("s", "/dev/nbd99999")),
        "KernelError",
        ("There can be no /dev/nbd99999", "the last is /dev/nbd"),
    ),
    "detach-while-in-use": (detach("bystander"), "Busy", ("/dev/nbd7 is open in process", "fio")),
    "detach": (detach("plain"), "", ()),
    "detach-twice": (detach("plain"), "NotAttached", ("'plain'",)),
    "attach-what-nobody-defined": (attach("x"), "NoSuchDevice", ("'x'", "nbdctl list")),
    "detach-what-nobody-defined": (detach("x"), "NoSuchDevice", ("'x'", "nbdctl list")),
    "set-timeout-of-what-nobody-defined": (set_timeout("x"), "NoSuchDevice", ("'x'", "nbdctl list")),
}

DENIED: dict[str, Call] = {
    "attach": attach("plain"),
    "attach-uri": attach_uri(URI, "x"),
    "detach": detach("bystander"),
    "force-detach": detach("bystander", force=("b", True)),
    "set-timeout": set_timeout("bystander"),
    "reload": Call("Reload"),
    "list-exports": list_exports(URI),
}
"""One for each polkit action."""


@pytest.fixture(scope="module")
def misuse(lab: Lab, bystander: Bystander) -> Batch:
    lab.define(f"devices:\n  plain:\n    uri: {bystander.uri}\n")
    bystander.expected = {"bystander", "plain"}
    calls = {}
    for label, (call, _, _) in MISUSE.items():
        calls[label] = replace(call, body=[bystander.uri if item == "@" else item for item in call.body])
    outcomes = lab.calls(calls)
    outcomes |= lab.calls({f"denied-{action}": call for action, call in DENIED.items()}, user="visitor")
    found = Batch(outcomes, bystander.harm())
    bystander.expected = {"bystander"}
    lab.guest.run(f"rm {DEVICES_D}/*; systemctl reload nbdd")
    return found


@pytest.mark.parametrize("label", MISUSE)
def test_call_at_the_wrong_time_gets_the_reason(misuse: Batch, label: str) -> None:
    _, name, words = MISUSE[label]
    if name:
        space = FREEDESKTOP if name == "InvalidArgs" else OWN
        check_sentence(misuse.error(label), space + name, *words)
    else:
        assert misuse.outcomes[label].error is None


@pytest.mark.parametrize("action", DENIED)
def test_user_without_privileges_is_denied_with_the_name_of_the_action(misuse: Batch, action: str) -> None:
    error = misuse.error(f"denied-{action}")
    check_sentence(error, FREEDESKTOP + "AccessDenied", f"org.nbdd1.{action}", "administrator")


# Others on the same machine


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("interface", ["netlink", "ioctl"])
def test_device_of_nbd_client_is_busy_and_stays_as_it_is(lab: Lab, interface: str) -> None:
    server = lab.nbdkit("memory 16M")
    port = server.uri.rpartition(":")[2].strip("/")
    how = "-nonetlink" if interface == "ioctl" else ""
    lab.guest.run(
        f"set -e; nbd-client {how} 127.0.0.1 {port} /dev/nbd0 >/dev/null; head -c 1M /dev/urandom >/root/theirs;"
        "dd if=/root/theirs of=/dev/nbd0 oflag=direct bs=64k status=none"
    )
    theirs = lab.guest.read("/sys/block/nbd0/pid")
    try:
        outcomes = lab.calls(
            {
                "named": attach_uri(server.uri, "named", device=("s", "/dev/nbd0")),
                "any": attach_uri(server.uri, "any"),
            }
        )
        node = lab.device("any")["Node"]
        lab.detach("any")
        assert node not in {"", "/dev/nbd0"}
        error = outcomes["named"].error
        assert error is not None
        check_sentence(error, OWN + "Busy", "/dev/nbd0 is taken", "Name another device")
        assert lab.guest.read("/sys/block/nbd0/pid") == theirs
        lab.guest.run("dd if=/dev/nbd0 iflag=direct bs=64k count=16 status=none | cmp - /root/theirs")
    finally:
        lab.guest.run("nbd-client -d /dev/nbd0 >/dev/null; rm -f /root/theirs")
        lab.until("! [ -e /sys/block/nbd0/pid ]", 20, what="nbd-client's device to be free")
        lab.stop(server)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.prove_only
def test_flood_of_questions_from_anybody_costs_no_worker_and_ends(lab: Lab) -> None:
    worker = lab.device("bystander")["WorkerPID"]
    lab.guest.put(Path(__file__).with_name("in_guest") / "flood.py", "/run/flood.py")
    lab.guest.run("runuser -u nobody -- python3 /run/flood.py bystander 100000", timeout=500)
    lab.guest.run("timeout 200 nbdctl status bystander", timeout=300)
    assert lab.device("bystander")["WorkerPID"] == worker
    assert "was killed" not in lab.guest.journal("nbdd")


@pytest.mark.usefixtures("unharmed")
def test_second_nbdd_exits_with_one_sentence_and_touches_nothing(lab: Lab) -> None:
    before = lab.guest.run("sha256sum /run/nbdd/devices/*").stdout
    second = lab.guest.run("/usr/bin/nbdd", check=False)
    assert second.returncode == 1
    assert second.stdout == ""
    assert second.stderr.strip().startswith("nbdd: Another nbdd is running: it owns the bus name org.nbdd1.")
    assert len(second.stderr.strip().splitlines()) == 1
    assert lab.guest.run("sha256sum /run/nbdd/devices/*").stdout == before


def test_attach_without_the_kernel_module_says_how_to_load_it_and_works_afterwards(
    lab: Lab, bystander: Bystander
) -> None:
    # The only test without a bystander: the module can't be unloaded under one.
    bystander.stop()
    manager = lab.manager_pid()
    # Without the first line the kernel would load the module by itself, if it could.
    lab.guest.run("echo 'install nbd /bin/false' >/etc/modprobe.d/no-nbd.conf; udevadm settle; modprobe -r nbd")
    try:
        with pytest.raises(BusError) as caught:
            lab.attach_uri(bystander.uri, "bystander")
        devices = lab.devices()
    finally:
        lab.guest.run("rm /etc/modprobe.d/no-nbd.conf; modprobe nbd; udevadm settle")
    check_sentence(caught.value, OWN + "KernelError", "no NBD driver loaded", "'modprobe nbd'")
    assert devices == {}
    assert lab.manager_pid() == manager
    bystander.start()
    assert bystander.harm() == []
