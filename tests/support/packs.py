"""What the tests of the pack cache share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peftkernels.backends import cpu
from support.implementations import skip_unless_served


@contextmanager
def fresh_cache() -> Iterator[None]:
    """An empty cache with the default settings in the block; the settings found come back after it."""
    skip_unless_served("cpu")
    before = cpu.pack_cache_stats()
    cpu.clear_pack_cache()
    cpu.set_pack_mode("both")
    cpu.set_pack_limit("50%")
    try:
        yield
    finally:
        cpu.set_pack_mode(str(before["mode"]))
        cpu.set_pack_limit(str(before["limit_setting"]))
        cpu.clear_pack_cache()


def count(name: str) -> int:
    """A number of the cache's statistics."""
    value = cpu.pack_cache_stats()[name]
    assert isinstance(value, int), f"{name} is {value!r}"
    return value


def gained(action: Callable[[], object]) -> tuple[int, int]:
    """Hits and misses that `action` causes."""
    hits, misses = count("hits"), count("misses")
    action()
    return count("hits") - hits, count("misses") - misses


def packed_bytes(n: int, k: int, element_size: int = 4) -> dict[str, int]:
    """Bytes of the packs of a weight (N, K) in float32: columns are rounded up to panels of 64."""
    panels = {"forward": -(-n // 64) * k, "backward": -(-k // 64) * n}
    return {name: 64 * element_size * size for name, size in panels.items()}
