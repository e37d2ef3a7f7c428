"""The last moments of a run, kept in memory to return to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftkernels._reading import check_list, check_object, check_text, check_whole, shown
from peftkernels.allocation.layers.sharding import local_part
from peftkernels.allocation.run.engine import BudgetAllocator
from peftkernels.allocation.run.json_tensor import METADATA, decode, encode
from peftkernels.allocation.run.snapshot import Snapshot, check_snapshot, trained_parameters
from peftkernels.allocation.run.state_checks import FACTS, check_names, check_tensor, fact, part, within

_STATE = "state."


class Snapshots:
    """Keeps a snapshot of every `every`-th step, the `last` of them; the oldest makes room for a new one.

        snapshots = Snapshots(allocator, every=50, last=3)
        allocator.add_callback(snapshots)
        ...
        snapshots.to(snapshots.steps[-1])

    A snapshot holds what `BudgetAllocator.snapshot` says. With AdamW and AdaLoRA's averages that is five times the
    trained parameters, on their device; `nbytes` has the sum. Attach the allocator to its optimizer first, or moments
    are not in the snapshots. `state_dict` has the snapshots too, so that a resumed run can go back behind the resume.

    Args:
        allocator: The allocator of the run.
        every: Steps between two snapshots; the first is taken after the first step that is seen.
        last: How many are kept.

    Raises:
        TypeError: Naming the argument.
        ValueError: Likewise.
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
        """Roll back to a kept step; later snapshots are dropped.

        Args:
            step: One of `steps`.
            why: The reason that observers are told.

        Raises:
            ValueError: Where the step is not kept.
        """
        token = next((token for token in self._kept if token.step == step), None)
        if token is None:
            raise ValueError(f"step: found {step}, expected one of the kept steps {self.steps}")
        self.allocator.rollback(token, why)
        self._kept = [kept for kept in self._kept if kept.step <= step]

    def drop(self, step: int) -> None:
        """Keep the snapshot of a step no longer."""
        self._kept = [token for token in self._kept if token.step != step]

    def state_dict(self) -> dict[str, Tensor]:
        """Return all snapshots as tensors by name, which safetensors and torch.save can write.

        Raises:
            TypeError: Naming it, where an optimizer keeps something that is neither a tensor nor a JSON value.
        """
        facts = []
        tensors: dict[str, Tensor] = {}
        for place, token in enumerate(self._kept):
            values = None if token.moments is None else [_described(moments) for moments in token.moments]
            facts.append({"step": token.step, "parameters": len(token.parameters), "moments": values})
            tensors |= {f"{place}.{name}": value.contiguous() for name, value in _parts(token).items()}
        return {METADATA: encode({"every": self.every, "last": self.last, "snapshots": facts}), **tensors}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: Before any change, where it belongs to other settings, layers or parameters, or where anything
                is missing or wrong.
        """
        self.keep(self.read(state))

    def keep(self, tokens: list[Snapshot]) -> None:
        """Keep these snapshots, which `read` gave, in place of what is kept now."""
        self._kept = tokens

    def read(self, state: Mapping[str, Tensor]) -> list[Snapshot]:
        """Return the snapshots of a state, as `load_state_dict` takes them over; changes nothing."""
        facts = decode(state)
        check_names(facts, ("every", "last", "snapshots"), FACTS)
        for name in ("every", "last"):
            if facts[name] != getattr(self, name):
                raise ValueError(f"state: found {name} {shown(facts[name])}, expected {getattr(self, name)}")
        kept = check_list(facts["snapshots"], fact("snapshots"))
        if len(kept) > self.last:
            raise ValueError(f"{fact('snapshots')}: found {len(kept)}, expected at most {self.last}")
        tokens = [_token(place, own, part(state, f"{place}.")) for place, own in enumerate(kept)]
        names = {f"{place}.{name}" for place, token in enumerate(tokens) for name in _parts(token)}
        check_names(state, {METADATA, *names})
        for place, (token, before) in enumerate(zip(tokens, [None, *tokens], strict=False)):
            with within(f"state: snapshot {place}"):
                if before is not None and token.step <= before.step:
                    raise ValueError(f"step: found {token.step} after {before.step}, expected a later one")
                check_snapshot(self.allocator.parts, self.allocator.optimizer, token)
                _check_tensors(self.allocator, token)
        return tokens


def check_count(name: str, value: Any, lowest: int = 1) -> None:
    """Check that `value` is an int of at least `lowest`.

    Raises:
        TypeError: Naming the argument, where it is no int.
        ValueError: Where it is a lower one.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: found {value!r} ({type(value).__name__}), expected an int")
    if value < lowest:
        raise ValueError(f"{name}: found {value}, expected at least {lowest}")


