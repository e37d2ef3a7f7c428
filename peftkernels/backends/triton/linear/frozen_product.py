"""The frozen product of either pass: which way it goes, and the launch of a GEMM with its tail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkernels.backends.triton.common.arguments import Frozen, LowRank, Sizes
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, capability, gpu_name, multiprocessors
from peftkernels.backends.triton.common.tiles import TMA, Tile, tile
from peftkernels.backends.triton.kernels import gemm_pointer, gemm_tma
from peftkernels.backends.triton.linear import routes


def route(kinds: Kinds, device: torch.device, direction: str, sizes: Sizes, plain_weight: bool) -> routes.Choice:
    """Return the choice that serves a call: the table's, or the library where a view's layout rules it out.

    Args:
        kinds: The call as the compiler sees it.
        device: Where it runs.
        direction: `routes.FORWARD` or `routes.BACKWARD`.
        sizes: M, N and K.
        plain_weight: True if W is contiguous.

    Raises:
        RuntimeError: Where a forced choice cannot serve.
    """
    product = routes.Product(direction, str(kinds.x).removeprefix("torch."), sizes.m, sizes.n, sizes.k)
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


def resident_programs(device: torch.device, tile: Tile, m: int, columns: int) -> int:
    """Programs that stay and share the tiles of out (m, columns) among them."""
    return min(tiles_of(tile, m, columns), multiprocessors(device) * tile.programs)


def tiles_of(tile: Tile, m: int, columns: int) -> int:
    """Tiles of out (m, columns)."""
    return -(-m // tile.rows) * -(-columns // tile.columns)


@dataclass(frozen=True)
class TailProduct:
    """out = in · Wop + left·right in one launch (see `products`).

    Attributes:
        variant: `gemm_tma` or `gemm_pointer`, as the tile's kind says.
        tile: How a program walks the product.
        programs: The grid.
        transposed: True for the backward direction.
        sizes: The product's sizes.
    """

    variant: Variant
    tile: Tile
    programs: int
    transposed: bool
    sizes: Sizes

    def __call__(self, frozen: Frozen, low_rank: LowRank, out: Tensor, keep_scale: float) -> None:
        """Write out; keep_scale: what dropout multiplies an element by that it keeps, where low_rank has its bits."""
        if self.tile.kind == TMA:
            gemm_tma.launch(
                self.variant, self.programs, self.tile, frozen, low_rank, out, self.transposed, keep_scale, self.sizes
            )
        else:
            gemm_pointer.launch(self.variant, self.programs, frozen, low_rank, out, keep_scale, self.sizes)


def plan_tail(kinds: Kinds, device: torch.device, tile: Tile, sizes: Sizes, transposed: bool) -> TailProduct:
    """Return the launch for x·Wᵀ, or transposed for G·W."""
    m, n, k, _, _ = sizes
    columns, depth = (k, n) if transposed else (n, k)
    if tile.kind == TMA:
        variant = gemm_tma.variant(kinds, tile, transposed)
        return TailProduct(variant, tile, resident_programs(device, tile, m, columns), transposed, sizes)
    variant = gemm_pointer.variant(kinds, tile, transposed, depth % tile.depth == 0)
    return TailProduct(variant, tile, tiles_of(tile, m, columns), transposed, sizes)
