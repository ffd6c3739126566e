# SPDX-License-Identifier: MIT
"""What nbdd serves on the system bus, in the daemon's process."""
