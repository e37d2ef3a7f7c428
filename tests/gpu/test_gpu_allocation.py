"""AdaLoRA's allocator on a GPU: beside HF peft's, in CUDA graphs, without waiting, and how long a step takes."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkernels import RankPlan
from peftkernels.allocation import AdaLoraAllocator

pytestmark = pytest.mark.gpu

FACTORS = ("lora_A", "lora_B", "lora_E")
STEPS = 200
# (K, N): widths that end inside of tiles, and one that comes four at a time.
WIDTHS = ((200, 136), (515, 97), (1024, 260))


Layers = dict[str, SimpleNamespace]


def _layers(widths: tuple[tuple[int, int], ...], r: int, device: torch.device) -> Layers:
    """What an allocator needs of layers: frozen weights take no part."""
    layers = {}
    for place, (k, n) in enumerate(widths):
        shapes = {"lora_A": (r, k), "lora_B": (n, r), "lora_E": (r, 1)}
        factors = {name: nn.Parameter(torch.randn(shape, device=device) * 0.02) for name, shape in shapes.items()}
        plan = RankPlan.from_mask(torch.ones(r, dtype=torch.bool, device=device))
        layers[f"layer{place}"] = SimpleNamespace(**factors, rank_plan=plan)
    return layers


def _factors(layers: Layers) -> list[Tensor]:
    return [getattr(layer, factor) for layer in layers.values() for factor in FACTORS]


def _draw(layers: Layers) -> None:
    """Parameters move and get gradients, in place."""
    with torch.no_grad():
        for factor in _factors(layers):
            if factor.grad is None:
                factor.grad = torch.empty_like(factor)
            factor.grad.normal_().mul_(1e-2)
            factor.sub_(factor.grad, alpha=0.3)


def _allocator(layers: Layers, **changes: Any) -> AdaLoraAllocator:
    return AdaLoraAllocator(layers, **{"total_step": STEPS, "target_r": 3, "tfinal": 20, "impl": "triton", **changes})


@pytest.mark.parametrize("delta", [1, 7])
def test_200_steps_keep_the_ranks_that_peft_keeps(device: torch.device, delta: int, seed: int) -> None:
    """From identical parameters and gradients: masks and gates after every step, averages to the bit."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    layers = _layers(WIDTHS, 8, device)
    linears = nn.ModuleDict({name: nn.Linear(k, n, bias=False) for name, (k, n) in zip(layers, WIDTHS, strict=True)})
    config = peft.AdaLoraConfig(
        init_r=8, target_r=3, total_step=STEPS, tfinal=20, deltaT=delta, target_modules=list(layers)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a model without a configuration
        theirs = peft.get_peft_model(linears.to(device), config).base_model
    allocator = _allocator(layers, deltaT=delta)
    for step in range(1, STEPS + 1):
        _draw(layers)
        for name, layer in layers.items():
            for factor in FACTORS:
                own, other = getattr(layer, factor), getattr(theirs.model[name], factor)["default"]
                other.data.copy_(own)
                other.grad = own.grad.clone()
        allocator.step()
        theirs.update_and_allocate(step)
        pattern = theirs.peft_config["default"].rank_pattern
        if pattern is not None:
            assert allocator.rank_pattern() == {name: pattern[f"{name}.lora_E.default"] for name in layers}, step
        saved = allocator.state_dict()
        for name, layer in layers.items():
            assert torch.equal(layer.lora_E, theirs.model[name].lora_E["default"]), (step, name)
            for factor in FACTORS if f"strategy.sensitivity.{name}.lora_A" in saved else ():
                key = f"{name}.{factor}"
                own = saved[f"strategy.sensitivity.{key}"], saved[f"strategy.uncertainty.{key}"]
                ranks = theirs.rankallocator
                their_own = ranks.exp_avg_ipt[f"{key}.default"], ranks.exp_avg_unc[f"{key}.default"]
                assert all(map(torch.equal, own, their_own)), (step, key)


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _step(allocator: AdaLoraAllocator) -> Callable[[], None]:
    def step() -> None:
        allocator.add_regularization_gradient()
        allocator.step()

    return step


@pytest.mark.parametrize("capturable", [False, True])
def test_the_host_never_waits(device: torch.device, capturable: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layers = _layers(WIDTHS, 12, device)
    step = _step(_allocator(layers, capturable=capturable))
    _draw(layers)
    step()
    torch.cuda.synchronize(device)
    with _waiting_is_an_error():
        for _ in range(3):
            _draw(layers)
            step()
        # Gradients that lie elsewhere: their addresses are sent again.
        for factor in _factors(layers):
            factor.grad = factor.detach() * 1e-2
        step()


def test_a_graph_replays_the_steps_of_a_schedule(device: torch.device, seed: int) -> None:
    """Replayed beside an allocator that runs step by step: same bits of factors, gradients and averages, same masks."""
    results: list[list[Tensor]] = []
    for captured in (False, True):
        torch.manual_seed(seed)
        layers = _layers(WIDTHS, 12, device)
        allocator = _allocator(layers, capturable=True)
        step = _step(allocator)
        graph = torch.cuda.CUDAGraph()
        replay = step
        for number in range(40):
            _draw(layers)
            if captured and number == 3:
                with torch.cuda.graph(graph):
                    step()
                replay = graph.replay
            replay()
        saved = [value for value in allocator.state_dict().values() if isinstance(value, Tensor)]
        plans = [getattr(layer.rank_plan, name) for layer in layers.values() for name in ("state", "order", "counts")]
        gradients = [factor.grad for factor in _factors(layers)]
        results.append([*_factors(layers), *gradients, *saved, *plans])
    for place, (one, other) in enumerate(zip(*results, strict=True)):
        assert torch.equal(one, other), place


def test_gradients_that_moved_are_refused_in_a_capture(device: torch.device, seed: int) -> None:
    torch.manual_seed(seed)
    layers = _layers(WIDTHS, 12, device)
    allocator = _allocator(layers, capturable=True)
    _draw(layers)
    allocator.step()
    for factor in _factors(layers):
        factor.grad = factor.detach().clone()
    message = "the gradients of lora_A, lora_B, lora_E lie elsewhere than in the last call"
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        allocator.step()


def _milliseconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Of one call, by events around many; the median of five."""
    call()
    samples = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        samples.append(begin.elapsed_time(end) / calls)
    return statistics.median(samples)


@pytest.mark.parametrize("modules", [56, 224])
def test_how_long_a_step_takes(device: torch.device, modules: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, and compared with nothing: a step with its orthogonality term on 4096x4096 at rank 12, called from the
    host and replayed from a graph.
    """
    layers = _layers(((4096, 4096),) * modules, 12, device)
    allocator = _allocator(layers, total_step=10**6, target_r=6, tfinal=0, capturable=True)
    step = _step(allocator)
    _draw(layers)
    called = _milliseconds(step, 10, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replayed = _milliseconds(graph.replay, 10, device)
    assert 0 < replayed < float("inf") and 0 < called < float("inf")
    with capsys.disabled():
        print(
            f"\nallocator with orthogonality term, {modules} modules of 4096x4096 at rank 12 in fp32 on "
            f"{torch.cuda.get_device_name(device)}: {called:.3f} ms called, {replayed:.3f} ms replayed"
        )
