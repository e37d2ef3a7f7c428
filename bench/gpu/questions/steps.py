"""Training steps of a Llama made from a configuration: what HF peft's adapters and ours take, launch and wait for.

- `frozen`: forward and backward pass of the model without adapters, the gradient reaching its embeddings
- `LoRA, AdaLoRA, peft`: stock peft, factors in float32 on a bfloat16 model: its default
- `LoRA, AdaLoRA, ours`: the same models after `apply_to_peft`

Adapters of equal size: rank 16, of which AdaLoRA takes some away at every step. Steps are whole ones, with optimizer
and allocation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bench.gpu.device import Cuda, Device
from bench.gpu.questions.names import FROZEN, KINDS, LIBRARIES, training
from bench.verify import WrongResultError
from peftkernels import apply_to_peft
from peftkernels.cli.timing import Effort, Spread, interleave, spread

STEP = "a whole training step"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, TARGET_RANK = 16, 8
# So many that the budget falls at every step that is measured.
SCHEDULE = {"total_step": 100_000, "tinit": 1, "tfinal": 1, "deltaT": 1}
WARM_UP = 3
# What the host waits in until the device has done everything before.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Shape:
    """Widths and depth of a model, tokens of a step."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    tokens: int
    vocabulary: int = 4096

    @property
    def title(self) -> str:
        return f"{self.layers} layers of {self.hidden}, {self.tokens} tokens"


# One whose steps wait for launches, and one whose steps wait for products.
SHAPES = (Shape(1024, 2816, 8, 8, 1024), Shape(4096, 11008, 4, 32, 4096))
SMOKE_SHAPES = (Shape(64, 96, 2, 4, 16, 64),)


@dataclass(frozen=True)
class Profile:
    """What one step did.

    Attributes:
        launches: kernels, and copies and fills by the device.
        waits: times that the host waited for the device.
        microseconds: that the device was busy.
        operators: that torch dispatched.
    """

    launches: int
    waits: int
    microseconds: float
    operators: int


@dataclass(frozen=True)
class Found:
    """What was measured of a model; times by contestant, over the frozen step's in the same round."""

    shape: Shape
    frozen: float
    ratios: dict[str, Spread]
    rounds: int
    profiles: dict[str, Profile]


def contestants() -> list[str]:
    """Names of all trainings beside the frozen step."""
    return [training(kind, library) for kind in KINDS for library in LIBRARIES]


class Steps:
    """The frozen step and the trainings of one model, on the same tokens."""

    baseline = FROZEN

    def __init__(self, shape: Shape, device: Device, dtype: torch.dtype) -> None:
        self._device = device
        base = _base(shape, device, dtype)
        self._ids = torch.randint(shape.vocabulary, (1, shape.tokens), device=device.place)
        self.contestants: dict[str, Callable[[], Tensor]] = {FROZEN: _frozen_step(base, self._ids)}
        for kind in KINDS:
            stock = _adapted(copy.deepcopy(base), kind)
            patched = copy.deepcopy(stock)
            apply_to_peft(patched)
            for model, library in zip((stock, patched), LIBRARIES, strict=True):
                self.contestants[training(kind, library)] = _training_step(model, self._ids)

    def prepare(self, name: str) -> None:
        """Let whatever came before end."""
        self._device.synchronize()

    def turn(self, name: str, first: int, repeats: int) -> None:
        """`repeats` steps."""
        step = self.contestants[name]
        for _ in range(repeats):
            step()

    def profile(self, name: str) -> Profile:
        """One step under torch's profiler."""
        activities = [ProfilerActivity.CPU]
        if isinstance(self._device, Cuda):
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as recorded:
            with record_function(STEP):
                self.contestants[name]()
            self._device.synchronize()
        return summary(list(recorded.events() or []))


def summary(events: list[Any]) -> Profile:
    """A step's events, as torch's profiler lists them; the wait for its end is not the step's."""
    (step,) = (event for event in events if event.name == STEP and event.device_type == DeviceType.CPU)
    during = [event for event in events if event.device_type == DeviceType.CPU and _within(event, step)]
    # The device's share of an annotation is no work.
    on_device = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    return Profile(
        launches=len(on_device),
        waits=sum(event.name in WAITS for event in during),
        microseconds=float(sum(event.time_range.elapsed_us() for event in on_device)),
        operators=sum(event.name.startswith("aten::") for event in during),
    )


def _within(event: Any, other: Any) -> bool:
    return bool(other.time_range.start <= event.time_range.start <= other.time_range.end)


def _base(shape: Shape, device: Device, dtype: torch.dtype) -> nn.Module:
    """The model without adapters, with random weights; every parameter frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        use_cache=False,
    )
    with device.place:
        model: nn.Module = LlamaForCausalLM(config).to(dtype)
    return model.requires_grad_(False)


def _adapted(base: nn.Module, kind: str) -> Any:
    """Stock peft's adapters on all projections, with factors that do not begin at zero."""
    import peft

    common: dict[str, Any] = {"target_modules": list(TARGETS), "lora_alpha": RANK, "task_type": "CAUSAL_LM"}
    config = (
        peft.LoraConfig(r=RANK, **common)
        if kind == "LoRA"
        else peft.AdaLoraConfig(init_r=RANK, target_r=TARGET_RANK, **SCHEDULE, **common)
    )
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            # It counts ranks in a step of their own, which no optimizer should take.
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.02)
    return model


def _frozen_step(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        loss: Tensor = model(inputs_embeds=embedded, labels=ids).loss
        loss.backward()
        return loss.detach()

    return step


def _training_step(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    allocate = getattr(model.base_model, "update_and_allocate", None)
    steps = 0

    def step() -> Tensor:
        nonlocal steps
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        steps += 1
        if allocate is not None:
            allocate(steps)
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure_steps(shape: Shape, device: Device, dtype: torch.dtype, effort: Effort, turn_seconds: float) -> Found:
    """All contestants timed in turns, then profiled."""
    torch.manual_seed(0)
    bench = Steps(shape, device, dtype)
    for step in bench.contestants.values():
        for _ in range(WARM_UP):
            loss = step()
        if not loss.isfinite():
            raise WrongResultError(f"{shape.title}: the loss is {float(loss)}; nothing was timed")
    samples = interleave(bench, effort, stopwatch=device.elapsed, turn_seconds=turn_seconds)
    return Found(
        shape,
        spread(samples.times(FROZEN)).median,
        {name: spread(samples.ratios(name, FROZEN)) for name in contestants()},
        len(samples.rounds),
        {name: bench.profile(name) for name in bench.contestants},
    )
