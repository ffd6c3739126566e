# SPDX-License-Identifier: MIT
"""How processes of nbdd live and speak with each other."""
