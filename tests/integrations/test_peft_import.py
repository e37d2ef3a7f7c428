"""Adapters that HF peft or we ourselves wrote, read into our layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exported_models import (
    CLOSE,
    PATHS,
    WIDTH,
    adapted_model,
    base_model,
    config_of,
    prune,
)
from torch import Tensor, nn

from peftkernels.integrations.peft import load_adapter, save_adapter
from peftkernels.nn import AdaLoRALinear, LoRALinear


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(3))


def test_loading_into_layers_and_into_plain_modules(tmp_path: Path, x: Tensor) -> None:
    model = adapted_model(AdaLoRALinear, lora_dropout=0.25)
    prune(model, [0, 2, 5], [], [0, 1, 2, 3, 4, 5], [3, 4])
    save_adapter(model, tmp_path)
    plain, adapted = base_model(), adapted_model(AdaLoRALinear)
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
    theirs = peft.get_peft_model(base_model(), config)
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
    ours = base_model()
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
    save_adapter(adapted_model(AdaLoRALinear), tmp_path)
    _assert_refused(
        adapted_model(AdaLoRALinear, r=5),
        tmp_path,
        ValueError,
        r"found AdaLoRALinear with r=5, lora_alpha=9 at 'blocks\.0\.query', expected AdaLoRALinear with r=6",
    )
    _assert_refused(adapted_model(AdaLoRALinear, lora_alpha=8), tmp_path, ValueError, "lora_alpha=8 at")
    _assert_refused(adapted_model(LoRALinear), tmp_path, ValueError, "found LoRALinear with r=6, lora_alpha=9 at")
    _assert_refused(
        adapted_model(AdaLoRALinear, [*PATHS, "blocks.1.out"]),
        tmp_path,
        ValueError,
        r"adapter layers that the file does not have, blocks\.1\.out",
    )
    smaller = base_model()
    del smaller.blocks[1]
    _assert_refused(smaller, tmp_path, ValueError, r"found no module 'blocks\.1\.query', for which the file has an")
    other = base_model()
    other.blocks[1].value = nn.Identity()
    _assert_refused(other, tmp_path, TypeError, r"found Identity at 'blocks\.1\.value', expected nn.Linear or AdaLoRA")
    wider = base_model()
    wider.blocks[1].value = nn.Linear(WIDTH + 1, 24)
    _assert_refused(
        wider, tmp_path, ValueError, r"blocks\.1\.value\.lora_A: found \(6, 16\) in the file, expected \(6, 17\)"
    )


def test_loading_checks_the_files(tmp_path: Path) -> None:
    model = adapted_model(AdaLoRALinear)
    prune(model, [0, 2, 5], [1], [0, 1, 2, 3, 4, 5], [3, 4])
    save_adapter(model, tmp_path, modules_to_save=["head"])
    config_path, weights_path = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, tensors = config_of(tmp_path), load_file(weights_path)
    # As peft writes it, without a configuration of its own.
    save_file(tensors, weights_path)

    def refused(error: type[Exception], message: str) -> None:
        _assert_refused(base_model(), tmp_path, error, message)

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
