"""The certainty that all processes decide alike: a digest of what an allocator decided, compared between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from peftkernels.allocation import BudgetAllocator
from peftkernels.allocation.layers.sharding import all_gather

KINDS = ("mask", "gate", "score")
SHOWN = 6


def check_agreement(
    allocator: BudgetAllocator, group: dist.ProcessGroup | None = None, kinds: Sequence[str] = KINDS
) -> None:
    """Compare masks, gates and scores between the processes of `group`, all of which must call it.

    Every process sends one 64-bit digest for each layer and kind and receives those of the others: one all-gather and
    one read from the device, so it is not free on every step of a fast run. A digest changes with any single element
    that changes; two different layers have the same by chance once in 2⁶⁴.

    Args:
        allocator: each process's own.
        group: the processes, all of them by default.
        kinds: some of "mask", which ranks the last decision kept and the state of every rank; "gate", lora_E to the
            bit; "score", the scores of the last decision to the bit, nothing before the first.

    Raises:
        RuntimeError: they differ; on every process, with the same message: the step, which process differs from the
            majority (from the first where there is none), in which layers and in what.
        ValueError: an unknown kind.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"kinds: found {unknown[0]!r}, expected some of {', '.join(KINDS)}")
    own = torch.cat([torch.tensor([allocator.steps], device=allocator.masks.device), *_digests(allocator, kinds)])
    processes = dist.get_world_size(group)
    gathered = torch.empty(processes * own.numel(), dtype=torch.int64, device=own.device)
    all_gather(gathered, own, group)
    rows: list[list[int]] = gathered.view(processes, -1).tolist()
    if any(row != rows[0] for row in rows):
        raise RuntimeError(_described(rows, list(allocator.masks.ranks), kinds))


class DivergenceCheck:
    """A callback that compares all processes after every `every` steps: `allocator.add_callback(DivergenceCheck(50))`.

    Processes that start alike and average their gradients stay alike; a loss that only one of them gave to a strategy,
    costs measured by each for itself, a gradient that was not averaged or a broken device make them drift apart, which
    no loss curve shows. Every process must have the callback. A call raises what `check_agreement` raises.

    Args:
        every: steps between two comparisons, at least 1.
        group: the processes, all of them by default.

    Raises:
        TypeError, ValueError: `every` is no int, or below 1.
    """

    def __init__(self, every: int = 1, group: dist.ProcessGroup | None = None) -> None:
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"every: found {every!r} ({type(every).__name__}), expected an int")
        if every < 1:
            raise ValueError(f"every: found {every}, expected at least 1")
        self.every = every
        self.group = group

    def __call__(self, allocator: BudgetAllocator) -> None:
        if allocator.steps % self.every == 0:
            check_agreement(allocator, self.group)


@torch.no_grad()
def _digests(allocator: BudgetAllocator, kinds: Sequence[str]) -> list[Tensor]:
    """One digest for each layer, int64 (n,), for each of the kinds."""
    masks = allocator.masks
    vectors = {}
    if "mask" in kinds:
        states = torch.cat([plan.state for plan in masks.plans()]).to(torch.int64)
        vectors["mask"] = 2 * states + masks.keep
    if "gate" in kinds:
        vectors["gate"] = torch.cat([_bits(gate) for gate in masks.fresh_gates()])
    if "score" in kinds:
        none_yet = torch.zeros_like(masks.keep, dtype=torch.int64)
        vectors["score"] = none_yet if allocator.decision is None else _bits(allocator.decision.scores)
    total = masks.keep.numel()
    # Odd factors: a change of one element always changes the sum, which wraps around at 2⁶⁴.
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (total,), generator=generator).mul_(2).add_(1).to(masks.device)
    sizes = torch.tensor(list(masks.ranks.values()), device=masks.device)
    layer_of_rank = torch.arange(len(sizes), device=masks.device).repeat_interleave(sizes, output_size=total)
    none = torch.zeros(len(sizes), dtype=torch.int64, device=masks.device)
    return [none.index_add(0, layer_of_rank, vectors[kind] * factors) for kind in kinds]


def _bits(values: Tensor) -> Tensor:
    """The bits of floating-point numbers as int64, flat."""
    same_width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.detach().reshape(-1).view(same_width).to(torch.int64)


def _described(rows: Sequence[Sequence[int]], names: Sequence[str], kinds: Sequence[str]) -> str:
    steps = [row[0] for row in rows]
    if len(set(steps)) > 1:
        found = ", ".join(f"process {process} at step {step}" for process, step in enumerate(steps))
        return f"the processes are not at the same step: found {found}"
    differing: dict[tuple[int, str], list[str]] = {}
    for column in range(1, len(rows[0])):
        values = [row[column] for row in rows]
        # The first of the most frequent ones; of two processes either may be wrong.
        common = Counter(values).most_common(1)[0][0]
        kind, layer = divmod(column - 1, len(names))
        for process, value in enumerate(values):
            if value != common:
                differing.setdefault((process, names[layer]), []).append(kinds[kind])
    reference = "process 0" if len(rows) == 2 else "most others"
    places = [
        f"process {process} differs from {reference} in {_joined(what)} of {name!r}"
        for (process, name), what in differing.items()
    ]
    more = f"; and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return f"step {steps[0]}: the processes have diverged: {'; '.join(places[:SHOWN])}{more}"


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
