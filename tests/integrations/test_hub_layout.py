"""The package as a kernel of the Hugging Face Hub: its layers, the folder that is assembled, and that folder loaded."""

from __future__ import annotations

import copy
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import kernels
import pytest
import torch
from kernels._rust import Build, Metadata
from kernels.layer.layer import _validate_layer
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear
from support.peft_models import adapted, away_from_zero, gradients, loss_of, relative_errors, tokens
from torch import nn

import peftkernels
from peftkernels import layers
from peftkernels import nn as own
from peftkernels.integrations.hub import __main__ as command
from peftkernels.integrations.hub import folder as hub

ROOT = Path(__file__).parents[2]
# Layers, and the classes that adopt their forward.
ADOPTERS: dict[str, tuple[type[nn.Module], ...]] = {
    "PeftLinear": (Linear, SVDLinear),
    "LoRALinear": (own.LoRALinear,),
    "AdaLoRALinear": (own.AdaLoRALinear,),
}
PAIRS = [(name, adopter) for name, adopters in ADOPTERS.items() for adopter in adopters]


class Installed:
    """A layer of the installed package, where `kernels` expects a repository."""

    def __init__(self, layer_name: str) -> None:
        self.layer_name = layer_name

    def load(self) -> type[nn.Module]:
        layer: type[nn.Module] = getattr(layers, self.layer_name)
        return layer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.assemble(tmp_path_factory.mktemp("hub") / "peftkernels")


@pytest.fixture(params=["package", "copy"])
def repository(request: pytest.FixtureRequest, folder: Path) -> Callable[[str], Any]:
    """What gives a layer by its name: the package itself, or the assembled copy."""
    if request.param == "package":
        return Installed
    return lambda name: kernels.LocalLayerRepository(folder, layer_name=name)


@pytest.fixture
def kernelized(repository: Callable[[str], Any]) -> Generator[Callable[[nn.Module], Any]]:
    """A copy of a model, by `kernels.kernelize`, every layer of which must be served."""
    for name, adopter in PAIRS:
        kernels.replace_kernel_forward_from_hub(adopter, name)
    mapping = {name: {"cpu": repository(name)} for name in ADOPTERS}
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE

    def of(model: nn.Module) -> Any:
        with kernels.use_kernel_mapping(mapping):
            return kernels.kernelize(copy.deepcopy(model), mode=mode, device="cpu", use_fallback=False)

    yield of
    for _, adopter in PAIRS:
        del adopter.kernel_layer_name, adopter.kernel_condition


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, kernelized: Any, repository: Callable[[str], Any]) -> list[str]:
    """The classes whose calls ran on `lora_linear`, in order."""
    calls: list[str] = []
    package = repository("PeftLinear").load().__module__.removesuffix(".layers")
    for theirs, ours in importlib.import_module(f"{package}.integrations.peft.classes").CLASSES.items():

        def count(self: Any, *given: Any, original: Any = ours._serve, name: str = theirs.__name__) -> Any:
            calls.append(name)
            return original(self, *given)

        monkeypatch.setattr(ours, "_serve", count)
    return calls


def adapter_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, (Linear, SVDLinear))]


@pytest.mark.parametrize(("name", "adopter"), PAIRS)
def test_layers_are_what_kernels_accepts(name: str, adopter: type[nn.Module]) -> None:
    _validate_layer(check_cls=adopter, cls=getattr(layers, name), repo=Installed(name))


def test_all_layers_have_been_checked_by_a_check_that_refuses() -> None:
    assert set(layers.__all__) == set(ADOPTERS)

    class Stateful(layers.LoRALinear):
        scale = 2.0

    with pytest.raises(TypeError, match="additional members"):
        _validate_layer(check_cls=own.LoRALinear, cls=Stateful, repo=Installed("LoRALinear"))
    with pytest.raises(TypeError, match="different number of arguments"):
        _validate_layer(check_cls=Linear, cls=layers.LoRALinear, repo=Installed("LoRALinear"))


@pytest.mark.parametrize(
    ("kind", "model"),
    [("lora", "llama"), ("rslora", "gpt2"), ("lora-bias", "bert"), ("dora", "llama"), ("adalora", "gpt2")],
)
def test_gradients_are_those_of_stock_peft(kind: str, model: str, kernelized: Any, served: list[str]) -> None:
    stock = adapted(kind, model)
    lent = kernelized(stock)
    ids = tokens()
    found, expected = gradients(lent, ids), gradients(stock, ids)
    # The same number added to all keys changes no attention: the bias of a key has no gradient but rounding.
    for name in [name for name in expected if "key" in name and name.endswith("bias")]:
        assert float(found.pop(name).abs().max()) < 1e-8 > float(expected.pop(name).abs().max())
    errors = relative_errors(found, expected)
    assert errors and max(errors.values()) <= 1e-5, max(errors.items(), key=lambda each: each[1])
    assert loss_of(lent, ids).item() == pytest.approx(loss_of(stock, ids).item(), rel=1e-6)
    assert served == [type(layer).__name__ for layer in adapter_layers(stock)] * 2