def _described(moments: Mapping[str, Any]) -> dict[str, Any]:
    """Moments as JSON: the names of tensors, and the other values."""
    plain = {name: value for name, value in moments.items() if not isinstance(value, Tensor)}
    for name, value in plain.items():
        if not _is_plain(value):
            raise TypeError(
                f"optimizer: found {type(value).__name__} as {name!r} in its state, expected a tensor or a plain value"
            )
    return {"tensors": [name for name in moments if name not in plain], "values": plain}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _parts(token: Snapshot) -> dict[str, Tensor]:
    """All tensors of a snapshot by the names that they have in a state."""
    parts = {_STATE + name: value for name, value in token.state.items()}
    parts |= {f"parameters.{index}": value for index, value in enumerate(token.parameters)}
    for index, moments in enumerate(token.moments or ()):
        parts |= {f"moments.{index}.{name}": value for name, value in moments.items() if isinstance(value, Tensor)}
    return parts


def _token(place: int, facts: Any, own: Mapping[str, Any]) -> Snapshot:
    """Make the snapshot of which a state says `facts` and has the tensors `own`, or raise ValueError."""
    where = fact(f"snapshots[{place}]")
    check_names(facts, ("step", "parameters", "moments"), where)
    step = check_whole(facts["step"], f"{where}.step")
    count = check_whole(facts["parameters"], f"{where}.parameters", most=len(own))
    parameters = tuple(_tensor(own, place, f"parameters.{index}") for index in range(count))
    moments = None
    if facts["moments"] is not None:
        kept = check_list(facts["moments"], f"{where}.moments")
        if len(kept) != count:
            raise ValueError(f"{where}.moments: found {len(kept)}, expected {count}, one for each parameter")
        moments = tuple(
            _moments(f"{where}.moments[{index}]", found, place, index, own) for index, found in enumerate(kept)
        )
    return Snapshot(step, part(own, _STATE), parameters, moments)


def _moments(where: str, facts: Any, place: int, index: int, own: Mapping[str, Any]) -> dict[str, Any]:
    check_names(facts, ("tensors", "values"), where)
    names = [check_text(name, f"{where}.tensors") for name in check_list(facts["tensors"], f"{where}.tensors")]
    values = check_object(facts["values"], f"{where}.values")
    for name, value in values.items():
        if name in names or not _is_plain(value):
            raise ValueError(
                f"{where}.values[{name!r}]: found {shown(value)}, expected a plain value, no tensor's name"
            )
    return {**{name: _tensor(own, place, f"moments.{index}.{name}") for name in names}, **values}


def _tensor(own: Mapping[str, Any], place: int, name: str) -> Tensor:
    found = own.get(name)
    if not isinstance(found, Tensor):
        described = "nothing" if found is None else shown(found)
        raise ValueError(f"state[{f'{place}.{name}'!r}]: found {described}, expected a tensor")
    return found


def _check_tensors(allocator: BudgetAllocator, token: Snapshot) -> None:
    """Raise ValueError unless parameters and moments can be written into what the allocator's optimizer has now."""
    parts, optimizer = _parts(token), allocator.optimizer
    trained = trained_parameters(allocator.parts, optimizer)
    for index, (parameter, _) in enumerate(zip(trained, token.parameters, strict=False)):
        own = local_part(parameter)
        check_tensor(parts, f"parameters.{index}", own.shape, own.dtype)
        if optimizer is None or token.moments is None:
            continue
        known = optimizer.state.get(parameter, {})
        for name, value in token.moments[index].items():
            # Where the optimizer has made nothing yet, there is nothing to compare with.
            if known and name not in known:
                raise ValueError(f"state: moments.{index}.{name}: found an unknown name, expected {', '.join(known)}")
            if isinstance(value, Tensor) and isinstance(known.get(name), Tensor):
                check_tensor(parts, f"moments.{index}.{name}", known[name].shape, known[name].dtype)
