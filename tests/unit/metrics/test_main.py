# SPDX-License-Identifier: MIT
"""The command nbdd-metrics."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdd.metrics.__main__ import main
from tests.fakes.manager import DEADLINE, FakeManager

SCRAPE = b"GET /metrics HTTP/1.1\r\n\r\n"


def command(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nbdd.metrics", *arguments], stdout=-1, stderr=-1, text=True, **more
    )  # fmt: skip


def test_command_without_an_option_prints_the_metrics(fake: FakeManager, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake.devices
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert 'nbdd_device_read_bytes_total{device="backup"} 512.0\n' in out
    assert err == ""


@pytest.mark.usefixtures("no_service")
def test_textfile_without_nbdd_says_down_and_the_timer_does_not_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nbdd.prom"
    assert main(["--textfile", str(path)]) == 0
    assert path.read_text().endswith("\nnbdd_up 0.0\n")
    assert capsys.readouterr().err == "nbdd-metrics: nbdd is not running. See `systemctl status nbdd`.\n"


@pytest.mark.usefixtures("no_service")
@pytest.mark.parametrize(
    ("path", "reason"),
    [("nbdd.txt", "does not end in .prom"), ("no/nbdd.prom", "can't be written: No such file or directory")],
)
def test_textfile_in_a_bad_place_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, reason: str
) -> None:
    assert main(["--textfile", str(tmp_path / path)]) == 1
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_command_serve_without_sockets_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--serve"]) == 1
    assert capsys.readouterr().err == (
        "nbdd-metrics: systemd passed no listening socket; --serve is for nbdd-metrics.socket.\n"
    )


@pytest.mark.usefixtures("no_service")
def test_command_without_the_library_says_which_package_to_install(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ModuleNotFoundError(name='prometheus_client')")
    with command(env=os.environ | {"PYTHONPATH": str(tmp_path)}) as process:
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert err == "nbdd-metrics: The Prometheus client library is missing: apt install python3-prometheus-client.\n"


@pytest.mark.usefixtures("no_service")
def test_output_to_a_closed_pipe_or_a_full_disk_is_no_traceback() -> None:
    with Path("/dev/full").open("w") as full, command() as lost:
        assert lost.communicate(timeout=DEADLINE)
        done = subprocess.run(
            [sys.executable, "-m", "nbdd.metrics"], stdout=full, stderr=-1, text=True, check=False, timeout=DEADLINE
        )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1, "nbdd-metrics: The output can't be written: No space left on device.",
    )  # fmt: skip


@pytest.mark.usefixtures("no_service")
def test_output_that_is_closed_is_a_sentence() -> None:
    run = ["sh", "-c", '"$0" -m nbdd.metrics >&-', sys.executable]
    done = subprocess.run(run, stderr=-1, text=True, check=False, timeout=DEADLINE)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1, "nbdd-metrics: There is no standard output to write to.",
    )  # fmt: skip


def test_command_serves_on_the_sockets_that_systemd_passes(fake: FakeManager) -> None:
    # LISTEN_PID is the program's own, which only a child between fork and exec knows: so a shell is that child.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        os.set_inheritable(listener.fileno(), True)
        line = f'exec 3<&{listener.fileno()}; LISTEN_PID=$$ exec "$0" -m nbdd.metrics --serve'
        process = subprocess.Popen(
            ["bash", "-c", line, sys.executable], stderr=-1, text=True, pass_fds=[listener.fileno()],
            env=os.environ | {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "nbdd-metrics.socket"},
        )  # fmt: skip
        with process, socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as client:
            client.sendall(SCRAPE)
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=DEADLINE)[1] == ""
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b'nbdd_device_info{configured="true",device="backup"' in answer
    assert fake.calls
