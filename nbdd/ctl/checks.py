# SPDX-License-Identifier: MIT
"""The checks of `nbdctl doctor`, one function for each thing that nbdd needs of a machine.

Everything works for every user; if only root may see something, the finding says so. `root` is the root of the file
system, for tests.
"""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from nbdd import protocol
from nbdd.errors import InvalidConfig, NbddError, NegotiationFailed, NoSuchExport
from nbdd.kernel.netlink import NetlinkNBD
from nbdd.kernel.sysfs import module_loaded, nodes
from nbdd.server.connect import Deadline, connect, list_exports, negotiate
from nbdd.text import clause, plural, size
from nbdd.uri import URI

if TYPE_CHECKING:
    from nbdd.bus.caller.device import DeviceView
    from nbdd.config.loader import Configuration

SERVER_SECONDS = 3.0
"""How long a server may take to describe an export."""

SYSTEMCTL_SECONDS = 5.0
KERNEL_SECONDS = 3.0

_AT_ONCE = 64
"""Servers that are asked at the same time."""

_RULES = "60-nbdd.rules"
_RULES_DIRECTORIES = ("etc/udev/rules.d", "run/udev/rules.d", "usr/local/lib/udev/rules.d", "usr/lib/udev/rules.d")
_UDEV_CONTROL = "run/udev/control"
_POLICY = "usr/share/polkit-1/actions/org.nbdd1.policy"
POLKIT = "org.freedesktop.PolicyKit1"


class Verdict(StrEnum):
    """How it is."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found: about `subject`, in one sentence, which says what to do if it is not ok."""

    verdict: Verdict
    subject: str
    text: str


def ok(subject: str, text: str) -> Finding:
    """All is well."""
    return Finding(Verdict.OK, subject, text)


def warning(subject: str, text: str) -> Finding:
    """It works, but not all of it, or perhaps not."""
    return Finding(Verdict.WARNING, subject, text)


def fault(subject: str, text: str) -> Finding:
    """Something does not work."""
    return Finding(Verdict.FAULT, subject, text)


# The kernel


def kernel_module(root: str = "/", release: str | None = None) -> Finding:
    """Whether the NBD driver is loaded, or could be."""
    subject = "kernel module"
    if module_loaded(sysfs=f"{root}sys"):
        return ok(subject, "the NBD driver is loaded")
    known = Path(root, "lib/modules", release or os.uname().release, "modules.dep")
    try:
        there = "/nbd.ko" in known.read_text(encoding="utf-8")
    except OSError:
        there = True  # a container has no list, and the kernel of its host may well have it
    if there:
        return fault(subject, "the NBD driver is not loaded; `modprobe nbd` loads it, as does a start of nbdd.service")
    return fault(subject, f"this kernel ({known.parent.name}) has no NBD driver; install one with CONFIG_BLK_DEV_NBD")


def netlink_family(root: str = "/") -> Finding:
    """Whether the driver answers; not asked while it isn't loaded, since the question may load it."""
    subject = "kernel netlink"
    if not module_loaded(sysfs=f"{root}sys"):
        return fault(subject, 'there is no family "nbd" without the kernel module')
    try:
        with NetlinkNBD(seconds=KERNEL_SECONDS):
            return ok(subject, 'the family "nbd" answers')
    except NbddError as error:
        return fault(subject, f"{clause(error)}; nbdd needs Linux 4.12 or later, and the first network namespace")


