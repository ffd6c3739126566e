# SPDX-License-Identifier: MIT
"""nbdd-notify and nbdd-open in a session: a screen, a real program that shows notifications, and the rest of it faked.

python -m tests.desktop     writes docs/screenshots from what it sees
"""
