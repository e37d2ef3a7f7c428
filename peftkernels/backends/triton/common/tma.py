"""What the tensor memory accelerator needs of a product's operands: in, W and out, in blocks of a tile."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peftkernels.backends.triton.common.arguments import Frozen, Types
from peftkernels.backends.triton.common.launch import descriptor
from peftkernels.backends.triton.common.tiles import Tile


def descriptor_types(dtype: torch.dtype, tile: Tile, transposed: bool) -> Types:
    """The types of `descriptors`."""
    blocks = zip(("in_desc", "w_desc", "out_desc"), _blocks(tile, transposed), strict=True)
    return {name: descriptor(dtype, block) for name, block in blocks}


def descriptors(tile: Tile, frozen: Frozen, out: Tensor, transposed: bool) -> list[TensorDescriptor]:
    """The descriptors of in, W and out."""
    tensors = (frozen.rows, frozen.weight, out)
    return [descriptor_of(tensor, block) for tensor, block in zip(tensors, _blocks(tile, transposed), strict=True)]


def _blocks(tile: Tile, transposed: bool) -> tuple[list[int], list[int], list[int]]:
    w = [tile.depth, tile.columns] if transposed else [tile.columns, tile.depth]
    # Half the columns of out at a time: that takes half the shared memory.
    return [tile.rows, tile.depth], w, [tile.rows, tile.columns // 2]


def descriptor_of(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """What the tensor memory accelerator needs to move blocks of a (rows, columns) tensor.

    The class checks alignment, strides and block when it is constructed, at a cost of 3 µs each time; the plan of a
    call has settled them, so the fields are set without it.
    """
    made = object.__new__(TensorDescriptor)
    vars(made).update(
        base=tensor,
        shape=list(tensor.shape),
        strides=list(tensor.stride()),
        block_shape=block,
        padding="zero",
        round_f32_to_tf32=False,
    )
    return made
