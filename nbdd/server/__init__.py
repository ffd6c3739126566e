# SPDX-License-Identifier: MIT
"""To an NBD server: connect, negotiate, compare what it has with what the device has."""
