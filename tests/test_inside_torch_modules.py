"""Layers with adapters inside torch's own modules, some of which read a projection's weight and never call it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkernels.nn import AdaLoRALinear, LoRALinear

KINDS = pytest.mark.parametrize("kind", [LoRALinear, AdaLoRALinear])


def adapted(linear: nn.Linear, kind: type) -> Any:
    layer = kind.from_linear(linear, 4, 8)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return layer


def encoder_layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return layer.requires_grad_(False)


@KINDS
def test_out_proj_of_attention_is_refused(kind: type) -> None:
    attention = nn.MultiheadAttention(16, 2)
    with pytest.raises(TypeError, match=r"^linear: found a NonDynamicallyQuantizableLinear, as nn.MultiheadAttention"):
        kind.from_linear(attention.out_proj, 4, 8)  # type: ignore[attr-defined]


@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_attention_does_not_compute_with_a_layer_put_there_by_hand(kind: type, training: bool) -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True).train(training)
    attention.out_proj = adapted(nn.Linear(16, 16), kind)
    x = torch.randn(1, 3, 16)
    with torch.no_grad(), pytest.raises(RuntimeError, match="multi_head_attention_forward: found the weight of a"):
        attention(x, x, x)


@KINDS
@pytest.mark.parametrize("places", [("linear1",), ("linear2",), ("linear1", "linear2")])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_encoder_layer_computes_the_same_in_evaluation(kind: type, places: tuple[str, ...], compiled: bool) -> None:
    layer, x = encoder_layer(), torch.randn(2, 5, 16)
    for place in places:
        setattr(layer, place, adapted(getattr(layer, place), kind))
    with torch.no_grad():
        trained = layer.train()(x)
        run: Callable[[Tensor], Tensor] = torch.compile(layer, backend="eager") if compiled else layer
        layer.eval()
        torch.testing.assert_close(run(x), trained)


@KINDS
def test_a_whole_encoder_with_padding(kind: type) -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2).requires_grad_(False)
    for layer in encoder.layers:
        layer.linear1, layer.linear2 = adapted(layer.linear1, kind), adapted(layer.linear2, kind)
    x, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        trained = encoder.train()(x, src_key_padding_mask=padding)
        evaluated = encoder.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(evaluated[~padding], trained[~padding])


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x @ w.T": lambda x, w: x @ w.T,
    "x @ w.mT": lambda x, w: x @ w.mT,
    "w @ x.T": lambda x, w: w @ x.T,
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: torch.matmul(x, w.t()),
    "mm": lambda x, w: x.mm(w.transpose(0, 1)),
    "addmm": lambda x, w: torch.addmm(torch.zeros(6), x, w.T),
    "einsum": lambda x, w: torch.einsum("mk,nk->mn", x, w),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_with_the_weight_would_leave_the_adapter_out(product: str) -> None:
    layer, x = adapted(nn.Linear(8, 6), LoRALinear), torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="expected that the layer is called"):
        PRODUCTS[product](x, layer.weight)
    # On purpose, or with the adapter in the weight, it may be multiplied.
    assert PRODUCTS[product](x, layer.base_layer.weight).shape[0] in (3, 6)
    layer.merge()
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x))


def test_the_weight_answers_everything_else() -> None:
    layer = adapted(nn.Linear(8, 6).bfloat16(), LoRALinear)
    weight, own = layer.weight, layer.base_layer.weight
    assert (weight.dtype, weight.device, weight.shape, weight.data_ptr()) == (
        torch.bfloat16,
        own.device,
        own.shape,
        own.data_ptr(),
    )
    assert not weight.requires_grad
    assert weight.is_floating_point()
    assert type(weight.data) is Tensor
    for made in (weight.float(), weight.detach(), weight.norm(), weight + 1, weight[0], copy.deepcopy(own)):
        assert type(made) in (Tensor, nn.Parameter)
    assert torch.equal(pickle.loads(pickle.dumps(weight)), own)
    weight.data.zero_()
    assert not own.any()


def test_a_compiled_program_may_ask_the_weight() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = adapted(nn.Linear(8, 6), LoRALinear)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.projection.weight
            return self.projection(x.to(weight.dtype).to(weight.device))  # type: ignore[no-any-return]

    model, x = Model(), torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


AFTER_TO_EMPTY = """
import torch
from torch import nn
from peftkernels.nn import AdaLoRALinear

model = nn.Sequential(*(AdaLoRALinear.from_linear(nn.Linear(16, 16), r, impl=impl)
                        for r in (1, 8, 33) for impl in ("auto", "eager", "reference")))
for junk in (0, 1, 127, 255):
    for layer in model:
        for name in ("rank_state", "rank_order", "rank_counts"):
            tensor = getattr(layer, name)
            filled = torch.full((tensor.numel() * tensor.element_size(),), junk, dtype=torch.uint8).view(tensor.dtype)
            layer._buffers[name] = filled
    # Memory that was used is handed out again, with what lies in it.
    model.to_empty(device="cpu")
    for layer in model:
        assert layer.rank_plan.is_consistent()
        layer(torch.randn(3, 16)).sum().backward()
        layer.reset_parameters()
        assert layer.rank_counts.tolist() == [layer.r, layer.r]
meta = AdaLoRALinear.from_linear(nn.Linear(16, 16, device="meta"), 8).to_empty(device="cpu")
assert meta(torch.randn(3, 16)).shape == (3, 16)
print("whole")
"""


def test_a_layer_after_to_empty_holds_a_plan_that_kernels_may_follow() -> None:
    done = subprocess.run([sys.executable, "-c", AFTER_TO_EMPTY], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


def test_moves_and_casts_leave_the_ranks_as_they_are() -> None:
    layer = AdaLoRALinear.from_linear(nn.Linear(8, 8), 3)
    layer.rank_plan.update_(torch.tensor([0, 2, 1], dtype=torch.uint8))
    layer.to(torch.float64).share_memory()
    assert (layer.rank_state.tolist(), layer.rank_order.tolist()) == ([0, 2, 1], [1, 2, 0])
    assert layer.rank_counts.tolist() == [1, 2]
