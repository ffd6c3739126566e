# SPDX-License-Identifier: MIT
"""The command nbdctl. It calls the service over D-Bus, with the same rights as any other caller."""
