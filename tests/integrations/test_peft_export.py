"""Adapters written for HF peft and read back, by peft and by ourselves."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftkernels import RankState
from peftkernels.allocation import AdaLoraAllocator, Budget, BudgetAllocator
from peftkernels.allocation.strategies import Magnitude
from peftkernels.integrations.peft import adapter_files, load_adapter, save_adapter
from peftkernels.nn import AdaLoRALinear, LoRALinear

WIDTH = 16
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, 24)
        self.out = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.query(x)) + self.out(torch.tanh(self.value(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Sequential(nn.Linear(WIDTH, 5), nn.LayerNorm(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


PATHS = [f"blocks.{index}.{name}" for index in range(2) for name in ("query", "value")]


def _base() -> Net:
    torch.manual_seed(0)
    return Net()


def _adapt(kind: type, paths: list[str] = PATHS, **arguments: Any) -> Net:
    """A base model with adapters that contribute, and a head that training has changed."""
    model = _base()
    torch.manual_seed(1)
    for index, path in enumerate(paths):
        parent, _, name = path.rpartition(".")
        own = {key: value[index] if isinstance(value, list) else value for key, value in arguments.items()}
        layer = kind.from_linear(model.get_submodule(path), **{"r": 6, "lora_alpha": 9, **own})
        for factor in layer.parameters():
            if factor.requires_grad:
                nn.init.normal_(factor, std=0.3)
        setattr(model.get_submodule(parent), name, layer)
    return model.eval()


def _prune(model: Net, *kept: list[int]) -> dict[str, list[bool]]:
    """Mask ranks as an allocator does: gates zero, states PROBE."""
    pattern = {}
    for path, ranks in zip(PATHS, kept, strict=True):
        layer = model.get_submodule(path)
        keep = torch.zeros(layer.r, dtype=torch.bool)
        keep[ranks] = True
        with torch.no_grad():
            layer.lora_E[~keep] = 0
        layer.rank_plan.update_(torch.where(keep, int(RankState.ACTIVE), int(RankState.PROBE)).to(torch.uint8))
        pattern[path] = keep.tolist()
    return pattern


def _change_head(model: Net) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_()


def _through_peft(directory: Path) -> nn.Module:
    peft = pytest.importorskip("peft", reason="reading the adapter with HF peft needs peft installed")
    return peft.PeftModel.from_pretrained(_base(), str(directory)).eval()


def _config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter_config.json").read_text())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(3))


def test_lora(tmp_path: Path, x: Tensor) -> None:
    model = _adapt(LoRALinear, lora_dropout=0.1)
    save_adapter(model, tmp_path, base_model_name_or_path="some/base", task_type="FEATURE_EXTRACTION")
    config = _config(tmp_path)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 6, 9)
    assert config["target_modules"] == ["query", "value"]
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/base", "FEATURE_EXTRACTION")
    assert config["lora_dropout"] == 0.1
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert names == {f"base_model.model.{path}.lora_{f}.weight" for path in PATHS for f in "AB"}
    peft = pytest.importorskip("peft", reason="reading the adapter with HF peft needs peft installed")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}))
    theirs = peft.PeftModel.from_pretrained(_base(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)
    assert not torch.allclose(theirs(x), _base()(x), atol=0.1)


def test_lora_of_several_ranks(tmp_path: Path, x: Tensor) -> None:
    model = _adapt(LoRALinear, r=[2, 6, 6, 3], lora_alpha=[4, 9, 9, 9])
    save_adapter(model, tmp_path)
    config = _config(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (6, 9)
    assert config["rank_pattern"] == {"blocks.0.query": 2, "blocks.1.value": 3}
    assert config["alpha_pattern"] == {"blocks.0.query": 4}
    torch.testing.assert_close(_through_peft(tmp_path)(x), model(x), **CLOSE)


def test_adalora_with_pruned_ranks(tmp_path: Path, x: Tensor) -> None:
    model = _adapt(AdaLoRALinear)
    pattern = _prune(model, [0, 2, 5], [1], [0, 1, 2, 3, 4, 5], [3, 4])
    save_adapter(model, tmp_path)
    config = _config(tmp_path)
    assert (config["peft_type"], config["init_r"], config["lora_alpha"]) == ("ADALORA", 6, 9)
    assert config["rank_pattern"] == {f"{path}.lora_E": kept for path, kept in pattern.items()}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.blocks.0.query.lora_A"].shape == (3, WIDTH)
    assert tensors["base_model.model.blocks.0.value.lora_B"].shape == (24, 1)
    assert tensors["base_model.model.blocks.1.value.lora_E"].shape == (2, 1)
    torch.testing.assert_close(_through_peft(tmp_path)(x), model(x), **CLOSE)


def test_adalora_before_any_pruning(tmp_path: Path, x: Tensor) -> None:
    model = _adapt(AdaLoRALinear)
    save_adapter(model, tmp_path)
    assert _config(tmp_path)["rank_pattern"] is None
    torch.testing.assert_close(_through_peft(tmp_path)(x), model(x), **CLOSE)


def test_adalora_layer_without_kept_ranks(tmp_path: Path, x: Tensor) -> None:
    model = _adapt(AdaLoRALinear)
    _prune(model, [0, 2, 5], [], [1, 2], [])
    save_adapter(model, tmp_path)
    torch.testing.assert_close(_through_peft(tmp_path)(x), model(x), **CLOSE)


def test_file_equals_pefts_own(tmp_path: Path) -> None:
    """The same adapter saved by peft: equal tensors under equal names, equal pattern."""
    peft = pytest.importorskip("peft", reason="the comparison with HF peft's file needs peft installed")
    model = _adapt(AdaLoRALinear)
    pattern = _prune(model, [0, 2, 5], [1], [0, 1, 2, 3, 4, 5], [3, 4])
    config = peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=9, total_step=10, target_modules=["query", "value"])
    theirs = peft.get_peft_model(_base(), config)
    state = {f"base_model.model.{key}": value for key, value in model.state_dict().items() if "lora_" in key}
    assert not peft.set_peft_model_state_dict(theirs, state).unexpected_keys
    theirs.peft_config["default"].rank_pattern = {f"{path}.lora_E.default": kept for path, kept in pattern.items()}
    theirs.save_pretrained(str(tmp_path / "theirs"))
    save_adapter(model, tmp_path / "ours")
    ours, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert _config(tmp_path / "ours")["rank_pattern"] == _config(tmp_path / "theirs")["rank_pattern"]


@pytest.mark.parametrize("states", ["of-the-layers", "given"])
def test_adalora_as_lora(tmp_path: Path, x: Tensor, states: str) -> None:
    model = _adapt(AdaLoRALinear, r=[6, 6, 4, 8], lora_alpha=[9, 3, 9, 9])
    pattern = _prune(model, [0, 2, 5], [1], [0, 1, 3], [])
    save_adapter(model, tmp_path, as_lora=True, rank_pattern=pattern if states == "given" else None)
    config = _config(tmp_path)
    assert (config["peft_type"], config["r"]) == ("LORA", 3)
    assert config["rank_pattern"] == {"blocks.0.value": 1}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("blocks.1.value" in name or "lora_E" in name for name in tensors)
    layer = model.blocks[0].query
    gated = (layer.lora_A * layer.lora_E)[[0, 2, 5]]
    assert torch.equal(tensors["base_model.model.blocks.0.query.lora_A.weight"], gated)
    theirs = _through_peft(tmp_path)
    assert theirs.base_model.model.blocks[0].query.scaling["default"] == pytest.approx(layer.scaling, rel=1e-15)
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)


def test_lora_and_adalora_together_as_lora(tmp_path: Path, x: Tensor) -> None:
    model = _adapt(AdaLoRALinear)
    model.blocks[0].out = LoRALinear.from_linear(model.blocks[0].out, 2, 5)
    nn.init.normal_(model.blocks[0].out.lora_B.weight)
    with pytest.raises(ValueError, match=r"found LoRALinear at 'blocks.0.out' and AdaLoRALinear at .*as_lora=True"):
        save_adapter(model, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    save_adapter(model, tmp_path, as_lora=True)
    torch.testing.assert_close(_through_peft(tmp_path)(x), model(x), **CLOSE)


@pytest.mark.parametrize("as_lora", [False, True])
def test_trained_head_goes_along(tmp_path: Path, x: Tensor, as_lora: bool) -> None:
    model = _adapt(AdaLoRALinear)
    _prune(model, [0, 2, 5], [1], [0, 1, 2, 3, 4, 5], [3, 4])
    _change_head(model)
    save_adapter(model, tmp_path, modules_to_save=["head"], as_lora=as_lora)
    assert _config(tmp_path)["modules_to_save"] == ["head"]
    torch.testing.assert_close(_through_peft(tmp_path)(x), model(x), **CLOSE)
    ours = _base()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours.eval()(x), model(x), **CLOSE)


def test_merged_layers_are_written_like_unmerged(tmp_path: Path, x: Tensor) -> None:
    model = _adapt(AdaLoRALinear)
    expected = model(x)
    for path in PATHS:
        model.get_submodule(path).merge()
    save_adapter(model, tmp_path)
    torch.testing.assert_close(_through_peft(tmp_path)(x), expected, **CLOSE)


@pytest.mark.parametrize("as_lora", [False, True])
def test_half_precision_factors(tmp_path: Path, x: Tensor, as_lora: bool) -> None:
    model = _adapt(AdaLoRALinear)
    for path in PATHS:
        layer = model.get_submodule(path)
        for name in ("lora_A", "lora_B", "lora_E"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach().to(torch.bfloat16)))
    save_adapter(model, tmp_path, as_lora=as_lora)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32 if as_lora else torch.bfloat16}
    torch.testing.assert_close(_through_peft(tmp_path)(x), model(x), **CLOSE)


def test_after_training_with_the_allocator(tmp_path: Path, x: Tensor) -> None:
    model = _adapt(AdaLoRALinear).train()
    allocator = AdaLoraAllocator(model, total_step=12, target_r=2, tfinal=3)
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if "lora_" in name], lr=1e-2)
    allocator.attach(optimizer)
    for _ in range(14):
        (model(x).square().mean() + allocator.regularization()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    save_adapter(model, tmp_path, rank_pattern=allocator.rank_pattern(), settings=allocator.settings)
    config = _config(tmp_path)
    assert sum(map(sum, config["rank_pattern"].values())) == 8
    assert (config["total_step"], config["target_r"], config["tfinal"]) == (12, 2, 3)
    torch.testing.assert_close(_through_peft(tmp_path)(x), model(x), **CLOSE)


@pytest.mark.parametrize("unit", ["ranks", "parameters"])
def test_settings_with_a_budget_write_the_average_rank(tmp_path: Path, x: Tensor, unit: str) -> None:
    peft = pytest.importorskip("peft", reason="reading the adapter with HF peft needs peft installed")
    model = _adapt(AdaLoRALinear).train()
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
    torch.testing.assert_close(_through_peft(tmp_path)(x), model(x), **CLOSE)
    loaded = _base()
    load_adapter(loaded, tmp_path)
    loaded.eval()
    torch.testing.assert_close(loaded(x), model(x), **CLOSE)


# Names


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
    assert _config(tmp_path)["target_modules"] == target_modules
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)
    wrapped = [name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")]
    assert wrapped == adapted
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(x), model(x), **CLOSE)


# Reading


def test_loading_into_layers_and_into_plain_modules(tmp_path: Path, x: Tensor) -> None:
    model = _adapt(AdaLoRALinear, lora_dropout=0.25)
    _prune(model, [0, 2, 5], [], [0, 1, 2, 3, 4, 5], [3, 4])
    save_adapter(model, tmp_path)
    plain, adapted = _base(), _adapt(AdaLoRALinear)
    original = plain.blocks[0].query
    for target in (plain, adapted):
        load_adapter(target, tmp_path)
        torch.testing.assert_close(target.eval()(x), model(x), **CLOSE)
        layer = target.blocks[0].query
        assert layer.rank_state.tolist() == [2, 0, 2, 0, 0, 2]
        assert layer.rank_plan.counts.tolist() == [3, 3]
        assert not layer.lora_A[1].any()
        assert not layer.lora_E[[1, 3, 4]].any()
    assert plain.blocks[0].query.base_layer is original
    assert plain.blocks[0].query.lora_dropout == 0.25


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_reads_what_peft_writes(tmp_path: Path, x: Tensor, kind: str) -> None:
    peft = pytest.importorskip("peft", reason="writing the adapter with HF peft needs peft installed")
    shared = {"lora_alpha": 9, "target_modules": ["query", "value"], "modules_to_save": ["head"]}
    if kind == "lora":
        patterns = {"rank_pattern": {"blocks.1.query": 2, "value": 4}, "alpha_pattern": {"value": 5}}
        config = peft.LoraConfig(r=6, **patterns, **shared)
    else:
        config = peft.AdaLoraConfig(init_r=6, target_r=3, total_step=10, **shared)
    theirs = peft.get_peft_model(_base(), config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    if kind == "adalora":
        gates = {n: p for n, p in theirs.base_model.model.named_parameters() if "lora_E" in n}
        pattern = {}
        for name, gate in gates.items():
            keep = torch.rand(6) < 0.5
            with torch.no_grad():
                gate[~keep] = 0
            pattern[name] = keep.tolist()
        theirs.peft_config["default"].rank_pattern = pattern
    theirs.eval()
    expected = theirs(x)
    theirs.save_pretrained(str(tmp_path))
    ours = _base()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours.eval()(x), expected, **CLOSE)


def _assert_refused(model: nn.Module, directory: Path, error: type[Exception], message: str) -> None:
    """The call raises and the model is what it was, frozen parameters and layer types included."""

    def state() -> tuple[str, dict[str, Tensor], list[bool]]:
        tensors = {name: value.clone() for name, value in model.state_dict().items()}
        return repr(model), tensors, [parameter.requires_grad for parameter in model.parameters()]

    before = state()
    with pytest.raises(error, match=message):
        load_adapter(model, directory)
    after = state()
    assert before[0] == after[0]
    assert before[2] == after[2]
    assert all(torch.equal(value, after[1][name]) for name, value in before[1].items())


def test_loading_checks_the_model(tmp_path: Path) -> None:
    save_adapter(_adapt(AdaLoRALinear), tmp_path)
    _assert_refused(
        _adapt(AdaLoRALinear, r=5),
        tmp_path,
        ValueError,
        r"found AdaLoRALinear with r=5, lora_alpha=9 at 'blocks\.0\.query', expected AdaLoRALinear with r=6",
    )
    _assert_refused(_adapt(AdaLoRALinear, lora_alpha=8), tmp_path, ValueError, "lora_alpha=8 at")
    _assert_refused(_adapt(LoRALinear), tmp_path, ValueError, "found LoRALinear with r=6, lora_alpha=9 at")
    _assert_refused(
        _adapt(AdaLoRALinear, [*PATHS, "blocks.1.out"]),
        tmp_path,
        ValueError,
        r"adapter layers that the file does not have, blocks\.1\.out",
    )
    smaller = _base()
    del smaller.blocks[1]
    _assert_refused(smaller, tmp_path, ValueError, r"found no module 'blocks\.1\.query', for which the file has an")
    other = _base()
    other.blocks[1].value = nn.Identity()
    _assert_refused(other, tmp_path, TypeError, r"found Identity at 'blocks\.1\.value', expected nn.Linear or AdaLoRA")
    wider = _base()
    wider.blocks[1].value = nn.Linear(WIDTH + 1, 24)
    _assert_refused(
        wider, tmp_path, ValueError, r"blocks\.1\.value\.lora_A: found \(6, 16\) in the file, expected \(6, 17\)"
    )


def test_loading_checks_the_files(tmp_path: Path) -> None:
    model = _adapt(AdaLoRALinear)
    _prune(model, [0, 2, 5], [1], [0, 1, 2, 3, 4, 5], [3, 4])
    save_adapter(model, tmp_path, modules_to_save=["head"])
    config_path, weights_path = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, tensors = _config(tmp_path), load_file(weights_path)
    # As peft writes it, without a configuration of its own.
    save_file(tensors, weights_path)

    def refused(error: type[Exception], message: str) -> None:
        _assert_refused(_base(), tmp_path, error, message)

    for name, value in [("use_dora", True), ("bias", "all"), ("fan_in_fan_out", True), ("use_rslora", True)]:
        config_path.write_text(json.dumps({**config, name: value}))
        refused(ValueError, f"found {name} = {value!r}, expected")
    config_path.write_text(json.dumps({**config, "peft_type": "LOHA"}))
    refused(ValueError, "found peft_type 'LOHA', expected 'LORA' or 'ADALORA'")
    config_path.write_text('{"peft_type": "ADALORA",\n oops}')
    refused(ValueError, r"adapter_config\.json, line 2: found no JSON")
    shorter = {**config["rank_pattern"], "blocks.0.query.lora_E": [True, True, False, False, False, False]}
    config_path.write_text(json.dumps({**config, "rank_pattern": shorter}))
    refused(ValueError, r"rank_pattern\['blocks\.0\.query\.lora_E'\]: found 6 ranks, 2 of them kept, and 3 ranks in")
    config_path.write_text(json.dumps(config))

    def rewritten(changed: dict[str, Tensor]) -> None:
        save_file(changed, weights_path)

    query = "base_model.model.blocks.0.query.lora_B"
    rewritten({name: value for name, value in tensors.items() if name != query})
    refused(ValueError, r"found no blocks\.0\.query\.lora_B, expected it beside")
    rewritten({**tensors, "base_model.model.tail.weight": torch.zeros(2)})
    refused(ValueError, r"found the tensor 'tail\.weight', which the model does not have")
    rewritten({**tensors, "base_model.model.head.0.weight": torch.zeros(2)})
    refused(ValueError, r"head\.0\.weight: found \(2,\) in the file, expected \(5, 16\)")
    rewritten({name: value for name, value in tensors.items() if "head" in name})
    refused(ValueError, r"found no tensor named \.\.\.\.lora_A, expected the factors")
    config_path.unlink()
    refused(FileNotFoundError, r"found no adapter_config\.json in")
    weights_path.unlink()
    refused(FileNotFoundError, r"found no adapter_config\.json and no adapter_model\.safetensors in")
    config_path.write_text(json.dumps(config))
    refused(FileNotFoundError, r"found no adapter_model\.safetensors in")


# Writing


def test_saving_checks_its_arguments(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    model = _adapt(AdaLoRALinear)
    pattern = {path: [True] * 6 for path in PATHS}
    cases: list[tuple[nn.Module, dict[str, Any], type[Exception], str]] = [
        (_base(), {}, ValueError, "found no LoRALinear or AdaLoRALinear in Net"),
        (model.blocks[0].query, {}, ValueError, "found a AdaLoRALinear itself"),
        (model, {"modules_to_save": "head"}, TypeError, "modules_to_save: found the str 'head'"),
        (model, {"modules_to_save": ["tail"]}, ValueError, "modules_to_save: found 'tail', which no module's path"),
        (model, {"modules_to_save": ["blocks.0"]}, ValueError, r"'blocks\.0' holds adapter 'blocks\.0\.query'"),
        (model, {"rank_pattern": {**pattern, "x": [True]}}, ValueError, r"on one side only: \['x'\]"),
        (model, {"rank_pattern": {**pattern, PATHS[1]: [True]}}, ValueError, "found 1 values, expected r = 6"),
        (model, {"rank_pattern": dict.fromkeys(PATHS, [False] * 6), "as_lora": True}, ValueError, "no kept rank"),
        (_adapt(AdaLoRALinear, r=[6, 6, 5, 6]), {}, ValueError, r"found r 6 at .* and 5 at .*as_lora=True"),
        (_adapt(AdaLoRALinear, lora_alpha=[9, 9, 5, 9]), {}, ValueError, r"found lora_alpha 9 at .* and 5 at"),
        (
            _adapt(LoRALinear, lora_dropout=[0.0, 0.5, 0.0, 0.0]),
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
    save_adapter(_adapt(LoRALinear), tmp_path)
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
        save_adapter(_adapt(LoRALinear, r=3), tmp_path)
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
