"""Allocation by a bandit: budget moves between groups of modules, and moves that lower the loss are made again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkernels.allocation.checks import check_smoothing
from peftkernels.allocation.strategies.group_shares import GroupShares
from peftkernels.allocation.strategies.statistics import Statistics
from peftkernels.allocation.strategies.strategy import Strategy

RULES = ("ucb1", "exp3")
# How much of the deviation of earlier improvements counts for the mean and the spread of rewards.
MEMORY = 0.9


class Bandit(GroupShares):
    """Each group of modules has a share of the budget; every `interval` steps a bandit moves some of it, or nothing.

    Arms are the moves "from group g to group h", where g has something to give, and "none". After a round of `interval`
    steps, the reward of its arm is

        improvement = (mean loss of the round before - mean loss of the round) / (budget)
        reward = clip(1/2 + (improvement - m)/(4·d), 0, 1)

    with m and d the running mean and deviation of improvements, since the loss of a fine-tuning falls by itself, and
    the rules want rewards in [0, 1]. A move with a reward below 1/2, after which the loss fell less than it usually
    does, is taken back.

    - "ucb1": the arm with the highest mean reward + √(2·ln n/n_a), each once before (Auer, Cesa-Bianchi, Fischer,
      Finite-time Analysis of the Multiarmed Bandit Problem, Machine Learning 47, 2002). On planted targets the more
      reliable of the two
    - "exp3": arm a with p_a = (1-γ)·w_a/Σw + γ/K;  w_a ← w_a·exp(γ·(reward - 1/2)/(p_a·K)) for the arm that was played
      (Auer, Cesa-Bianchi, Freund, Schapire, The Nonstochastic Multiarmed Bandit Problem, SIAM J. Comput. 32, 2002, but
      for the 1/2, which lowers the variance of the weights). Made for rewards that change from round to round, as they
      do here: every move changes what the next one is worth

    Rounds are played while the budget is below what all ranks cost. Reads the loss on the host in every step, so a step
    cannot be captured in a CUDA graph.

    Args:
        inner: Scores the ranks of a group; `Uniform` leaves all learning to the bandit.
        groups: As `GroupShares` has them, whose way of keeping ranks by shares this is.
        rule: "ucb1" or "exp3".
        interval: Steps of a round.
        amount: Part of the whole budget that one move takes, as far as the group has it.
        gamma: The γ of "exp3", between 0 and 1.
        seed: Seed of the draws of "exp3".

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise.
        RuntimeError: In a step without a loss: give it to `BudgetAllocator.observe`.
    """

    name = "bandit"

    def __init__(
        self,
        inner: Strategy,
        groups: Mapping[str, str | Sequence[str]] | None = None,
        *,
        rule: str = "ucb1",
        interval: int = 4,
        amount: float = 0.05,
        gamma: float = 0.3,
        seed: int = 0,
    ) -> None:
        super().__init__(inner, groups)
        if rule not in RULES:
            raise ValueError(f"rule: found {rule!r}, expected one of {', '.join(RULES)}")
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
            raise ValueError(f"interval: found {interval!r}, expected an int of at least 1")
        check_smoothing("amount", amount)
        check_smoothing("gamma", gamma)
        self.rule, self.interval, self.amount, self.gamma, self.seed = rule, interval, amount, gamma, seed
        self.needs_loss = True

    def begin(self, statistics: Statistics) -> None:
        super().begin(statistics)
        self._generator = torch.Generator().manual_seed(self.seed)
        count = len(self.arms)
        self._state = {
            "log_weights": torch.zeros(count, dtype=torch.float64),
            "plays": torch.zeros(count, dtype=torch.float64),
            "rewards": torch.zeros(count, dtype=torch.float64),
            # Mean, squared deviation and number of the improvements seen.
            "improvements": torch.zeros(3, dtype=torch.float64),
            # Sum and number of the losses of this round, and the mean loss of the last one.
            "losses": torch.tensor([0.0, 0.0, math.nan], dtype=torch.float64),
            # The arm that is played, what it was drawn with, and what it moved.
            "arm": torch.zeros((), dtype=torch.int64),
            "probability": torch.ones((), dtype=torch.float64),
            "moved": torch.zeros((), dtype=torch.float64),
        }

    def update(self, statistics: Statistics) -> None:
        super().update(statistics)
        if statistics.loss is None:
            raise RuntimeError("the bandit found no loss: call allocator.observe(loss) before optimizer.step()")
        state = self._state
        budget = statistics.shares.budget(statistics.step)
        loss = float(statistics.loss)
        if budget >= self.full_cost or not math.isfinite(loss) or not statistics.finite:
            return
        state["losses"][0] += loss
        state["losses"][1] += 1
        if int(state["losses"][1]) == self.interval:
            self._end_round(budget)

    def _end_round(self, budget: float) -> None:
        state = self._state
        mean = float(state["losses"][0] / state["losses"][1])
        before = float(state["losses"][2])
        state["losses"].copy_(torch.tensor([0.0, 0.0, mean]))
        if not math.isnan(before):
            self._learn(self._reward((before - mean) / budget))
        arm, probability = self._choose()
        state["arm"].fill_(arm)
        state["probability"].fill_(probability)
        pair = self.arms[arm]
        state["moved"].fill_(0.0 if pair is None else self.move(*pair, self.amount))

    def _reward(self, improvement: float) -> float:
        mean, square, seen = self._state["improvements"].tolist()
        reward = 0.5
        if seen > 1 and square > 0:
            reward = min(1.0, max(0.0, 0.5 + (improvement - mean) / (4 * math.sqrt(square))))
        weight = max(1 - MEMORY, 1 / (seen + 1))
        away = improvement - mean
        mean += weight * away
        square += weight * (away * (improvement - mean) - square)
        self._state["improvements"].copy_(torch.tensor([mean, square, seen + 1]))
        return reward

    def _learn(self, reward: float) -> None:
        state, arm = self._state, int(self._state["arm"])
        state["plays"][arm] += 1
        state["rewards"][arm] += reward
        state["log_weights"][arm] += self.gamma * (reward - 0.5) / (float(state["probability"]) * len(self.arms))
        pair = self.arms[arm]
        if pair is not None and reward < 0.5:
            giver, taker = pair
            self.move(taker, giver, float(state["moved"]))

    def _choose(self) -> tuple[int, float]:
        """The next arm and its probability, of those that would move something: the others are asleep."""
        state = self._state
        awake = torch.tensor([pair is None or self.has_to_give(pair[0]) for pair in self.arms])
        if self.rule == "ucb1":
            plays = state["plays"]
            unplayed = torch.nonzero((plays == 0) & awake).flatten()
            if unplayed.numel():
                return int(unplayed[0]), 1.0
            bounds = state["rewards"] / plays + (2 * plays.sum().log() / plays).sqrt()
            return int(torch.where(awake, bounds, -torch.inf).argmax()), 1.0
        weights = torch.where(awake, state["log_weights"], -torch.inf)
        probabilities = (1 - self.gamma) * torch.softmax(weights, 0) + self.gamma * awake / int(awake.sum())
        arm = int(torch.multinomial(probabilities, 1, generator=self._generator))
        return arm, float(probabilities[arm])

    def tensors(self) -> Mapping[str, Tensor]:
        return {**super().tensors(), **self._state, "generator": self._generator.get_state()}

    def load(self, tensors: Mapping[str, Tensor], statistics: Statistics) -> None:
        super().load(tensors, statistics)
        for name, tensor in self._state.items():
            tensor.copy_(tensors[name])
        self._generator.set_state(tensors["generator"].cpu())

    def facts(self) -> dict[str, Any]:
        own = {
            "rule": self.rule,
            "interval": self.interval,
            "amount": self.amount,
            "gamma": self.gamma,
            "seed": self.seed,
        }
        return {**own, **super().facts()}
