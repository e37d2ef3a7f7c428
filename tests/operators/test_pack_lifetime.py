"""Packs live as long as the weight they were made of, whatever happens to the layer that holds it."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.packs import count, fresh_cache, gained, packed_bytes
from torch import Tensor, nn

from peftkernels import lora_linear
from peftkernels.nn import LoRALinear

N, K = 48, 80
MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    with fresh_cache():
        yield


def _adapted(linear: nn.Linear) -> LoRALinear:
    layer = LoRALinear(linear, r=4, lora_alpha=8, impl="cpu")
    nn.init.normal_(layer.lora_B.weight)
    return layer


def _layer(n: int = N, k: int = K) -> LoRALinear:
    return _adapted(nn.Linear(k, n))


def _train(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    """y and ∂x for fixed numbers."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, layer.in_features, generator=generator).to(layer.weight.dtype).requires_grad_()
    y = layer(x)
    (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), grad_x


def _right(layer: LoRALinear) -> None:
    """The layer answers from its weight as it is now."""
    found = _train(layer)
    layer.impl = "eager"
    exact = _train(layer)
    layer.impl = "cpu"
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if layer.weight.dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def _resident() -> int:
    """Bytes of this process that are in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE")


only_where_memory_is_told = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="this system has no /proc/self/statm, which tells a process's memory"
)


def _load_state_dict(layer: LoRALinear) -> None:
    layer.load_state_dict(_layer().state_dict())


def _assign_state_dict(layer: LoRALinear) -> None:
    layer.load_state_dict(_layer().state_dict(), assign=True)


def _share(layer: LoRALinear) -> None:
    layer.share_memory()
    layer.weight.data.mul_(2.0)


def _swap(layer: LoRALinear) -> None:
    torch.utils.swap_tensors(layer.base_layer.weight, nn.Parameter(torch.randn(N, K), requires_grad=False))


def _set(layer: LoRALinear) -> None:
    layer.weight.data.set_(torch.randn(N, K))


def _resize(layer: LoRALinear) -> None:
    """The same tensor and storage over other memory."""
    layer.weight.data.untyped_storage().resize_(4 * layer.weight.untyped_storage().nbytes())
    layer.weight.data.normal_()


CHANGES: dict[str, Callable[[LoRALinear], object]] = {
    "to_bfloat16": lambda layer: layer.to(torch.bfloat16),
    "to_bfloat16_and_back": lambda layer: layer.to(torch.bfloat16).to(torch.float32),
    "load_state_dict": _load_state_dict,
    "load_state_dict_assign": _assign_state_dict,
    "data_assigned": lambda layer: setattr(layer.weight, "data", torch.randn(N, K)),
    "data_copied_to": lambda layer: layer.weight.data.copy_(torch.randn(N, K)),
    "parameter_replaced": lambda layer: setattr(
        layer.base_layer, "weight", nn.Parameter(torch.randn(N, K), requires_grad=False)
    ),
    "merged_and_unmerged": lambda layer: (layer.merge(), layer.unmerge()),
    "share_memory": _share,
    "swap_tensors": _swap,
    "set": _set,
    "resize": _resize,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_changed_in_any_way_has_packs_of_its_present_weight_alone(
    change: Callable[[LoRALinear], object],
) -> None:
    layer = _layer()
    _right(layer)
    change(layer)
    _right(layer)
    size = layer.weight.element_size()
    assert (count("weights"), count("entries")) == (1, 2)
    assert count("bytes") == sum(packed_bytes(N, K, size).values())


def test_layers_tied_to_one_weight_share_packs() -> None:
    linear, other = nn.Linear(K, N), nn.Linear(K, N)
    other.weight = linear.weight
    tied = [_adapted(linear), _adapted(linear), _adapted(other)]
    assert gained(lambda: [_train(layer) for layer in tied]) == (4, 2)
    assert count("weights") == 1
    # A copy of all of them is tied to a weight of its own.
    copied = copy.deepcopy(tied)
    assert gained(lambda: [_train(layer) for layer in copied]) == (4, 2)
    assert count("weights") == 2
    linear.weight.data.mul_(2.0)
    for layer in tied + copied:
        _right(layer)
    assert count("weights") == 2
    tied.clear()
    del linear, other, layer
    assert count("weights") == 1


def test_a_deep_copy_has_packs_of_its_own() -> None:
    layer = _layer()
    _train(layer)
    copied = copy.deepcopy(layer)
    assert gained(lambda: _train(copied)) == (0, 2)
    copied.weight.data.zero_()
    _right(copied)
    assert gained(lambda: _right(layer)) == (2, 0)


def test_packs_are_not_pickled(tmp_path: Path) -> None:
    layer = _layer()
    before = len(pickle.dumps(layer))
    _train(layer)
    assert len(pickle.dumps(layer)) == before
    loaded = pickle.loads(pickle.dumps(layer))
    assert gained(lambda: _right(loaded)) == (0, 2)
    torch.save(layer, tmp_path / "layer.pt")
    mapped = torch.load(tmp_path / "layer.pt", weights_only=False, mmap=True)
    assert gained(lambda: _right(mapped)) == (0, 2)
    for ours, theirs in zip(_train(mapped), _train(layer), strict=True):
        assert torch.equal(ours, theirs)


@only_where_memory_is_told
def test_packs_are_freed_with_the_weight_at_once() -> None:
    """Without another call, and without the statistics, which look for dead weights."""
    layer = _layer(2048, 1024)
    _train(layer)
    weight, weight_bytes = weakref.ref(layer.weight), layer.weight.nbytes
    packs = sum(packed_bytes(2048, 1024).values())
    assert count("bytes") == packs
    before = _resident()
    del layer
    assert weight() is None
    # More than the weight alone, whose memory may wait in torch's allocator for its next use.
    assert before - _resident() > 0.9 * packs > weight_bytes


@pytest.mark.parametrize("memory", ["numpy", "file"])
def test_packs_of_weights_in_foreign_memory_are_freed_by_the_next_pack(memory: str, tmp_path: Path) -> None:
    def foreign() -> Tensor:
        if memory == "numpy":
            return torch.from_numpy(torch.randn(N, K).numpy().copy())
        path = tmp_path / "weight"
        path.write_bytes(torch.randn(N, K).numpy().tobytes())
        return torch.from_file(str(path), size=N * K).view(N, K)

    x, lora_A, lora_B = torch.randn(2, K), torch.randn(3, K), torch.randn(N, 3)
    entries = []
    for _ in range(10):
        weight = foreign()
        y = lora_linear(x, weight, lora_A, lora_B, impl="cpu")
        torch.testing.assert_close(y, lora_linear(x, weight, lora_A, lora_B, impl="eager"), rtol=1e-4, atol=1e-4)
        entries.append(count("entries"))
        del weight
    assert entries == [1] * 10
    assert count("entries") == 0


@only_where_memory_is_told
def test_packs_of_weights_in_foreign_memory_are_freed_though_no_pack_is_made() -> None:
    """Calls that find their pack look for dead weights now and then."""
    layer = _layer()
    large = torch.from_numpy(torch.randn(2048, 1024).numpy())
    lora_linear(torch.randn(1, 1024), large, torch.randn(1, 1024), torch.randn(2048, 1), impl="cpu")
    x = torch.randn(1, K)
    with torch.no_grad():
        layer(x)
        del large
        before = _resident()
        for _ in range(1024):
            layer(x)
    assert before - _resident() > 0.9 * packed_bytes(2048, 1024)["forward"]


@only_where_memory_is_told
@pytest.mark.parametrize("memory", ["torch", "numpy"])
def test_a_thousand_layers_leave_nothing_behind(memory: str) -> None:
    """A leak of one pack in ten would show: each layer has 0.75 MiB of weight and packs."""

    def live_and_die() -> None:
        layer = _layer(256, 256)
        if memory == "numpy":
            layer.weight.data = torch.from_numpy(layer.weight.detach().numpy().copy())
        _train(layer)

    for _ in range(100):
        live_and_die()
    gc.collect()
    before = _resident()
    for _ in range(1000):
        live_and_die()
    grown = _resident() - before
    assert grown < 25 * MEBIBYTE, f"{grown / MEBIBYTE:.1f} MiB more after 1000 layers"
    assert (count("weights"), count("bytes")) == (0, 0)
