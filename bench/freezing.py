"""`python -m bench.freezing`: the time of a training step with a frozen prefix over that of one without, paired."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
from torch import nn

from peftkernels.allocation import BudgetAllocator
from peftkernels.allocation.strategies import Magnitude
from peftkernels.cli.timing import Effort, interleave, spread
from peftkernels.nn import AdaLoRALinear

RANK = 16


class Steps:
    """Training steps of equal nets of which the first layers are frozen, by contestant."""

    baseline = "none frozen"

    def __init__(self, width: int, depth: int, rows: int, prefixes: list[int]) -> None:
        self.contestants: Mapping[str, object] = {
            self.baseline if count == 0 else f"first {count} of {depth} frozen": _step(width, depth, rows, count)
            for count in prefixes
        }

    def prepare(self, name: str) -> None:
        """Nothing is left from the turn before."""

    def turn(self, name: str, first: int, repeats: int) -> None:
        step: Callable[[], None] = self.contestants[name]  # type: ignore[assignment]
        for _ in range(repeats):
            step()


def _step(width: int, depth: int, rows: int, frozen: int) -> Callable[[], None]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [AdaLoRALinear.from_linear(nn.Linear(width, width), RANK), nn.Tanh()]
    model = nn.Sequential(*layers)
    allocator = BudgetAllocator(model, Magnitude(), total_step=10**9, target_r=RANK // 2, tinit=10**9 - 2)
    for name in list(allocator.layers)[:frozen]:
        allocator.freeze(name)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    x, target = torch.randn(rows, width), torch.randn(rows, width)

    def step() -> None:
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()

    return step


def main() -> None:
    """Print the median of ratios within a round, and their quartiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    prefixes = sorted({0, options.depth // 4, options.depth // 2, 3 * options.depth // 4})
    bench = Steps(options.width, options.depth, options.rows, prefixes)
    samples = interleave(bench, Effort(options.seconds, 10, 3 * options.seconds))
    for name in bench.contestants:
        ratios = spread(samples.ratios(name, bench.baseline))
        milliseconds = spread(samples.times(name)).median * 1e3
        print(f"{name}: {milliseconds:.1f} ms, {ratios.median:.2f} ({ratios.p25:.2f}-{ratios.p75:.2f})")
    print(
        f"{options.depth} layers of {options.width}x{options.width}, {options.rows} rows, r = {RANK}, fp32, "
        f"{torch.get_num_threads()} threads; {len(samples.rounds)} rounds, {samples.discarded} disturbed ones left out"
        + ("; most rounds were disturbed: not to be relied on" if samples.disturbed else "")
    )


if __name__ == "__main__":
    main()
