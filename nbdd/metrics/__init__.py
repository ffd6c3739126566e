# SPDX-License-Identifier: MIT
"""What nbdd tells, for Prometheus: gathered over the bus, written as metrics, served or put into a file.

`gather` asks the running nbdd, as any caller may; `families` makes metrics of the answer; `server` and `textfile` are
the ways out. docs/metrics.md is the reference. It is a program of its own, so the daemon carries nothing of it.
"""
