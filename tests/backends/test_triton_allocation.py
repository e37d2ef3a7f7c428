"""How the allocation kernels in Triton are called: launches, tables, captures, and what is refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from support.allocation_calls import (
    BETA1,
    BETA2,
    Averages,
    assert_same,
    averages_of,
    counted,
)
from torch import nn

from peftkernels import RankPlan, RankState
from peftkernels.allocation import BudgetAllocator
from peftkernels.allocation.strategies import Magnitude
from peftkernels.backends.registry import kernels_for
from peftkernels.backends.triton import allocation
from peftkernels.backends.triton.allocation.addresses import Addresses
from peftkernels.nn import AdaLoRALinear


@pytest.fixture
def device(triton_device: torch.device) -> torch.device:
    return triton_device


def test_a_step_takes_seven_launches(device: torch.device, seed: int) -> None:
    """Whatever the number of layers; setting the flag of the check is a launch of the library."""
    for layers in ("r12", "odd"):
        drawn = averages_of(layers, device, seed)
        layout, kernels = drawn.layout, allocation.kernels()
        both = drawn.copies()
        gates, lora_A, lora_B = (drawn.parameters[kind::3] for kind in (2, 0, 1))
        plans = [RankPlan.from_mask(torch.ones(r, dtype=torch.bool, device=device)) for r in layout.ranks]
        with counted() as names:
            kernels.update_averages(layout, drawn.parameters, drawn.gradients(), *both, BETA1, BETA2)
            keep, _ = kernels.select(kernels.rank_scores(layout, *both), layout.total_rank // 2, False)
            kernels.apply(layout, keep, gates, plans, int(RankState.PROBE))
            kernels.orthogonality(lora_A, lora_B, 0.5, None, [torch.zeros_like(each) for each in (*lora_A, *lora_B)])
        assert names == [
            "check_finite", "update_averages", "add_parts", "keep_above_threshold", "write_masks", "gram_matrices",
            "add_gradients",
        ]  # fmt: skip


def _every_call(drawn: Averages, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each function that reads tables of addresses, on one object."""
    kernels, layout = allocation.kernels(), drawn.layout
    gradients = drawn.gradients()
    plans = [RankPlan.from_mask(torch.ones(r, dtype=torch.bool, device=device)) for r in layout.ranks]
    keep = torch.ones(layout.total_rank, dtype=torch.bool, device=device)
    averages = (drawn.sensitivity, drawn.uncertainty)
    lora_A, lora_B, gates = (drawn.parameters[kind::3] for kind in range(3))
    return {
        "update_averages": lambda: kernels.update_averages(
            layout, drawn.parameters, gradients, *averages, BETA1, BETA2
        ),
        "apply": lambda: kernels.apply(layout, keep, gates, plans, int(RankState.PROBE)),
        "orthogonality": lambda: kernels.orthogonality(lora_A, lora_B, 0.5),
    }