def test_nothing_is_kept(kernelized: Any, served: list[str]) -> None:
    """AdaLoRA's scale is read in every call, also where a write to the rank number leaves no trace."""
    stock = adapter_layers(adapted("adalora"))[0]
    lent = kernelized(stock)
    x = torch.randn(3, stock.base_layer.in_features)
    before = lent(x)
    for layer in (stock, lent):
        layer.ranknum["default"].data.fill_(1.0)
    torch.testing.assert_close(lent(x), stock(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(lent(x), before, rtol=1e-3)
    assert vars(lent).keys() - {"forward"} == vars(stock).keys()
    assert served == ["SVDLinear"] * 3


def merge(model: Any) -> None:
    for layer in adapter_layers(model):
        layer.merge()


def hook(model: Any) -> None:
    for layer in adapter_layers(model):
        layer.base_layer.register_forward_hook(lambda module, given, y: 2 * y)


def two_adapters(model: Any) -> None:
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    away_from_zero(model)


class Doubled(Linear):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 2 * super().forward(x, *args, **kwargs)


def subclass(model: Any) -> None:
    for layer in adapter_layers(model):
        layer.__class__ = Doubled


@pytest.mark.parametrize("change", [merge, hook, two_adapters, subclass])
def test_what_cannot_be_served_runs_the_layers_own_forward(
    change: Callable[[Any], None], kernelized: Any, served: list[str]
) -> None:
    stock = adapted("lora")
    plain = loss_of(stock, tokens()).item()
    change(stock)
    lent = kernelized(stock)
    assert loss_of(lent, tokens()).item() == loss_of(stock, tokens()).item()
    assert change is merge or loss_of(stock, tokens()).item() != plain
    assert served == []


def test_adapters_switched_off_and_mixed_batches(kernelized: Any, served: list[str]) -> None:
    stock = adapted("lora")
    lent = kernelized(stock)
    ids = tokens()
    with stock.disable_adapter(), lent.disable_adapter():
        assert loss_of(lent, ids).item() == loss_of(stock, ids).item()
    names = ["default", "__base__"]
    found, expected = (model.eval()(input_ids=ids, adapter_names=names).logits for model in (lent, stock))
    assert torch.equal(found, expected)
    assert served == []


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_one_program_without_breaks(kind: str, kernelized: Any) -> None:
    stock = adapter_layers(adapted(kind))[0]
    lent = kernelized(stock)
    x = torch.randn(3, stock.base_layer.in_features)
    compiled = torch.compile(lent, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), stock(x), rtol=1e-5, atol=1e-6)


def test_layers_of_this_package(kernelized: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        own.LoRALinear.from_linear(nn.Linear(12, 10), r=3, lora_alpha=6),
        own.AdaLoRALinear.from_linear(nn.Linear(10, 7, bias=False), r=4),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.5)
    model[1].rank_plan.update_(torch.tensor([2, 0, 2, 1], dtype=torch.uint8))
    lent = kernelized(model)
    assert all("forward" in vars(layer) for layer in lent)
    x = torch.randn(5, 12)
    found, expected = {}, {}
    for results, each in ((found, lent), (expected, model)):
        y = each(x)
        trained = {name: p for name, p in each.named_parameters() if p.requires_grad}
        results["y"] = y.detach()
        results.update(zip(trained, torch.autograd.grad(y.square().sum(), list(trained.values())), strict=True))
    assert len(found) == 6
    assert max(relative_errors(found, expected).values()) <= 1e-5
    lent[1].merge()
    torch.testing.assert_close(lent(x), expected["y"], rtol=1e-5, atol=1e-5)


# In a process that has no peftkernels: the operator on what can run here, a layer, and every module of the copy.
LOADED = """
import importlib, pkgutil, sys
from pathlib import Path
sys.modules["peftkernels"] = None
import kernels, peft, torch
from peft.tuners.lora.layer import Linear

folder = Path(sys.argv[1])
kernel = kernels.get_local_kernel(folder)
torch.manual_seed(0)
x, weight, A, B = torch.randn(5, 16), torch.randn(8, 16), torch.randn(3, 16), torch.randn(8, 3)
A.requires_grad_(), B.requires_grad_()
expected = x @ weight.T + 0.5 * x @ A.T @ B.T
of_expected = torch.autograd.grad(expected.square().sum(), [A, B])
for impl in ("auto", "eager", "reference", "triton"):
    y = kernel.lora_linear(x, weight, A, B, scaling=0.5, impl=impl)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [A, B]), of_expected, rtol=1e-4, atol=1e-3)
    print("ran", impl)

kernels.replace_kernel_forward_from_hub(Linear, "PeftLinear")
mapping = {"PeftLinear": {"cpu": kernels.LocalLayerRepository(folder, layer_name="PeftLinear")}}
model = peft.inject_adapter_in_model(
    peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False), torch.nn.Sequential(torch.nn.Linear(16, 8))
)
stock = model(x)
with kernels.use_kernel_mapping(mapping):
    kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
assert model[0].forward.__func__.__module__ == kernel.__name__ + ".layers"
torch.testing.assert_close(model(x), stock, rtol=1e-5, atol=1e-5)
assert f"{kernel.__name__}.integrations.peft.stateless" in sys.modules
print("ran", "layer")

for module in pkgutil.walk_packages(kernel.__path__, kernel.__name__ + "."):
    importlib.import_module(module.name)
print("imported", sum(name.startswith(kernel.__name__) for name in sys.modules))
assert [name for name in sys.modules if name.split(".")[0] == "peftkernels"] == ["peftkernels"]
assert not hasattr(torch.ops.peftkernels, "lora_linear_fwd")
"""


def test_the_copy_needs_no_installed_package(folder: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LOADED, str(folder)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    *lines, imported = ran.stdout.splitlines()
    assert lines == ["ran auto", "ran eager", "ran reference", "ran triton", "ran layer"]
    sources = list((folder / "build" / "torch-cpu").rglob("*.py"))
    assert imported == f"imported {len(sources)}"


def test_a_copy_beside_the_package(folder: Path) -> None:
    """Both register operators in one process: each has its own."""
    kernel = kernels.get_local_kernel(folder)
    assert kernel.lora_linear is not peftkernels.lora_linear
    variant = "torch-cuda" if torch.version.cuda else "torch-cpu"
    assert Metadata.read_from_file(folder / "build" / variant / "metadata.json").id == kernel.__name__
    name = str(getattr(torch.ops, kernel.__name__).lora_linear_fwd.eager)
    assert name == f"{kernel.__name__}.lora_linear_fwd.eager"
    assert str(torch.ops.peftkernels.lora_linear_fwd.eager) == "peftkernels.lora_linear_fwd.eager"


def test_the_folder(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["build", "build.toml", "torch-ext"]
    assert sorted(path.name for path in (folder / "build").iterdir()) == ["torch-cpu", "torch-cuda"]
    assert (folder / "build.toml").read_bytes() == (ROOT / "build.toml").read_bytes()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    source = folder / "torch-ext" / "peftkernels"
    # kernel-builder writes a file of this name there.
    assert not (source / "_ops.py").exists()
    assert (source / "layers.py").is_file() and not (source / "cli").exists() and not (source / "bench").exists()
    for path in source.rglob("*"):
        assert path.is_dir() or path.suffix in (".py", ".json")
        assert path.is_dir() or not re.search(r"^\s*(from|import) peftkernels\b", path.read_text(), re.MULTILINE)


def test_other_sources_give_another_namespace(folder: Path, tmp_path: Path) -> None:
    def names(where: Path) -> list[str]:
        return [Metadata.read_from_file(path).id for path in sorted(where.glob("build/*/metadata.json"))]

    assert names(hub.assemble(tmp_path)) == names(folder)
    assert re.fullmatch("_peftkernels_cpu_[0-9a-f]{10} _peftkernels_cuda_[0-9a-f]{10}", " ".join(names(folder)))
    files = {"__init__.py": b""}
    general = {"name": "peftkernels", "version": 0, "license": "Apache-2.0"}
    before, after = (hub._variant(each, "cpu", general) for each in (files, {"__init__.py": b"\n"}))
    assert before["_ops.py"] != after["_ops.py"]


def test_kernel_builder_reads_the_description(tmp_path: Path) -> None:
    text = (ROOT / "build.toml").read_text()
    described = ROOT
    if kernels.__version__.startswith("0.17."):
        with pytest.raises(ValueError, match="unsupported build edition 6"):
            Build.open(ROOT)
        # Edition 5 says the same in the same words, but for [kernel.*] sections, of which there are none.
        assert "\n[kernel." not in text
        described = tmp_path
        (tmp_path / "build.toml").write_text(text.replace("\nedition = 6\n", "\nedition = 5\n"))
    assert [str(backend) for backend in Build.open(described).general.backends] == ["cpu", "cuda"]


def test_nothing_is_overwritten_or_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note").write_text("mine")
    assert command.main([str(tmp_path)]) == 2
    assert "found something there, expected an empty folder or none" in capsys.readouterr().err
    monkeypatch.setattr(hub, "_variant", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hub.assemble(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
    monkeypatch.setattr(hub, "PACKAGE", tmp_path / "peftkernels")
    with pytest.raises(FileNotFoundError, match="expected a checkout of the repository"):
        hub.assemble(tmp_path / "new")
