# SPDX-License-Identifier: MIT
"""What a guest is made of: packages, kernel modules and the few files laid over them.

Only data, and the hash that names an image by it. A change here makes new images.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

RELEASES: dict[str, str] = {"debian12": "bookworm", "debian13": "trixie"}
"""Names of the guests, and the Debian suite each is made of."""

DISK_GIB = 6
"""Size of a guest's root disk; the image is sparse, so this costs nothing until it is written."""

_SYSTEM = (
    "linux-image-amd64 systemd systemd-sysv udev dbus dbus-bin polkitd libpam-systemd udisks2 openssh-server "
    "busybox-static kmod iproute2 nftables procps psmisc lsof strace util-linux-extra ca-certificates "
    "init-system-helpers less libglib2.0-bin jq"
)
_SERVERS = "nbdkit nbd-server nbd-client qemu-utils libnbd-bin"
_STORAGE = "e2fsprogs xfsprogs parted fdisk gdisk dmsetup lvm2 mdadm cryptsetup-bin fio git apparmor"
# The packages that nbdd's own .deb depends on or recommends: a guest has no network to fetch them from.
_PYTHON = "python3 python3-dbus-next python3-sdnotify python3-yaml python3-jsonschema python3-click python3-rich"
_METRICS = "python3-prometheus-client"
# A desktop of small parts, each one that people use: none of it runs before a test starts it.
_DESKTOP = (
    "dbus-user-session xvfb openbox dunst thunar gvfs lxpolkit xdg-utils xdotool fonts-dejavu-core adwaita-icon-theme "
    "librsvg2-common"
)

PACKAGES: tuple[str, ...] = tuple(sorted(f"{_SYSTEM} {_SERVERS} {_STORAGE} {_PYTHON} {_METRICS} {_DESKTOP}".split()))
"""What every guest has."""

# What reads /etc/crypttab left the package systemd after Debian 12.
MORE_PACKAGES: dict[str, tuple[str, ...]] = {"debian12": (), "debian13": ("systemd-cryptsetup",)}
"""What a guest of one release has besides."""

DPKG_OPTIONS: tuple[str, ...] = (
    # A virtual machine's drivers only. The last line that matches a file decides.
    "path-exclude=/lib/modules/*/kernel/drivers/*",
    "path-exclude=/usr/lib/modules/*/kernel/drivers/*",
    *(
        f"path-include={usr}/lib/modules/*/kernel/drivers/{kept}/*"
        for usr in ("", "/usr")
        for kept in ("block", "md", "virtio", "char", "net", "scsi", "firmware", "dax", "acpi", "rtc", "cdrom", "ptp")
    ),
    *(
        f"path-exclude={usr}/lib/modules/*/kernel/{cut}/*"
        for usr in ("", "/usr")
        for cut in (
            "sound",
            "drivers/net/ethernet",
            "drivers/net/wireless",
            "drivers/net/usb",
            "drivers/net/can",
            "drivers/net/fddi",
            "drivers/net/hamradio",
            "drivers/net/arcnet",
            "drivers/net/wwan",
            "drivers/net/phy",
            "drivers/net/dsa",
            "net/bluetooth",
            "net/mac80211",
            "net/wireless",
            "net/can",
            "net/nfc",
            "net/batman-adv",
            "net/ax25",
            "fs/ocfs2",
            "fs/ceph",
            "fs/smb",
            "fs/cifs",
        )
    ),
    "path-exclude=/usr/share/doc/*",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
)

INITRD_MODULES: tuple[str, ...] = ("virtio_pci", "virtio_blk", "virtio_net", "ext4", "crc32c_generic", "crc32c_intel")
"""What stands between a Debian kernel and its disk and network. A kernel may have some built in, or no more."""

# Half a second instead of initramfs-tools' several: nothing is looked for, everything is known. The address is set here
# too: it outlives the change of root, and no service has to be waited for.
INITRD_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
# The kernel hands unknown NAME=VALUE words of its command line to init: `probe=1` only asks whether this runs at all.
if [ -n "$probe" ]; then echo "probe: alive" >/dev/console; /bin/busybox reboot -f; fi
for module in $(/bin/busybox cat /modules/order); do /bin/busybox insmod "/modules/$module"; done
tries=0
until [ -b /dev/vda ]; do
    tries=$((tries + 1))
    [ $tries -lt 600 ] || { echo "initrd: no root disk" >/dev/console; /bin/busybox poweroff -f; }
    /bin/busybox usleep 50000
