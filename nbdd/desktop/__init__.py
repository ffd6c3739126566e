# SPDX-License-Identifier: MIT
"""For the person at the machine: notifications, and links that open. It runs as that person, and asks over D-Bus."""
