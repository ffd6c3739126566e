# SPDX-License-Identifier: MIT
"""org.nbdd1 as other processes see it: nbdctl, nbdd-metrics, nbdd-notify and nbdd-open."""