def device_nodes(root: str = "/") -> Finding:
    """Whether the kernel's devices have their nodes."""
    subject = "device nodes"
    found = list(nodes(sysfs=f"{root}sys", dev=f"{root}dev"))
    missing = [node.path for node in found if not _is_block(node.path)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return fault(subject, f"{missing[0]}{more} is not there; is devtmpfs mounted on /dev, and not hidden here?")
    bound = sum(node.bound for node in found)
    return ok(subject, f"{len(found)} in /dev, {bound} of them bound; the kernel makes more when they are needed")


def _is_block(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


# The system


def permissions(uid: int | None = None) -> Finding:
    """What this user may do."""
    if (os.geteuid() if uid is None else uid) == 0:
        return ok("permissions", "root may do everything")
    return ok("permissions", "you may list, look and monitor; for the rest polkit asks for an administrator's password")


def systemd_unit(show: Callable[[], str] | None = None) -> Finding:
    """Whether nbdd.service is there and runs; `show` is for tests."""
    subject = "service"
    try:
        unit = dict(line.split("=", 1) for line in (show or _show_unit)().splitlines() if "=" in line)
    except (OSError, subprocess.SubprocessError) as error:
        why = clause(str(error).partition("\n")[0])
        return warning(subject, f"systemd can't be asked about nbdd.service ({why})")
    state, enabled = unit.get("ActiveState", ""), unit.get("UnitFileState", "")
    match unit.get("LoadState", ""):
        case "loaded" if state == "active":
            if enabled == "enabled":
                return ok(subject, "nbdd.service runs, and is started at boot")
            return warning(
                subject, "nbdd.service runs, but is not started at boot; `systemctl enable nbdd` changes that"
            )
        case "loaded" if state == "failed":
            return fault(subject, f"nbdd.service failed ({unit.get('Result', '')}); `journalctl -u nbdd` says why")
        case "loaded":
            return warning(subject, f"nbdd.service is {state}; any call starts it, and so does `systemctl start nbdd`")
        case "masked":
            until_boot = " --runtime" if unit.get("UnitFileState") == "masked-runtime" else ""
            return fault(subject, f"nbdd.service is masked; `systemctl unmask{until_boot} nbdd` lets it start again")
        case "not-found":
            return fault(subject, "there is no nbdd.service; install the package nbdd")
        case other:
            return fault(subject, f"nbdd.service is not usable ({other or 'systemd does not run'})")


def _show_unit() -> str:
    done = subprocess.run(
        ["systemctl", "show", "nbdd.service", "--property=LoadState,ActiveState,UnitFileState,Result"],
        capture_output=True, text=True, check=False, timeout=SYSTEMCTL_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise OSError(done.stderr.strip() or f"systemctl ended with {done.returncode}")
    return done.stdout


def running(version: str | None, ours: str, problem: NbddError | None = None) -> Finding:
    """Whether nbdd answers, and is the one that belongs to this nbdctl."""
    if problem is not None:
        return fault("nbdd", clause(problem))
    if version is None:
        return warning("nbdd", "it does not run now; `systemctl start nbdd` starts it")
    if version != ours:
        return warning("nbdd", f"it is version {version} and this is {ours}; `systemctl restart nbdd` costs no I/O")
    return ok("nbdd", f"version {version} answers")


def polkit(names: Iterable[str], startable: Iterable[str], root: str = "/") -> Finding:
    """Whether others than root can be asked for a password."""
    if POLKIT not in {*names, *startable}:
        return warning("polkit", "it is not there, and so only root may attach and detach; install polkitd")
    if not Path(root, _POLICY).exists():
        return warning("polkit", f"nbdd's actions are not installed (/{_POLICY}); install the package again")
    return ok("polkit", "it is there to ask for passwords" if POLKIT in names else "it starts when it is needed")


def udev_rules(root: str = "/") -> Finding:
    """Whether udev runs and makes the links in /dev/disk/by-nbd."""
    subject = "udev rules"
    found = next((path for folder in _RULES_DIRECTORIES if _there(path := Path(root, folder, _RULES))), None)
    if found is None:
        return fault(subject, f"{_RULES} is not installed, and so no device has its link; install the package again")
    if os.path.realpath(found) == "/dev/null" or not found.stat().st_size:
        return fault(subject, f"{found} switches the rules off, and so no device has its link; remove it")
    if not Path(root, _UDEV_CONTROL).exists():
        return fault(subject, "udevd does not run, and so no device gets its link; `systemctl start systemd-udevd`")
    return ok(subject, "udev runs, and makes the links in /dev/disk/by-nbd")


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def links(devices: Iterable[DeviceView], root: str = "/") -> Iterator[Finding]:
    """Attached devices that can't be found by their names."""
    for device in devices:
        link = Path(root, "dev/disk/by-nbd", device.name)
        if device.node and device.state != "connecting" and os.path.realpath(link) != device.node:
            yield fault(
                f"link of {device.name}", f"{link} does not lead to {device.node}; `udevadm trigger {device.node}`"
            )


def states(devices: Iterable[DeviceView]) -> Iterator[Finding]:
    """Devices in trouble."""
    for device in devices:
        last = f": {clause(device.last_error.message)}" if device.last_error else ""
        subject = f"device {device.name}"
        if device.state == "failed" and device.node:
            does = "waits" if device.fails_at > time.time_ns() // 1000 else "fails"
            yield fault(
                subject, f"its I/O {does}{last}; nbdd keeps trying, and `nbdctl status {device.name}` says more"
            )
        elif device.state == "failed":
            yield fault(subject, f"it is not attached{last}; `nbdctl attach {device.name}` tries again")
        elif device.state in {"reconnecting", "degraded"} or (device.state == "connecting" and last):
            yield warning(subject, f"{device.state}{last}; nbdd keeps trying")


# The configuration


def configuration(directory: Path) -> tuple[Configuration | None, list[Finding]]:
    """What is configured, or None, and the findings about it."""
    from nbdd.config.loader import load  # noqa: PLC0415 - brings YAML and JSON schema along

    subject = "configuration"
    try:
        found = load(directory)
    except InvalidConfig as error:
        hidden = [problem for problem in error.problems if problem.rstrip(".").endswith("permission denied")]
        if hidden and len(hidden) == len(error.problems):
            return None, [warning(subject, f"only root can see all of it ({clause(hidden[0])})")]
        return None, [fault(subject, clause(problem)) for problem in error.problems]
    named = plural(len(found.devices), "device"), plural(len(found.files), "file")
    unsafe = [warning(subject, text) for text in map(_unsafe, (directory, *found.files)) if text]
    return found, [ok(subject, f"{named[0]} in {named[1]}, all well"), *unsafe]


def _unsafe(path: Path) -> str:
    """Why others than root could change it, and with it what root mounts."""
    try:
        status = path.stat()
    except OSError:
        return ""
    if status.st_mode & stat.S_IWOTH:
        return f"everyone can write {path}; `chmod o-w {path}`"
    return f"{path} belongs to user {status.st_uid}, who can change it; `chown root: {path}`" if status.st_uid else ""


def known_servers(configured: Configuration | None, devices: Iterable[DeviceView]) -> dict[str, tuple[URI, ...]]:
    """The servers of each device: as configured or, if that can't be read, as nbdd has them."""
    if configured is not None:
        return {name: definition.uri for name, definition in configured.devices.items()}
    return {device.name: tuple(map(URI.parse, device.servers)) for device in devices}


def servers(known: Mapping[str, Sequence[URI]], devices: Iterable[DeviceView]) -> list[Finding]:
    """Whether the servers of devices without a connection answer, and have the export."""
    connected = {device.name for device in devices if device.live_connections}
    wanted = [(name, uri) for name, uris in known.items() if name not in connected for uri in uris]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        asked = list(pool.map(lambda each: server(f"server of {each[0]}", each[1]), wanted))
    return [ok(f"server of {name}", "it is connected to") for name in known if name in connected] + asked


def server(subject: str, uri: URI) -> Finding:
    """Whether a server answers and has the export. That is not opened: it may be for a single client."""
    if uri.socket is not None and os.path.exists(uri.socket) and not os.access(uri.socket, os.W_OK):
        return warning(subject, f"only root, or its owner, may connect to {uri.address}")
    deadline = Deadline(SERVER_SECONDS)
    try:
        with connect(uri, deadline) as sock:
            export = negotiate(sock, protocol.info(uri.export), deadline, address=uri.address)
    except NegotiationFailed as error:
        # An old server can't describe an export without opening it; it may have a list.
        if isinstance(error, NoSuchExport) or not _listed(uri):
            return fault(subject, clause(error))
        return ok(subject, f"{uri.address} has it in its list of exports")
    except NbddError as error:
        return fault(subject, clause(error))
    return ok(subject, f"{uri.address} has it, {size(export.size)}")


def _listed(uri: URI) -> bool:
    try:
        return uri.export in {export.name for export in list_exports(uri, Deadline(SERVER_SECONDS))}
    except NbddError:
        return False
