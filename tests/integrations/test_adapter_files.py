"""An adapter's two files when they are interrupted, mixed up, damaged, or those of a compiled or wrapped model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from peftkernels.integrations.peft import load_adapter, save_adapter
from peftkernels.nn import AdaLoRALinear, LoRALinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two layers, one of which is called as DistributedDataParallel calls what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.module = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(torch.tanh(self.first(x)))
        return y


def adapted(value: float = 0.1, r: int = 2, alpha: float = 4, kind: type = LoRALinear) -> Net:
    net = Net()
    net.first = kind.from_linear(net.first, r, alpha)
    net.module[0] = kind.from_linear(net.module[0], r, alpha)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora" in name:
                parameter.fill_(value)
    return net


def loaded(directory: Path) -> Tensor:
    net = Net()
    load_adapter(net, directory)
    return net(X).detach()


# A save that is interrupted


_KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_adapter_files import adapted
from peftkernels.integrations.peft import save_adapter
replace, left = os.replace, [{count}]
def counted(*names):
    if left[0] == 0:
        os._exit(9)
    left[0] -= 1
    replace(*names)
os.replace = counted
save_adapter(adapted(0.2, r=4, alpha=40), Path({directory!r}))
"""


@pytest.mark.parametrize("count", range(4))
@pytest.mark.parametrize("earlier", ["ours", "peft's", "none"])
def test_a_save_killed_before_each_rename_leaves_the_old_adapter_or_the_new(
    tmp_path: Path, earlier: str, count: int
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: nothing to compare with")
    directory = tmp_path / "adapter"
    old, new = adapted()(X).detach(), adapted(0.2, r=4, alpha=40)(X).detach()
    if earlier != "none":
        save_adapter(adapted(), directory)
    if earlier == "peft's":
        save_file(load_file(directory / WEIGHTS), directory / WEIGHTS, metadata={"format": "pt"})
    program = _KILLED.format(tests=str(Path(__file__).parent), count=count, directory=str(directory))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    renames = 2 if earlier == "none" else 3
    assert run.returncode == (9 if count < renames else 0), run.stderr

    replaced = count >= renames - 1
    if earlier == "none" and not replaced:
        with pytest.raises(FileNotFoundError):
            load_adapter(Net(), directory)
    else:
        torch.testing.assert_close(loaded(directory), new if replaced else old)
    if (directory / CONFIG).exists():
        torch.testing.assert_close(
            peft.PeftModel.from_pretrained(Net(), directory)(X).detach(), new if count >= renames else old
        )
    else:
        with pytest.raises(ValueError, match="Can't find"):
            peft.PeftModel.from_pretrained(Net(), directory)
    save_adapter(adapted(0.3), directory)
    assert {path.name for path in directory.iterdir()} == {CONFIG, WEIGHTS}
    torch.testing.assert_close(loaded(directory), adapted(0.3)(X).detach())


@pytest.mark.parametrize("place", range(3))
def test_control_c_between_renames_leaves_both_files_of_one_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    save_adapter(adapted(), tmp_path)
    replace, calls = os.replace, [0]

    def interrupted(*names: Any) -> None:
        replace(*names)
        calls[0] += 1
        if calls[0] == place + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(adapted(0.2, r=4, alpha=40), tmp_path)
    monkeypatch.undo()
    expected = adapted() if place == 0 else adapted(0.2, r=4, alpha=40)
    torch.testing.assert_close(loaded(tmp_path), expected(X).detach())
    assert (tmp_path / CONFIG).is_file()


def test_files_of_two_saves_are_refused_by_their_names(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    save_adapter(adapted(0.2, alpha=40), tmp_path / "b")
    shutil.copy(tmp_path / "a" / CONFIG, tmp_path / "b" / CONFIG)
    with pytest.raises(ValueError, match=rf"{CONFIG}: lora_alpha: found 4, but {WEIGHTS} beside it was saved with 40"):
        load_adapter(Net(), tmp_path / "b")


def test_names_in_the_configuration_may_be_edited(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere", "task_type": None}))
    torch.testing.assert_close(loaded(tmp_path), adapted()(X).detach())


# Compiled and wrapped models


class Wrapped(nn.Module):
    """A wrapper that nobody knows."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _inner_compiled(net: Net) -> Net:
    net.module = torch.compile(net.module, backend="eager")  # type: ignore[assignment]
    return net


def _inner_checkpointed(net: Net) -> Net:
    net.module = checkpoint_wrapper(net.module)
    return net


WRAPPINGS: dict[str, Callable[[Net], nn.Module]] = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "data parallel": nn.DataParallel,
    "data parallel, compiled": lambda net: torch.compile(nn.DataParallel(net), backend="eager"),
    "a part compiled": _inner_compiled,
    "a part under activation checkpointing": _inner_checkpointed,
}


@pytest.mark.parametrize("kind", [LoRALinear, AdaLoRALinear])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_wrapped_model_is_saved_and_loaded_under_the_models_own_names(
    tmp_path: Path, wrapping: str, kind: type
) -> None:
    save_adapter(adapted(kind=kind), tmp_path / "plain")
    save_adapter(WRAPPINGS[wrapping](adapted(kind=kind)), tmp_path / "wrapped")
    assert load_file(tmp_path / "plain" / WEIGHTS).keys() == load_file(tmp_path / "wrapped" / WEIGHTS).keys()
    assert (tmp_path / "plain" / CONFIG).read_bytes() == (tmp_path / "wrapped" / CONFIG).read_bytes()
    net = Net()
    load_adapter(WRAPPINGS[wrapping](net), tmp_path / "plain")
    torch.testing.assert_close(net(X), adapted(kind=kind)(X))


def test_a_wrapper_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: found Wrapped, which holds nothing but `module`"):
        save_adapter(Wrapped(adapted()), tmp_path)


# Damaged and hostile files


def _edited(directory: Path, **changes: Any) -> None:
    """Both files as peft writes them, with changes of the configuration."""
    weights = load_file(directory / WEIGHTS)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((directory / CONFIG).read_text()) | changes
    (directory / CONFIG).write_text(json.dumps(config))


def refused(directory: Path, message: str, net: nn.Module | None = None) -> None:
    """Loading raises ValueError with the message and leaves the model as it was."""
    net = Net() if net is None else net

    def state() -> Any:
        flags = [parameter.requires_grad for parameter in net.parameters()]
        return repr(net), flags, {name: value.clone() for name, value in net.state_dict().items()}

    before = state()
    with pytest.raises(ValueError, match=message):
        load_adapter(net, directory)
    after = state()
    assert before[:2] == after[:2]
    assert all(torch.equal(value, after[2][name]) for name, value in before[2].items())


def test_an_enormous_rank_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    save_adapter(adapted(kind=AdaLoRALinear), tmp_path)
    _edited(tmp_path, init_r=1_000_000_000, rank_pattern=None)
    code = (
        "import resource, sys\n"
        "import peftkernels.integrations.peft as integration\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_adapter_files import Net\n"
        "net = Net()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        f"    integration.load_adapter(net, {str(tmp_path)!r})\n"
        "except ValueError as error:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)\n"
    )
    kilobytes, _, message = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.partition(" ")
    assert "expected init_r = 1000000000 ranks" in message
    assert int(kilobytes) < 100_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern\['\('\]: found no regular expression"),
        ({"alpha_pattern": {"first": "much"}}, r"alpha_pattern\['first'\]: found 'much', expected a finite number"),
        ({"alpha_pattern": [1]}, r"alpha_pattern: found \[1\], expected a JSON object"),
        ({"lora_alpha": None}, "lora_alpha: found None"),
        ({"lora_alpha": True}, "lora_alpha: found True"),
        ({"lora_alpha": float("nan")}, "lora_alpha: found nan"),
        ({"lora_dropout": 2}, "lora_dropout: found 2, expected a probability"),
        ({"peft_type": "LOHA"}, "found peft_type 'LOHA'"),
    ],
)
def test_a_wrong_configuration_is_refused_with_file_and_field(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save_adapter(adapted(), tmp_path)
    _edited(tmp_path, **changes)
    refused(tmp_path, f"{CONFIG}.*{message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_r": "2"}, "init_r: found '2', expected a whole number"),
        ({"init_r": None}, "init_r: found None"),
        ({"rank_pattern": {"first.lora_E": 2}}, r"rank_pattern\['first\.lora_E'\]: found 2, expected a list"),
        (
            {"rank_pattern": {"first.lora_E": [1, 1]}},
            r"rank_pattern\['first\.lora_E'\]: found \[1, 1\], expected a list",
        ),
        ({"rank_pattern": {"first.lora_E": [True]}}, r"found 1 ranks, 1 of them kept"),
    ],
)
def test_a_wrong_rank_pattern_is_refused_with_file_and_field(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save_adapter(adapted(kind=AdaLoRALinear), tmp_path)
    _edited(tmp_path, **changes)
    refused(tmp_path, f"{CONFIG}.*{message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"peft_type": "LORA", "peft_type": "LORA"}', "'peft_type': found twice in one object"),
        (b'{"peft_type": "\\ud800"}', r"peft_type: found half of a surrogate pair, \\ud800"),
        (b"\xff\xfe", "found a byte that is not UTF-8"),
        (b"[]", r"found \[\], expected a JSON object"),
        (b"", "line 1: found no JSON"),
    ],
)
def test_a_damaged_configuration_is_refused_with_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    save_adapter(adapted(), tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    refused(tmp_path, f"{CONFIG}.*{message}")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int32])
def test_factors_that_are_no_floating_point_numbers_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_adapter(adapted(), tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.first.lora_A.weight"
    save_file({**weights, name: torch.ones(2, 8).to(dtype)}, tmp_path / WEIGHTS)
    refused(tmp_path, rf"{WEIGHTS}: first\.lora_A\.weight: found \(2, 8\) .*, expected a matrix of floating-point")


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    save_file({**weights, "first.lora_A.weight": torch.zeros(2, 8)}, tmp_path / WEIGHTS)
    refused(tmp_path, rf"{WEIGHTS}: found both .*expected 'first\.lora_A\.weight' once")


@pytest.mark.parametrize("shape", [(3, 1), (2,), (), (2, 2)])
def test_gates_of_a_wrong_shape_are_refused_before_the_model_is_changed(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_adapter(adapted(kind=AdaLoRALinear), tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    save_file({**weights, "base_model.model.module.0.lora_E": torch.ones(shape)}, tmp_path / WEIGHTS)
    refused(tmp_path, rf"{WEIGHTS}: module\.0\.lora_E: found")
    refused(tmp_path, rf"{WEIGHTS}: module\.0\.lora_E: found", adapted(0.5, kind=AdaLoRALinear))


def test_cut_and_changed_weights_are_read_or_refused_with_the_files_name(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    draw = torch.Generator().manual_seed(0)
    for turn in range(120):
        place = int(torch.randint(len(whole), (), generator=draw))
        value = int(torch.randint(256, (), generator=draw))
        changed = whole[:place] + (b"" if turn % 3 == 0 else bytes([value]) + whole[place + 1 :])
        (tmp_path / WEIGHTS).write_bytes(changed)
        try:
            load_adapter(Net(), tmp_path)
        except ValueError as error:
            said = str(error)
            if WEIGHTS not in said and "model: " not in said:
                pytest.fail(f"byte {place} as {value}: {said}")


@pytest.mark.parametrize("existing", [False, True])
def test_control_c_while_loading_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    save_adapter(adapted(), tmp_path)
    net = adapted(0.7) if existing else Net()
    before = repr(net), net(X).detach(), [parameter.requires_grad for parameter in net.parameters()]
    load, calls = nn.Module.load_state_dict, [0]

    def interrupted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        done = load(self, *args, **kwargs)
        if calls[0] == 2:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(nn.Module, "load_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(net, tmp_path)
    assert repr(net) == before[0]
    assert torch.equal(net(X), before[1])
    assert [parameter.requires_grad for parameter in net.parameters()] == before[2]
