# SPDX-License-Identifier: MIT
"""Every example of the manual pages works as it is printed, in a guest where storage.example is a server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.lab import Lab
from tests.system.seat import Seat
from tests.system.test_remote import CLEAN_UP, PREPARE

PAGES = Path(__file__).parents[2] / "man"

BEFORE = {
    "nbdctl detach backup --wait 30": "systemd-run -q sh -c 'sleep 2; umount /mnt'",
    "nbdctl import > /etc/nbdd/devices.d/nbdtab.yaml": "echo 'nbd3 storage.example other' >/etc/nbdtab",
    "busctl call org.nbdd1 /org/nbdd1 org.nbdd1.Manager Attach 'sa{sv}' backup 0": "nbdctl detach --if-needed copy",
}
"""What a reader has done, or others do, when it comes to a line."""

MAKE = """
cp -a /etc/nbdd/nbdd.yaml /root/nbdd.yaml
mkdir -p /root/examples && cd /root/examples && truncate -s 64M backup photos
mkfs.ext4 -qF backup; mkfs.ext4 -qF -L photos photos
echo '127.0.0.1 storage.example' >>/etc/hosts
"""
UNMAKE = """
mv /root/nbdd.yaml /etc/nbdd/nbdd.yaml
umount /mnt /srv/backup 2>/dev/null
sed -i '/storage.example/d' /etc/hosts; sed -i '/by-nbd/d' /etc/fstab; systemctl daemon-reload
rm -rf /root/examples /etc/nbdtab /usr/local/bin/xdg-open; systemctl stop udisks2
"""


def examples(page: str) -> list[str]:
    """The blocks of a page's section EXAMPLES, as a reader sees them."""
    text = (PAGES / page).read_text().split("\n.Sh EXAMPLES\n")[1].split("\n.Sh ")[0]
    blocks = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed$|^\.Dl (.*?\n)", text + "\n", re.MULTILINE | re.DOTALL)
    return [(block or line).replace("\\e", "\\").replace("\\-", "-").replace("\\&", "") for block, line in blocks]


def lines(block: str) -> list[str]:
    """Its commands; one that goes on in the next line is one."""
    return block.replace("\\\n", " ").splitlines()


@pytest.fixture
def example(lab: Lab) -> Iterator[Lab]:
    """A guest in which storage.example exports `backup` and `photos`, and is reached over ssh, too."""
    lab.guest.run(MAKE + PREPARE.replace("Host far", "Host far storage.example"))
    try:
        server = "nbdkit -f -i 127.0.0.1 -p 10809 file dir=/root/examples"
        lab.serve(server, "nbd://storage.example/", ready="ss -ltnH sport = :10809 | grep -q .")
        yield lab
    finally:
        lab.guest.run(f"nbdctl detach --if-needed backup; {UNMAKE}{CLEAN_UP}", check=False, timeout=180)


@pytest.mark.quick_on("debian12")
def test_examples_of_the_manual_pages_work_as_printed(example: Lab) -> None:
    lab, guest = example, example.guest
    seen = {page.name for page in PAGES.glob("*.[158]") if "\n.Sh EXAMPLES\n" in page.read_text()}
    assert seen == {"nbdctl.1", "nbdd-notify.1", "nbdd-open.1", "nbdd.8", "nbdd.yaml.5", "org.nbdd1.5"}

    [definitions] = examples("nbdd.yaml.5")
    guest.write("/etc/nbdd/nbdd.yaml", definitions)
    guest.run("nbdd --check && systemctl reload nbdd")
    # "attach: boot" tries from the reload on; the other two servers are nowhere.
    lab.wait_for("backup", "State", 's "attached"')
    lab.detach("backup")

    for block in examples("nbdctl.1") + examples("org.nbdd1.5"):
        for line in lines(block):
            guest.run(f"{BEFORE.get(line, ':')}; {line}", timeout=180)
    assert lab.device("copy")["ReadOnly"] is True
    assert {"backup", "mirror", "image", "nbd3"} <= set(lab.devices())
    for name in ("copy", "backup"):
        lab.detach(name)

    check, journal, fstab = examples("nbdd.8")
    guest.run(check.strip())
    assert "backup: attached -> detaching" in guest.run(journal.strip()).stdout
    guest.run(f"mkdir -p /srv/backup; echo '{fstab.strip()}' >>/etc/fstab; systemctl daemon-reload")
    guest.run("systemctl start srv-backup.mount && mountpoint /srv/backup", timeout=180)
    guest.run("systemctl stop srv-backup.mount nbdd-attach@backup", timeout=180)
    assert lab.device("backup")["State"] == "detached"

    # Of a desktop, with somebody at it.
    guest.write("/usr/local/bin/xdg-open", "#!/bin/sh\n", 0o755)
    [click] = examples("nbdd-open.1")
    for line in lines(click):
        guest.run(f"systemctl start udisks2; {line.replace('/eve/', '/root/')}", timeout=180)
    assert "photos" not in lab.devices()
    [mask] = examples("nbdd-notify.1")
    Seat(lab).run(f"{mask.strip()} && systemctl --user unmask nbdd-notify")
