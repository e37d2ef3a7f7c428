"""Which way a product goes: through the library's GEMM, or through one of our kernels. Measured beforehand, never here.

The choice depends on the product's shape and dtype and not on the rank: a DEAD rank must leave the same bits as the
call with that rank cut out.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peftkernels._files import write_text
from peftkernels.backends.triton.common import tiles

FORWARD, BACKWARD = DIRECTIONS = ("forward", "backward")
LIBRARY, TAIL, SINGLE, DECODE = ROUTES = ("library", "tail", "single", "decode")
TABLES = Path(__file__).parent.parent / "configs"
# Farthest that a measured product may be from the one asked for: the sum of the base-2 logarithms of three ratios.
FARTHEST = 3.0
MOST_DECODE_ROWS = 16
FORCED = "forced"


@dataclass(frozen=True)
class Choice:
    """A way to serve a product.

    Attributes:
        route: "library": the library's GEMM, then `addmm_`; "tail": a shrink launch, then a GEMM whose last steps are
            the low-rank product; "single": both in one launch; "decode": one launch for few rows.
        tile: The name of a `tiles.Tile`; empty for the library.
    """

    route: str
    tile: str = ""

    def __str__(self) -> str:
        return self.route if not self.tile else f"{self.route}:{self.tile}"


@dataclass(frozen=True)
class Product:
    """A frozen product: FORWARD x (m, k) · Wᵀ, or BACKWARD G (m, n) · W, with W (n, k) of `dtype` ("bfloat16", …)."""

    direction: str
    dtype: str
    m: int
    n: int
    k: int

    @property
    def aligned(self) -> bool:
        """True if rows of W, x and G are multiples of 16 elements, which tiles of kind "tma" ask for."""
        return self.n % 16 == 0 and self.k % 16 == 0

    def distance(self, other: Product) -> float:
        """How far two products of one direction are apart; infinite where one has 16-bit operands and one does not.

        bfloat16 and float16 move as many bytes and multiply at one rate: what was measured for one serves the other,
        as long as its own was not.
        """
        single = "float32"
        if self.direction != other.direction or (self.dtype == single) != (other.dtype == single):
            return math.inf
        pairs = ((self.m, other.m), (self.n, other.n), (self.k, other.k))
        return sum(abs(math.log2(mine / theirs)) for mine, theirs in pairs) + 0.01 * (self.dtype != other.dtype)


@dataclass(frozen=True)
class Entry:
    """What was measured for a product: the fastest choice, every candidate's median time over the bare product's."""

    product: Product
    choice: Choice
    ratios: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """The measurements of one GPU.

    Attributes:
        gpu: Its name as the driver has it, "NVIDIA H200".
        measured: Date, commit and versions of the run.
        entries: What was measured for each product.
    """

    gpu: str
    measured: dict[str, str]
    entries: tuple[Entry, ...] = ()


def refusal(choice: Choice, product: Product, capability: tuple[int, int]) -> str | None:
    """None when `choice` can serve `product` on a GPU of this compute capability, else why it cannot."""
    if choice.route not in ROUTES:
        return f"there is no route {choice.route!r}, expected one of {', '.join(ROUTES)}"
    if choice.route == LIBRARY:
        return None if not choice.tile else f"the library takes no tile, found {choice.tile!r}"
    tile = tiles.tile(choice.tile)
    if choice.route in (SINGLE, DECODE) and product.direction != FORWARD:
        return f"route {choice.route!r} serves the forward pass only"
    if (choice.route == DECODE) != (tile.kind == tiles.DECODE_TILE):
        return f"route {choice.route!r} does not take a tile of kind {tile.kind!r}"
    if choice.route == DECODE and product.m > MOST_DECODE_ROWS:
        return f"route 'decode' serves at most {MOST_DECODE_ROWS} rows, found {product.m}"
    if tile.kind == tiles.TMA:
        if capability < (9, 0):
            return f"tiles of kind 'tma' need compute capability 9.0, found {capability[0]}.{capability[1]}"
        if product.dtype == "float32":
            return "tiles of kind 'tma' serve float16 and bfloat16"
        if not product.aligned:
            return f"tiles of kind 'tma' need N and K in multiples of 16, found N = {product.n}, K = {product.k}"
    return None


def candidates(product: Product, capability: tuple[int, int]) -> list[Choice]:
    """Every choice that can serve `product` and is worth timing; the library first."""
    found = [Choice(LIBRARY)]
    for tile in tiles.shipped(product.dtype, capability):
        if tile.rows > max(2 * product.m, 16):
            continue
        routes = (DECODE,) if tile.kind == tiles.DECODE_TILE else (TAIL, SINGLE)
        choices = [Choice(route, tile.name) for route in routes]
        found += [choice for choice in choices if refusal(choice, product, capability) is None]
    return found


_forced: Choice | None = None
_generation = 0


@contextmanager
def forced(choice: Choice | None) -> Iterator[None]:
    """Every product in the block takes `choice` (None: the table's), or raises RuntimeError where it cannot.

    For tests and for measuring; it holds for all threads.
    """
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def state() -> tuple[Choice | None, int]:
    """What choices depend on beside the call: plans that were made under another state are not used."""
    return _forced, _generation


def choose(product: Product, gpu: str, capability: tuple[int, int]) -> tuple[Choice, str]:
    """How `product` is served on `gpu`, and the reason in words.

    The entry of that very product in the GPU's table, else of the nearest one measured, else the library. A forced
    choice comes first; RuntimeError where it cannot serve.
    """
    if _forced is not None:
        reason = refusal(_forced, product, capability)
        # A tile that only one direction has is no choice for the other: that one keeps the table's.
        if reason is None:
            return _forced, FORCED
        if product.direction == FORWARD or _forced.route not in (SINGLE, DECODE):
            raise RuntimeError(f"choice {str(_forced)!r} cannot serve {product}: {reason}")
    return _from_table(product, gpu, capability)


@functools.lru_cache(maxsize=4096)
def _from_table(product: Product, gpu: str, capability: tuple[int, int]) -> tuple[Choice, str]:
    table = table_of(gpu)
    if table is None:
        return Choice(LIBRARY), f"no product was measured on {gpu!r}: the library's GEMM and addmm_ are the safe choice"
    usable = [entry for entry in table.entries if refusal(entry.choice, product, capability) is None]
    nearest = min(usable, key=lambda entry: product.distance(entry.product), default=None)
    if nearest is None or product.distance(nearest.product) > FARTHEST:
        return Choice(LIBRARY), f"nothing near {_shape(product)} was measured on {gpu!r}"
    if nearest.product == product:
        return nearest.choice, f"measured on {gpu!r}"
    return nearest.choice, f"nearest measured on {gpu!r}: {_shape(nearest.product)}"


def _shape(product: Product) -> str:
    return f"M={product.m} N={product.n} K={product.k} {product.dtype} {product.direction}"


def file_name(gpu: str) -> str:
    """The file of a GPU's table: "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


@functools.lru_cache(maxsize=64)
def table_of(gpu: str) -> Table | None:
    """The table of `gpu`, from the folder that PEFTKERNELS_TRITON_TABLES names, else the package's own; None without.

    Read once in a process.
    """
    folders = [Path(folder) for folder in (os.environ.get("PEFTKERNELS_TRITON_TABLES"),) if folder]
    for folder in (*folders, TABLES):
        path = folder / file_name(gpu)
        if path.exists():
            return read_table(path)
    return None


def forget_tables() -> None:
    """Read tables anew at the next choice: for the tuner, which has just written one."""
    global _generation
    _generation += 1
    table_of.cache_clear()
    _from_table.cache_clear()


def read_table(path: Path) -> Table:
    """Read a table.

    Args:
        path: The file.

    Raises:
        ValueError: For a file that holds no table, or a choice that does not exist; it names the file.
    """
    try:
        content = json.loads(path.read_text())
        entries = tuple(
            Entry(Product(**entry["product"]), Choice(**entry["choice"]), dict(entry["ratios"]))
            for entry in content["entries"]
        )
        for entry in entries:
            if entry.choice.route not in ROUTES or (entry.choice.tile and tiles.tile(entry.choice.tile) is None):
                raise ValueError(f"no choice {str(entry.choice)!r}")
        return Table(str(content["gpu"]), dict(content["measured"]), entries)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a table of the Triton backend's choices: {error!r}") from error


def write_table(path: Path, table: Table) -> None:
    """Write the table: all of it, or nothing."""
    content: dict[str, Any] = asdict(table)
    write_text(path, json.dumps(content, indent=1) + "\n")
