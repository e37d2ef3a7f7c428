"""Deliberate faults, each put between the public function and one implementation's operators.

A fault sees the operator's arguments by name, and returns what the operator would return if it had the fault.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkernels.backends.registry import Operators
from peftkernels.ops import reference
from peftkernels.ops.call import Backward, Forward

Arguments = dict[str, Any]
Operator = Callable[..., Any]
Fault = Callable[[Operator, Arguments], Any]

GRAD_X, GRAD_WEIGHT, GRAD_A, GRAD_B, GRAD_BIAS, GRAD_GATE = range(6)


@dataclass(frozen=True)
class Mutant:
    """Wraps an implementation's two operators; None leaves one as it is."""

    forward: Fault | None = None
    backward: Fault | None = None

    def wrap(self, operators: Operators) -> Operators:
        return operators._replace(
            forward=_wrapped(operators.forward, Forward._fields, self.forward),
            backward=_wrapped(operators.backward, Backward._fields, self.backward),
            functions=None,
        )


def _wrapped(operator: Operator, names: tuple[str, ...], fault: Fault | None) -> Operator:
    if fault is None:
        return operator

    def by_name(**arguments: Any) -> Any:
        return operator(*(arguments[name] for name in names))

    return lambda *values: fault(by_name, dict(zip(names, values, strict=True)))


def _with(**changes: Any) -> Fault:
    """The operator with some arguments replaced; a function is called with all arguments."""

    def fault(operator: Operator, given: Arguments) -> Any:
        made = {name: value(given) if inspect.isfunction(value) else value for name, value in changes.items()}
        return operator(**{**given, **made})

    return fault


def _gradient(place: int, change: Callable[[Tensor, Arguments], Tensor]) -> Fault:
    """One gradient replaced, where it was asked for."""

    def fault(operator: Operator, given: Arguments) -> Any:
        gradients = list(operator(**given))
        if given["needs"][place]:
            gradients[place] = change(gradients[place], given)
        return tuple(gradients)

    return fault


def _gradient_from(place: int, changed: Fault) -> Fault:
    """One gradient taken from a faulty run, the others from a right one."""

    def fault(operator: Operator, given: Arguments) -> Any:
        gradients = list(operator(**given))
        gradients[place] = changed(operator, given)[place]
        return tuple(gradients)

    return fault


def _result(change: Callable[[Tensor, Arguments], Tensor]) -> Fault:
    def fault(operator: Operator, given: Arguments) -> Any:
        y, shrink = operator(**given)
        return change(y, given), shrink

    return fault


