"""The frozen product of either pass: which way it goes, and the launch of a GEMM with its tail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, capability, descriptor_of, gpu_name, multiprocessors
from peftkernels.backends.triton.common.tiles import TMA, Tile, descriptor_blocks, tile
from peftkernels.backends.triton.kernels import gemm_pointer, gemm_tma
from peftkernels.backends.triton.linear import routes


def route(
    kinds: Kinds, device: torch.device, direction: str, m: int, n: int, k: int, plain_weight: bool
) -> routes.Choice:
    """The choice that serves a call: the table's, or the library where a view's layout rules it out.

    RuntimeError where a forced choice cannot serve.
    """
    product = routes.Product(direction, str(kinds.x).removeprefix("torch."), m, n, k)
    choice, reason = routes.choose(product, gpu_name(device), capability(device))
    if choice.route == routes.LIBRARY:
        return choice
    forced = reason == routes.FORCED
    obstacle = None
    if not plain_weight:
        obstacle = "the weight's rows are not contiguous"
    elif not kinds.aligned and (tile(choice.tile).kind == TMA or not forced):
        # Pointers serve any alignment, element by element: slower than the library, right where they are asked for.
        obstacle = "an operand is not aligned to 16 bytes"
    if obstacle is None:
        return choice
    if forced:
        raise RuntimeError(f"choice {str(choice)!r} cannot serve this call: {obstacle}")
    return routes.Choice(routes.LIBRARY)


def resident_programs(device: torch.device, tile: Tile, m: int, p: int) -> int:
    """Programs that stay and share the tiles of out (m, p) among them."""
    return min(tiles_of(tile, m, p), multiprocessors(device) * tile.programs)


def tiles_of(tile: Tile, m: int, p: int) -> int:
    """Tiles of out (m, p)."""
    return -(-m // tile.rows) * -(-p // tile.columns)


@dataclass(frozen=True)
class TailProduct:
    """out (M, P) = in (M, Q) · Wop + left·right in one launch; transposed: the backward direction (see `products`)."""

    variant: Variant
    tile: Tile
    programs: int
    transposed: bool

    def __call__(
        self,
        rows: Tensor,
        weight: Tensor,
        y: Tensor,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        bits: Tensor | None,
        counts: Tensor | None,
        keep_scale: float,
        r: int,
    ) -> None:
        """Write y; bits: `dropout.keep_bits` over y, through which left·right passes."""
        (m, q), p = rows.shape, y.shape[1]
        low_rank = (left, right, bits, counts)
        if self.tile.kind == TMA:
            x_w_y = descriptors(self.tile, rows, weight, y, self.transposed)
            self.variant(self.programs, *x_w_y, bias, *low_rank, keep_scale, m, p, q, r, left.shape[1])
        else:
            numbers = (keep_scale, m, p, q, r, left.shape[1], rows.stride(0))
            self.variant(self.programs, rows, weight, bias, *low_rank, y, *numbers)


def plan_tail(kinds: Kinds, device: torch.device, tile: Tile, m: int, n: int, k: int, transposed: bool) -> TailProduct:
    """The launch for x (m, k) · Wᵀ, or transposed for G (m, n) · W."""
    p, q = (k, n) if transposed else (n, k)
    if tile.kind == TMA:
        variant = gemm_tma.variant(kinds, tile, transposed)
        return TailProduct(variant, tile, resident_programs(device, tile, m, p), transposed)
    variant = gemm_pointer.variant(kinds, tile, transposed, q % tile.depth == 0)
    return TailProduct(variant, tile, tiles_of(tile, m, p), transposed)


def descriptors(tile: Tile, rows: Tensor, weight: Tensor, y: Tensor, transposed: bool) -> list[object]:
    """What the tensor memory accelerator needs of in, W and out."""
    blocks = descriptor_blocks(tile, transposed)
    return [descriptor_of(tensor, block) for tensor, block in zip((rows, weight, y), blocks, strict=True)]
