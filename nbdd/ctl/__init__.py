# SPDX-License-Identifier: MIT
"""nbdctl, the command of nbdd. It speaks to the service over D-Bus and knows nothing that others could not ask, too."""

import gc

# A command ends before there is anything to collect, and the search for it costs a tenth of the time that imports take.
gc.set_threshold(50_000)