def _plan(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Arguments of a plan whose states are changed."""

    def state(given: Arguments) -> Tensor | None:
        return None if given["rank_state"] is None else change(given["rank_state"])

    def order(given: Arguments) -> Tensor | None:
        changed = state(given)
        return None if changed is None else changed.sort(descending=True, stable=True).indices.int()

    def counts(given: Arguments) -> Tensor | None:
        changed = state(given)
        return None if changed is None else torch.stack(((changed == 2).sum(), (changed > 0).sum())).int()

    return {"rank_state": state, "rank_order": order, "rank_counts": counts}


def _one_fewer(place: int) -> dict[str, Any]:
    """`counts[place]` is one too small, for implementations that read states the last such rank counts as the next."""

    def counts(given: Arguments) -> Tensor | None:
        if given["rank_counts"] is None:
            return None
        changed = given["rank_counts"].clone()
        changed[place] -= 1
        return changed

    def state(given: Arguments) -> Tensor | None:
        if given["rank_state"] is None:
            return None
        changed = given["rank_state"].clone()
        changed[(changed == 2 - place).nonzero()[-1]] -= 1
        return changed

    return {"rank_counts": counts, "rank_state": state}


def _scaled(factor: float) -> dict[str, Any]:
    return {
        "scaling": lambda given: given["scaling"] * factor,
        "scaling_tensor": lambda given: None if given["scaling_tensor"] is None else given["scaling_tensor"] * factor,
    }


def _without_last_columns(name: str, count: int = 8) -> Callable[[Arguments], Tensor]:
    """The last k-tile of a right operand reads as zero."""

    def tile(given: Arguments) -> Tensor:
        changed = given[name].clone()
        changed[:, -count:] = 0
        return changed

    return tile


def _dropped_everywhere(operator: Operator, given: Arguments) -> Any:
    """x is dropped once, for the frozen product too."""
    if given["dropout_seed"] is None:
        return operator(**given)
    x = given["x"]
    factor = reference.dropout_factor(given["dropout_seed"], given["dropout_p"], x[..., 0].numel(), x.shape[-1])
    return operator(**{**given, "x": x * factor.view(x.shape).to(x.dtype), "dropout_p": 0.0, "dropout_seed": None})


def _leak_dead(y: Tensor, given: Arguments) -> Tensor:
    """Masking by multiplication with zero, which a NaN survives."""
    if given["rank_state"] is None:
        return y
    dead = (given["rank_state"] == 0).to(given["lora_A"].dtype)
    return y + (0 * (given["lora_A"] * dead.unsqueeze(1)).sum()).to(y.dtype)


def _jitter(y: Tensor, given: Arguments) -> Tensor:
    """The last bit of an element depends on chance."""
    return y + torch.randint(2, y.shape).to(y.dtype) * torch.finfo(y.dtype).eps * y


def _shifted_seed(given: Arguments) -> Tensor | None:
    return None if given["dropout_seed"] is None else given["dropout_seed"] + 1


def _coarse(name: str) -> Callable[[Arguments], Tensor]:
    """An operand rounded to bfloat16 on the way."""
    return lambda given: given[name].bfloat16().to(given[name].dtype)


def _narrow(name: str) -> Callable[[Arguments], Tensor | None]:
    """An operand that passed through float16, which ends at 65504 and at 6e-8."""
    return lambda given: None if given[name] is None else given[name].half().to(given[name].dtype)


def _row_of_zeros(y: Tensor, given: Arguments) -> Tensor:
    rows = y.flatten(0, -2).clone()
    rows[127::128] = 0
    return rows.view(y.shape)


def _gate_by_position(given: Arguments) -> Tensor | None:
    """The gates are read in the order of the plan, but not through it."""
    if given["gate"] is None or given["rank_order"] is None:
        return given["gate"]
    return torch.empty_like(given["gate"]).index_copy_(0, given["rank_order"].long(), given["gate"])


def _tail_zeroed(grad_y: Tensor) -> Tensor:
    changed = grad_y.clone()
    changed[..., -8:] = 0
    return changed


def _coarse_or_none(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.bfloat16().to(value.dtype)


def _in_one_piece(state: Tensor) -> Tensor:
    """What lies behind the first element of a view."""
    return state.as_strided(state.shape, (1,), state.storage_offset()).clone()


_NO_ADAPTER = {"lora_B": lambda given: torch.zeros_like(given["lora_B"])}
_NO_PLAN = {"rank_state": None, "rank_order": None, "rank_counts": None}
_NO_DROPOUT = {"dropout_p": 0.0, "dropout_seed": None}
_SQUARED_GATE = {"gate": lambda given: None if given["gate"] is None else given["gate"].square()}
_PROBE_AS_DEAD = _plan(lambda state: state.where(state != 1, 0))
_PROBE_AS_ACTIVE = _plan(lambda state: state.where(state != 1, 2))
_DEAD_AS_PROBE = _plan(lambda state: state.where(state != 0, 1))


def _zero(gradient: Tensor, given: Arguments) -> Tensor:
    return torch.zeros_like(gradient)


FAULTS: dict[str, Mutant] = {
    "given S ignored": Mutant(forward=_with(given_shrink=None)),
    "given S in another order": Mutant(
        forward=_with(
            given_shrink=lambda given: None if given["given_shrink"] is None else given["given_shrink"].flip(1)
        )
    ),
    "adapter dropped": Mutant(forward=_with(**_NO_ADAPTER)),
    "adapter scaled by 1.05": Mutant(forward=_with(**_scaled(1.05))),
    "gradients scaled by 1.05": Mutant(backward=_with(**_scaled(1.05))),
    "scaling ignored": Mutant(forward=_with(scaling=1.0, scaling_tensor=None)),
    "scaling ignored in ∂gate": Mutant(backward=_gradient_from(GRAD_GATE, _with(scaling=1.0, scaling_tensor=None))),
    "∂A with the wrong sign": Mutant(backward=_gradient(GRAD_A, lambda gradient, given: -gradient)),
    "∂B with the wrong sign": Mutant(backward=_gradient(GRAD_B, lambda gradient, given: -gradient)),
    "∂A = 0": Mutant(backward=_gradient(GRAD_A, _zero)),
    "∂B = 0": Mutant(backward=_gradient(GRAD_B, _zero)),
    "∂gate = 0": Mutant(backward=_gradient(GRAD_GATE, _zero)),
    "∂bias = 0": Mutant(backward=_gradient(GRAD_BIAS, _zero)),
    "bias ignored": Mutant(forward=_with(bias=None)),
    "∂x without the adapter": Mutant(backward=_gradient_from(GRAD_X, _with(**_NO_ADAPTER))),
    "∂x without the frozen weight": Mutant(
        backward=_gradient_from(GRAD_X, _with(weight=lambda given: torch.zeros_like(given["weight"])))
    ),
    "gate ignored": Mutant(
        forward=_with(gate=lambda given: None if given["gate"] is None else torch.ones_like(given["gate"]))
    ),
    "gate ignored in ∂x": Mutant(
        backward=_gradient_from(
            GRAD_X, _with(gate=lambda given: None if given["gate"] is None else torch.ones_like(given["gate"]))
        )
    ),
    "gate applied twice": Mutant(forward=_with(**_SQUARED_GATE)),
    "gate applied twice in ∂A": Mutant(backward=_gradient_from(GRAD_A, _with(**_SQUARED_GATE))),
    "gates read by position": Mutant(forward=_with(gate=_gate_by_position)),
    "gates read by position in backward": Mutant(backward=_with(gate=_gate_by_position)),
    "mask ignored": Mutant(forward=_with(**_NO_PLAN)),
    "mask ignored in backward": Mutant(backward=_with(**_NO_PLAN)),
    "a plan of views read as if in one piece": Mutant(forward=_with(**_plan(_in_one_piece))),
    "a plan of views read as if in one piece in backward": Mutant(backward=_with(**_plan(_in_one_piece))),
    "n_active off by one": Mutant(forward=_with(**_one_fewer(0))),
    "n_active off by one in backward": Mutant(backward=_with(**_one_fewer(0))),
    "n_active + n_probe off by one": Mutant(forward=_with(**_one_fewer(1))),
    "n_active + n_probe off by one in backward": Mutant(backward=_with(**_one_fewer(1))),
    "PROBE treated as DEAD": Mutant(_with(**_PROBE_AS_DEAD), _with(**_PROBE_AS_DEAD)),
    "PROBE treated as ACTIVE": Mutant(forward=_with(**_PROBE_AS_ACTIVE)),
    "PROBE treated as ACTIVE in backward": Mutant(backward=_with(**_PROBE_AS_ACTIVE)),
    "DEAD treated as PROBE": Mutant(_with(**_DEAD_AS_PROBE), _with(**_DEAD_AS_PROBE)),
    "DEAD ranks multiplied by zero": Mutant(forward=_result(_leak_dead)),
    "NaN turned into zero": Mutant(forward=_result(lambda y, given: y.nan_to_num())),
    "dropout ignored": Mutant(forward=_with(**_NO_DROPOUT)),
    "dropout ignored in ∂x": Mutant(backward=_gradient_from(GRAD_X, _with(**_NO_DROPOUT))),
    "dropout ignored in ∂A": Mutant(backward=_gradient_from(GRAD_A, _with(**_NO_DROPOUT))),
    "dropout on the frozen product": Mutant(forward=_dropped_everywhere),
    "another mask in backward": Mutant(backward=_with(dropout_seed=_shifted_seed)),
    "another mask everywhere": Mutant(_with(dropout_seed=_shifted_seed), _with(dropout_seed=_shifted_seed)),
    "kept elements not scaled up": Mutant(
        forward=_with(lora_A=lambda given: given["lora_A"] * (1 - given["dropout_p"]))
    ),
    "last k-tile skipped": Mutant(forward=_with(weight=_without_last_columns("weight"))),
    "last k-tile of the shrink skipped": Mutant(forward=_with(lora_A=_without_last_columns("lora_A"))),
    "last k-tile of ∂x skipped": Mutant(
        backward=_gradient_from(GRAD_X, _with(grad_y=lambda given: _tail_zeroed(given["grad_y"])))
    ),
    "last rank skipped": Mutant(forward=_with(lora_B=_without_last_columns("lora_B", 1))),
    "last row of a block not written": Mutant(forward=_result(_row_of_zeros)),
    "A rounded to bfloat16": Mutant(forward=_with(lora_A=_coarse("lora_A"))),
    "A rounded to float16": Mutant(forward=_with(lora_A=_narrow("lora_A"))),
    "B rounded to float16": Mutant(forward=_with(lora_B=_narrow("lora_B"))),
    "B rounded to float16 in backward": Mutant(backward=_with(lora_B=_narrow("lora_B"))),
    "S rounded to float16": Mutant(backward=_with(shrink=_narrow("shrink"))),
    "weight rounded to bfloat16": Mutant(forward=_with(weight=_coarse("weight"))),
    "S rounded to bfloat16": Mutant(backward=_with(shrink=lambda given: _coarse_or_none(given["shrink"]))),
    "a bit left to chance": Mutant(forward=_result(_jitter)),
}
