"""The rules of the structure: small trees with one fault each, and what the script says of them."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "house.py"
HOUSE = runpy.run_path(str(SCRIPT))
NINE = "x, weight, lora_A, lora_B, bias, gate, scaling, dropout_p, dropout_seed"


@pytest.fixture
def plant(tmp_path: Path) -> Any:
    """Writes a tree of files, each package with its __init__.py, and gives the findings as lines."""

    def planted(files: dict[str, str]) -> list[str]:
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            for folder in file.relative_to(tmp_path).parents:
                if file.suffix == ".py" and folder.name and not (tmp_path / folder / "__init__.py").exists():
                    (tmp_path / folder / "__init__.py").write_text("")
        return [str(finding) for finding in HOUSE["findings"](tmp_path)]

    return planted


def test_a_tree_that_keeps_the_rules_has_no_findings(plant: Any) -> None:
    fields = "".join(f"    {name}: object\n" for name in NINE.split(", "))
    assert (
        plant(
            {
                "peftkernels/ops/call.py": f"class Forward(NamedTuple):\n{fields}",
                "peftkernels/functional/linear.py": f"def lora_linear({NINE}): ...\ndef explain({NINE}): ...\n",
                "peftkernels/backends/triton/linear/gemm.py": f"@triton.jit\ndef gemm({NINE}): ...\n",
                "peftkernels/backends/registry.py": "from peftkernels.backends import eager\n",
                "peftkernels/backends/eager.py": "from peftkernels.ops.call import Forward\n",
                "peftkernels/backends/cpu/__init__.py": "from peftkernels import _C\nimport peftkernels._files\n",
                "peftkernels/_files.py": "import json\n",
                "peftkernels/cli/main.py": "import peftkernels\nfrom peftkernels import lora_linear\n",
                "bench/cases.py": "from peftkernels.cli.main import main\nfrom demo import timing\nimport torch\n",
                "demo/timing.py": "from peftkernels.integrations import peft\n",
                "peftkernels/integrations/peft/__init__.py": (
                    '"""Summary.\n\n    y = x    z = y\n\nArgs:\n    x: (M, K)\n\nNote: two  blanks.\n"""\n'
                ),
                "csrc/call.h": "#include <vector>\n",
                "csrc/bindings.cpp": '#include "cpu/linear.h"\n#include "call.h"\n',
                "csrc/cpu/linear.h": '#include "call.h"\n#include "pack.h"\n',
                "csrc/cpu/pack.h": "#pragma once\n",
            }
        )
        == []
    )


@pytest.mark.parametrize(
    "text",
    [
        f"def f({NINE}): ...",
        "def f(x, w, A, B, b, E, scale, p, seed): ...",
        "def f(_x, *, weight_ptr, lora_A_ptr, B, b, given_shrink, state, order, counts): ...",
        f"class Kept:\n    def method(self, {NINE}): ...",
        f"async def f({NINE}): ...",
        f"def f():\n    return lambda {NINE}: None",
        f"def f(*arguments):\n    {NINE} = arguments",
        f"def f(*arguments):\n    {NINE}, *rest = arguments",
        "class Kept:\n" + "".join(f"    {name}: object\n" for name in NINE.split(", ")),
    ],
)
def test_a_long_list_of_arguments_is_found(plant: Any, text: str) -> None:
    (found,) = plant({"peftkernels/ops/schemas.py": f"{text}\n"})
    assert found.startswith("peftkernels/ops/schemas.py:") and "takes 9 of the operator's arguments" in found


def test_the_same_list_under_other_names_is_found_by_its_tensors(plant: Any) -> None:
    forms = ("Tensor", "Tensor | None", "torch.Tensor", "'Tensor'", "Optional[Tensor]")
    named = ", ".join(f"t{index}: {forms[index % len(forms)]}" for index in range(9))
    assert plant({"bench/layer.py": f"def f({named}): ...\n"}) == [
        "bench/layer.py:1: f() takes 9 tensors: t0, t1, t2, t3, t4, t5, t6, t7, t8"
    ]
    assert plant({"bench/layer.py": f"def f({named.rpartition(',')[0]}, t9: list[Tensor]): ...\n"}) == []


def test_a_long_list_is_found_in_cpp(plant: Any) -> None:
    parameters = ",\n    ".join(f"const Tensor& {name}" for name in NINE.split(", "))
    (found,) = plant({"csrc/cpu/linear/forward.h": f"// f({NINE})\nvoid f({parameters});\n"})
    assert found == f"csrc/cpu/linear/forward.h:2: a list takes 9 of the operator's arguments: {NINE}"
    assert plant({"csrc/cpu/linear/forward.h": "void f(const Tensor& x, const Adapter& adapter, Tensor shrink);"}) == []


def test_eight_are_allowed_and_the_exceptions_belong_to_their_places(plant: Any) -> None:
    assert plant({"peftkernels/ops/schemas.py": f"def f({NINE.rpartition(',')[0]}, other, another): ...\n"}) == []
    assert len(plant({"peftkernels/nn/layer.py": f"def lora_linear({NINE}): ...\n"})) == 1
    assert len(plant({"peftkernels/ops/call.py": f"def from_flat({NINE}): ...\n"})) == 2


@pytest.mark.parametrize(
    "line",
    [
        "import peftkernels.nn.layer",
        "from peftkernels.nn import layer",
        "from peftkernels.nn.layer import Layer",
        "from ..nn import layer",
        "if TYPE_CHECKING:\n    from peftkernels.nn.layer import Layer",
        "def late():\n    from peftkernels.nn.layer import Layer",
        "import importlib\nlayer = importlib.import_module('peftkernels.nn.layer')",
    ],
)
def test_an_import_upwards_is_found(plant: Any, line: str) -> None:
    (found,) = plant({"peftkernels/ops/weights.py": f"{line}\n", "peftkernels/nn/layer.py": ""})
    text = "peftkernels.ops.weights must not use peftkernels.nn.layer, which is not below it"
    assert found == f"peftkernels/ops/weights.py:{line.count(chr(10)) + 1}: {text}"


def test_the_package_itself_is_above_its_parts(plant: Any) -> None:
    (found,) = plant({"peftkernels/nn/layer.py": "from peftkernels import lora_linear\n"})
    assert "peftkernels.nn.layer must not use peftkernels, which is not below it" in found


@pytest.mark.parametrize("name", ["bench.cases", "demo", "tests.support", "support.cases", "examples"])
def test_no_product_file_imports_what_lies_around_the_package(plant: Any, name: str) -> None:
    (found,) = plant({"peftkernels/cli/main.py": f"import {name}\n", "bench/cases.py": "", "demo/job.py": ""})
    assert f"peftkernels.cli.main must not use {name.partition('.')[0]}" in found


def test_a_module_without_a_place_is_found(plant: Any) -> None:
    (found,) = plant({"peftkernels/helpers.py": "from peftkernels import _files\n", "peftkernels/_files.py": ""})
    assert found.startswith("peftkernels/helpers.py:1: peftkernels.helpers has no place in the table")


def test_backends_know_of_each_other_through_the_registry_alone(plant: Any) -> None:
    files = {"peftkernels/backends/registry.py": "from peftkernels.backends.cpu import linear\n"}
    files["peftkernels/backends/cpu/linear.py"] = "from peftkernels.backends import backend\nfrom . import packs\n"
    files["peftkernels/backends/cpu/packs.py"] = files["peftkernels/backends/backend.py"] = ""
    assert plant(files) == []
    files["peftkernels/backends/triton/linear.py"] = "from peftkernels.backends.cpu.packs import keep\n"
    (found,) = plant(files)
    assert found == "peftkernels/backends/triton/linear.py:1: the backend triton must not use the backend cpu"


@pytest.mark.parametrize("back", ["import {}", "def late():\n    import {}", "if TYPE_CHECKING:\n    import {}"])
def test_a_circle_of_modules_is_found(plant: Any, back: str) -> None:
    names = [f"peftkernels.allocation.{name}" for name in "abc"]
    files = {f"peftkernels/allocation/{name}.py": "" for name in "abc"}
    files["peftkernels/allocation/a.py"] = f"import {names[1]}\n"
    files["peftkernels/allocation/b.py"] = f"import {names[2]}\n"
    assert plant(files) == []
    (found,) = plant({**files, "peftkernels/allocation/c.py": back.format(names[0]) + "\n"})
    assert f"a circle: {' → '.join([*names, names[0]])}" in found


def test_a_circle_of_folders_is_found_where_none_of_their_modules_lies_on_one(plant: Any) -> None:
    files = {f"peftkernels/allocation/{name}.py": "" for name in ("run/engine", "run/state", "budget/masks")}
    files["peftkernels/allocation/run/engine.py"] = "from peftkernels.allocation.budget import masks\n"
    assert plant(files) == []
    (found,) = plant({**files, "peftkernels/allocation/budget/masks.py": "from ..run import state\n"})
    assert "a circle: peftkernels.allocation.budget → peftkernels.allocation.run" in found


@pytest.mark.parametrize(
    ("file", "include", "target"),
    [
        ("csrc/call.h", "cpu/cpu_backend.h", "csrc/cpu/cpu_backend.h"),
        ("csrc/cpu/cpu_backend.h", "../cuda/memory.h", "csrc/cuda/memory.h"),
        ("csrc/cpu/gemm/rows.h", "../packs/pack.h", "csrc/cpu/packs/pack.h"),
        ("csrc/cpu/linear/forward.cpp", "cpu/allocation/mask.h", "csrc/cpu/allocation/mask.h"),
    ],
)
def test_an_include_upwards_is_found(plant: Any, file: str, include: str, target: str) -> None:
    (found,) = plant({file: f'\n#  include "{include}"\n', target: "#pragma once\n"})
    assert found == f"{file}:2: {file} must not use {target}, which is not below it"


def test_a_circle_of_headers_is_found(plant: Any) -> None:
    (found,) = plant({"csrc/cpu/packs/a.h": '#include "b.h"\n', "csrc/cpu/packs/b.h": '#include "cpu/packs/a.h"\n'})
    assert "a circle: csrc/cpu/packs/a.h → csrc/cpu/packs/b.h → csrc/cpu/packs/a.h" in found


@pytest.mark.parametrize(
    "line", ["kept   (M, r)", "    x, weight  what it reads", '"any"  wherever they are', "kept (r,)  ranks"]
)
def test_a_docstring_in_two_columns_is_found(plant: Any, line: str) -> None:
    (found,) = plant({"peftkernels/nn/layer.py": f'def f():\n    """Summary.\n\n    {line}\n    """\n'})
    assert found == f"peftkernels/nn/layer.py:4: two columns in a docstring: {line.strip()}"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("Raises TypeError or ValueError naming the argument.", "an error in a docstring's sentence"),
        ("Empty. Raises what `f` raises.", "an error in a docstring's sentence"),
        ("Arguments:", "a docstring's arguments under another word"),
    ],
)
def test_errors_and_arguments_have_their_sections(plant: Any, line: str, why: str) -> None:
    (found,) = plant({"peftkernels/nn/layer.py": f'class C:\n    """Summary.\n\n    {line}\n    """\n'})
    assert found.startswith(f"peftkernels/nn/layer.py:4: {why}")
    assert plant({"peftkernels/nn/layer.py": '"""Summary.\n\nRaises:\n    ValueError: raises no error.\n"""\n'}) == []


def test_the_script_prints_what_it_finds_and_fails(plant: Any, tmp_path: Path) -> None:
    plant({"peftkernels/nn/layer.py": f"\ndef f({NINE}): ...\n"})
    ran = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert ran.returncode == 1
    first, last = ran.stdout.splitlines()
    assert first == f"peftkernels/nn/layer.py:2: f() takes 9 of the operator's arguments: {NINE}"
    assert last == "house: 1 findings"
    (tmp_path / "peftkernels/nn/layer.py").write_text("")
    assert subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], stdout=subprocess.DEVNULL).returncode == 0
