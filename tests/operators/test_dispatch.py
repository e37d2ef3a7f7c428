"""What "auto" takes, that explain() says the same, and what importing the package loads."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import make_call
from support.devices import device_of
from support.implementations import ALL, skip_unless_served

import peftkernels
from peftkernels import Explanation, explain, lora_linear
from peftkernels.backends import registry, triton
from peftkernels.functional import linear


def _runs(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **keywords: Any) -> str:
    """The implementation whose forward operator runs."""
    ran: list[str] = []

    def watched(name: str) -> Any:
        operators = registry.OPERATORS[name]

        def forward(*values: Any) -> Any:
            ran.append(name)
            return operators.forward(*values)

        return operators._replace(forward=forward, functions=None)

    direct_call = linear._direct_call

    def watched_direct_call(*values: Any) -> Any:
        y = direct_call(*values)
        if y is not None:
            ran.append("cpu")
        return y

    with monkeypatch.context() as patch:
        patch.setattr(linear, "_direct_call", watched_direct_call)
        for name in list(registry.OPERATORS):
            patch.setitem(registry.OPERATORS, name, watched(name))
        lora_linear(*arguments, **keywords)
    assert len(ran) == 1
    return ran[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-fp32_factors", "fp16", "fp64"])
@pytest.mark.parametrize("trained_weight", [False, True], ids=["frozen", "trained_weight"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_explain_agrees_with_what_runs(
    dtype: str, trained_weight: bool, autocast: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make_call(seed, dtype=dtype, plan=True)
    call.weight.requires_grad_(trained_weight)
    arguments = (call.x, call.weight, call.lora_A, call.lora_B)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        explanation = explain(*arguments, **call.optional)
        assert _runs(monkeypatch, *arguments, **call.optional) == explanation.chosen
    faster = ("cuda", "triton", "cpu", "eager")
    assert tuple(explanation.why_not) == faster[: faster.index(explanation.chosen)]
    assert all(explanation.why_not.values())


@pytest.mark.parametrize("name", ALL)
def test_a_named_implementation_runs(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_served(name)
    call = make_call(seed).on(device_of(name))
    arguments = (call.x, call.weight, call.lora_A, call.lora_B)
    assert _runs(monkeypatch, *arguments, impl=name, **call.optional) == name


def test_auto_takes_the_cpu_kernels_where_they_are_the_fastest(seed: int) -> None:
    skip_unless_served("cpu")
    call = make_call(seed)
    assert explain(call.x, call.weight, call.lora_A, call.lora_B).chosen == "cpu"


def test_a_trained_weight_is_left_to_eager(seed: int) -> None:
    skip_unless_served("cpu")
    call = make_call(seed)
    explanation = explain(call.x, call.weight.requires_grad_(), call.lora_A, call.lora_B)
    assert explanation.chosen == "eager"
    assert explanation.why_not["cpu"] == "weight requires grad, the C++ kernels serve frozen weights"


def test_other_devices_are_left_to_eager(seed: int) -> None:
    call = make_call(seed, bias=False, gate=False)
    arguments = [value.to("meta") for value in (call.x, call.weight, call.lora_A, call.lora_B)]
    assert explain(*arguments).chosen == "eager"
    assert lora_linear(*arguments).shape == (7, 33)


def test_an_explanation_is_a_dataclass_that_prints_its_reasons() -> None:
    explanation = Explanation("eager", {"cuda": "no GPU", "cpu": "not built"})
    assert dataclasses.is_dataclass(explanation)
    assert str(explanation) == "lora_linear runs on 'eager'\n  not 'cuda': no GPU\n  not 'cpu': not built"
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.chosen = "cpu"


def test_explaining_computes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(*arguments: Any) -> None:
        raise AssertionError("a kernel ran")

    for name in list(registry.OPERATORS):
        monkeypatch.setitem(registry.OPERATORS, name, registry.Operators(ran, ran, ran))
    monkeypatch.setattr(linear, "_direct_call", ran)
    call = make_call(seed, dropout_p=0.5)
    before = torch.random.get_rng_state()
    explain(call.x, call.weight, call.lora_A, call.lora_B, **{**call.optional, "dropout_seed": None})
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_status_of_every_backend_is_known() -> None:
    status = registry.backend_status()
    assert tuple(status) == registry.names() == ("reference", "eager", "cpu", "triton", "cuda")
    assert status["reference"] is None
    assert status["eager"] is None
    assert (status["triton"] is None) == (triton.interpreting() or torch.cuda.is_available())
    assert status["cuda"]


def test_an_extension_that_was_built_is_served() -> None:
    """A build that does not load must not pass for a machine without a compiler."""
    built = sorted(Path(peftkernels.__file__).parent.glob("_C.*"))
    if not built:
        pytest.skip("the C++ extension was not built here")
    assert registry.backend_status()["cpu"] is None


def test_importing_loads_neither_kernels_nor_optional_packages() -> None:
    program = (
        "import sys, peftkernels\n"
        "heavy = ['peftkernels._C', 'transformers', 'peft', 'matplotlib', 'rich', 'sklearn', 'torch._dynamo']\n"
        "print(sorted(name for name in heavy if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names() -> None:
    operator = {"Explanation", "RankPlan", "RankState", "__version__", "explain", "lora_linear", "shared_shrink"}
    kept = {"weights_changed"}
    builders = {"Backend", "LoraLinearFunction", "register_backend"}
    assert set(peftkernels.__all__) == {*operator, *kept, *builders, "apply_to_peft", "revert", "stats"}
    for name in peftkernels.__all__:
        assert getattr(peftkernels, name) is not None


def test_a_transform_is_explained(seed: int) -> None:
    call = make_call(seed)
    found: list[Explanation] = []

    def loss(x: Any) -> Any:
        found.append(explain(x, call.weight, call.lora_A, call.lora_B))
        return lora_linear(x, call.weight, call.lora_A, call.lora_B).sum()

    torch.func.grad(loss)(call.x)
    assert found[0].chosen == "composition"
    reason = "the call is differentiated by a transform of torch.func, which kernels do not follow"
    assert found[0].why_not == dict.fromkeys(("cuda", "triton", "cpu", "eager"), reason)
