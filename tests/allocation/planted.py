"""A planted target: a frozen net, and a teacher that differs from it by low-rank matrices of known, uneven ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftkernels.allocation import Budget, BudgetAllocator, Strategy
from peftkernels.nn import AdaLoRALinear

TRUE_RANKS = (0, 1, 3, 5)
INITIAL_RANK = 6
WIDTH = 24
# Stated, so that the problem does not change with the layers' default; the learning rates below go with it.
ALPHA = 8


class Net(nn.Module):
    """h ← h + tanh(layer_i(h)): every layer sees the input, whatever the others do, so ranks cannot move to others."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return h


@dataclass
class Planted:
    """A student with gated layers of `initial_ranks`, and the teacher it is to become.

    true_ranks  rank of the teacher's W - W_frozen, layer by layer, all singular values equal to `size`
    """

    true_ranks: Sequence[int] = TRUE_RANKS
    initial_ranks: Sequence[int] | None = None
    width: int = WIDTH
    size: float = 1.0
    seed: int = 0
    student: Net = field(init=False)
    teacher: Net = field(init=False)

    def __post_init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            ranks = self.initial_ranks or [INITIAL_RANK] * len(self.true_ranks)
            frozen = [nn.Linear(self.width, self.width) for _ in self.true_ranks]
            taught = []
            for linear, rank in zip(frozen, self.true_ranks, strict=True):
                left, right = (torch.linalg.qr(torch.randn(self.width, self.width)).Q[:, :rank] for _ in range(2))
                teacher = nn.Linear(self.width, self.width)
                teacher.load_state_dict(linear.state_dict())
                teacher.weight.data += self.size * left @ right.T
                taught.append(teacher)
            self.teacher = Net(taught).requires_grad_(False)
            gated = [AdaLoRALinear.from_linear(linear, rank, ALPHA) for linear, rank in zip(frozen, ranks, strict=True)]
            self.student = Net(gated)

    @property
    def total(self) -> int:
        """The true ranks together."""
        return sum(self.true_ranks)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.student.parameters() if parameter.requires_grad]

    def batches(self, steps: int, rows: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        """x and teacher(x), the same for every run."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        for _ in range(steps):
            x = torch.randn(rows, self.width, generator=generator)
            yield x, self.teacher(x)


def train(
    problem: Planted,
    allocator: BudgetAllocator,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    each: Callable[[int, float], None] | None = None,
) -> list[float]:
    """One optimizer step on the squared error for each batch; returns the losses."""
    losses = []
    for step, (x, target) in enumerate(problem.batches(steps), 1):
        loss = (problem.student(x) - target).square().mean()
        loss.backward()
        allocator.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if each is not None:
            each(step, losses[-1])
    return losses


def ranks_found(
    strategy: Strategy, problem: Planted | None = None, *, steps: int = 300, learning_rate: float = 2e-2
) -> list[int]:
    """Ranks that a strategy leaves in each layer, its budget being the sum of the true ones."""
    problem = problem or Planted()
    allocator = BudgetAllocator(
        problem.student,
        strategy,
        total_step=steps,
        budget=Budget(problem.total),
        tinit=steps // 5,
        tfinal=steps // 5,
        exact_budget=True,
    )
    optimizer = torch.optim.AdamW(problem.parameters, lr=learning_rate, weight_decay=0.0)
    allocator.attach(optimizer)
    train(problem, allocator, optimizer, steps)
    return [sum(kept) for kept in allocator.rank_pattern().values()]
