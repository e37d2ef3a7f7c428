"""Each contestant's training on a tiny encoder: its budget, what it starts from, what it leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.batches import collate
from demo.compare import contestants, trial
from demo.compare.budget_run import BudgetRun
from demo.compare.contestants import BASELINE, CONTESTANTS, Earlier
from demo.compare.settings import VALIDATION, Setting, Trial
from demo.options import Options
from peftkernels.allocation.policies.freezing import LayerFreezing
from peftkernels.allocation.policies.learning_rate import LearningRateScale
from peftkernels.allocation.search import Candidate

MATRICES = 12  # six linear modules in each of two layers
CANDIDATE = Candidate(6, 48.0, 2, 0.2, 0.25, 3, 1e-2, {"attention": 0.5, "mlp": 2.0})


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """Trainings set the number of threads of the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small(tiny_model: Path, tiny_data: Path) -> Options:
    return Options(steps=12, batch_size=16, max_tokens=16, quick=True, model=tiny_model, data=tiny_data)


def test_a_budget_in_parameters_is_used_up(small: Options) -> None:
    """The knapsack fills what the same rank in every module has, to less than one rank."""
    outcome = trial.run_trial(Trial("knapsack", 0, Setting(3e-3, 2.0, 2, 1)), Earlier(), small, 6, 0.1)
    head = 32 * 3 + 3
    widths = 2 * (4 * (32 + 32) + 2 * (32 + 64))
    used = outcome["live_parameters"] - head
    assert 2 * (widths + MATRICES) - (32 + 64 + 1) < used <= 2 * (widths + MATRICES)
    ranks = outcome["live_ranks_by_module"].items()
    assert used == sum(live * (65 if "attention" in name else 97) for name, live in ranks)


@pytest.fixture(scope="module")
def ended_with(small: Options) -> dict[str, int]:
    """The ranks that a training of AdaLoRA ends with."""
    outcome = trial.run_trial(Trial("adalora", 1000, Setting(1e-2, 8.0, 2, 1)), Earlier(), small, 6, 0.1)
    return dict(outcome["live_ranks_by_module"])


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_spends_the_same_budget(small: Options, ended_with: dict[str, int], name: str) -> None:
    setting = Setting.of(CANDIDATE) if CONTESTANTS[name].search else Setting(1e-2, 8.0, 2, 1)
    earlier = Earlier(ended_with if CONTESTANTS[name].learns_from else None, setting.candidate)
    outcome = trial.run_trial(Trial(name, 0, setting), earlier, small, 6, 0.1)
    assert outcome["live_ranks"] == sum(outcome["live_ranks_by_module"].values())
    assert CONTESTANTS[name].unit == "parameters" or outcome["live_ranks"] == 2 * MATRICES
    assert outcome["total_ranks"] == (6 if CONTESTANTS[name].budgeted else 2) * MATRICES
    assert len(outcome["losses"]) == 12 and 0 <= outcome["accuracy"] <= 1
    assert outcome["losses"][-1] < outcome["losses"][0]


def test_the_prior_starts_from_the_ranks_it_is_given(small: Options, ended_with: dict[str, int]) -> None:
    """Whatever the scores say: with ranks in one module alone, it keeps most of its own there."""
    only = next(iter(ended_with))
    skewed = {name: 6 if name == only else 0 for name in ended_with}
    wanted = Trial("prior", 0, Setting(1e-2, 8.0, 2, 1))
    by_ranks = {}
    for title, ranks in (("own", ended_with), ("skewed", skewed)):
        outcome = trial.run_trial(wanted, Earlier(ranks), small, 6, 0.1)
        by_ranks[title] = outcome["live_ranks_by_module"]
    assert by_ranks["skewed"][only] == 6 > by_ranks["own"][only]
    with pytest.raises(ValueError, match="prior: found no ranks of an earlier training, expected those of adalora"):
        trial.run_trial(wanted, Earlier(), small, 6, 0.1)


def test_a_candidate_decides_schedule_and_groups(small: Options) -> None:
    prepared = trial.prepared_for(small)
    setting = Setting.of(CANDIDATE)
    assert setting == Setting(1e-2, 8.0, 2, 3, CANDIDATE)
    run = CONTESTANTS["search"].build(trial.start_for(prepared, setting, 6, 0.1), Earlier(candidate=CANDIDATE))
    assert isinstance(run, BudgetRun)
    settings = run.allocator.settings
    assert (settings.total_step, settings.tinit, settings.tfinal, settings.deltaT) == (12, 2, 3, 3)
    for indices in prepared.order:
        run.step(collate(prepared.training, indices))
    kept = {"attention": 0, "mlp": 0}
    for module, own in run.ranks().items():
        kept["attention" if "attention" in module else "mlp"] += sum(own)
    # Eight modules with a weight of a half and four with one of two share 24 ranks.
    assert kept == {"attention": 8, "mlp": 16}
    moved = setting.at(target_rank=1, delta_t=5)
    assert moved.candidate is not None and (moved.candidate.target_r, moved.candidate.deltaT) == (1, 5)
    assert Trial("search", 0, moved).key != Trial("search", 0, setting).key
    other = Setting.of(replace(CANDIDATE, tinit=0.1))
    assert Trial("search", 0, other).key != Trial("search", 0, setting).key


def test_policies_are_part_of_a_runs_state(small: Options) -> None:
    prepared = trial.prepared_for(small)
    start = trial.start_for(prepared, Setting(1e-2, 8.0, 2, 1), 6, 0.1)
    for name, kind in (("freezing", LayerFreezing), ("rate-scale", LearningRateScale)):
        run, other = (CONTESTANTS[name].build(start, Earlier()) for _ in range(2))
        for indices in prepared.order[:6]:
            run.step(collate(prepared.training, indices))
        other.load_state_dict(copy.deepcopy(run.state_dict()))
        states = []
        for each in (run, other):
            assert isinstance(each, BudgetRun)
            (policy,) = each.policies
            assert isinstance(policy, kind)
            each.step(collate(prepared.training, prepared.order[6]))
            states.append(str(policy.state_dict()))
        assert states[0] == states[1]
        assert name == "freezing" or set(policy.current.values()) != {1.0}


def test_another_budget_is_an_error(small: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = CONTESTANTS[BASELINE]

    def wasteful(start: Any, earlier: Earlier) -> Any:
        return fixed.build(replace(start, recipe=replace(start.recipe, lora_rank=3)), earlier)

    monkeypatch.setitem(contestants.CONTESTANTS, BASELINE, replace(fixed, build=wasteful))
    with pytest.raises(RuntimeError, match=r"ended with 36 ACTIVE ranks, expected the budget, 24"):
        trial.run_trial(Trial(BASELINE, 0, Setting(1e-2, 8.0, 2, 1)), Earlier(), small, 6, 0.1)


def test_validation_texts_come_from_the_training_texts(small: Options) -> None:
    prepared = trial.prepared_for(replace(small, seed=1000))
    rest, held_out = trial.carve(prepared.training, 1000)
    assert len(held_out) == round(0.2 * len(prepared.training)) and len(rest) + len(held_out) == len(prepared.training)
    texts = sorted(zip(prepared.training.ids, prepared.training.classes, strict=True))
    assert (
        sorted([*zip(rest.ids, rest.classes, strict=True), *zip(held_out.ids, held_out.classes, strict=True)]) == texts
    )
    wanted = Trial(BASELINE, 1000, Setting(1e-2, 8.0, 2, 1), VALIDATION)
    outcome = trial.run_trial(wanted, Earlier(), small, 6, 0.1)
    assert outcome["texts"] == {"training": len(rest), "held_out": len(held_out)}
