# SPDX-License-Identifier: MIT
"""nbdctl, the command of nbdd. It speaks to the service over D-Bus and knows nothing that others could not ask, too."""
