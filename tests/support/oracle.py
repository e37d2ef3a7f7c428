"""How wrong an implementation may be: the float64 oracle, plain PyTorch in the same dtype, and the rounding band.

An element's budget is twice the largest error that plain PyTorch makes in the same tensor, plus the band

    band = (2·eps + √n·eps_sum) · scale

scale    the root of the sum of squares of the terms that are summed into the element, and of its own square, in
         float64: what the element is and what it would typically be. It is not small where terms happen to cancel.
2·eps    the roundings that a result may pass through, to the dtype of x or, where that is coarser, of the parameter: a
         cast factor, S or H, the same times the gate, and the result. Each is off by at most eps/2 of a part that is no
         larger than `scale` on average: four halves.
√n·eps_sum  a chain of n additions in the dtype of sums (float32, or float64 for float64) of terms without a common
         sign: the partial sums grow as √(j/n)·scale and the rounding of each is uniform within ±eps_sum/2 of it, so the
         error's standard deviation is √(Σ_j eps_sum²/12·j/n)·scale = √n·eps_sum·scale/4.9; the band is 4.9 of these.
         n counts the additions of inner sums too (S and H), whose errors every later product carries on.

The band alone is what tensors with few elements have, where plain PyTorch may be exact by luck. In tensors with many
elements the root mean square of the errors is held to the same rule, so that one bad column cannot hide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkernels.ops import reference
from support.cases import Call, Outcome
from support.devices import CPU


def _seed(call: Call) -> Tensor | None:
    return torch.tensor(call.dropout_seed) if call.dropout_p > 0 else None


def _rows(call: Call) -> int:
    return call.x.shape[:-1].numel()


def mask(call: Call) -> Tensor:
    """What dropout multiplies x by, float64 (..., K)."""
    seed = _seed(call)
    if seed is None:
        return torch.ones(call.x.shape, dtype=torch.float64)
    return reference.dropout_factor(seed, call.dropout_p, _rows(call), call.x.shape[-1]).view(call.x.shape)


def oracle(call: Call) -> Outcome:
    """`reference.py` in float64 on the CPU, called directly; the results lie where the call does."""
    if call.x.device != CPU:
        with CPU:
            return oracle(call.on(CPU)).on(call.x.device)
    wide = call.replace(**{name: value.double() for name, value in call.tensors().items()})
    record = wide.replace(scaling=float(call.scaling), dropout_seed=_seed(call), shrink=None).record()
    y, shrink = reference.lora_linear_forward(record)
    record = record._replace(given_shrink=shrink)
    gradients = reference.lora_linear_backward(record.backward(call.grad_y.double(), [True] * 6))
    named = dict(zip(("x", "weight", "lora_A", "lora_B", "bias", "gate"), gradients, strict=True))
    return Outcome(y, {name: named[name] for name in call.tensors()})


def plain(call: Call) -> Outcome:
    """What a user of PyTorch would write, in the same dtypes: `F.linear` three times, and autograd.

    DEAD ranks are cut out, PROBE ranks have gate 0, dropout multiplies by the reference's mask.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in call.tensors().items()}
    dtype = call.x.dtype
    live = call.state.nonzero().squeeze(1)
    active = (call.state[live] == 2).to(dtype)
    x = leaves["x"]
    dropped = x * mask(call).to(dtype) if call.dropout_p > 0 else x
    shrink = F.linear(dropped, leaves["lora_A"][live].to(dtype))
    if "gate" in leaves:
        # The value 0 with the gradient of the gate, as AdaLoRA masks: what is subtracted is a constant.
        gates = leaves["gate"][live].to(dtype)
        shrink = shrink * (gates - (gates * (1 - active)).detach())
    else:
        shrink = shrink * active
    delta = F.linear(shrink, leaves["lora_B"][:, live].to(dtype)) * call.scaling
    y = F.linear(x, leaves["weight"], leaves.get("bias")) + delta.to(dtype)
    y.backward(call.grad_y)
    return Outcome(y.detach(), {name: leaf.grad for name, leaf in leaves.items()})


