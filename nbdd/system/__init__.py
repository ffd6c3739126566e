# SPDX-License-Identifier: MIT
"""The system around nbdd: systemd's notifications, the journal, the installation of a wheel."""
