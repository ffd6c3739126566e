# SPDX-License-Identifier: MIT
"""A person who sits at a guest: a session of logind's that is local and active, as polkit wants one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from tests.guest.guest import Result
from tests.system.lab import Lab

TERMINAL = 7
"""The virtual terminal that the person sits at."""

RULES_FILE = "/etc/polkit-1/rules.d/60-desktop-test.rules"

PASSWORD = "tr0ub4dor"
"""Of root, once `know_password` has set it."""

_AT_TERMINAL = Path(__file__).with_name("in_guest") / "at_terminal.py"
_CANCELLING_AGENT = Path(__file__).with_name("in_guest") / "cancelling_agent.py"


def to_front(terminal: int) -> str:
    """A command that puts a virtual terminal in front: VT_ACTIVATE of ioctl_vt(2)."""
    return f"python3 -c 'import fcntl, os; fcntl.ioctl(os.open(\"/dev/tty0\", os.O_RDWR), 0x5606, {terminal})'"


def at_the_machine(kind: str, how: str) -> str:
    """The beginning of a command: what follows runs in a session of that kind ("tty", "x11"), local and active.

    `how` are more options of systemd-run(1).
    """
    place = f"-p TTYPath=/dev/tty{TERMINAL} -E XDG_SEAT=seat0 -E XDG_VTNR={TERMINAL}"
    session = f"-p User=visitor -p PAMName=runuser-l -E XDG_SESSION_TYPE={kind} -E XDG_SESSION_CLASS=user"
    return f"{to_front(TERMINAL)}; systemd-run --quiet --collect {how} {place} {session} -E LANG=C.UTF-8"


class Seat:
    """A person, "visitor", at the machine: each command is a session of logind's on a terminal that is in front."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def run(self, command: str, *, check: bool = True) -> Result:
        """Run a command in a session that is local and active; systemd takes one $ of two."""
        quoted = shlex.quote(command.replace("$", "$$"))
        words = f"{at_the_machine('tty', '--wait --pipe')} bash -c {quoted}"
        return self._lab.guest.run(words, check=check, timeout=180)

    def know_password(self) -> None:
        """From now on there is an administrator with a password."""
        self._lab.guest.run(f"echo root:{PASSWORD} | chpasswd")

    def with_cancelling_agent(self, way: str, command: str) -> Result:
        """Run a command beside an agent whose person "cancels" or "thinks"; see cancelling_agent.py."""
        self._lab.guest.put(_CANCELLING_AGENT, "/usr/local/bin/cancelling_agent.py")
        return self.run(f"timeout 90 python3 /usr/local/bin/cancelling_agent.py {way} {command}", check=False)

    def type(self, command: str, *answers: tuple[str, str]) -> Result:
        """Run a command on a terminal, and type each answer as soon as its words are there; see at_terminal.py.

        What was on the terminal is the result's stdout.
        """
        self._lab.guest.put(_AT_TERMINAL, "/usr/local/bin/at_terminal.py")
        typed = shlex.quote(json.dumps(answers))
        return self.run(f"python3 /usr/local/bin/at_terminal.py {typed} {command}", check=False)
