"""CUDA graphs of forward and backward, and a hot path that never makes the host wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.cases import TRAINABLE, Call, make_call
from support.implementations import served
from torch import Tensor

from peftkernels import lora_linear

pytestmark = pytest.mark.gpu

SHAPES: dict[str, dict[str, Any]] = {"one_row": {"leading": (1,)}, "many_tiles": {"leading": (777,)}}
in_every_shape = pytest.mark.parametrize("shape", SHAPES)


def _call(seed: int, shape: str, device: torch.device) -> Call:
    (dtype, *_) = served("triton", ("bf16-fp32_factors", "fp16-fp32_factors"))
    call = make_call(
        seed, n=1040, k=528, r=21, plan=True, scaling="tensor", dropout_p=0.25, dtype=dtype, **SHAPES[shape]
    )
    return call.on(device)


def _step(call: Call, **changes: object) -> Callable[[], list[Tensor]]:
    """Forward and backward: y and the gradients of all that is trained."""
    leaves = {name: value.detach().requires_grad_(name in TRAINABLE) for name, value in call.tensors().items()}
    keywords = {**call.optional, "bias": leaves["bias"], "gate": leaves["gate"], **changes}

    def step() -> list[Tensor]:
        y = lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], impl="triton", **keywords)
        gradients = torch.autograd.grad(y, [leaves[name] for name in TRAINABLE], call.grad_y)
        return [y.detach(), *gradients]

    return step


def _captured(step: Callable[[], list[Tensor]], device: torch.device) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of `step`, after three runs on a side stream, as PyTorch's documentation has it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def _states(seed: int, r: int, device: torch.device) -> Iterator[Tensor]:
    """All ACTIVE, all DEAD, all PROBE, then mixtures."""
    generator = torch.Generator().manual_seed(seed)
    for value in (2, 0, 1):
        yield torch.full((r,), value, dtype=torch.uint8, device=device)
    for _ in range(4):
        yield torch.randint(3, (r,), generator=generator, dtype=torch.uint8).to(device)


def _assert_same(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    for name, one, other in zip(("y", *TRAINABLE), found, expected, strict=True):
        assert torch.equal(one, other), f"{what}: {name} differs"


@in_every_shape
def test_a_replay_uses_the_new_masks(device: torch.device, shape: str, seed: int) -> None:
    """The plan is updated between replays; an eager call under the new plan is the yardstick."""
    call = _call(seed, shape, device)
    assert call.rank_plan is not None
    step = _step(call)
    graph, results = _captured(step, device)
    for state in _states(seed, call.r, device):
        call.rank_plan.update_(state)
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        _assert_same(results, step(), f"{call.label}, states {state.tolist()}")


@in_every_shape
def test_the_update_itself_is_captured(device: torch.device, shape: str, seed: int) -> None:
    call = _call(seed, shape, device)
    plan = call.rank_plan
    assert plan is not None
    coming = plan.state.clone()
    step = _step(call)

    def updated() -> list[Tensor]:
        plan.update_(coming)
        return step()

    graph, results = _captured(updated, device)
    for state in _states(seed, call.r, device):
        coming.copy_(state)
        graph.replay()
        assert torch.equal(plan.state, state)
        _assert_same(results, step(), f"{call.label}, states {state.tolist()}")


@in_every_shape
def test_a_replay_reads_new_inputs(device: torch.device, shape: str, seed: int) -> None:
    call, other = _call(seed, shape, device), _call(seed + 1, shape, device)
    step = _step(call)
    graph, results = _captured(step, device)
    for name, value in {**call.tensors(), "grad_y": call.grad_y}.items():
        value.copy_(getattr(other, name))
    graph.replay()
    _assert_same(results, step(), call.label)


def test_every_replay_draws_another_mask(device: torch.device, seed: int) -> None:
    """Seeds drawn inside the graph: backward drops what forward dropped, and each replay drops something else."""
    identity = torch.eye(64, device=device)
    x = torch.ones(40, 64, device=device, requires_grad=True)

    def step() -> list[Tensor]:
        y = lora_linear(x, torch.zeros_like(identity), identity, identity, dropout_p=0.5, impl="triton")
        (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return [y.detach(), grad_x]

    torch.cuda.manual_seed(seed)
    graph, (y, grad_x) = _captured(step, device)
    masks = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(y, grad_x)
        assert 0.4 < float((y == 0).float().mean()) < 0.6
        masks.append(y.clone())
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_noticed(device: torch.device) -> None:
    """The mode does what the tests below rely on."""
    value = torch.ones((), device=device)
    with _waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


@in_every_shape
@pytest.mark.parametrize("drawn", [False, True], ids=["seed_given", "seed_drawn"])
def test_the_host_never_waits(device: torch.device, shape: str, drawn: bool, seed: int) -> None:
    """Plan, scaling tensor and dropout, forward and backward, after the kernels were compiled."""
    call = _call(seed, shape, device)
    assert call.rank_plan is not None
    step = _step(call, dropout_seed=None if drawn else call.dropout_seed)
    step()
    state = call.rank_plan.state.flip(0)
    torch.cuda.synchronize(device)
    with _waiting_is_an_error():
        call.rank_plan.update_(state)
        step()
