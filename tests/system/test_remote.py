# SPDX-License-Identifier: MIT
"""nbdctl --host with a real ssh, sshd, systemd-stdio-bridge and nbdd; the other machine is this one."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.system.lab import Lab

pytestmark = pytest.mark.quick_on("debian12")

PREPARE = """
set -e
rm -rf /root/far; mkdir -m 700 /root/far
cp --archive /root/.ssh /root/far/kept
ssh-keygen -q -t ed25519 -N '' -f /root/far/key
cat /root/far/key.pub >>/root/.ssh/authorized_keys
cat >/root/.ssh/config <<'END'
Host far
  HostName 127.0.0.1
  IdentityFile /root/far/key
  StrictHostKeyChecking accept-new
  UserKnownHostsFile /root/far/known
END
home=$(getent passwd visitor | cut -d: -f6)
install -d -o visitor -m 700 "$home/.ssh"
install -o visitor -m 600 /root/far/key.pub "$home/.ssh/authorized_keys"
usermod --password '*' visitor
"""
CLEAN_UP = "rm -rf /root/.ssh && mv /root/far/kept /root/.ssh && rm -rf /root/far ~visitor/.ssh && passwd -q -l visitor"


@pytest.fixture
def far(lab: Lab) -> Iterator[Lab]:
    """The guest with a way to itself: `far` in ssh's configuration, for root and for `visitor`."""
    lab.guest.run(PREPARE)
    yield lab
    lab.guest.run(CLEAN_UP)


def test_remote_device_is_attached_listed_and_detached(far: Lab) -> None:
    server = far.nbdkit("memory 32M")
    done = far.guest.run(f"nbdctl --host root@far attach {server.uri} --name there --json", timeout=180)
    assert json.loads(done.stdout)["name"] == "there"
    assert far.device("there")["State"] == "attached"
    listed = json.loads(far.guest.run("nbdctl list --host far --json").stdout)
    assert [(device["name"], device["state"]) for device in listed["devices"]] == [("there", "attached")]
    assert far.guest.run("nbdctl -H far detach there", timeout=180).stdout == "there is detached\n"
    assert far.bound() == []


def test_remote_user_in_a_session_over_ssh_is_denied_with_a_sentence(far: Lab) -> None:
    far.define("devices:\n  photos:\n    uri: nbd://127.0.0.1:1/\n")
    # One that asks PAM, and so logind, as every sshd does but the one for tests.
    far.guest.run(
        "systemd-run --quiet --collect --unit=sshd-with-pam /usr/sbin/sshd -D -p 2222 -o UsePAM=yes;"
        "for _ in $(seq 300); do ss -Hltn 'sport = :2222' | grep -q . && break; sleep 0.1; done"
    )
    ssh = "ssh -F /root/.ssh/config -p 2222 -o UserKnownHostsFile=/root/far/known2 {} visitor@far"
    try:
        session = far.guest.run(f"{ssh.format('')} 'loginctl show-session $XDG_SESSION_ID -P Remote -P Active'")
        assert session.stdout.split() == ["yes", "yes"]
        refused = "nbdctl: You are not allowed to do this (org.nbdd1.attach); run it as root, or ask an administrator."
        plain = far.guest.run(f"{ssh.format('')} nbdctl attach photos", check=False)
        assert (plain.returncode, plain.stdout, plain.stderr) == (1, "", f"{refused}\n")
        # On a terminal, too, nobody is asked for a password that would not help.
        terminal = far.guest.run(f"{ssh.format('-tt')} nbdctl attach photos </dev/null", check=False)
        assert terminal.returncode == 1
        assert refused in terminal.stdout
        assert "Password" not in terminal.stdout
    finally:
        far.guest.run("systemctl stop sshd-with-pam; loginctl terminate-user visitor", check=False)


def test_remote_user_may_look_but_not_attach(far: Lab) -> None:
    assert json.loads(far.guest.run("nbdctl --host visitor@far list --json").stdout) == {"devices": []}
    done = far.guest.run("nbdctl --host visitor@far attach nbd://127.0.0.1:1/", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("nbdctl: ")
    assert done.stderr.count("\n") == 1
    assert "not " in done.stderr


def test_remote_machine_that_is_absent_or_refuses_is_one_sentence(far: Lab) -> None:
    reasons = {
        "nowhere.invalid": "ssh: Could not resolve hostname nowhere.invalid: ",
        "nobody@far": "nobody@127.0.0.1: Permission denied (publickey)",
        "ssh://far:1": "ssh: connect to host 127.0.0.1 port 1: Connection refused",
    }
    for host, reason in reasons.items():
        done = far.guest.run(f"nbdctl --host {host} list", check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"nbdctl: The system bus of {host} can't be reached with ssh: {reason}")
        assert done.stderr.count("\n") == 1
