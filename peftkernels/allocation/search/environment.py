"""A Gymnasium environment over rank budgets, for agents that learn where ranks are of use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from peftkernels.allocation.checks import check_smoothing
from peftkernels.allocation.strategies.adalora import AdaLora
from peftkernels.allocation.strategies.group_shares import GroupShares
from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy
from peftkernels.ops.rank_plan import RankState

try:
    import gymnasium
    import numpy as np
except ImportError as error:
    raise ImportError("the environment needs gymnasium: pip install 'peftkernels[rl]'") from error

FineTuning = Callable[[Strategy, int], Iterator[float]]
PER_GROUP = 3
OVERALL = 2
HIGHEST_LOSS_RATIO = 10.0


class WatchedShares(GroupShares):
    """`GroupShares` that keeps what it saw, to be read after the gradients are cleared."""

    def begin(self, statistics: Statistics) -> None:
        super().begin(statistics)
        self.statistics = statistics
        self.step = 0

    def update(self, statistics: Statistics) -> None:
        super().update(statistics)
        self.step += 1
        self.gate_gradients = statistics.gate_gradients


class RankBudgetEnv(gymnasium.Env):
    """One episode is one short fine-tuning; an action moves budget between two groups of modules, or nothing.

        def fine_tuning(strategy, seed):             # a generator: one loss for each optimizer step
            model, batches = make(seed)
            allocator = BudgetAllocator(model, strategy, total_step=200, target_r=4)
            ...
            for batch in batches:
                ...
                optimizer.step()
                yield loss.item()

        env = RankBudgetEnv(fine_tuning)

    Action: Discrete(1 + G·(G-1)): 0 moves nothing, the others are the pairs (from, to) in the order of `arms`.
    Observation: float32 (3·G + 2,): by group its share of the budget, the part of its ranks that is ACTIVE, its part
    of Σ mean |∂e| over the groups, all in [0, 1]; then the budget over what all ranks cost, in [0, 1], and the mean
    loss of the last round over that of the first, in [0, 10] (higher ones are shown as 10).
    Reward: (mean loss of the round before - mean loss of this round) / (budget in use), as the bandit's before it is
    scaled. `reset` plays a first round without a move. An episode ends with the fine-tuning; it is never truncated.

    Making the environment runs the first step of one fine-tuning, to see its modules.

    Args:
        fine_tuning: Called with the strategy to give to the allocator and a seed; everything random must come from the
            seed.
        groups: Shell patterns by name of the group; by default projection types, see `group_modules`.
        inner: Makes the strategy that scores ranks inside a group.
        interval: Optimizer steps of one step of the environment.
        move: Part of the whole budget that one action moves, as far as the group has it.

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise.
        RuntimeError: For a fine-tuning that ends before its first round does.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        fine_tuning: FineTuning,
        groups: Mapping[str, str | Sequence[str]] | None = None,
        *,
        inner: Callable[[], Strategy] = AdaLora,
        interval: int = 5,
        move: float = 0.1,
    ) -> None:
        if not callable(fine_tuning):
            raise TypeError(f"fine_tuning: found {type(fine_tuning).__name__}, expected a function")
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
            raise ValueError(f"interval: found {interval!r}, expected an int of at least 1")
        check_smoothing("move", move)
        self._fine_tuning, self._groups, self._inner = fine_tuning, groups, inner
        self._interval, self._move = interval, move
        self._start(0)
        self._round(1)
        self.labels = list(self._shares.labels)
        self.arms = self._shares.arms
        self.action_space = gymnasium.spaces.Discrete(len(self.arms))
        highest: np.ndarray = np.ones(PER_GROUP * len(self.labels) + OVERALL, dtype=np.float32)
        highest[-1] = HIGHEST_LOSS_RATIO
        self.observation_space = gymnasium.spaces.Box(np.zeros_like(highest), highest, dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a fine-tuning and play its first round without a move."""
        super().reset(seed=seed)
        self._start(int(self.np_random.integers(2**31)))
        self._first = self._loss = self._round(self._interval)
        return self._observation(), self._info()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Make the move and play a round: observation, reward, terminated, truncated (never), info (loss, shares)."""
        if not self.action_space.contains(action):
            raise ValueError(f"action: found {action!r}, expected an int from 0 to {len(self.arms) - 1}")
        pair = self.arms[int(action)]
        if pair is not None:
            self._shares.move(*pair, self._move)
        before = self._loss
        self._loss = self._round(self._interval, before)
        reward = (before - self._loss) / self._budget()
        return self._observation(), reward, self._over, False, self._info()

    def close(self) -> None:
        """End a fine-tuning that is under way."""
        end = getattr(self._steps, "close", None)
        if end is not None:
            end()

    def _start(self, seed: int) -> None:
        if hasattr(self, "_steps"):
            self.close()
        self._shares = WatchedShares(self._inner(), self._groups)
        self._steps = iter(self._fine_tuning(self._shares, seed))
        self._over = False

    def _round(self, steps: int, otherwise: float | None = None) -> float:
        """The mean loss of the next steps; `otherwise` where the fine-tuning has none left."""
        losses: list[float] = []
        while len(losses) < steps and not self._over:
            loss = next(self._steps, None)
            self._over = loss is None
            if loss is not None:
                losses.append(float(loss))
        if not losses and otherwise is None:
            raise RuntimeError("fine_tuning: it ended before its first round, expected at least one loss")
        if not hasattr(self._shares, "statistics"):
            raise RuntimeError("fine_tuning: it gave the strategy to no allocator")
        return sum(losses) / len(losses) if losses else float(otherwise or 0.0)

    def _budget(self) -> float:
        return self._shares.statistics.shares.budget(self._shares.step)

    def _observation(self) -> np.ndarray:
        statistics, index, count = self._shares.statistics, self._shares.group_index, len(self.labels)
        zero = torch.zeros(count, dtype=torch.float64, device=index.device)
        sizes = zero.index_add(0, index, torch.ones_like(index, dtype=torch.float64)).clamp(min=1)
        active = torch.cat([layer.rank_plan.state for layer in statistics.layers]) == RankState.ACTIVE
        wants = zero.index_add(0, index, self._shares.gate_gradients.abs().double()) / sizes
        ratio = min(max(self._loss / self._first, 0.0), HIGHEST_LOSS_RATIO) if self._first > 0 else 1.0
        parts = [
            torch.tensor(list(self._shares.shares.values()), dtype=torch.float64),
            (zero.index_add(0, index, active.double()) / sizes).cpu(),
            (wants / wants.sum().clamp(min=1e-300)).cpu(),
            torch.tensor([self._budget() / self._shares.full_cost, ratio], dtype=torch.float64),
        ]
        return torch.cat(parts).float().clamp(min=0).numpy()

    def _info(self) -> dict[str, Any]:
        return {"loss": self._loss, "shares": self._shares.shares}
