"""Adapters written for HF peft and read back by peft."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.exported_models import (
    CLOSE,
    PATHS,
    WIDTH,
    Block,
    adapted_model,
    base_model,
    change_head,
    config_of,
    prune,
    through_peft,
)
from torch import Tensor, nn

from peftkernels.allocation import AdaLoraAllocator, Budget, BudgetAllocator
from peftkernels.allocation.strategies import Magnitude
from peftkernels.integrations.peft import adapter_files, load_adapter, save_adapter
from peftkernels.nn import AdaLoRALinear, LoRALinear


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(3))


def test_lora(tmp_path: Path, x: Tensor) -> None:
    model = adapted_model(LoRALinear, lora_dropout=0.1)
    save_adapter(model, tmp_path, base_model_name_or_path="some/base", task_type="FEATURE_EXTRACTION")
    config = config_of(tmp_path)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 6, 9)
    assert config["target_modules"] == ["query", "value"]
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/base", "FEATURE_EXTRACTION")
    assert config["lora_dropout"] == 0.1
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert names == {f"base_model.model.{path}.lora_{f}.weight" for path in PATHS for f in "AB"}
    peft = pytest.importorskip("peft", reason="reading the adapter with HF peft needs peft installed")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}))
    theirs = peft.PeftModel.from_pretrained(base_model(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)
    assert not torch.allclose(theirs(x), base_model()(x), atol=0.1)


def test_lora_of_several_ranks(tmp_path: Path, x: Tensor) -> None:
    model = adapted_model(LoRALinear, r=[2, 6, 6, 3], lora_alpha=[4, 9, 9, 9])
    save_adapter(model, tmp_path)
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (6, 9)
    assert config["rank_pattern"] == {"blocks.0.query": 2, "blocks.1.value": 3}
    assert config["alpha_pattern"] == {"blocks.0.query": 4}
    torch.testing.assert_close(through_peft(tmp_path)(x), model(x), **CLOSE)


def test_adalora_with_pruned_ranks(tmp_path: Path, x: Tensor) -> None:
    model = adapted_model(AdaLoRALinear)
    pattern = prune(model, [0, 2, 5], [1], [0, 1, 2, 3, 4, 5], [3, 4])
    save_adapter(model, tmp_path)
    config = config_of(tmp_path)
    assert (config["peft_type"], config["init_r"], config["lora_alpha"]) == ("ADALORA", 6, 9)
    assert config["rank_pattern"] == {f"{path}.lora_E": kept for path, kept in pattern.items()}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.blocks.0.query.lora_A"].shape == (3, WIDTH)
    assert tensors["base_model.model.blocks.0.value.lora_B"].shape == (24, 1)
    assert tensors["base_model.model.blocks.1.value.lora_E"].shape == (2, 1)
    torch.testing.assert_close(through_peft(tmp_path)(x), model(x), **CLOSE)


def test_adalora_before_any_pruning(tmp_path: Path, x: Tensor) -> None:
    model = adapted_model(AdaLoRALinear)
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["rank_pattern"] is None
    torch.testing.assert_close(through_peft(tmp_path)(x), model(x), **CLOSE)


def test_adalora_layer_without_kept_ranks(tmp_path: Path, x: Tensor) -> None:
    model = adapted_model(AdaLoRALinear)
    prune(model, [0, 2, 5], [], [1, 2], [])
    save_adapter(model, tmp_path)
    torch.testing.assert_close(through_peft(tmp_path)(x), model(x), **CLOSE)


def test_file_equals_pefts_own(tmp_path: Path) -> None:
    """The same adapter saved by peft: equal tensors under equal names, equal pattern."""
    peft = pytest.importorskip("peft", reason="the comparison with HF peft's file needs peft installed")
    model = adapted_model(AdaLoRALinear)
    pattern = prune(model, [0, 2, 5], [1], [0, 1, 2, 3, 4, 5], [3, 4])
    config = peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=9, total_step=10, target_modules=["query", "value"])
    theirs = peft.get_peft_model(base_model(), config)
    state = {f"base_model.model.{key}": value for key, value in model.state_dict().items() if "lora_" in key}
    assert not peft.set_peft_model_state_dict(theirs, state).unexpected_keys
    theirs.peft_config["default"].rank_pattern = {f"{path}.lora_E.default": kept for path, kept in pattern.items()}
    theirs.save_pretrained(str(tmp_path / "theirs"))
    save_adapter(model, tmp_path / "ours")
    ours, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert config_of(tmp_path / "ours")["rank_pattern"] == config_of(tmp_path / "theirs")["rank_pattern"]


@pytest.mark.parametrize("states", ["of-the-layers", "given"])
def test_adalora_as_lora(tmp_path: Path, x: Tensor, states: str) -> None:
    model = adapted_model(AdaLoRALinear, r=[6, 6, 4, 8], lora_alpha=[9, 3, 9, 9])
    pattern = prune(model, [0, 2, 5], [1], [0, 1, 3], [])
    save_adapter(model, tmp_path, as_lora=True, rank_pattern=pattern if states == "given" else None)
    config = config_of(tmp_path)
    assert (config["peft_type"], config["r"]) == ("LORA", 3)
    assert config["rank_pattern"] == {"blocks.0.value": 1}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("blocks.1.value" in name or "lora_E" in name for name in tensors)
    layer = model.blocks[0].query
    gated = (layer.lora_A * layer.lora_E)[[0, 2, 5]]
    assert torch.equal(tensors["base_model.model.blocks.0.query.lora_A.weight"], gated)
    theirs = through_peft(tmp_path)
    assert theirs.base_model.model.blocks[0].query.scaling["default"] == pytest.approx(layer.scaling, rel=1e-15)
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)


def test_lora_and_adalora_together_as_lora(tmp_path: Path, x: Tensor) -> None:
    model = adapted_model(AdaLoRALinear)
    model.blocks[0].out = LoRALinear.from_linear(model.blocks[0].out, 2, 5)
    nn.init.normal_(model.blocks[0].out.lora_B.weight)
    with pytest.raises(ValueError, match=r"found LoRALinear at 'blocks.0.out' and AdaLoRALinear at .*as_lora=True"):
        save_adapter(model, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    save_adapter(model, tmp_path, as_lora=True)
    torch.testing.assert_close(through_peft(tmp_path)(x), model(x), **CLOSE)


@pytest.mark.parametrize("as_lora", [False, True])
def test_trained_head_goes_along(tmp_path: Path, x: Tensor, as_lora: bool) -> None:
    model = adapted_model(AdaLoRALinear)
    prune(model, [0, 2, 5], [1], [0, 1, 2, 3, 4, 5], [3, 4])
    change_head(model)
    save_adapter(model, tmp_path, modules_to_save=["head"], as_lora=as_lora)
    assert config_of(tmp_path)["modules_to_save"] == ["head"]
    torch.testing.assert_close(through_peft(tmp_path)(x), model(x), **CLOSE)
    ours = base_model()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours.eval()(x), model(x), **CLOSE)


def test_merged_layers_are_written_like_unmerged(tmp_path: Path, x: Tensor) -> None:
    model = adapted_model(AdaLoRALinear)
    expected = model(x)
    for path in PATHS:
        model.get_submodule(path).merge()
    save_adapter(model, tmp_path)
    torch.testing.assert_close(through_peft(tmp_path)(x), expected, **CLOSE)


@pytest.mark.parametrize("as_lora", [False, True])
def test_half_precision_factors(tmp_path: Path, x: Tensor, as_lora: bool) -> None:
    model = adapted_model(AdaLoRALinear)
    for path in PATHS:
        layer = model.get_submodule(path)
        for name in ("lora_A", "lora_B", "lora_E"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach().to(torch.bfloat16)))
    save_adapter(model, tmp_path, as_lora=as_lora)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32 if as_lora else torch.bfloat16}
    torch.testing.assert_close(through_peft(tmp_path)(x), model(x), **CLOSE)


def test_after_training_with_the_allocator(tmp_path: Path, x: Tensor) -> None:
    model = adapted_model(AdaLoRALinear).train()
    allocator = AdaLoraAllocator(model, total_step=12, target_r=2, tfinal=3)
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if "lora_" in name], lr=1e-2)
    allocator.attach(optimizer)
    for _ in range(14):
        (model(x).square().mean() + allocator.regularization()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    save_adapter(model, tmp_path, rank_pattern=allocator.rank_pattern(), settings=allocator.settings)
    config = config_of(tmp_path)
    assert sum(map(sum, config["rank_pattern"].values())) == 8
    assert (config["total_step"], config["target_r"], config["tfinal"]) == (12, 2, 3)
    torch.testing.assert_close(through_peft(tmp_path)(x), model(x), **CLOSE)


@pytest.mark.parametrize("unit", ["ranks", "parameters"])
def test_settings_with_a_budget_write_the_average_rank(tmp_path: Path, x: Tensor, unit: str) -> None:
    peft = pytest.importorskip("peft", reason="reading the adapter with HF peft needs peft installed")
    model = adapted_model(AdaLoRALinear).train()
    layers = {path: model.get_submodule(path) for path in PATHS}
    if unit == "ranks":
        total = 10
    else:
        total = 10 * min(layer.lora_A.shape[1] + layer.lora_B.shape[0] + 1 for layer in layers.values())
    allocator = BudgetAllocator(
        model, Magnitude(), budget=Budget(total, unit), total_step=12, tfinal=3, exact_budget=True, orth_reg_weight=0.2
    )
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if "lora_" in name], lr=1e-2)
    allocator.attach(optimizer)
    for _ in range(14):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    pattern = allocator.rank_pattern()
    save_adapter(model, tmp_path, rank_pattern=pattern, settings=allocator.settings)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, peft.AdaLoraConfig)
    kept = sum(map(sum, pattern.values()))
    assert config.target_r == round(kept / len(PATHS)) >= 1
    assert (config.beta1, config.beta2, config.orth_reg_weight, config.tfinal) == (0.85, 0.85, 0.2, 3)
    torch.testing.assert_close(through_peft(tmp_path)(x), model(x), **CLOSE)
    loaded = base_model()
    load_adapter(loaded, tmp_path)
    loaded.eval()
    torch.testing.assert_close(loaded(x), model(x), **CLOSE)


class Twins(nn.Module):
    """One module's path is the end of another's, and a plain module's path ends with an adapted one's."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.outer = nn.ModuleDict({"block": Block(), "other": Block()})

    def forward(self, x: Tensor) -> Tensor:
        return self.outer["other"](self.outer["block"](self.block(x)))


