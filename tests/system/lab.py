# SPDX-License-Identifier: MIT
"""A guest with nbdd in it, as the tests of the whole system speak to it: D-Bus calls, servers, and the state after."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tests.guest import Guest

ATTACH_SECONDS = 90
"""Emulated guests on busy machines are slow; no test waits this long when all is well."""

_OBJECTS = "busctl --json=short call org.nbdd1 /org/nbdd1 org.freedesktop.DBus.ObjectManager GetManagedObjects"
_CALL = f"busctl --quiet --auto-start=no --timeout={ATTACH_SECONDS} call"
_RELOAD = f"{_CALL} org.nbdd1 /org/nbdd1 org.nbdd1.Manager Reload"
_KERNEL_SAID = "the kernel said"

_KERNEL_TROUBLE = re.compile(
    r"WARNING:|BUG:|Oops|blocked for more than|general protection|refcount_t|list_del corruption"
)


class BusError(Exception):
    """A D-Bus call failed; `name` is the error's name, the text is what the caller reads."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name
        self.text = text


@dataclass(frozen=True)
class Call:
    """One of several calls; in `body`, `{"timeout": ("u", 5)}` stands for options (a{sv})."""

    member: str
    signature: str = ""
    body: Sequence[Any] = ()
    interface: str = "org.nbdd1.Manager"
    path: str = "/org/nbdd1"


@dataclass(frozen=True)
class Outcome:
    """What one of several calls came to; variants in the reply are the values in them."""

    error: BusError | None
    reply: list[Any]
    seconds: float


@dataclass(frozen=True)
class Server:
    """A server in the guest, as a systemd unit."""

    unit: str
    uri: str


