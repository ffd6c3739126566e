# SPDX-License-Identifier: MIT
"""For a desktop: notifications, and links that open. Runs as the user of the session, as a caller on D-Bus."""
