# SPDX-License-Identifier: MIT
"""What is wanted: YAML files and options of calls, read into frozen `Definition`s."""
