# SPDX-License-Identifier: MIT
"""The kernel's side of a device: generic netlink, sysfs, udev. The only place that knows /dev/nbdX."""