def scales(call: Call) -> tuple[Outcome, dict[str, int]]:
    """The root of the sum of squares of every result's terms, and how many additions lead to it."""
    rows, n, k, r = _rows(call), *call.weight.shape, call.r
    x2 = call.x.double().reshape(rows, k).square()
    drop2 = mask(call).reshape(rows, k).square()
    g2 = call.grad_y.double().reshape(rows, n).square()
    w2, a2, b2 = (t.double().square() for t in (call.weight, call.lora_A, call.lora_B))
    live, active = (call.state > 0).double(), (call.state == 2).double()
    gates = torch.ones(r, dtype=torch.float64) if call.gate is None else call.gate.double().reshape(r)
    a2, b2 = a2.where(live.bool().unsqueeze(1), 0), b2.where(live.bool(), 0)
    gates2 = gates.where(active.bool(), 0).square() * float(call.scaling) ** 2

    dropped = call.x.double().reshape(rows, k) * mask(call).reshape(rows, k)
    shrink = dropped @ call.lora_A.double().where(live.bool().unsqueeze(1), 0).T
    expanded = call.grad_y.double().reshape(rows, n) @ call.lora_B.double().where(live.bool(), 0)
    # The values as they are, plus what they would typically be: rounding errors of their terms count as well.
    shrink2 = shrink.square() + (x2 * drop2) @ a2.T
    expanded2 = expanded.square() + g2 @ b2

    y2 = x2 @ w2.T + (shrink2 * gates2) @ b2.T
    squares = {
        "x": (g2 @ w2 + drop2 * ((expanded2 * gates2) @ a2)).reshape(call.x.shape),
        "weight": g2.T @ x2,
        "lora_A": (expanded2 * gates2).T @ (x2 * drop2),
        "lora_B": g2.T @ (shrink2 * gates2),
        "bias": g2.sum(0),
        "gate": (shrink2 * expanded2).sum(0) * float(call.scaling) ** 2,
    }
    if call.bias is not None:
        y2 = y2 + call.bias.double().square()
    terms = {
        "y": 2 * k + r + 1,
        "∂x": 2 * n + r,
        "∂weight": rows,
        "∂lora_A": rows + n,
        "∂lora_B": rows + k,
        "∂bias": rows,
        "∂gate": rows + n + k,
    }
    roots = {name: squares[name].sqrt() for name in call.tensors()}
    return Outcome(y2.sqrt().reshape(call.grad_y.shape), roots), terms


@dataclass
class Excess:
    """A result that is more wrong than it may be."""

    name: str
    error: float
    allowed: float
    plain_error: float

    def __str__(self) -> str:
        base = f"plain PyTorch: {self.plain_error:.3g}"
        return f"{self.name}: error {self.error:.3g}, allowed {self.allowed:.3g} ({base})"


class Budget:
    """The budgets of one call, computed once for all implementations, on the CPU.

    `computed_in` is the dtype of computation where it is not x's (autocast), and `by_pytorch` what plain PyTorch
    computes then. Casting x and the weight is one rounding more for each of them: the band is 3·eps wide.
    """

    def __init__(self, call: Call, computed_in: torch.dtype | None = None, by_pytorch: Outcome | None = None) -> None:
        with CPU:
            self._compute(call.on(CPU), computed_in, None if by_pytorch is None else by_pytorch.on(CPU))

    def _compute(self, call: Call, computed_in: torch.dtype | None, by_pytorch: Outcome | None) -> None:
        self.call = call
        self.exact = oracle(call).named()
        found = plain(call) if by_pytorch is None else by_pytorch
        self.plain_errors = {name: value.double() - self.exact[name] for name, value in found.named().items()}
        roots, terms = scales(call)
        compute, roundings = (call.x.dtype, 2) if computed_in is None else (computed_in, 3)
        eps_sum = torch.finfo(torch.promote_types(call.x.dtype, torch.float32)).eps
        dtypes = {"y": call.x.dtype, **{f"∂{name}": value.dtype for name, value in call.tensors().items()}}
        self.bands = {}
        for name, root in roots.named().items():
            eps = max(torch.finfo(dtype).eps for dtype in (compute, dtypes[name]))
            scale = (root.square() + self.exact[name].square()).sqrt()
            self.bands[name] = (roundings * eps + max(terms[name], 1) ** 0.5 * eps_sum) * scale

    def usage(self, outcome: Outcome) -> dict[str, tuple[float, float, float, float]]:
        """For each result: the worst share of its budget, the error there, what was allowed, plain PyTorch's error."""
        found = {}
        for name, value in outcome.on(CPU).named().items():
            error = value.double() - self.exact[name]
            if error.numel() == 0:
                continue
            plain_error, band = self.plain_errors[name], self.bands[name]
            pairs = [
                (error.abs(), 2 * plain_error.abs().max() + band, plain_error.abs().max()),
                (rms(error), 2 * rms(plain_error) + rms(band), rms(plain_error)),
            ]
            worst = (0.0, 0.0, 0.0, 0.0)
            for wrong, allowed, base in pairs:
                # A NaN is infinitely wrong; 0 wrong where nothing is allowed is right.
                share = torch.where(wrong == 0, 0.0, (wrong / allowed).nan_to_num(nan=torch.inf))
                place = int(share.argmax())
                if float(share.reshape(-1)[place]) >= worst[0]:
                    worst = (
                        float(share.reshape(-1)[place]),
                        float(wrong.reshape(-1)[place]),
                        float(allowed.reshape(-1)[place]),
                        float(base),
                    )
            found[name] = worst
        return found

    def excesses(self, outcome: Outcome) -> list[Excess]:
        return [
            Excess(name, error, allowed, base)
            for name, (share, error, allowed, base) in self.usage(outcome).items()
            if not share <= 1.0
        ]


def rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
