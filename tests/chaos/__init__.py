# SPDX-License-Identifier: MIT
"""The campaign: filesystems, a database and git on nbdd's devices, while everything around them fails.

    make chaos                                      ten minutes on Debian 13, with a new seed, which is printed
    make chaos GUEST=debian12 MINUTES=60 SEED=7     as long as you like; the same seed makes the same faults again

`campaign.py` runs in a guest: it starts the servers and the loads, plays the faults of a seed, undoes them, and then
compares everything. One JSON object at the end says what was done and what went wrong.
"""