class Lab:
    """One guest, used by one test at a time. `cleanup` puts back what a test changed and checks what is left."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self._servers: list[str] = []
        self._port = 10900
        self._log_mark = ""

    # Calls

    def call(
        self,
        member: str,
        *arguments: str,
        interface: str = "org.nbdd1.Manager",
        path: str = "/org/nbdd1",
        user: str = "root",
        timeout: float = ATTACH_SECONDS,
    ) -> str:
        """Call a method; arguments are GVariant texts such as `"'backup'"` and `"{'wait': <uint32 5>}"`.

        Returns the out-arguments as gdbus prints them; raises BusError.
        """
        words = ["gdbus", "call", "--system", f"--timeout={timeout:.0f}", "--dest=org.nbdd1", f"--object-path={path}"]
        words += [f"--method={interface}.{member}", "--", *arguments]
        done = self.guest.run(shlex.join(words), check=False, timeout=timeout + 30, user=user)
        if done.returncode == 0:
            return done.stdout.strip()
        found = re.search(r"GDBus\.Error:([\w.]+): (.*)", done.stderr, re.DOTALL)
        if found is None:
            raise BusError("gdbus", done.stderr.strip())
        raise BusError(found[1], found[2].strip().removesuffix("'"))

    def calls(
        self,
        calls: Mapping[str, Call],
        *,
        first: Mapping[str, str] | None = None,
        together: bool = False,
        user: str = "root",
        timeout: float = ATTACH_SECONDS,
    ) -> dict[str, Outcome]:
        """Make many calls with one start of a program in the guest, one after the other, or all `together`.

        `first` holds shell commands to run before some of them. No error is raised: each call has its own outcome.
        `timeout`, in seconds, is for each call.
        """
        wanted = [{**asdict(call), "first": (first or {}).get(label, "")} for label, call in calls.items()]
        self.guest.put(Path(__file__).with_name("in_guest") / "caller.py", "/run/caller.py")
        done = self.guest.run(
            f"python3 /run/caller.py {'together' if together else 'in-turn'} {timeout:g}",
            input=json.dumps(wanted).encode(),
            user=user,
            timeout=timeout * (1 if together else len(calls)) + 60,
        )
        return {
            label: Outcome(
                BusError(told["error"], told["text"]) if told["error"] else None, told["body"], told["seconds"]
            )
            for label, told in zip(calls, json.loads(done.stdout), strict=True)
        }

    def attach(self, name: str, options: str = "@a{sv} {}", **kwargs: Any) -> str:
        """`Manager.Attach`; returns the object path."""
        return _path_in(self.call("Attach", f"'{name}'", options, **kwargs))

    def attach_uri(self, uri: str, name: str, more: str = "", **kwargs: Any) -> str:
        """`Manager.AttachURI` with a name; `more` holds further options, such as `"'timeout': <uint32 5>"`."""
        options = "{" + ", ".join(filter(None, [f"'name': <'{name}'>", more])) + "}"
        return _path_in(self.call("AttachURI", f"'{uri}'", options, **kwargs))

    def detach(self, name: str, options: str = "@a{sv} {}", **kwargs: Any) -> None:
        """`Manager.Detach`."""
        self.call("Detach", f"'{name}'", options, **kwargs)

    def devices(self) -> dict[str, dict[str, Any]]:
        """Every device's properties by name, from GetManagedObjects."""
        return _devices(self.guest.run(_OBJECTS).stdout)

    def device(self, name: str) -> dict[str, Any]:
        """One device's properties."""
        return self.devices()[name]

    def wait_for(self, name: str, prop: str, value: str, seconds: float = ATTACH_SECONDS) -> None:
        """Wait until a property has a value, as busctl prints it (`s "attached"`, `u 1`)."""
        path = object_path(name)
        get = f"busctl get-property org.nbdd1 {path} org.nbdd1.Device {prop} 2>&1"
        self.until(f"""[ "$({get})" = {shlex.quote(value)} ]""", seconds, what=f"{name}.{prop} = {value}")

    def until(
        self,
        condition: str,
        seconds: float = ATTACH_SECONDS,
        *,
        what: str = "",
        unit: str = "",
        first: str = ":",
    ) -> None:
        """Wait until a shell condition holds in the guest; a failure shows what nbdd last said.

        With a unit, the wait is over when that no longer runs, and a failure shows what it last said. `first` is a
        shell command to run before.
        """
        alive = f" && systemctl is-active --quiet {unit}" if unit else ""
        end = f"end=$(($(date +%s) + {int(seconds)}))"
        loop = f"{first}; {end}; until {condition}; do [ $(date +%s) -lt $end ]{alive} || exit 99; sleep 0.1; done"
        done = self.guest.run(loop, check=False, timeout=seconds + 60)
        if done.returncode:
            failure = f"{unit or 'nbdd'}: not within {seconds} s: {what or condition}"
            raise AssertionError(f"{failure}\n{self.guest.journal(unit or 'nbdd', 30)}")

    # Configuration and servers

    def define(self, yaml: str) -> None:
        """Make this the whole configuration below devices.d, and reload."""
        self.guest.run(f"cat >/etc/nbdd/devices.d/test.yaml && {_RELOAD}", input=yaml.encode(), timeout=ATTACH_SECONDS)

    def serve(self, command: str, uri: str, *, ready: str = "") -> Server:
        """Start a server as a unit of its own, in the foreground; `ready` is a shell condition, by default the port's.

        "{port}" in command and uri becomes a free port; "{unit}" the unit's name.
        """
        self._port += 1
        unit = f"server-{self._port}"
        command = command.replace("{port}", str(self._port)).replace("{unit}", unit)
        uri = uri.replace("{port}", str(self._port)).replace("{unit}", unit)
        socket = re.search(r"socket=([^&]+)", uri)
        # What a server of an earlier test left there would look as if this one were ready.
        clear = f"rm -f {socket[1]}; " if socket else ""
        start = f"{clear}systemd-run --quiet --collect --unit={unit} -p KillMode=control-group {command}"
        self._servers.append(unit)
        default = f"[ -S {socket[1]} ]" if socket else f"ss -ltnH sport = :{self._port} | grep -q ."
        self.until(ready or default, 60, what=command, unit=unit, first=f"{start} || exit 98")
        return Server(unit, uri)

    def nbdkit(self, arguments: str = "memory 64M", export: str = "") -> Server:
        """Start nbdkit on a TCP port of 127.0.0.1."""
        return self.serve(f"nbdkit -f -i 127.0.0.1 -p {{port}} {arguments}", f"nbd://127.0.0.1:{{port}}/{export}")

    def stop(self, server: Server) -> None:
        """Stop a server."""
        self.guest.run(f"systemctl stop {server.unit}", check=False)

    # State

    def manager_pid(self) -> int:
        """The daemon's main process."""
        return int(self.guest.run("systemctl show -P MainPID nbdd").stdout)

    def bound(self) -> list[str]:
        """Kernel names of bound NBD devices, whoever bound them."""
        return [
            PurePosixPath(path).parent.name for path in self.guest.run("ls -d /sys/block/nbd*/pid || :").stdout.split()
        ]

    def kernel_log(self) -> list[str]:
        """What the kernel said since `mark`."""
        return self._since_mark(self.guest.run("dmesg").stdout)

    def kernel_trouble(self) -> list[str]:
        """Lines of it that no kernel should write."""
        return _trouble(self.kernel_log())

    def mark(self) -> None:
        """Begin: what the kernel said so far is not this test's."""
        log = self.guest.run("dmesg").stdout.splitlines()
        self._log_mark = log[-1] if log else ""

    def cleanup(self) -> None:
        """Put back what a test changed, and fail if nbdd or the kernel took harm."""
        # Few programs, where all is well: this runs after every test, and each takes a tenth of a second in a guest.
        told = self.guest.run(
            "{ rm -f /etc/nbdd/devices.d/*;"
            "while read -r source target _; do case $source in *nbd*) umount $target;; esac; done </proc/self/mounts;"
            f"{_RELOAD} 2>/dev/null || {{ systemctl start nbdd; systemctl reload nbdd; }}; }} >/dev/null;"
            f'objects=$({_OBJECTS}); echo "$objects";'
            f"case $objects in *org.nbdd1.Device*) ;; *) {self._stop_and_look()};; esac",
            timeout=ATTACH_SECONDS * 2,
        ).stdout
        objects, _, left = told.partition("\n")
        found = _devices(objects)
        if found:
            for name, device in found.items():
                if device["State"] != "detached":
                    self.detach(name, "{'force': <true>}")
            assert self.devices() == {}, "devices are left on the bus"
            left = self.guest.run(self._stop_and_look()).stdout
        self._servers.clear()
        left, _, log = left.partition(f"{_KERNEL_SAID}\n")
        assert left == "", "devices are left bound, records are left, or workers"
        assert _trouble(self._since_mark(log)) == []

    def _stop_and_look(self) -> str:
        """The shell commands that stop the servers, and tell what is left, and what the kernel said."""
        return (
            f"systemctl stop {' '.join(self._servers)} 2>/dev/null; rm -f /run/server-*.sock;"
            "ls -d /sys/block/nbd*/pid 2>/dev/null;"
            "ls -d /run/nbdd/devices/* /run/nbdd/udev/* 2>/dev/null; pgrep -xa 'nbdd:.*';"
            f"echo {_KERNEL_SAID}; dmesg"
        )

    def _since_mark(self, log: str) -> list[str]:
        lines = log.splitlines()
        start = lines.index(self._log_mark) + 1 if self._log_mark in lines else 0
        return lines[start:]


def _devices(objects: str) -> dict[str, dict[str, Any]]:
    found = {}
    for interfaces in json.loads(objects)["data"][0].values():
        properties = {key: value["data"] for key, value in interfaces["org.nbdd1.Device"].items()}
        found[properties["Name"]] = properties
    return found


def _trouble(log: list[str]) -> list[str]:
    return [line for line in log if _KERNEL_TROUBLE.search(line)]


def object_path(name: str) -> str:
    """The D-Bus path of a device, escaped by systemd's own rules; written again here to check the product's."""
    label = re.sub(r"[^a-zA-Z0-9]", lambda found: f"_{ord(found[0]):02x}", name)
    if label[0].isdigit():
        label = f"_{ord(label[0]):02x}" + label[1:]
    return f"/org/nbdd1/device/{label}"


def _path_in(reply: str) -> str:
    found = re.search(r"'(/[^']*)'", reply)
    assert found is not None, reply
    return found[1]