def test_tables_are_sent_once_while_tensors_stay(
    device: torch.device, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = averages_of("odd", device, seed)
    calls = _every_call(drawn, device)
    for call in calls.values():
        call()
    for name in ("addresses", "parts", "term", "implementation"):
        module = f"peftkernels.backends.triton.allocation.{name}.sent"
        monkeypatch.setattr(module, lambda *_: pytest.fail("a table was sent again"))
    for call in calls.values():
        call()
    drawn.parameters[0] = drawn.parameters[0].clone()
    with pytest.raises(pytest.fail.Exception, match="sent again"):
        calls["update_averages"]()


def test_an_allocator_sends_the_tables_of_its_term_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way the term is asked for, and however often."""
    layers = {name: AdaLoRALinear.from_linear(nn.Linear(6, 5), 3).to(device) for name in ("first", "second")}
    allocator = BudgetAllocator(layers, Magnitude(), total_step=9, target_r=1, orth_reg_weight=0.5, impl="triton")
    transfers = []
    for name in ("addresses", "parts", "term", "implementation"):
        module = f"peftkernels.backends.triton.allocation.{name}"
        send = importlib.import_module(module).sent
        monkeypatch.setattr(f"{module}.sent", lambda *given, send=send: transfers.append(given) or send(*given))
    term = allocator.regularization()
    term.backward()
    assert transfers
    transfers.clear()
    for _ in range(2):
        assert torch.equal(allocator.regularization(), term)
    assert not transfers
    allocator.add_regularization_gradient()
    transfers.clear()
    allocator.regularization()
    allocator.add_regularization_gradient()
    assert not transfers


def test_a_capture_needs_tensors_that_stay(device: torch.device, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table cannot be sent while a graph is captured: the first call, and tensors that moved, are refused."""
    folder = "peftkernels.backends.triton.allocation"
    modules = [f"{folder}.{name}.capturing" for name in ("smoothing", "implementation", "term")]

    def capture(yes: bool) -> None:
        for module in modules:
            monkeypatch.setattr(module, lambda device: yes)

    drawn = averages_of("odd", device, seed)
    calls = _every_call(drawn, device)
    capture(True)
    for call in calls.values():
        with pytest.raises(RuntimeError, match="make one call"):
            call()
    capture(False)
    for call in calls.values():
        call()
    capture(True)
    for call in calls.values():
        call()
    drawn.parameters[0] = drawn.parameters[0].clone()
    with pytest.raises(RuntimeError, match="the parameters lora_A, lora_B, lora_E lie elsewhere than in the last call"):
        calls["update_averages"]()


def test_a_graph_keeps_the_table_that_it_reads(device: torch.device) -> None:
    """Addresses that a graph was captured with stay in memory, and a later call has another table."""
    addresses = Addresses("tensors", lambda tensors: None)
    first, second = torch.ones(3, device=device), torch.ones(3, device=device)
    assert addresses.update([first], device, False)
    captured = addresses.table
    assert not addresses.update([first], device, True)
    assert addresses.update([second], device, False)
    assert captured.tolist() == [first.data_ptr()] and addresses.table.tolist() == [second.data_ptr()]
    assert any(kept is captured for kept in addresses.kept)


def test_what_does_not_fit_is_refused_before_any_launch(device: torch.device, seed: int) -> None:
    drawn = averages_of("odd", device, seed)
    kernels, layout, gradients = allocation.kernels(), drawn.layout, drawn.gradients()
    averages = drawn.copies()
    rates = (BETA1, BETA2)
    with counted() as names:
        # What was refused once is not known for that.
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"sensitivity: found torch.float64 \(\d+,\), expected contiguous torch.f"
            ):
                kernels.update_averages(layout, drawn.parameters, gradients, averages[0].double(), averages[1], *rates)
            with pytest.raises(ValueError, match="parameters: found 8 tensors, expected 9"):
                kernels.update_averages(layout, drawn.parameters[1:], gradients, *averages, *rates)
            doubled = [drawn.parameters[0].double(), *drawn.parameters[1:]]
            with pytest.raises(ValueError, match=r"parameters\[0\]: found torch.float64 \(1, 7\), expected float32, "):
                kernels.update_averages(layout, doubled, gradients, *averages, *rates)
            with pytest.raises(TypeError, match=r"scores: found torch.float64 \(3,\), expected float32"):
                kernels.select(torch.ones(3, dtype=torch.float64, device=device), 1, False)
            with pytest.raises(
                TypeError, match=r"lora_B\[0\]: found torch.float64, expected float32, float16 or bfloat16"
            ):
                kernels.orthogonality([drawn.parameters[0]], [drawn.parameters[1].double()], 0.5)
            targets = [torch.zeros(1, 7, device=device), torch.zeros(9, 2, device=device)]
            with pytest.raises(
                ValueError, match=r"add_to\[1\]: found torch.float32 \(9, 2\), expected torch.float32 \(9"
            ):
                kernels.orthogonality(drawn.parameters[:1], drawn.parameters[1:2], 0.5, None, targets)
            plans = [RankPlan.from_mask(torch.ones(r + 1, dtype=torch.bool, device=device)) for r in layout.ranks]
            keep = torch.ones(layout.total_rank, dtype=torch.bool, device=device)
            with pytest.raises(
                ValueError, match="layer 0: found a gate of 1 numbers and a plan of 2 ranks, expected 1"
            ):
                kernels.apply(layout, keep, drawn.parameters[2::3], plans, 1)
    assert not names
    assert_same(averages, (drawn.sensitivity, drawn.uncertainty))


def test_a_named_implementation_is_served_or_refused(device: torch.device) -> None:
    assert kernels_for(device, torch.float32, "triton").name == "triton"
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: averages are torch.float64"):
        kernels_for(device, torch.float64, "triton")
    elsewhere = torch.device("meta")
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: averages are on meta"):
        kernels_for(elsewhere, torch.float32, "triton")
    # Interpreted kernels are for tests: nobody gets them who did not ask.
    assert (kernels_for(device, torch.float32).name == "triton") is (device.type == "cuda")
