"""Results on the device are checked against float64 before a speed is printed.

The rule is that of `bench/verify.py`. Gradients of the factors and the gate sum over all rows and are compared whole;
y and ∂x of large cases are compared in the first and last rows and in others drawn anew in each run, and have to be
finite everywhere. Meanwhile what `torch.empty` returns is filled with NaN, so that an element that nobody writes shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bench import data, lineup
from bench.gpu.layer import DeviceLayer
from bench.verify import SEED, Results, WrongResultError, check, check_peer, differentiated, fused, plain
from peftkernels.ops import reference

# Multiply-adds from which on y and ∂x are compared in a sample of their rows, and how many rows that are.
LARGE_PRODUCT = 2**36
SAMPLED_ROWS, EDGE_ROWS = 512, 16
_BY_ROW = ("y", "∂x")


def verify(bench: DeviceLayer) -> None:
    """Check every contestant of a case; raises WrongResultError."""
    case = bench.case
    rows = sampled_rows(case.M, case.M * case.N * case.K)
    exact = oracle(bench, case.dropout, rows)
    typed = _at(plain(bench, bench.adapter, case.dropout), rows)
    with poisoned_allocations():
        found = fused(bench, bench.adapter, case.dropout, bench.impl)
    _check(bench, lineup.OURS, found, typed, exact, rows)
    if case.dropout:
        # The library draws its own masks: without dropout they all compute the same.
        exact, typed = oracle(bench, 0.0, rows), _at(plain(bench, bench.adapter, 0.0), rows)
    own = bench.adapter.copy(case.trains)
    with poisoned_allocations():
        found = differentiated(bench, own, bench.floor(own, 0.0))
    if case.live < 100:
        # Every rank is multiplied, and the gates of DEAD ranks get gradients that nobody asked for.
        exact = {name: value for name, value in exact.items() if name != "∂gate"}
    _check(bench, lineup.FLOOR, found, typed, exact, rows)
    if case.dropout:
        return
    for name, contestant in bench.contestants.items():
        if name.startswith("peft "):
            with torch.no_grad():
                check_peer(case, name, contestant.call(bench.inputs[0])[rows], exact["y"])


def sampled_rows(count: int, products: int) -> Tensor:
    """Numbers of the rows that are compared, in order: all of them below LARGE_PRODUCT multiply-adds."""
    if products < LARGE_PRODUCT or count <= SAMPLED_ROWS:
        return torch.arange(count)
    inner = torch.randperm(count - 2 * EDGE_ROWS)[: SAMPLED_ROWS - 2 * EDGE_ROWS] + EDGE_ROWS
    return torch.cat([torch.arange(EDGE_ROWS), inner.sort().values, torch.arange(count - EDGE_ROWS, count)])


def _at(results: Results, rows: Tensor) -> Results:
    return {name: value[rows] if name in _BY_ROW else value for name, value in results.items()}


def _check(bench: DeviceLayer, name: str, found: Results, typed: Results, exact: Results, rows: Tensor) -> None:
    for what in _BY_ROW:
        if what in exact and not found[what].isfinite().all():
            raise WrongResultError(
                f"{bench.case.id}: {name}: {what} is wrong: it holds elements that are not finite, or that nobody "
                "wrote; nothing was timed"
            )
    check(bench.case, name, _at(found, rows), typed, exact)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Let torch fill what `torch.empty` returns, at::empty of C++ included, with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # Operators without a deterministic form are what they are; the filling is what this is for.
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=only_warned)


def oracle(bench: DeviceLayer, dropout: float, rows: Tensor) -> Results:
    """`reference.py`'s formulas in float64: y and ∂x at `rows`, every gradient of the adapter over all rows."""
    adapter, device = bench.adapter, bench.weight.device
    x, weight = bench.inputs[0].double(), bench.weight.double()
    lora_A, lora_B = adapter.lora_A.double(), adapter.lora_B.double()
    state = torch.full((lora_A.shape[0],), 2, device=device) if adapter.plan is None else adapter.plan.state
    gates = torch.ones_like(lora_A[:, 0]) if adapter.gate is None else adapter.gate.double()
    # Exactly what is ACTIVE reaches y; the gate's gradient is that of every live rank.
    factors = (gates * data.SCALING).where(state == 2, 0)
    factor = None
    if dropout:
        factor = reference.dropout_factor(torch.tensor(SEED, device=device), dropout, *x.shape)
    shrink = (x if factor is None else x * factor) @ lora_A.T
    y = x[rows] @ weight.T + (shrink[rows] * factors) @ lora_B.T
    if bench.bias is not None:
        y = y + bench.bias.double()
    if not bench.case.trains:
        return {"y": y}
    grads = bench.grads[0].double()
    expanded = grads @ lora_B
    gated = expanded * factors
    share = gated[rows] @ lora_A
    found = {
        "y": y,
        "∂x": grads[rows] @ weight + (share if factor is None else share * factor[rows]),
        "∂lora_A": gated.T @ (x if factor is None else x * factor),
        "∂lora_B": grads.T @ (shrink * factors),
    }
    if adapter.gate is not None:
        found["∂gate"] = ((shrink * expanded).sum(0) * data.SCALING).where(state > 0, 0)
    return found
