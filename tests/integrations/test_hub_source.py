"""Sources of the package for a copy under another name: what is rewritten, what stays, what is refused."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from peftkernels.integrations.hub.source import rewritten


@pytest.mark.parametrize(
    ("source", "path", "expected"),
    [
        ("from peftkernels.nn import A  # why\n", "functional.py", "from .nn import A  # why\n"),
        ("from peftkernels import nn, ops\n", "a/b.py", "from .. import nn, ops\n"),
        (
            "from peftkernels import (\n    ops as o,\n)\n",
            "a/__init__.py",
            "from .. import (\n    ops as o,\n)\n",
        ),
        ("from peftkernels.ops.schemas import library\n", "a/b/c.py", "from ...ops.schemas import library\n"),
        ("import torch\nfrom peft import x\nfrom . import y\n", "a.py", None),
        ('s = "·"; t = "peftkernels of peftkernels.nn"\n', "a.py", None),
        (
            'm = importlib.import_module(f"peftkernels.a.{n}_b")\n',
            "a/b.py",
            'm = importlib.import_module(f"..a.{n}_b", __package__)\n',
        ),
        (
            '"""·"""\nfrom __future__ import annotations\n\nx = "·", torch.ops.peftkernels.f(2)\n',
            "a/b.py",
            '"""·"""\nfrom __future__ import annotations\nfrom .._ops import ops\n\nx = "·", ops.f(2)\n',
        ),
        (
            'from __future__ import annotations\nl = torch.library.Library("peftkernels", "DEF")\n'
            'torch.library.register_fake(f"peftkernels::f.{n}", g, lib=l)\n',
            "a.py",
            "from __future__ import annotations\nfrom ._ops import add_op_namespace_prefix\n"
            'l = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "DEF")\n'
            'torch.library.register_fake(add_op_namespace_prefix(f"f.{n}"), g, lib=l)\n',
        ),
    ],
)
def test_rewritten_sources(source: str, path: str, expected: str | None) -> None:
    assert rewritten(source, PurePosixPath(path)) == (source if expected is None else expected)


@pytest.mark.parametrize(
    "source",
    [
        "import peftkernels\n",
        "import peftkernels.nn as nn\n",
        'm = sys.modules["peftkernels.nn"]\n',
        "from __future__ import annotations\nops = torch.ops.peftkernels\n",
    ],
)
def test_what_cannot_be_rewritten_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"^a/b\.py"):
        rewritten(source, PurePosixPath("a/b.py"))