done
/bin/busybox ip link set lo up
/bin/busybox ip link set eth0 up
/bin/busybox ip address add 10.0.2.15/24 dev eth0
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox umount /dev
exec /bin/busybox switch_root /root /sbin/init
"""

READY_PORT = "ttyS1"
"""The serial port on which a guest says that it can be spoken to. Its driver is in the kernel: nothing can delay it."""

FILES: dict[str, str] = {
    "/etc/fstab": "/dev/vda / ext4 defaults,noatime 0 0\n",
    "/etc/hosts": "127.0.0.1 localhost guest\n::1 localhost ip6-localhost\n",
    "/etc/hostname": "guest\n",
    "/etc/ssh/sshd_config.d/guest.conf": (
        # No PAM, no session of logind's: a command costs a fork, and what it leaves running is left alone.
        "PermitRootLogin prohibit-password\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "UseDNS no\nPrintMotd no\nPrintLastLog no\nX11Forwarding no\nMaxSessions 1000\nMaxStartups 1000\n"
        "HostKey /etc/ssh/ssh_host_ed25519_key\nSetEnv LANG=C.UTF-8\n"
    ),
    "/etc/systemd/system/guest-ready.service": (
        "[Unit]\nDescription=Tell the host that this guest can be spoken to\nAfter=ssh.service dbus.service\n"
        "[Service]\nType=oneshot\nRemainAfterExit=yes\n"
        f"ExecStart=/bin/sh -c 'echo ready >/dev/{READY_PORT}'\n"
        "[Install]\nWantedBy=multi-user.target\n"
    ),
    # The journal outlives a reboot, as the tests of a reboot want to read both.
    "/etc/systemd/journald.conf.d/guest.conf": "[Journal]\nStorage=persistent\nSyncIntervalSec=2s\nRateLimitBurst=0\n",
    "/etc/systemd/system.conf.d/guest.conf": "[Manager]\nDefaultTimeoutStopSec=30s\nShowStatus=no\n",
    # Drivers that udev would load for what QEMU's board says it has.
    "/etc/modprobe.d/guest.conf": "".join(
        f"blacklist {name}\n"
        for name in (
            *("floppy", "kvm", "kvm_amd", "button", "qemu_fw_cfg", "ghash_clmulni_intel", "aesni_intel"),
            *("crct10dif_pclmul", "crc32_pclmul", "sha1_ssse3", "sha256_ssse3", "sha512_ssse3"),
        )
    ),
    "/etc/apt/apt.conf.d/50guest": 'APT::Periodic::Enable "0";\n',
}

MASKED: tuple[str, ...] = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer"),
    *("e2scrub_reap.service", "fstrim.timer", "man-db.timer", "logrotate.timer", "mdcheck_start.timer"),
    *(
        "mdcheck_continue.timer",
        "mdmonitor-oneshot.timer",
        "xfs_scrub_all.timer",
        "systemd-networkd-wait-online.service",
    ),
    *("systemd-pstore.service", "systemd-timesyncd.service", "getty@tty1.service", "serial-getty@ttyS0.service"),
    *("getty.target", "nbd-server.service", "networking.service", "keyboard-setup.service", "console-setup.service"),
    *("systemd-boot-random-seed.service", "systemd-hwdb-update.service", "nbd-client.service", "rc-local.service"),
    *("sys-kernel-debug.mount", "sys-kernel-tracing.mount", "dev-hugepages.mount", "dev-mqueue.mount"),
    *("systemd-network-generator.service", "systemd-networkd.service", "systemd-networkd.socket"),
    *("dm-event.service", "dm-event.socket", "apparmor.service"),
    *("systemd-networkd-persistent-storage.service", "lvm2-monitor.service", "systemd-binfmt.service"),
    *("proc-sys-fs-binfmt_misc.automount", "sys-fs-fuse-connections.mount", "sys-kernel-config.mount"),
    *("modprobe@drm.service", "modprobe@configfs.service", "modprobe@fuse.service", "systemd-sysext.socket"),
    *("systemd-udev-load-credentials.service", "systemd-creds.socket", "sshd-unix-local.socket"),
    *("systemd-update-utmp-runlevel.service", "systemd-update-utmp.service", "run-lock.mount"),
    *("ldconfig.service", "systemd-tpm2-setup.service", "systemd-tpm2-setup-early.service", "ssh.socket"),
)
"""Units that a guest starts in vain, and servers that a test starts itself."""

ENABLED: tuple[str, ...] = ("ssh.service", "guest-ready.service")

DEFAULT_TARGET = "multi-user.target"
"""UDisks belongs to the graphical one: here the first to call it over D-Bus starts it."""

USER = "visitor"
"""An ordinary user, member of no group but its own."""

KERNEL_COMMAND_LINE = (
    "root=/dev/vda rw rootfstype=ext4 console=ttyS0 quiet loglevel=5 mitigations=off edd=off nokaslr audit=0 "
    "net.ifnames=0 random.trust_cpu=on 8250.nr_uarts=2 fsck.mode=skip panic=10 cryptomgr.notests systemd.ssh_auto=no "
    # On a busy host an emulated processor may not run for seconds: that is no fault of the guest's kernel.
    "no_timer_check nosoftlockup rcupdate.rcu_cpu_stall_suppress=1 "
    # QEMU translates a program again for each address it is loaded to: if each start has other addresses, `true` takes
    # 28 ms instead of 11, a command over ssh 103 ms instead of 39. And Debian's kernel clears each page it gives out.
    "norandmaps init_on_alloc=0"
)
"""No part of the recipe's digest: it belongs to a boot. Kernel warnings show on the console (loglevel 5)."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides what one release's image holds."""

    release: str
    """`debian12` or `debian13`."""
    suite: str
    """The Debian suite, such as `trixie`."""

    @property
    def packages(self) -> tuple[str, ...]:
        """What is installed, besides what Debian cannot do without."""
        return (*PACKAGES, *MORE_PACKAGES.get(self.release, ()))

    @property
    def digest(self) -> str:
        """Twelve hex digits that change with the recipe; the mirror's day is no part of it."""
        parts = [self.release, self.suite, DISK_GIB, self.packages, DPKG_OPTIONS, INITRD_MODULES, INITRD_INIT, FILES]
        text = json.dumps([*parts, MASKED, ENABLED, DEFAULT_TARGET, USER], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def recipe(release: str) -> Recipe:
    """Return the recipe of one release, or raise `KeyError`."""
    return Recipe(release, RELEASES[release])