@pytest.mark.parametrize(
    ("adapted", "target_modules"),
    [
        (["block.query", "outer.block.query", "outer.other.query"], ["query"]),
        (["outer.block.query"], ["outer.block.query"]),
        (["block.query", "outer.block.query"], ["block.query", "outer.block.query"]),
        (["block.query"], r"block\.query"),
        (["block.query", "outer.other.value"], r"block\.query|outer\.other\.value"),
    ],
)
def test_exactly_the_adapted_modules_are_targeted(
    tmp_path: Path, x: Tensor, adapted: list[str], target_modules: list[str] | str
) -> None:
    peft = pytest.importorskip("peft", reason="reading the adapter with HF peft needs peft installed")
    torch.manual_seed(4)
    base = Twins()
    model = copy.deepcopy(base)
    for index, path in enumerate(adapted):
        parent, _, name = path.rpartition(".")
        # Where there are three, the second one's rank is the common one and the first one's needs a pattern.
        layer = LoRALinear.from_linear(model.get_submodule(path), 2 + min(index, 1), 3 + min(index, 1))
        nn.init.normal_(layer.lora_B.weight)
        setattr(model.get_submodule(parent), name, layer)
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["target_modules"] == target_modules
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)
    wrapped = [name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")]
    assert wrapped == adapted
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(x), model(x), **CLOSE)


