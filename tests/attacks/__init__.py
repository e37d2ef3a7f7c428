"""Attacks on the package: many random wrong or hostile uses of one kind, each of which must raise or be right.

An attack is a module with

    NAME         as the command line and the table of docs/attacks.md call it
    TITLE        what is tried, in words
    SHORT, LONG  rounds in `make test`, and on demand
    run          (rounds, seed) -> `Counts`

and stands in `ATTACKS`. `make attacks` runs them on demand.
"""

from __future__ import annotations

ATTACKS = ("public-calls", "raw-operators", "lifetimes", "threads", "memory-limits", "kills")
