"""The process in which rounds of an attack run: `python -m attacks.child NAME FIRST END SEED`."""

from __future__ import annotations

import json
import sys
from typing import cast

import conftest  # noqa: F401  Triton's interpreter, where there is no GPU

from attacks.attack import Rounds, load


def main(name: str, first: int, end: int, seed: int) -> None:
    """Report each round before it begins and when it is over."""
    attack = cast(Rounds, load(name))
    for at in range(first, end):
        print(json.dumps({"round": at}), flush=True)
        kind, fault = attack.one(at, seed)
        print(json.dumps({"kind": kind, "fault": fault}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
