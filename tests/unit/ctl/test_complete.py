# SPDX-License-Identifier: MIT
"""Tab behind nbdctl, in each shell as the package sets it up."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.manager import ABSENT, DEADLINE, FakeManager
from tests.fakes.terminal import NBDCTL

TREE = Path(__file__).resolve().parents[3]
COMPLETIONS = TREE / "completions"

NO_AUTOSTART = 2


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


@pytest.fixture
def path(fake: FakeManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in PATH with an nbdctl in it, and devices to complete."""
    fake.devices["bare-metal"] = ABSENT | {"Name": "bare-metal"}
    program = tmp_path / "bin" / "nbdctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={TREE} exec {sys.executable} -m {NBDCTL[-1]} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


class Shell:
    """An interactive shell on a terminal."""

    def __init__(self, *command: str) -> None:
        self.fd, end = pty.openpty()
        environment = os.environ | {"TERM": "dumb", "PS1": "$ "}
        self.process = subprocess.Popen(
            command, stdin=end, stdout=end, stderr=end, env=environment, start_new_session=True
        )
        os.close(end)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, wanted: str) -> None:
        end = time.monotonic() + DEADLINE
        while wanted not in self.text:
            assert select.select([self.fd], [], [], max(end - time.monotonic(), 0))[0], self.text
            self.text += os.read(self.fd, 4096).decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def shell(request: pytest.FixtureRequest, path: Path) -> Iterator[Shell]:
    """bash or zsh, with the completion loaded as the package has it."""
    if request.param == "bash":
        started = Shell("bash", "--norc", "--noprofile", "-i")
        started.type(f"bind 'set bell-style none'; source {COMPLETIONS}/nbdctl.bash; echo rea''dy\n")
    else:
        started = Shell("zsh", "-f", "-i")
        started.type(f"fpath=({COMPLETIONS} $fpath); autoload -U compinit; compinit -u -d {path}/dump; echo rea''dy\n")
    try:
        started.wait_for("ready\r\n")
        yield started
    finally:
        started.close()


SHELLS = [pytest.param("bash", marks=needs("bash")), pytest.param("zsh", marks=needs("zsh"))]


@pytest.mark.parametrize("shell", SHELLS, indirect=True)
def test_completion_offers_commands_options_and_device_names(shell: Shell) -> None:
    # Each word is told from its beginning by what Tab puts behind it.
    for begun, whole in (("det", "detach "), ("bac", "backup "), ("--fo", "--force ")):
        shell.type(("nbdctl " if begun == "det" else "") + begun + "\t")
        shell.wait_for(whole)


@pytest.mark.parametrize("shell", SHELLS, indirect=True)
def test_completion_works_again_after_the_first_time(shell: Shell) -> None:
    shell.type("nbdctl sta\t")
    shell.wait_for("status ")
    shell.type("bare\t")
    shell.wait_for("bare-metal ")
    shell.type("\x15nbdctl status /dev/n\t")
    shell.wait_for("/dev/nbd0 ")


def fish(line: str) -> dict[str, str]:
    """What fish offers, with its descriptions."""
    script = f"source {COMPLETIONS}/nbdctl.fish; complete -C '{line}'"
    done = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return dict(row.partition("\t")[::2] for row in done.stdout.splitlines())


@needs("fish")
@pytest.mark.usefixtures("path")
def test_completion_in_fish_has_descriptions() -> None:
    assert fish("nbdctl status b") == {"backup": "attached", "bare-metal": "detached"}
    assert fish("nbdctl status /dev/") == {"/dev/nbd0": "backup"}
    assert "--force" in fish("nbdctl detach --")
    assert {"status", "list"} <= fish("nbdctl ").keys()


def test_completion_files_are_where_each_shell_looks() -> None:
    project = tomllib.loads((TREE / "pyproject.toml").read_text())
    shared = project["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    # The places are those of bash-completion, and of Debian's zsh and fish.
    places = {
        "nbdctl.bash": "share/bash-completion/completions/nbdctl",
        "_nbdctl": "share/zsh/vendor-completions/_nbdctl",
        "nbdctl.fish": "share/fish/vendor_completions.d/nbdctl.fish",
    }
    assert {path.name for path in COMPLETIONS.iterdir()} == set(places)
    assert {source: place for source, place in shared.items() if source.startswith("completions/")} == {
        f"completions/{name}": place for name, place in places.items()
    }


def complete(line: str) -> list[str]:
    words = line.split(" ")
    environment = os.environ | {
        "_NBDCTL_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1),
    }  # fmt: skip
    done = subprocess.run(NBDCTL, capture_output=True, text=True, check=False, env=environment)
    assert done.stderr == ""
    return [row.partition(",")[2] for row in done.stdout.splitlines() if row]


def test_completion_offers_names_that_make_sense(fake: FakeManager) -> None:
    fake.devices["bare"] = ABSENT | {"Name": "bare"}
    assert complete("nbdctl status b") == ["backup", "bare"]
    assert complete("nbdctl attach b") == ["bare"]
    assert complete("nbdctl detach ") == ["backup"]
    assert {call.flags for call in fake.calls} == {NO_AUTOSTART}


@pytest.mark.usefixtures("no_service")
def test_completion_without_the_service_is_empty_and_silent() -> None:
    assert complete("nbdctl status b") == []
