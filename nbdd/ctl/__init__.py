# SPDX-License-Identifier: MIT
"""The command nbdctl. It calls the service over D-Bus, with the same rights as any other caller."""

import gc

# A command ends before there is anything to collect, and the search for it costs a tenth of the time that imports take.
gc.set_threshold(50_000)
