"""Packed copies of frozen weights: made once, never stale, freed with the weight, and a setting."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from support.cases import Call, make_call, run
from support.checks import within_budget
from support.packs import count, fresh_cache, gained, packed_bytes
from torch import Tensor, nn

from peftkernels import explain, lora_linear
from peftkernels.backends import cpu

N, K = 70, 90
PACKED_BYTES = packed_bytes(N, K)


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    with fresh_cache():
        yield


def _call(seed: int, **arguments: object) -> Call:
    return make_call(seed, leading=(6,), n=N, k=K, r=4, **arguments)


def _forward(call: Call, weight: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return lora_linear(
            call.x, call.weight if weight is None else weight, call.lora_A, call.lora_B, impl="cpu", **call.optional
        )


def test_the_second_call_hits(seed: int) -> None:
    call = _call(seed)
    assert gained(lambda: run(call, "cpu")) == (0, 2)
    assert gained(lambda: run(call, "cpu")) == (2, 0)
    assert count("entries") == 2
    assert count("bytes") == sum(PACKED_BYTES.values())


def test_another_rank_plan_or_adapter_shares_the_pack(seed: int) -> None:
    call, other = _call(seed), _call(seed + 1, plan=True)
    _forward(call)
    assert gained(lambda: _forward(other, call.weight)) == (1, 0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_layers_that_share_a_weight_share_a_pack(dtype: str, seed: int) -> None:
    call = _call(seed, dtype=dtype)
    parameter = nn.Parameter(call.weight, requires_grad=False)
    _forward(call, parameter)
    for alias in (parameter.detach(), parameter.data, parameter.view(N, K)):
        assert gained(lambda alias=alias: _forward(call, alias)) == (1, 0)
    assert count("entries") == 1


def test_views_of_one_storage_have_packs_of_their_own(seed: int) -> None:
    call = _call(seed)
    both = torch.cat((call.weight, call.weight + 1))
    for weight in (both[:N], both[N:], both[::2], both.T[: K // 2].T[:N]):
        x = call.x[:, : weight.shape[1]]
        lora_A = call.lora_A[:, : weight.shape[1]]
        within_budget(call.replace(weight=weight, x=x, lora_A=lora_A), "cpu")
    square = torch.randn(64, 64)
    for weight in (square, square.T):
        within_budget(make_call(seed, leading=(3,), n=64, k=64, r=2).replace(weight=weight), "cpu")


def _data_copy(weight: Tensor) -> None:
    weight.data.copy_(weight.data.flip(0) * 1.5)


def _optimizer_step(weight: Tensor) -> None:
    weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()
    weight.requires_grad_(False)
    weight.grad = None


def _load(weight: Tensor) -> None:
    layer = nn.Linear(K, N, bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.load_state_dict({"weight": torch.randn(N, K).to(weight.dtype)})


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda weight: weight.add_(0.5),
    "mul_": lambda weight: weight.mul_(-1),
    "copy_": lambda weight: weight.copy_(torch.randn(N, K)),
    "one_element": lambda weight: weight[17, 23].add_(1.0),
    "one_row": lambda weight: weight[5].zero_(),
    "index_put": lambda weight: weight.index_put_((torch.tensor([3]),), torch.tensor(2.0).to(weight.dtype)),
    "through_a_view": lambda weight: weight.view(-1)[1234:1300].fill_(1.0),
    "through_detach": lambda weight: weight.detach()[:, 40].fill_(1.0),
    "optimizer_step": _optimizer_step,
    "load_state_dict": _load,
    "data.copy_": _data_copy,
    "data.add_": lambda weight: weight.data.add_(0.5),
    "data.mul_": lambda weight: weight.data.mul_(1.25),
    "data_low_rank_merge": lambda weight: weight.data.addmm_(torch.ones(N, 1).to(weight), torch.ones(1, K).to(weight)),
    "numpy": lambda weight: (
        weight.data.view(torch.int16).numpy().__imul__(3)
        if weight.dtype == torch.bfloat16
        else weight.numpy().__imul__(3)
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["both", "forward", "off"])
def test_a_weight_changed_in_place_is_never_answered_from_its_old_pack(
    change: Callable[[Tensor], object], dtype: str, mode: str, seed: int
) -> None:
    cpu.set_pack_mode(mode)
    call = _call(seed, dtype=dtype)
    run(call, "cpu")
    before = call.weight.clone()
    change(call.weight)
    assert not torch.equal(call.weight, before)
    within_budget(call, "cpu")


def test_a_weight_replaced_through_data_is_packed_anew(seed: int) -> None:
    call = _call(seed)
    parameter = nn.Parameter(call.weight, requires_grad=False)
    _forward(call, parameter)
    parameter.data = call.weight * 2
    within_budget(call.replace(weight=parameter), "cpu")


def test_weights_that_reuse_freed_memory_are_packed_anew(seed: int) -> None:
    """The allocator likes to hand the same address out again."""
    places = []
    for i in range(20):
        call = _call(seed + i)
        places.append(call.weight.data_ptr())
        within_budget(call, "cpu")
        del call
    assert len(set(places)) < 20, "no address was reused: the test is empty"


def test_a_deleted_weight_frees_its_packs(seed: int) -> None:
    kept, dropped = _call(seed), _call(seed + 1)
    run(kept, "cpu")
    run(dropped, "cpu")
    assert count("entries") == 4
    del dropped
    assert count("entries") == 2
    assert count("bytes") == sum(PACKED_BYTES.values())
    assert gained(lambda: run(kept, "cpu")) == (2, 0)


def test_packs_do_not_keep_weights_alive(seed: int) -> None:
    call = _call(seed)
    run(call, "cpu")
    storage = weakref.ref(call.weight)
    call.weight = torch.zeros(1)
    assert storage() is None
    assert count("entries") == 0


def test_a_changed_weight_leaves_no_old_pack(seed: int) -> None:
    call = _call(seed)
    for _ in range(5):
        run(call, "cpu")
        call.weight.add_(1.0)
    assert count("entries") == 2


@pytest.mark.parametrize(
    ("mode", "entries", "bytes_kept", "hits_and_misses"),
    [
        ("both", 2, sum(PACKED_BYTES.values()), (2, 0)),
        ("forward", 1, PACKED_BYTES["forward"], (1, 1)),
        ("off", 0, 0, (0, 2)),
    ],
)
def test_modes(mode: str, entries: int, bytes_kept: int, hits_and_misses: tuple[int, int], seed: int) -> None:
    call = _call(seed)
    run(call, "cpu")
    cpu.set_pack_mode(mode)
    assert cpu.pack_cache_stats()["mode"] == mode
    assert count("entries") == entries
    run(call, "cpu")
    assert gained(lambda: run(call, "cpu")) == hits_and_misses
    assert count("entries") == entries
    assert count("bytes") == bytes_kept


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-fp32_factors"])
def test_modes_change_no_bit(dtype: str, seed: int) -> None:
    call = make_call(seed, leading=(140,), n=N, k=K, r=4, dtype=dtype, plan=True, dropout_p=0.2)
    expected = run(call, "cpu").named()
    for mode in ("forward", "off", "both"):
        cpu.set_pack_mode(mode)
        for name, value in run(call, "cpu").named().items():
            assert torch.equal(value, expected[name]), f"{mode}: {name}"


def test_clearing_frees_everything(seed: int) -> None:
    call = _call(seed)
    run(call, "cpu")
    cpu.clear_pack_cache()
    assert count("entries") == 0
    assert count("bytes") == 0
    within_budget(call, "cpu")


@pytest.mark.parametrize("mode", ["", "on", "Both", "backward"])
def test_an_unknown_mode(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode: found '{mode}', expected one of both, forward, off"):
        cpu.set_pack_mode(mode)
    assert cpu.pack_cache_stats()["mode"] == "both"


def test_packs_made_under_inference_mode(seed: int) -> None:
    """Inference tensors have no version counter."""
    call = _call(seed)
    with torch.inference_mode():
        weight = call.weight * 2
        for _ in range(3):
            weight.mul_(1.5)
            y = _forward(call, weight)
            exact = lora_linear(call.x, weight, call.lora_A, call.lora_B, impl="eager", **call.optional)
            torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


def test_auto_avoids_packing_in_every_call(seed: int) -> None:
    call = _call(seed)
    assert explain(call.x, call.weight, call.lora_A, call.lora_B).chosen == "cpu"
    cpu.set_pack_mode("off")
    explanation = explain(call.x, call.weight, call.lora_A, call.lora_B)
    assert explanation.chosen == "eager"
    assert "PEFTKERNELS_CPU_PACK" in explanation.why_not["cpu"]


def _with_environment(mode: str) -> subprocess.CompletedProcess[str]:
    program = (
        "import torch; from peftkernels import lora_linear; from peftkernels.backends import cpu\n"
        "lora_linear(torch.randn(2, 8), torch.randn(4, 8), torch.randn(1, 8), torch.randn(4, 1), impl='cpu')\n"
        "print(cpu.pack_cache_stats()['mode'])"
    )
    environment = {**os.environ, "PEFTKERNELS_CPU_PACK": mode}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_environment_sets_the_mode() -> None:
    done = _with_environment("forward")
    assert (done.returncode, done.stdout.strip()) == (0, "forward"), done.stderr


def test_the_environment_with_an_unknown_mode() -> None:
    done = _with_environment("sometimes")
    assert done.returncode != 0
    assert "ValueError: PEFTKERNELS_CPU_PACK: found 'sometimes', expected one of both, forward, off" in done.stderr
