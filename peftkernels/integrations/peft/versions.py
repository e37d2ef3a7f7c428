"""Which releases of HF peft the patched layers were made for, and what is done about another."""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from peftkernels.integrations.peft.swap import swap_layers

# The two newest minor releases; the tests run on the newer, and on both before a release of this package.
KNOWN = ((0, 20), (0, 21))


def check_version() -> None:
    """Let a known release of peft pass, one of another minor release after a self-check and with a warning.

    Raises:
        ImportError: peft is not installed.
        RuntimeError: the patched layers compute something else than those of the installed peft.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "apply_to_peft needs HF peft, which is not installed: pip install 'peftkernels[hf]'"
        ) from error
    found = minor_release(peft.__version__)
    if found in KNOWN:
        return
    _checked(peft.__version__)


def minor_release(version: str) -> tuple[int, int]:
    """(major, minor) of a version such as "0.21.2.dev0"."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise RuntimeError(f"peft: found version {version!r}, expected major.minor.patch")
    return int(match[1]), int(match[2])


@functools.lru_cache(maxsize=1)
def _checked(version: str) -> None:
    expected = " or ".join(f"{major}.{minor}" for major, minor in KNOWN)
    try:
        differing = self_check()
    except Exception as error:
        raise RuntimeError(
            f"peft: found version {version}, expected {expected}, and its layers cannot be served: {error!r}"
        ) from error
    if differing:
        raise RuntimeError(
            f"peft: found version {version}, expected {expected}: its layers compute another {', '.join(differing)}"
        )
    warnings.warn(
        f"peft {version} is not one of the releases that peftkernels is tested with ({expected}); a self-check of its "
        "layers passed, so they are served",
        UserWarning,
        stacklevel=3,
    )


def self_check() -> list[str]:
    """Where patched and stock layers of the installed peft differ by more than rounding: outputs and gradients of a
    small LoRA, DoRA and AdaLoRA layer in float64. Empty where they agree."""
    import peft

    configs = {
        "LoRA": peft.LoraConfig(r=3, target_modules=["layer"], lora_alpha=5),
        "DoRA": peft.LoraConfig(r=3, target_modules=["layer"], lora_alpha=5, use_dora=True),
        "AdaLoRA": peft.AdaLoraConfig(init_r=3, target_r=2, target_modules=["layer"], lora_alpha=5, total_step=10),
    }
    differing = []
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    for title, config in configs.items():
        base = nn.Module()
        base.layer = nn.Linear(7, 5, dtype=torch.float64)
        base.forward = lambda x, layer=base.layer: layer(x)
        model = peft.inject_adapter_in_model(config, base).double()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3, generator=generator)
        stock = _outputs(model, x)
        swap_layers(model, lora=True, adalora=True, impl="reference", strict=True)
        patched = _outputs(model, x)
        differing += [
            f"{what} of {title}" for what in stock if not torch.allclose(stock[what], patched[what], rtol=1e-9)
        ]
    return differing


def _outputs(model: Any, x: Tensor) -> dict[str, Tensor]:
    given = x.clone().requires_grad_()
    y = model.layer(given)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "ranknum" not in name}
    gradients = torch.autograd.grad(y.square().sum(), [given, *trained.values()])
    return {"y": y.detach(), "gradient of x": gradients[0], **dict(zip(trained, gradients[1:], strict=True))}
