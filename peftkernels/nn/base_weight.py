"""The weight of a layer with an adapter, to be looked at: a product with it would leave the adapter out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_OPERATORS = ("matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "addbmm", "inner", "einsum", "tensordot")


def _products() -> Iterable[Callable[..., Any]]:
    yield from (F.linear, F.bilinear, F.multi_head_attention_forward, torch.linalg.multi_dot, torch.chain_matmul)
    yield from (Tensor.__matmul__, Tensor.__rmatmul__)
    for name in _OPERATORS:
        for place in (torch, Tensor):
            for found in (getattr(place, name, None), getattr(place, f"{name}_", None)):
                if found is not None:
                    yield found


_PRODUCTS = frozenset(_products())
# What multiplies takes the weight on its side as often as not.
_TRANSPOSES = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")),
        *(getattr(place, name) for place in (torch, Tensor) for name in ("t", "transpose", "adjoint", "permute")),
    )
)


class BaseWeight(Tensor):
    """Shares the memory of the weight that it was made of, and answers every question as that does, but no product.

    torch's own modules multiply with `.weight` of projections that they hold: `nn.MultiheadAttention` always, and
    `nn.TransformerEncoderLayer` in evaluation, where it takes another way once a weight is of a class of its own.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Give plain tensors, but for a transpose and a product.

        Raises:
            RuntimeError: for a product.
        """
        if func in _PRODUCTS:
            # Not a TypeError, of which `@` makes one of its own that says nothing.
            raise RuntimeError(
                f"{func.__name__}: found the weight of a layer with an adapter, which the product would leave out, "
                "expected that the layer is called; to leave it out on purpose take layer.base_layer.weight"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            return result.as_subclass(cls) if func in _TRANSPOSES else result
