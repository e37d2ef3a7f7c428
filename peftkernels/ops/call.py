"""The operators' arguments, listed once: schemas, fakes, checks, autograd and backends take them from here.

`Call` holds what the public functions were given, as operands. `Forward`, `Backward` and `Shrink` hold what the
operators take, flat and in the order of their schemas: `operator(*call)` calls one, `Forward(*arguments)` reads it.

A new optional argument of an adapter is a field of `Adapter`, `Forward` and `Backward` with the default None, at the
end, and a line in `Call.forward`, `Forward.backward` and `_adapter`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from peftkernels.ops.weights import Weight


class Adapter(NamedTuple):
    """A low-rank adapter: scaling · ((drop(x)·Aᵀ) ⊙ ĝ)·Bᵀ, ĝ_i = gate_i where rank i is ACTIVE, else 0.

    Attributes:
        lora_A: A (r, K), any float dtype.
        lora_B: B (N, r), A's dtype.
        gate: (r,) or (r, 1), any float dtype; None means ones.
        rank_state: uint8 (r,), a `RankState` for every rank; None, with the next two, means every rank is ACTIVE.
        rank_order: int32 (r,), ACTIVE ranks first, then PROBE, then DEAD.
        rank_counts: int32 (2,), how many ranks are ACTIVE, and how many are ACTIVE or PROBE.
        scaling: where `scaling_tensor` is None.
        scaling_tensor: 0-dim, on x's device.
        dropout_p: probability in [0, 1] with which an element of the adapter's x is dropped.
        dropout_seed: 0-dim int64, on x's device; an int, or None, until the call has made it a tensor.
    """

    lora_A: Tensor
    lora_B: Tensor
    gate: Tensor | None = None
    rank_state: Tensor | None = None
    rank_order: Tensor | None = None
    rank_counts: Tensor | None = None
    scaling: float = 1.0
    scaling_tensor: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | int | None = None

    @property
    def scale(self) -> float | Tensor:
        """The scaling, wherever it is."""
        return self.scaling if self.scaling_tensor is None else self.scaling_tensor


class Call(NamedTuple):
    """A call of `lora_linear`, as operands.

    Attributes:
        x: (..., K).
        weight: W (N, K), frozen.
        adapter: the adapter of all rows.
        bias: (N,).
        shrink: (M, r), S = x·Aᵀ where the caller has it.
    """

    x: Tensor
    weight: Weight
    adapter: Adapter
    bias: Tensor | None = None
    shrink: Tensor | None = None

    def later_arguments(self) -> frozenset[str]:
        """Names of what was given of the optional arguments that not every backend serves."""
        if not _LATER_OF_CALL and not _LATER_OF_ADAPTER:
            return frozenset()
        given = {name for name in _LATER_OF_CALL if getattr(self, name) is not None}
        return frozenset(given | {name for name in _LATER_OF_ADAPTER if getattr(self.adapter, name) is not None})

    def forward(self, weight: Tensor, save_shrink: bool) -> Forward:
        """The call for the operator, with its weight as a tensor."""
        adapter = self.adapter
        seed = adapter.dropout_seed
        assert seed is None or isinstance(seed, Tensor)
        return Forward(
            self.x,
            weight,
            adapter.lora_A,
            adapter.lora_B,
            self.bias,
            adapter.gate,
            adapter.rank_state,
            adapter.rank_order,
            adapter.rank_counts,
            adapter.scaling,
            adapter.scaling_tensor,
            adapter.dropout_p,
            seed,
            save_shrink,
            self.shrink,
        )


# The optional arguments that every backend serves. One that joins later is served by those backends that name it.
_SERVED_BY_ALL = frozenset(
    ("gate", "rank_state", "rank_order", "rank_counts", "scaling_tensor", "dropout_seed", "bias", "shrink")
)


def _later(record: type[Adapter] | type[Call]) -> tuple[str, ...]:
    defaults = record._field_defaults
    return tuple(name for name, value in defaults.items() if value is None and name not in _SERVED_BY_ALL)


_LATER_OF_ADAPTER, _LATER_OF_CALL = _later(Adapter), _later(Call)


class Forward(NamedTuple):
    """The arguments of `lora_linear_fwd`; those that an adapter has are explained there.

    Attributes:
        x: (..., K); its dtype is the dtype of computation.
        weight: (N, K).
        bias: (N,).
        save_shrink: whether S (M, r) is a result, for the backward pass.
        given_shrink: S = x·Aᵀ (M, r) in `rank_dtype`, precomputed; refused beside dropout.
    """

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    gate: Tensor | None
    rank_state: Tensor | None
    rank_order: Tensor | None
    rank_counts: Tensor | None
    scaling: float
    scaling_tensor: Tensor | None
    dropout_p: float
    dropout_seed: Tensor | None
    save_shrink: bool
    given_shrink: Tensor | None = None

    @property
    def adapter(self) -> Adapter:
        return _adapter(self)

    @property
    def saves_shrink(self) -> bool:
        """Return True if S is a result: one that the caller gave is not given back."""
        return self.save_shrink and self.given_shrink is None

    def request(self) -> Call:
        """What a backend is asked whether it can serve."""
        return Call(self.x, self.weight, self.adapter, self.bias, self.given_shrink)

    def backward(self, grad_y: Tensor, needs: Sequence[bool]) -> Backward:
        """The call for the backward operator; S is `given_shrink`, which the forward pass may have made."""
        return Backward(
            grad_y,
            self.x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.bias,
            self.given_shrink,
            self.gate,
            self.rank_state,
            self.rank_order,
            self.rank_counts,
            self.scaling,
            self.scaling_tensor,
            self.dropout_p,
            self.dropout_seed,
            needs,
        )


class Needs(NamedTuple):
    """Which gradients the backward operator makes."""

    x: bool
    weight: bool
    lora_A: bool
    lora_B: bool
    bias: bool
    gate: bool


class Backward(NamedTuple):
    """The arguments of `lora_linear_bwd`; those that it shares with `Forward` are explained there.

    Attributes:
        grad_y: (..., N); its dtype is the dtype of computation.
        x: None where no gradient is made of it.
        shrink: S = drop(x)·Aᵀ (M, r); None where no gradient is made of it.
        needs: `Needs`, as the schema's bool[6].
    """

    grad_y: Tensor
    x: Tensor | None
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    shrink: Tensor | None
    gate: Tensor | None
    rank_state: Tensor | None
    rank_order: Tensor | None
    rank_counts: Tensor | None
    scaling: float
    scaling_tensor: Tensor | None
    dropout_p: float
    dropout_seed: Tensor | None
    needs: Sequence[bool]

    @property
    def adapter(self) -> Adapter:
        return _adapter(self)

    def request(self) -> Call:
        """What a backend is asked whether it can serve; the gradient of y stands for an x that is not there."""
        return Call(self.grad_y if self.x is None else self.x, self.weight, self.adapter, self.bias, self.shrink)

    def empty_gradients(self, needs: Sequence[bool] | None = None) -> tuple[Tensor, ...]:
        """Uninitialised results; a gradient that is not needed (by default, those of `needs`) has the shape (0,)."""
        needed = Needs(*(self.needs if needs is None else needs))
        grad_x_shape = (*self.grad_y.shape[:-1], self.weight.shape[1])
        likes = (
            (self.weight, needed.weight),
            (self.lora_A, needed.lora_A),
            (self.lora_B, needed.lora_B),
            (self.grad_y if self.bias is None else self.bias, needed.bias),
            (self.lora_A if self.gate is None else self.gate, needed.gate),
        )
        grad_x = self.grad_y.new_empty(grad_x_shape if needed.x else (0,))
        return grad_x, *(like.new_empty(like.shape if need else (0,)) for like, need in likes)


def _adapter(call: Forward | Backward) -> Adapter:
    return Adapter(
        call.lora_A,
        call.lora_B,
        call.gate,
        call.rank_state,
        call.rank_order,
        call.rank_counts,
        call.scaling,
        call.scaling_tensor,
        call.dropout_p,
        call.dropout_seed,
    )


class Shrink(NamedTuple):
    """The arguments of `lora_shrink`: S = x·A_jᵀ of several adapters of one x.

    Attributes:
        x: (..., K); its dtype is the dtype of computation.
        lora_A: one (r_j, K) of each adapter.
    """

    x: Tensor
    lora_A: Sequence[Tensor]

    def request(self) -> Shrink:
        """What a backend is asked whether it can serve."""
        return self


# What a backend is asked whether it can serve.
Request = Call | Shrink

# What an operator is called with.
Record = Forward | Backward | Shrink

# What errors call an argument of an operator.
_SPOKEN = {
    "rank_state": "rank_plan.state",
    "rank_order": "rank_plan.order",
    "rank_counts": "rank_plan.counts",
    "scaling_tensor": "scaling",
    "given_shrink": "shrink",
}


def _tensor_fields(record: type[NamedTuple]) -> tuple[tuple[str, int], ...]:
    """The fields that may hold tensors, by the names that errors give them, with their places."""
    kinds = (annotation.__forward_arg__ for annotation in record.__annotations__.values())
    return tuple(
        (_SPOKEN.get(name, name), place)
        for place, (name, kind) in enumerate(zip(record._fields, kinds, strict=True))
        if kind in ("Weight", "Tensor") or kind.startswith("Tensor |")
    )


TENSOR_FIELDS = {record: _tensor_fields(record) for record in (Adapter, Call, Forward, Backward)}


def named_tensors(call: Call | Record) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a call, by the name that errors give it."""
    if isinstance(call, Shrink):
        yield "x", call.x
        yield from ((f"lora_A[{place}]", factor) for place, factor in enumerate(call.lora_A))
        return
    for record in (call, call.adapter) if isinstance(call, Call) else (call,):
        for name, place in TENSOR_FIELDS[type(record)]:
            value = record[place]
            if value is not None and isinstance(value, Tensor):
                yield name, value


_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "bool": "bool",
    "Sequence[bool]": f"bool[{len(Needs._fields)}]",
    "Sequence[Tensor]": "Tensor[]",
}


def schema(call: type[Forward] | type[Backward] | type[Shrink]) -> str:
    """The arguments of an operator, in the language of torch's schemas."""
    types = (_TYPES[annotation.__forward_arg__] for annotation in call.__annotations__.values())
    defaults = {name: f"={default}" for name, default in call._field_defaults.items()}
    arguments = (f"{kind} {name}{defaults.get(name, '')}" for kind, name in zip(types, call._fields, strict=True))
    return f"({', '.join(arguments)})"
