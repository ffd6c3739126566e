# SPDX-License-Identifier: MIT
"""nbdd's negotiation held against the servers that people run, with nbdinfo as the second opinion."""
