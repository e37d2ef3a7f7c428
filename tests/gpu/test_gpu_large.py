"""x, y and their gradients of more than 2³¹ elements: every product of sizes and strides is taken in 64 bits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.cases import Call, Outcome, make_call
from support.implementations import served
from support.oracle import Budget
from support.routes import capability, x_dtype
from torch import Tensor

from peftkernels import lora_linear
from peftkernels.backends.triton.linear import routes
from peftkernels.backends.triton.linear.routes import Choice
from peftkernels.ops import reference


@dataclass(frozen=True)
class Size:
    """`border` is a row in the middle that the sample takes with its neighbours."""

    rows: int
    n: int
    k: int
    border: int

    @property
    def sample(self) -> list[int]:
        """The first rows, those around the border, and the last."""
        return [0, 1, self.border - 1, self.border, self.border + 1, self.rows - 2, self.rows - 1]

    @property
    def bytes(self) -> int:
        """x, y, both gradients, and room for two more of their kind."""
        return 6 * 2 * self.rows * max(self.n, self.k)


SIZES = {"small": Size(200, 80, 112, 128), "large": Size(2**31 // 4096 + 300, 4096, 4096, 2**31 // 4096)}
in_every_size = pytest.mark.parametrize("size", [pytest.param("small"), pytest.param("large", marks=pytest.mark.gpu)])
WAYS = {
    "library": Choice(routes.LIBRARY),
    "tail_tma": Choice(routes.TAIL, "tma-128x128x64-8w-4s"),
    "tail_pointer": Choice(routes.TAIL, "pointer-128x128x64-8w-3s"),
    "single_tma": Choice(routes.SINGLE, "tma-128x128x64-8w-4s"),
    "single_pointer": Choice(routes.SINGLE, "pointer-128x128x64-8w-3s"),
}
by_every_way = pytest.mark.parametrize("way", WAYS)


def _skip_unless_there_is_room(size: Size, way: Choice, device: torch.device) -> None:
    product = routes.Product(routes.FORWARD, x_dtype(_dtype()), size.rows, size.n, size.k)
    reason = routes.refusal(way, product, capability())
    if reason is not None:
        pytest.skip(reason)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if free < size.bytes:
            pytest.skip(f"{size.bytes / 1e9:.0f} GB of GPU memory are needed, {free / 1e9:.0f} GB are free")


def _dtype() -> str:
    return served("triton", ("bf16-fp32_factors", "fp16-fp32_factors"))[0]


def _call(seed: int, size: Size) -> Call:
    return make_call(seed, leading=(len(size.sample),), n=size.n, k=size.k, r=24, plan=True, dtype=_dtype())


def _spread(values: Tensor, size: Size, device: torch.device, *, noise: bool) -> Tensor:
    """(rows, C) with `values` in the sampled rows, and noise or zeros in all others."""
    spread = torch.zeros(size.rows, values.shape[1], dtype=values.dtype, device=device)
    if noise:
        spread.normal_()
    spread[size.sample] = values.to(device)
    return spread


def _outcome(call: Call, size: Size, device: torch.device, way: Choice) -> tuple[Outcome, Tensor]:
    """The sampled rows of a call with all rows, whose G is zero in all others; and ∂x in all rows.

    What the other rows add to the factors' gradients is exactly nothing, so all results are those of `call`.
    """
    here = call.on(device)
    leaves = {
        name: getattr(here, name).detach().clone().requires_grad_() for name in ("lora_A", "lora_B", "bias", "gate")
    }
    x = _spread(call.x, size, device, noise=True).requires_grad_()
    grad_y = _spread(call.grad_y, size, device, noise=False)
    keywords = {**here.optional, "bias": leaves["bias"], "gate": leaves["gate"]}
    with routes.forced(way):
        y = lora_linear(x, here.weight, leaves["lora_A"], leaves["lora_B"], impl="triton", **keywords)
        y.backward(grad_y)
    assert x.grad is not None
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return Outcome(y.detach()[size.sample], {"x": x.grad[size.sample], **gradients}), x.grad


@in_every_size
@by_every_way
def test_all_elements_are_reached(device: torch.device, way: str, size: str, seed: int) -> None:
    _skip_unless_there_is_room(SIZES[size], WAYS[way], device)
    call = _call(seed, SIZES[size])
    outcome, grad_x = _outcome(call, SIZES[size], device, WAYS[way])
    excesses = Budget(call).excesses(outcome)
    assert not excesses, f"{way}: " + "; ".join(map(str, excesses))
    grad_x[SIZES[size].sample] = 0
    # In pieces: a mask of all elements would take as much memory again.
    assert not any(bool(piece.any()) for piece in grad_x.split(2**16))


@in_every_size
@by_every_way
def test_all_elements_have_the_mask_of_their_place(device: torch.device, way: str, size: str, seed: int) -> None:
    """With W = 0 and p = ½ the call is the one on x times the mask, which is exact."""
    _skip_unless_there_is_room(SIZES[size], WAYS[way], device)
    call = _call(seed, SIZES[size])
    call = call.replace(weight=torch.zeros_like(call.weight))
    mask = _mask_of_sample(seed, 0.5, SIZES[size]).to(call.x.dtype)
    outcome, _ = _outcome(call.replace(dropout_p=0.5, dropout_seed=seed), SIZES[size], device, WAYS[way])
    grad_x = outcome.gradients.pop("x").cpu()
    excesses = Budget(call.replace(x=call.x * mask)).excesses(outcome)
    assert not excesses, f"{way}: " + "; ".join(map(str, excesses))
    assert not grad_x[mask == 0].any()
    assert float((grad_x[mask != 0] != 0).float().mean()) > 0.99


def _mask_of_sample(seed: int, p: float, size: Size) -> Tensor:
    """The dropout factors of the sampled rows, float64 (len(sample), K)."""
    flat = torch.tensor(size.sample)[:, None] * size.k + torch.arange(size.k)
    block, zero = flat // 4, torch.zeros_like(flat)
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32))
    words = torch.stack(reference.philox4x32_10((block & 0xFFFFFFFF, block >> 32, zero, zero), key))
    word = words.gather(0, (flat % 4)[None]).squeeze(0)
    return (word >= reference.dropout_threshold(p)).double() / (1 - p)


def test_the_mask_of_the_sample_is_the_references(seed: int) -> None:
    size = SIZES["small"]
    every = reference.dropout_factor(torch.tensor(seed), 0.3, size.rows, size.k)
    assert torch.equal(_mask_of_sample(seed, 0.3, size), every[size.sample])
