# SPDX-License-Identifier: MIT
"""The proving ground's view of the machine it runs on."""

from __future__ import annotations

import sys

import pytest

from tests.guest import host
from tests.guest.errors import GuestError

_FOREIGN = "http://other.example/apt/|bookworm|main|Somebody\n"


def test_the_archive_is_the_machines_own_and_security_goes_with_it() -> None:
    found = host.choose_archive(
        "http://mirror.example/debian/|bookworm|main|Debian\n"
        "http://mirror.example/debian/|bookworm-updates|main|Debian\n"
        "http://mirror.example/security/|bookworm-security|main|Debian-Security\n",
        "bookworm",
    )
    assert found == host.Archive("http://mirror.example/debian/", "http://mirror.example/security/")


def test_other_peoples_archives_for_the_same_codename_are_passed_over() -> None:
    found = host.choose_archive(
        "http://other.example/apt/|bookworm|main|Somebody\n"
        "http://other.example/sec/|bookworm-security|main|Somebody\n"
        "http://mirror.example/debian/|bookworm|main|Debian\n",
        "bookworm",
    )
    assert found == host.Archive("http://mirror.example/debian/", None)


def test_before_the_first_update_the_codename_decides() -> None:
    found = host.choose_archive(
        "http://other.example/apt/|cloud-bookworm|main|$(LABEL)\n"
        "mirror+file:/etc/apt/mirrors/debian.list|bookworm|main|$(LABEL)\n"
        "http://mirror.example/security/|bookworm-security|main|$(LABEL)\n",
        "bookworm",
    )
    assert found == host.Archive("mirror+file:/etc/apt/mirrors/debian.list", "http://mirror.example/security/")


def test_a_machine_that_follows_stable_by_name_has_its_archive_found_by_its_label() -> None:
    found = host.choose_archive("http://mirror.example/debian/|stable|main|Debian\n", "trixie")
    assert found.main == "http://mirror.example/debian/"


@pytest.mark.parametrize(
    "targets", ["", "nonsense\n", "http://mirror.example/debian/|bookworm|contrib|Debian\n", _FOREIGN]
)
def test_no_archive_is_a_sentence_that_says_what_to_do(targets: str) -> None:
    with pytest.raises(GuestError, match="no Debian archive for bookworm; add one"):
        host.choose_archive(targets, "bookworm")


def test_a_failing_program_is_shown_by_the_end_of_its_output() -> None:
    script = "print('\\n'.join(str(n) for n in range(100))); raise SystemExit(3)"
    with pytest.raises(GuestError) as caught:
        host.command([sys.executable, "-c", script], "counting", timeout=30)
    text = str(caught.value)
    assert text.startswith("counting: ")
    assert "exit code 3" in text
    assert text.endswith("\n99")
    assert "\n50\n" not in text


def test_a_program_that_does_not_end_is_ended_at_its_deadline() -> None:
    with pytest.raises(GuestError, match=r"waiting: .* did not end within 0 s"):
        host.command([sys.executable, "-c", "import time; time.sleep(60)"], "waiting", timeout=0.2)


def test_a_missing_program_is_named() -> None:
    with pytest.raises(GuestError, match="this machine has no no-such-program"):
        host.command(["no-such-program"], "trying", timeout=5)
