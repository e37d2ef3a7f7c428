"""Rank states and the plan that kernels read: masks as device tensors whose shapes never change."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from peftkernels.ops.rules import backed


class RankState(IntEnum):
    """What a rank does in a step.

    Attributes:
        ACTIVE: contributes to the output and receives every gradient.
        PROBE: contributes nothing and still receives the gradient of its gate, by which it can come back.
        DEAD: contributes nothing, receives nothing, costs nothing.
    """

    DEAD = 0
    PROBE = 1
    ACTIVE = 2


def _check_state(state: Tensor, name: str = "state") -> None:
    if not isinstance(state, Tensor):
        raise TypeError(f"{name}: found {type(state).__name__}, expected a uint8 tensor of shape (r,)")
    if state.dtype != torch.uint8:
        raise TypeError(f"{name}: found dtype {state.dtype}, expected torch.uint8")
    if state.dim() != 1:
        raise ValueError(f"{name}: found shape {tuple(state.shape)}, expected (r,)")


def _order(state: Tensor) -> Tensor:
    return torch.sort(state, descending=True, stable=True).indices.to(torch.int32)


def _counts(state: Tensor) -> Tensor:
    # As int: torch.compile folds the comparison of a tensor with an enumeration's member to False.
    active, dead = int(RankState.ACTIVE), int(RankState.DEAD)
    return torch.stack(((state == active).sum(), (state != dead).sum())).to(torch.int32)


def check_plan(state: Tensor, order: Tensor, counts: Tensor, prefix: str = "") -> None:
    """Raise TypeError or ValueError where these are not the tensors of a plan, by all that is known without a value."""
    for name, value in (("state", state), ("order", order), ("counts", counts)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{prefix}{name}: found {type(value).__name__}, expected a tensor")
    if (
        state.dtype is torch.uint8
        and order.dtype is torch.int32
        and counts.dtype is torch.int32
        and state.dim() == 1
        and order.shape == state.shape
        and counts.shape == (2,)
        and state.device == order.device == counts.device
    ):
        return
    _check_state(state, f"{prefix}state")
    for name, value, shape in (("order", order, tuple(state.shape)), ("counts", counts, (2,))):
        if value.dtype != torch.int32:
            raise TypeError(f"{prefix}{name}: found dtype {value.dtype}, expected torch.int32")
        if tuple(value.shape) != shape:
            raise ValueError(f"{prefix}{name}: found shape {tuple(value.shape)}, expected {shape}")
        if value.device != state.device:
            raise ValueError(f"{prefix}{name}: found device {value.device}, expected state's, {state.device}")


def check_values(state: Tensor, order: Tensor, counts: Tensor) -> None:
    """Raise ValueError where tensors on the CPU hold no plan, such as memory that nobody wrote.

    Elsewhere to look would be to wait for the device: its kernels keep to ranks that there are, whatever a plan says.
    """
    for name, value in (("state", state), ("order", order), ("counts", counts)):
        if value.device.type != "cpu" or type(value) is not Tensor:
            return
        backed(f"rank_plan.{name}", value)
    n_active, n_live = counts.tolist()
    r = state.shape[0]
    if not 0 <= n_active <= n_live <= r:
        raise ValueError(
            f"rank_plan.counts: found [{n_active}, {n_live}], expected [n_active, n_active + n_probe] of {r} ranks"
        )
    places, states = order.tolist(), state.tolist()
    expected = [int(RankState.ACTIVE)] * n_active + [int(RankState.PROBE)] * (n_live - n_active)
    expected += [int(RankState.DEAD)] * (r - n_live)
    if sorted(places) == list(range(r)) and [states[rank] for rank in places] == expected:
        return
    for place, rank in enumerate(places):
        if not 0 <= rank < r:
            raise ValueError(f"rank_plan.order: found rank {rank} at place {place}, expected ranks from 0 to {r - 1}")
        if rank in places[:place]:
            raise ValueError(f"rank_plan.order: found rank {rank} twice, expected it once")
        if states[rank] != expected[place]:
            raise ValueError(
                f"rank_plan.state: found {states[rank]} for rank {rank}, expected {expected[place]} by the plan's "
                "order and counts"
            )


class RankPlan:
    """Rank states together with the compact order that kernels walk.

    The constructor wraps existing tensors without copying or reading them; use `from_state` or `from_mask` to build a
    plan. What they hold is looked at where it is used: on the CPU an order or counts that do not belong to the states
    raise ValueError; on accelerators, which are not read, kernels keep to ranks that there are.

    Attributes:
        state: uint8 (r,), one `RankState` per rank.
        order: int32 (r,), ACTIVE ranks first, then PROBE, then DEAD, each in ascending index order.
        counts: int32 (2,), [n_active, n_active + n_probe].

    Raises:
        TypeError, ValueError: tensors of another dtype, shape or device.
    """

    __slots__ = ("counts", "order", "state")

    def __init__(self, state: Tensor, order: Tensor, counts: Tensor) -> None:
        check_plan(state, order, counts)
        self.state = state
        self.order = order
        self.counts = counts

    @classmethod
    def _of_known(cls, state: Tensor, order: Tensor, counts: Tensor) -> RankPlan:
        """A plan of tensors that were a plan's before, such as a layer's buffers: every call looks at them itself."""
        plan = cls.__new__(cls)
        plan.state, plan.order, plan.counts = state, order, counts
        return plan

    @classmethod
    def from_state(cls, state: Tensor) -> RankPlan:
        """Build a plan from states; they are read back once from an accelerator, to be checked.

        Args:
            state: uint8 (r,), values of `RankState`; copied.

        Raises:
            TypeError, ValueError: another dtype or shape, or a value that is no `RankState`.
        """
        _check_state(state)
        if state.numel() and int(state.max()) > RankState.ACTIVE:
            raise ValueError(f"state: found value {int(state.max())}, expected 0 (DEAD), 1 (PROBE) or 2 (ACTIVE)")
        state = state.detach().clone().contiguous()
        return cls._of_known(state, _order(state), _counts(state))

    @classmethod
    def from_mask(cls, mask: Tensor, masked: RankState = RankState.PROBE) -> RankPlan:
        """Build a plan from a mask.

        Args:
            mask: bool (r,), True for ACTIVE ranks.
            masked: the state of the others, PROBE or DEAD.

        Raises:
            TypeError, ValueError: another dtype or shape.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: found {found}, expected a torch.bool tensor of shape (r,)")
        if mask.dim() != 1:
            raise ValueError(f"mask: found shape {tuple(mask.shape)}, expected (r,)")
        state = torch.full(mask.shape, int(RankState(masked)), dtype=torch.uint8, device=mask.device)
        state.masked_fill_(mask, int(RankState.ACTIVE))
        return cls._of_known(state, _order(state), _counts(state))

    def is_consistent(self) -> bool:
        """Return True if states are states, and order and counts follow from them; reads an accelerator back."""
        state = self.state
        known = bool((state <= int(RankState.ACTIVE)).all())
        return known and torch.equal(self.order, _order(state)) and torch.equal(self.counts, _counts(state))

    def update_(self, state: Tensor) -> RankPlan:
        """Take new states in place, on the device, without synchronising with the host (CUDA graphs may capture it).

        Args:
            state: uint8 (r,) on the plan's device, values of `RankState`; values are not checked, since that would read
                them back.

        Returns:
            The plan itself.

        Raises:
            TypeError, ValueError: another dtype, shape or device.
        """
        _check_state(state)
        if state.shape != self.state.shape:
            raise ValueError(f"state: found shape {tuple(state.shape)}, expected {tuple(self.state.shape)}")
        if state.device != self.state.device:
            raise ValueError(f"state: found device {state.device}, expected {self.state.device}")
        self.state.copy_(state)
        self.order.copy_(_order(self.state))
        self.counts.copy_(_counts(self.state))
        return self

    def __repr__(self) -> str:
        return f"RankPlan(state={self.state!r}, counts={self.counts!r})"
