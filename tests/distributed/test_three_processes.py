"""Three processes: rows that do not divide evenly, processes without any, and sums of three parts."""

from __future__ import annotations

import pytest
import torch
from processes import Processes
from runs import run_whole


@pytest.mark.parametrize("how", ["fsdp2", "hook", "replicated"])
def test_three_processes_decide_as_one(three: Processes, how: str) -> None:
    one = run_whole(0, "one", 1, clip=False, compact=True)
    records = three.run(run_whole, how, processes=3, clip=False, compact=True)
    for record in records:
        assert record.masks == one.masks
        for name, expected in one.factors.items():
            assert torch.equal(record.factors[name], records[0].factors[name]), name
            torch.testing.assert_close(record.factors[name], expected, rtol=1e-9, atol=1e-12)