def test_saving_checks_its_arguments(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    model = adapted_model(AdaLoRALinear)
    pattern = {path: [True] * 6 for path in PATHS}
    cases: list[tuple[nn.Module, dict[str, Any], type[Exception], str]] = [
        (base_model(), {}, ValueError, "found no LoRALinear or AdaLoRALinear in Net"),
        (model.blocks[0].query, {}, ValueError, "found a AdaLoRALinear itself"),
        (model, {"modules_to_save": "head"}, TypeError, "modules_to_save: found the str 'head'"),
        (model, {"modules_to_save": ["tail"]}, ValueError, "modules_to_save: found 'tail', which no module's path"),
        (model, {"modules_to_save": ["blocks.0"]}, ValueError, r"'blocks\.0' holds adapter 'blocks\.0\.query'"),
        (model, {"rank_pattern": {**pattern, "x": [True]}}, ValueError, r"on one side only: \['x'\]"),
        (model, {"rank_pattern": {**pattern, PATHS[1]: [True]}}, ValueError, "found 1 values, expected r = 6"),
        (model, {"rank_pattern": dict.fromkeys(PATHS, [False] * 6), "as_lora": True}, ValueError, "no kept rank"),
        (adapted_model(AdaLoRALinear, r=[6, 6, 5, 6]), {}, ValueError, r"found r 6 at .* and 5 at .*as_lora=True"),
        (adapted_model(AdaLoRALinear, lora_alpha=[9, 9, 5, 9]), {}, ValueError, r"found lora_alpha 9 at .* and 5 at"),
        (
            adapted_model(LoRALinear, lora_dropout=[0.0, 0.5, 0.0, 0.0]),
            {},
            ValueError,
            r"found lora_dropout 0.0 at .* and 0.5",
        ),
    ]
    for source, arguments, error, message in cases:
        with pytest.raises(error, match=message):
            save_adapter(source, target, **arguments)
        assert not target.exists()
    target.write_text("a file")
    with pytest.raises(ValueError, match="directory: found the file"):
        save_adapter(model, target)
    with pytest.raises(TypeError, match="model: found dict"):
        save_adapter({}, tmp_path)


@pytest.mark.parametrize("moment", ["weights", "config", "rename"])
def test_interrupted_writes_leave_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    save_adapter(adapted_model(LoRALinear), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"adapter_config.json", "adapter_model.safetensors"}

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    if moment == "weights":
        monkeypatch.setattr(adapter_files, "save", interrupted)
    elif moment == "config":
        monkeypatch.setattr(os, "fsync", interrupted)
    else:
        monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(adapted_model(LoRALinear, r=3), tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_importing_and_saving_need_no_peft(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['peft'] = None; sys.modules['transformers'] = None\n"
        "from torch import nn\n"
        "from peftkernels.nn import LoRALinear\n"
        "from peftkernels.integrations.peft import load_adapter, save_adapter\n"
        "model = nn.Sequential(LoRALinear.from_linear(nn.Linear(3, 3), 2, 4))\n"
        f"save_adapter(model, {str(tmp_path)!r})\n"
        f"load_adapter(nn.Sequential(nn.Linear(3, 3)), {str(tmp_path)!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "adapter_model.safetensors").is_file()
