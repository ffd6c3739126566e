# SPDX-License-Identifier: MIT
"""Metrics of nbdd for Prometheus, as a program of its own: the daemon loads nothing of it.

`gather` asks the running nbdd, as any caller may; `families` makes metrics of the answer; `server` and `textfile`
deliver them. docs/metrics.md is the reference.
"""
