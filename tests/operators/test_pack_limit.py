"""The limit on packed copies: never exceeded, a stable set of weights within it, and no call slower than without."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from support.cases import Call, make_call, run
from support.checks import within_budget
from support.packs import count, fresh_cache, gained, packed_bytes

from peftkernels import explain, lora_linear
from peftkernels.backends import cpu

N = K = 64
UNIT = packed_bytes(N, K)["forward"]  # bytes of either pack
# A refused weight may take the place of others after so many calls in which they were idle (packs/pack_cache.h).
PATIENCE = 16


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    with fresh_cache():
        yield


def _calls(seed: int, number: int) -> list[Call]:
    return [make_call(seed + i, leading=(2,), n=N, k=K, r=2) for i in range(number)]


def _forward(call: Call, impl: str = "cpu") -> torch.Tensor:
    with torch.no_grad():
        return lora_linear(call.x, call.weight, call.lora_A, call.lora_B, impl=impl, **call.optional)


def _train(call: Call, impl: str = "cpu") -> None:
    run(call, impl, ("x", "lora_A", "lora_B"))


def _chosen(call: Call) -> str:
    return explain(call.x, call.weight, call.lora_A, call.lora_B).chosen


@pytest.mark.parametrize("step", [_forward, _train], ids=["forward", "training"])
@pytest.mark.parametrize("units", [0, 1, 5, 8, 11])
def test_a_loop_over_more_weights_than_fit_keeps_the_same_ones(
    step: Callable[[Call], object], units: int, seed: int
) -> None:
    calls = _calls(seed, 8)
    limit = units * UNIT + 100
    cpu.set_pack_limit(limit)
    packs = 1 if step is _forward else 2  # of a weight
    kept = min(8, units // packs)

    def loop() -> None:
        for call in calls:
            step(call)
            assert count("bytes") <= limit

    loop()
    for _ in range(3 * PATIENCE):
        assert gained(loop) == (packs * kept, packs * (8 - kept))
    assert (count("weights"), count("entries"), count("refused")) == (kept, packs * kept, 8 - kept)


def test_auto_serves_what_has_no_room_without_packs(seed: int) -> None:
    calls = _calls(seed, 6)
    cpu.set_pack_limit(4 * UNIT)
    for call in calls:
        run(call, "auto", ("x", "lora_A", "lora_B"))
    chosen = [_chosen(call) for call in calls]
    assert sorted(chosen) == ["cpu"] * 2 + ["eager"] * 4
    for call, impl in zip(calls, chosen, strict=True):
        assert gained(lambda call=call: _train(call, "auto")) == ((2, 0) if impl == "cpu" else (0, 0))
        within_budget(call, "auto")
    refused = calls[chosen.index("eager")]
    why_not = explain(refused.x, refused.weight, refused.lora_A, refused.lora_B).why_not["cpu"]
    assert "PEFTKERNELS_CPU_PACK_LIMIT" in why_not
    # A named implementation is not replaced: it packs for the call.
    assert gained(lambda: _forward(refused)) == (0, 1)
    within_budget(refused, "cpu")
    assert count("bytes") == 4 * UNIT


@pytest.mark.parametrize("impl", ["auto", "cpu"])
def test_idle_weights_give_way_after_a_while(impl: str, seed: int) -> None:
    idle, busy = _calls(seed, 4), _calls(seed + 100, 3)
    cpu.set_pack_limit(4 * UNIT)
    for call in idle:
        _forward(call, impl)
    for _ in range(PATIENCE):
        assert all(_chosen(call) == "cpu" for call in idle), "an idle weight was given up at once"
        for call in busy:
            _forward(call, impl)
    for _ in range(PATIENCE):
        for call in busy:
            _forward(call, impl)
    assert gained(lambda: [_forward(call, impl) for call in busy]) == (3, 0)
    # Of the idle ones no more went than was needed: the one used last is still there.
    assert gained(lambda: _forward(idle[-1], impl)) == (1, 0)
    assert count("bytes") == 4 * UNIT


def test_room_that_a_weight_leaves_is_taken(seed: int) -> None:
    first, second = _calls(seed, 2)
    cpu.set_pack_limit(UNIT)
    _forward(first)
    _forward(second)
    assert _chosen(second) == "eager"
    del first
    for _ in range(PATIENCE):
        _forward(second, "auto")
    assert _chosen(second) == "cpu"
    assert gained(lambda: _forward(second)) == (1, 0)


def test_a_lower_limit_frees_the_weights_not_used_for_longest(seed: int) -> None:
    calls = _calls(seed, 5)
    for call in calls:
        _forward(call)
    for place in (1, 3):
        _forward(calls[place])
    cpu.set_pack_limit(2 * UNIT)
    assert count("bytes") == 2 * UNIT
    assert gained(lambda: [_forward(calls[place]) for place in (1, 3)]) == (2, 0)


def test_a_higher_limit_is_used_at_once(seed: int) -> None:
    calls = _calls(seed, 3)
    cpu.set_pack_limit(0)
    for call in calls:
        _forward(call)
    assert (count("refused"), count("bytes")) == (3, 0)
    cpu.set_pack_limit("unlimited")
    assert cpu.pack_cache_stats()["limit"] is None
    for call in calls:
        assert _chosen(call) == "cpu"
        _forward(call)
    assert gained(lambda: [_forward(call) for call in calls]) == (3, 0)


def test_another_mode_and_clearing_forget_refusals(seed: int) -> None:
    (call,) = _calls(seed, 1)
    for forget in (lambda: cpu.set_pack_mode("forward"), cpu.clear_pack_cache):
        cpu.set_pack_limit(UNIT - 1)
        _forward(call)
        assert count("refused") == 1
        forget()
        assert count("refused") == 0


def test_a_refused_weight_that_dies_is_forgotten(seed: int) -> None:
    cpu.set_pack_limit(0)
    for i in range(20):
        _forward(_calls(seed + i, 1)[0])
    assert count("refused") == 0


def test_a_refused_weight_changed_in_place(seed: int) -> None:
    kept, refused = _calls(seed, 2)
    cpu.set_pack_limit(2 * UNIT)
    _train(kept)
    for _ in range(2 * PATIENCE):
        refused.weight.add_(0.5)
        within_budget(refused, "cpu")
    assert count("refused") == 1
    assert gained(lambda: _train(kept)) == (2, 0)


@pytest.mark.parametrize("limit", [0, 3 * UNIT, "1%", "unlimited"])
def test_limits_change_no_bit(limit: int | str, seed: int) -> None:
    calls = _calls(seed, 4)
    expected = [run(call, "cpu").named() for call in calls]
    cpu.clear_pack_cache()
    cpu.set_pack_limit(limit)
    for _ in range(2):
        for call, results in zip(calls, expected, strict=True):
            for name, value in run(call, "cpu").named().items():
                assert torch.equal(value, results[name]), f"{limit}: {name}"


def test_any_order_of_events(seed: int) -> None:
    """Calls, changes, deaths, new modes and limits: never more bytes than allowed, never a stale pack."""
    chance = random.Random(seed)
    calls = _calls(seed, 6)
    limit = 6 * UNIT
    cpu.set_pack_limit(limit)
    for event in range(400):
        place = chance.randrange(len(calls))
        kind = chance.choices(
            ("call", "auto", "change", "data", "new", "mode", "limit", "clear"), (8, 8, 2, 2, 2, 1, 1, 1)
        )[0]
        if kind == "change":
            calls[place].weight.mul_(0.9)
        elif kind == "data":
            calls[place].weight.data.mul_(1.1)
        elif kind == "new":
            calls[place] = _calls(seed + 10 + event, 1)[0]
        elif kind == "mode":
            cpu.set_pack_mode(chance.choice(cpu.PACK_MODES))
        elif kind == "limit":
            limit = chance.randrange(14) * UNIT
            cpu.set_pack_limit(limit)
        elif kind == "clear":
            cpu.clear_pack_cache()
        call, needs = calls[place], chance.choice((("x",), ()))
        outcome = run(call, "auto" if kind == "auto" else "cpu", needs)
        exact = run(call, "eager", needs).named()
        where = f"seed={seed} event={event}: {kind}"
        for name, value in outcome.named().items():
            torch.testing.assert_close(value, exact[name], rtol=1e-4, atol=1e-4, msg=f"{where}, {name}")
        assert count("bytes") <= limit, where


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("3GiB", 3 << 30),
        ("1.5 MiB", 3 << 19),
        ("2gb", 2 * 10**9),
        ("10kB", 10**4),
        ("8 TiB", 8 << 40),
        ("unlimited", None),
    ],
)
def test_settings_in_bytes(setting: int | str, expected: int | None) -> None:
    cpu.set_pack_limit(setting)
    assert cpu.pack_cache_stats()["limit"] == expected
    assert cpu.pack_cache_stats()["limit_setting"] == str(setting)


@pytest.mark.alone
def test_a_share_of_the_available_memory() -> None:
    available = cpu.available_memory()
    assert available is not None, "this system does not tell how much memory it has"
    for share in (0.0, 0.25, 1.0):
        cpu.set_pack_limit(f"{100 * share:g}%")
        # Other processes take and free memory meanwhile.
        assert count("limit") == pytest.approx(share * available, rel=0.2)


@pytest.mark.parametrize(
    "setting", ["", "much", "-1", "4GiBs", "101%", "-5%", "1e9", "%", "nan", "9000000TiB", -1, 2**63]
)
def test_wrong_settings(setting: int | str) -> None:
    with pytest.raises(ValueError, match=r"limit: found .*, expected a number of bytes such as 4GiB, 500MB or 0, a sh"):
        cpu.set_pack_limit(setting)
    assert cpu.pack_cache_stats()["limit_setting"] == "50%"


@pytest.mark.parametrize("setting", [None, 1.5, True])
def test_settings_of_a_wrong_type(setting: object) -> None:
    with pytest.raises(TypeError, match=f"limit: found {type(setting).__name__}, expected int or str"):
        cpu.set_pack_limit(setting)


def _with_environment(limit: str) -> subprocess.CompletedProcess[str]:
    program = (
        "import torch; from peftkernels import lora_linear; from peftkernels.backends import cpu\n"
        "lora_linear(torch.randn(2, 8), torch.randn(4, 8), torch.randn(1, 8), torch.randn(4, 1))\n"
        "print(cpu.pack_cache_stats()['limit'])"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PEFTKERNELS_CPU_PACK_LIMIT": limit},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_environment_sets_the_limit() -> None:
    done = _with_environment("64KiB")
    assert (done.returncode, done.stdout.strip()) == (0, "65536"), done.stderr


def test_the_environment_with_a_wrong_limit() -> None:
    done = _with_environment("plenty")
    assert done.returncode != 0
    assert "ValueError: PEFTKERNELS_CPU_PACK_LIMIT: found 'plenty', expected a number of bytes" in done.stderr
