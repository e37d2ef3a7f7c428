"""``peftkernels doctor``: what this installation can run, proven by running it, and why the rest cannot."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from peftkernels import RankPlan, RankState, lora_linear
from peftkernels.backends import triton
from peftkernels.backends.registry import backend_status
from peftkernels.cli.agreement import disagreements
from peftkernels.cli.machine import machine, versions

_PACKAGES = ("torch", "triton", "peft", "transformers")
_GPU_BACKENDS = ("triton", "cuda")
_ROWS, _WIDTH_IN, _WIDTH_OUT, _RANK = 5, 48, 40, 6
# The longest sum of the small call has _WIDTH_IN + _RANK terms, each rounded twice; relative to the largest result.
_TOLERANCE = 2 * (_WIDTH_IN + _RANK) * torch.finfo(torch.float32).eps


def run_doctor(*, as_json: bool, with_speed: bool = False) -> int:
    """Print the report.

    Args:
        as_json: print JSON.
        with_speed: where it can serve calls, time it as well (`speed.measure`).

    Returns:
        The exit code: 0 when the package can serve calls, else 1.
    """
    try:
        found = examine()
    except ValueError as error:  # a setting in the environment that the package refuses
        print(json.dumps({"ok": False, "error": str(error)}) if as_json else f"peftkernels CANNOT serve calls: {error}")
        return 1
    if not as_json:
        print(describe(found), flush=True)
    if with_speed and found["ok"]:
        from peftkernels.cli import speed

        found["speed"] = speed.measure()
        if not as_json:
            print(speed.describe(found["speed"]))
    if as_json:
        print(json.dumps(found, indent=1))
    return 0 if found["ok"] else 1


def examine() -> dict[str, Any]:
    """Find out what can run, by running it.

    Returns:
        JSON values: versions, machine, GPU, backends and pack cache. ``disagreements`` names libraries that do not take
        the installed release of another (`agreement.disagreements`). ``backends`` maps each name to ``usable``,
        ``reason`` (why it is not, else None) and ``error`` (greatest difference of a small call's output and gradients
        to the float64 reference, relative to the greatest value; None where it was not run). ``ok`` is true when every
        backend that says it can run computes right.
    """
    status = backend_status()
    backends = {name: _examine_backend(name, reason) for name, reason in status.items()}
    compiled = status.get("cpu", "unknown") is None
    return {
        "ok": all(backends[name]["usable"] for name, reason in status.items() if reason is None),
        "versions": versions(_PACKAGES),
        "disagreements": disagreements(),
        "machine": machine(),
        "gpu": _examine_gpu(),
        "backends": backends,
        "cpu_build": _build_facts() if compiled else None,
        "pack_cache": _pack_cache() if compiled else None,
    }


def _examine_backend(name: str, reason: str | None) -> dict[str, Any]:
    if reason is not None:
        return {"usable": False, "reason": reason, "error": None}
    try:
        error = small_call_error(name)
    except Exception as failure:  # whatever a broken installation raises is what the report is for
        return {"usable": False, "reason": f"a small call failed: {type(failure).__name__}: {failure}", "error": None}
    if not error <= _TOLERANCE:
        reason = f"a small call is off by {error:.1e} of the greatest value, expected at most {_TOLERANCE:.1e}"
        return {"usable": False, "reason": reason, "error": error}
    return {"usable": True, "reason": None, "error": error}


def small_call_error(impl: str) -> float:
    """Run forward and backward once on ``impl`` in float32, with ACTIVE, PROBE and DEAD ranks.

    Returns:
        The greatest difference to the float64 reference over the output and all gradients, each relative to the
        greatest value of its tensor.
    """
    device = "cuda" if impl in _GPU_BACKENDS and not triton.interpreting() else "cpu"
    exact = _small_call("reference", torch.float64, "cpu")
    found = _small_call(impl, torch.float32, device)
    errors = [
        float((ours.double().cpu() - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(found, exact, strict=True)
    ]
    return max(errors, key=lambda error: (error != error, error))


def _small_call(impl: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, grad: bool = True) -> Tensor:
        # Drawn in float32 for every precision, so that all of them see the same numbers.
        values = torch.randn(shape, generator=generator)
        return values.to(device, dtype).requires_grad_(grad)

    x, weight = draw(_ROWS, _WIDTH_IN), draw(_WIDTH_OUT, _WIDTH_IN, grad=False)
    lora_A, lora_B, gate = draw(_RANK, _WIDTH_IN), draw(_WIDTH_OUT, _RANK), draw(_RANK)
    bias, upstream = draw(_WIDTH_OUT, grad=False), draw(_ROWS, _WIDTH_OUT, grad=False)
    states = [RankState.ACTIVE] * (_RANK - 2) + [RankState.PROBE, RankState.DEAD]
    plan = RankPlan.from_state(torch.tensor([int(s) for s in states], dtype=torch.uint8, device=device))
    y = lora_linear(x, weight, lora_A, lora_B, bias=bias, gate=gate, rank_plan=plan, scaling=0.5, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, [x, lora_A, lora_B, gate], upstream)]


def _examine_gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return {"available": False, "reason": f"torch {torch.__version__} is {built} and finds no GPU", "devices": []}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        devices.append({"name": properties.name, "architecture": capability, "bytes": properties.total_memory})
    return {"available": True, "reason": None, "devices": devices}


def _build_facts() -> dict[str, Any]:
    from peftkernels.backends.cpu import build_facts

    return dict(build_facts())


def _pack_cache() -> dict[str, Any]:
    from peftkernels.backends.cpu import pack_cache_stats

    return dict(pack_cache_stats())


def describe(found: dict[str, Any]) -> str:
    """The report of ``examine`` for people."""
    lines = ["versions"]
    lines += [f"  {name:<14}{value or 'not installed'}" for name, value in found["versions"].items()]
    if found["disagreements"]:
        lines.append("libraries that do not agree: calls that need both of them may be refused")
        lines += [f"  {sentence}" for sentence in found["disagreements"]]
    cpu = found["machine"]
    features = [name if has else f"no {name}" for name, has in cpu["features"].items() if has is not None]
    lines += [
        "processor",
        f"  {cpu['processor']}, {cpu['cores']} cores, {cpu['threads']} threads",
        f"  {', '.join(features) if features else 'instruction sets unknown'}; torch uses {cpu['torch_kernels']}",
        "GPU",
    ]
    lines += [f"  {d['name']}, {d['architecture']}, {d['bytes'] / 2**30:.0f} GiB" for d in found["gpu"]["devices"]]
    if not found["gpu"]["available"]:
        lines.append(f"  none: {found['gpu']['reason']}")
    lines.append("backends")
    for name, backend in found["backends"].items():
        if backend["usable"]:
            lines.append(f"  {name:<14}runs; a small call is within {backend['error']:.0e} of the float64 reference")
        else:
            lines.append(f"  {name:<14}cannot run: {backend['reason']}")
    if found["cpu_build"] is not None:
        lines.append("C++ kernels")
        lines += [f"  {name:<14}{value}" for name, value in found["cpu_build"].items()]
    if found["pack_cache"] is not None:
        lines.append("pack cache of this process (packed copies of frozen weights)")
        lines += _describe_pack_cache(found["pack_cache"])
    lines.append("peftkernels can serve calls" if found["ok"] else "peftkernels CANNOT serve calls, see backends")
    return "\n".join(lines)


def _describe_pack_cache(found: dict[str, Any]) -> list[str]:
    """Lines about what `pack_cache_stats` returned."""
    setting, limit = found["limit_setting"], found["limit"]
    meaning = "no limit" if limit is None else _readable(limit)
    if setting.endswith("%"):
        meaning += f", {setting} of the memory that would be available without packs"
    return [
        f"  {'mode':<14}{found['mode']}",
        f"  {'limit':<14}{meaning}",
        f"  {'kept':<14}{_readable(found['bytes'])}: packs {found['entries']}, weights {found['weights']}",
        f"  {'no room for':<14}weights {found['refused']}",
        f"  {'calls':<14}{found['hits']} found a pack, {found['misses']} made one",
        "  A packed weight takes as much memory again as the weight, for each of forward and backward; layers that",
        "  share a weight share its packs. PEFTKERNELS_CPU_PACK=forward keeps the first only, off keeps none;",
        "  PEFTKERNELS_CPU_PACK_LIMIT (4GiB, 25%, unlimited) bounds them all.",
    ]


def _readable(count: int) -> str:
    """Bytes with the unit that leaves one to four digits before the point."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.1f} {units[0]}"
