"""The search itself: Optuna's ask and tell over a storage that survives, and that several workers may share."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkernels.allocation.search.space import BudgetSpace, Candidate

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("tpe", "gp", "nsga2", "random")
DIRECTIONS = ("maximize", "minimize")
_WORKER = "worker"
_SEEDS_PER_WORKER = 1_000_003
Report = Callable[[int, float], None]


class Pruned(Exception):
    """Raised by `report` inside an objective: this candidate is not worth going on with."""


@dataclass(frozen=True)
class Asked:
    """A candidate to try, and its number in the search."""

    number: int
    candidate: Candidate


@dataclass(frozen=True)
class Finished:
    """A candidate that was tried: its number in the search, and the objective's values."""

    number: int
    candidate: Candidate
    values: tuple[float, ...]


class BudgetSearch:
    """Bayesian search over budgets, or a search for the Pareto front of several objectives.

        def objective(candidate, report):                 # one fine-tuning
            model, allocator = build(candidate)
            for step in range(total_step):
                train_step(model, allocator)
                if step % 50 == 0:
                    report(step, validation_accuracy(model))   # raises Pruned where it is not worth going on
            return validation_accuracy(model)

        search = BudgetSearch(BudgetSpace(), storage="search.log")
        search.run(objective, trials=40)
        print(search.best)

    Args:
        space: What may be chosen.
        storage: A file for Optuna's journal, or the URL of a database it knows ("sqlite:///search.db"); None keeps the
            search in memory. A search that was killed goes on from its storage, and several processes or machines may
            work on one storage at a time.
        name: The study's name in the storage.
        directions: "maximize" or "minimize", one for each value of the objective. Several make a search for the front.
        sampler: "tpe" (Bergstra et al., NeurIPS 2011), "gp" (Gaussian process), "nsga2" (Deb et al., 2002) or "random";
            "tpe" by default, "nsga2" for several objectives.
        pruner: An `optuna.pruners` object; by default the median rule after 5 whole trials, for one objective.
        seed: Of the sampler. A trial's choice depends on the seed, its number and the trials finished before it, so a
            single worker that is killed and started again makes the same choices.
        worker: Which of the workers on one storage this is: each needs a number of its own, or two that ask at the same
            time draw the same candidate.

    Raises:
        ImportError: Without Optuna (`pip install 'peftkernels[search]'`).
        ValueError: Naming the argument.
    """

    def __init__(
        self,
        space: BudgetSpace,
        *,
        storage: str | Path | None = None,
        name: str = "budgets",
        directions: tuple[str, ...] = ("maximize",),
        sampler: str | None = None,
        pruner: optuna.pruners.BasePruner | None = None,
        seed: int = 0,
        worker: int = 0,
    ) -> None:
        optuna = _optuna()
        if not directions or any(direction not in DIRECTIONS for direction in directions):
            raise ValueError(f"directions: found {directions!r}, expected one or more of {', '.join(DIRECTIONS)}")
        sampler = sampler or ("tpe" if len(directions) == 1 else "nsga2")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: found {sampler!r}, expected one of {', '.join(SAMPLERS)}")
        if sampler == "gp" and len(directions) > 1:
            raise ValueError("sampler: found 'gp' with several directions, expected 'nsga2', 'tpe' or 'random'")
        if pruner is not None and len(directions) > 1:
            raise ValueError("pruner: found one with several directions, which Optuna cannot prune by; expected None")
        self.space = space
        self.directions = directions
        self._sampler = sampler
        self._seed = seed + _SEEDS_PER_WORKER * worker
        self._study = optuna.create_study(
            storage=_storage(storage),
            study_name=name,
            directions=list(directions),
            pruner=pruner or optuna.pruners.MedianPruner(n_startup_trials=5),
            load_if_exists=True,
        )
        known = tuple(direction.name.lower() for direction in self._study.directions)
        if known != directions:
            raise ValueError(f"directions: found {directions!r}, expected those of the stored search, {known!r}")

    def run(self, objective: Callable[[Candidate, Report], float | tuple[float, ...]], *, trials: int) -> None:
        """Try candidates until the search has `trials` of them that were finished or pruned, by whichever worker.

        objective: candidate and `report(step, value)` to value, or to one value for each direction. A candidate that is
        drawn again is not tried again: it has its values. An exception other
        than `Pruned` ends this worker; the trial counts as failed and is tried anew by the next worker to start, as are
        those of workers of this machine that are gone.
        """
        if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
            raise ValueError(f"trials: found {trials!r}, expected a whole number of at least 1")
        self._take_up_abandoned()
        states = _optuna().trial.TrialState
        while self._counted() < trials:
            trial, candidate = self._ask()
            known = next((each.values for each in self.finished if each.candidate == candidate), None)
            if known is not None:
                self._study.tell(trial, known)
                continue
            try:
                values = objective(candidate, self._reporter(trial))
            except Pruned:
                self._study.tell(trial, state=states.PRUNED)
            except BaseException:
                self._study.tell(trial, state=states.FAIL)
                raise
            else:
                self._study.tell(trial, values)

    def ask(self, count: int = 1) -> list[Asked]:
        """Return candidates for a loop of your own, such as one that trains several at a time; see `tell`.

        Those of one call do not know of each other's values.

        Raises:
            ValueError: For a count below 1.
        """
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"count: found {count!r}, expected a whole number of at least 1")
        asked = [self._ask() for _ in range(count)]
        return [Asked(trial.number, candidate) for trial, candidate in asked]

    def tell(self, number: int, *values: float) -> None:
        """Take what came of a candidate.

        Args:
            number: The number that `ask` gave it.
            *values: The objective's values, one for each direction.

        Raises:
            ValueError: For another number of values.
        """
        if len(values) != len(self.directions):
            raise ValueError(f"values: found {len(values)}, expected {len(self.directions)}, one for each direction")
        self._study.tell(number, list(values))

    @property
    def study(self) -> optuna.Study:
        """The Optuna study, for its plots and everything else it offers."""
        return self._study

    @property
    def finished(self) -> list[Finished]:
        """All candidates that were tried to their end, in the order of their numbers."""
        complete = (_optuna().trial.TrialState.COMPLETE,)
        return [self._finished(trial) for trial in self._study.get_trials(states=complete)]

    @property
    def best(self) -> Finished:
        """The best candidate so far.

        Raises:
            ValueError: Before the first has finished, and for several directions.
        """
        if len(self.directions) > 1:
            raise ValueError("best: the search has several directions and so no single best; expected front")
        return self._finished(self._study.best_trial)

    @property
    def front(self) -> list[Finished]:
        """The candidates that no other beats in one direction without losing in another, best first by the first; of
        those with equal values the one tried first."""
        found = sorted((self._finished(trial) for trial in self._study.best_trials), key=lambda each: -each.number)
        first = {each.values: each for each in found}
        sign = -1 if self.directions[0] == "maximize" else 1
        return sorted(first.values(), key=lambda each: (sign * each.values[0], each.number))

    def _ask(self) -> tuple[optuna.Trial, Candidate]:
        self._study.sampler = self._make_sampler(self._seed + len(self._study.get_trials(deepcopy=False)))
        trial = self._study.ask()
        trial.set_user_attr(_WORKER, f"{socket.gethostname()}:{os.getpid()}")
        return trial, self.space.draw(trial)

    def _reporter(self, trial: optuna.Trial) -> Report:
        def report(step: int, value: float) -> None:
            if len(self.directions) > 1:
                return
            trial.report(value, step)
            if trial.should_prune():
                raise Pruned(f"trial {trial.number} at step {step}")

        return report

    def _counted(self) -> int:
        """Trials that are done or being made: a worker stops when the last ones are in others' hands."""
        states = _optuna().trial.TrialState
        return len(self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED, states.RUNNING)))

    def _take_up_abandoned(self) -> None:
        states = _optuna().trial.TrialState
        host = socket.gethostname()
        trials = self._study.get_trials(states=(states.RUNNING, states.FAIL, states.WAITING))
        taken_up = {trial.user_attrs.get("again") for trial in self._study.get_trials(deepcopy=False)}
        for trial in trials:
            if trial.state == states.RUNNING:
                worker_host, _, pid = str(trial.user_attrs.get(_WORKER, ":")).rpartition(":")
                if worker_host != host or _is_running(int(pid or 0)):
                    continue
                self._study.tell(trial.number, state=states.FAIL)
            elif trial.state == states.WAITING:
                continue
            if trial.number not in taken_up and trial.params:
                self._study.enqueue_trial(trial.params, user_attrs={"again": trial.number})

    def _make_sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        samplers = _optuna().samplers
        made: optuna.samplers.BaseSampler = {
            "tpe": lambda: samplers.TPESampler(seed=seed, multivariate=True),
            "gp": lambda: samplers.GPSampler(seed=seed),
            "nsga2": lambda: samplers.NSGAIISampler(seed=seed, population_size=12),
            "random": lambda: samplers.RandomSampler(seed=seed),
        }[self._sampler]()
        return made

    def _finished(self, trial: optuna.trial.FrozenTrial) -> Finished:
        return Finished(trial.number, self.space.candidate(trial.params), tuple(trial.values))


def cost_of_ranks(pattern: Mapping[str, list[bool]], costs: Mapping[str, float]) -> float:
    """Return what the ranks cost that a pattern keeps: an objective to minimise beside the accuracy.

    Args:
        pattern: What `BudgetAllocator.rank_pattern` gave.
        costs: The cost of one rank by layer.
    """
    return sum(sum(kept) * costs[name] for name, kept in pattern.items())


def _is_running(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _storage(storage: str | Path | None) -> Any:
    if storage is None or (isinstance(storage, str) and "://" in storage):
        return storage
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "a search over budgets needs Optuna, which is not installed: pip install 'peftkernels[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
