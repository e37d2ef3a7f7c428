"""The last moments of a run, kept in memory to return to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from peftkernels.allocation.json_tensor import METADATA, decode, encode
from peftkernels.allocation.snapshot import Snapshot, check_snapshot

if TYPE_CHECKING:
    from peftkernels.allocation.engine import BudgetAllocator

_STATE = "state."


class Snapshots:
    """Keeps a snapshot of every `every`-th step, the `last` of them; the oldest makes room for a new one.

        snapshots = Snapshots(allocator, every=50, last=3)
        allocator.add_callback(snapshots)
        ...
        snapshots.to(snapshots.steps[-1])

    every  steps between two snapshots; the first is taken after the first step that is seen
    last   how many are kept

    A snapshot holds what `BudgetAllocator.snapshot` says. With AdamW and AdaLoRA's averages that is five times the
    trained parameters, on their device; `nbytes` has the sum. Attach the allocator to its optimizer first, or moments
    are not in the snapshots. `state_dict` has the snapshots too, so that a resumed run can go back behind the resume.
    Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, allocator: BudgetAllocator, *, every: int, last: int) -> None:
        for name, value in (("every", every), ("last", last)):
            check_count(name, value)
        self.allocator = allocator
        self.every = every
        self.last = last
        self._kept: list[Snapshot] = []

    def __call__(self, allocator: BudgetAllocator) -> None:
        """Take a snapshot where one is due; the allocator calls it after every step."""
        step = allocator.steps
        # The run may have gone back by other means: what was later then is no longer its past.
        self._kept = [token for token in self._kept if token.step <= step]
        known = bool(self._kept) and self._kept[-1].step == step
        if not known and (not self._kept or step % self.every == 0):
            del self._kept[: max(0, len(self._kept) + 1 - self.last)]
            self._kept.append(allocator.snapshot())

    @property
    def steps(self) -> list[int]:
        """The steps that can be returned to, oldest first."""
        return [token.step for token in self._kept]

    @property
    def nbytes(self) -> int:
        """Bytes that the snapshots hold now."""
        return sum(token.nbytes for token in self._kept)

    def to(self, step: int, why: str = "asked for") -> None:
        """Roll back to a kept step; later snapshots are dropped. Raises ValueError where the step is not kept."""
        token = next((token for token in self._kept if token.step == step), None)
        if token is None:
            raise ValueError(f"step: found {step}, expected one of the kept steps {self.steps}")
        self.allocator.rollback(token, why)
        self._kept = [kept for kept in self._kept if kept.step <= step]

    def drop(self, step: int) -> None:
        """Keep the snapshot of a step no longer."""
        self._kept = [token for token in self._kept if token.step != step]

    def state_dict(self) -> dict[str, Tensor]:
        """All snapshots as tensors by name, which safetensors and torch.save can write.

        Raises TypeError, naming it, where an optimizer keeps something that is neither a tensor nor a JSON value.
        """
        facts = []
        tensors: dict[str, Tensor] = {}
        for place, token in enumerate(self._kept):
            parts = {_STATE + name: value for name, value in token.state.items()}
            parts |= {f"parameters.{index}": value for index, value in enumerate(token.parameters)}
            values: list[dict[str, Any]] | None = None if token.moments is None else []
            for index, moments in enumerate(token.moments or ()):
                own = {name: value for name, value in moments.items() if isinstance(value, Tensor)}
                parts |= {f"moments.{index}.{name}": value for name, value in own.items()}
                plain = {name: value for name, value in moments.items() if name not in own}
                _check_plain(plain)
                assert values is not None
                values.append({"tensors": list(own), "values": plain})
            facts.append({"step": token.step, "parameters": len(token.parameters), "moments": values})
            tensors |= {f"{place}.{name}": value.contiguous() for name, value in parts.items()}
        return {METADATA: encode({"every": self.every, "last": self.last, "snapshots": facts}), **tensors}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError, before any change, where it belongs to other settings,
        layers or parameters."""
        facts = decode(state)
        for name in ("every", "last"):
            if facts.get(name) != getattr(self, name):
                raise ValueError(f"state: found {name} {facts.get(name)}, expected {getattr(self, name)}")
        tokens = [_token(place, own, state) for place, own in enumerate(facts["snapshots"])]
        for token in tokens:
            check_snapshot(self.allocator, token)
        self._kept = tokens


def check_count(name: str, value: Any, lowest: int = 1) -> None:
    """Raises TypeError or ValueError unless `value` is an int of at least `lowest`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: found {value!r} ({type(value).__name__}), expected an int")
    if value < lowest:
        raise ValueError(f"{name}: found {value}, expected at least {lowest}")


def _check_plain(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise TypeError(
                f"optimizer: found {type(value).__name__} as {name!r} in its state, expected a tensor or a plain value"
            )


def _token(place: int, facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> Snapshot:
    prefix = f"{place}."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    allocator = {name.removeprefix(_STATE): value for name, value in own.items() if name.startswith(_STATE)}
    parameters = tuple(own[f"parameters.{index}"] for index in range(facts["parameters"]))
    moments = None
    if facts["moments"] is not None:
        moments = tuple(
            {**{name: own[f"moments.{index}.{name}"] for name in kept["tensors"]}, **kept["values"]}
            for index, kept in enumerate(facts["moments"])
        )
    return Snapshot(facts["step"], allocator, parameters, moments)
