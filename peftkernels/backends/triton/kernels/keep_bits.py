"""Which elements dropout keeps, a bit an element.

The backward pass looks at each element twice (∂A and ∂x), and a word of Philox costs some forty integer instructions:
this works them out once.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkernels.backends.triton.common.arguments import AdapterArguments, Sizes
from peftkernels.backends.triton.common.dropout import block_words, random_words
from peftkernels.backends.triton.common.kinds import Kinds
from peftkernels.backends.triton.common.launch import Variant, integers, options

# Rows and 32-bit words of a program of `keep_bits`.
BITS_ROWS, BITS_WORDS = 16, 8


@triton.jit
def keep_bits(
    seed_ptr,
    bits_ptr,
    M,
    K,
    least,
    BLOCK_M: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    """Decide for each element of x (M, K) whether dropout keeps it.

    Grid: row blocks × blocks of words.

    Args:
        seed_ptr: One int64.
        bits_ptr: int32 (M, ⌈K / 32⌉); written: bit j of word w in a row is 1 where element 32·w + j is kept.
        M, K: Rows and columns of x.
        least: The least word of Philox that keeps an element.
    """
    row_words = tl.cdiv(K, 32)
    blocks = tl.cdiv(row_words, BLOCK_WORDS)
    rows = (tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_word = (tl.program_id(0) % blocks) * BLOCK_WORDS
    word = first_word + tl.arange(0, BLOCK_WORDS)
    smallest = least.to(tl.uint32)
    if WHOLE_BLOCKS:
        # Eight blocks a word, four decisions each, where they are drawn: nothing changes threads but the last sum.
        seed = tl.load(seed_ptr)
        first_block = (rows.to(tl.int64)[:, None] * K + word[None, :] * 32) // 4
        block = first_block[:, :, None] + tl.arange(0, 8)[None, None, :]
        word0, word1, word2, word3 = block_words(seed, block)
        kept = (word0 >= smallest).to(tl.int32) | ((word1 >= smallest).to(tl.int32) << 1)
        kept = kept | ((word2 >= smallest).to(tl.int32) << 2) | ((word3 >= smallest).to(tl.int32) << 3)
        packed = tl.sum(kept << (4 * tl.arange(0, 8))[None, None, :], axis=2)
    else:
        words = random_words(seed_ptr, rows, first_word * 32, K, BLOCK_WORDS * 32, False)
        kept = tl.reshape((words >= smallest).to(tl.int32), (BLOCK_M, BLOCK_WORDS, 32))
        packed = tl.sum(kept << tl.arange(0, 32)[None, None, :], axis=2)
    inside = (rows < M)[:, None] & (word < row_words)[None, :]
    tl.store(bits_ptr + rows.to(tl.int64)[:, None] * row_words + word[None, :], packed, mask=inside)


def launch(variant: Variant, adapter: AdapterArguments, sizes: Sizes) -> Tensor:
    """Launch `keep_bits` for the adapter's seed, and return the bits."""
    seed = adapter.seed
    assert seed is not None
    m, k = sizes.m, sizes.k
    words = -(-k // 32)
    bits = seed.new_empty((m, words), dtype=torch.int32)
    variant(-(-m // BITS_ROWS) * -(-words // BITS_WORDS), seed, bits, m, k, adapter.numbers.least)
    return bits


@functools.cache
def variant(kinds: Kinds) -> Variant:
    """`keep_bits` for x of any dtype."""
    types = {"seed_ptr": "*i64", "bits_ptr": "*i32", **integers("M", "K"), "least": "i64"}
    constants = {"BLOCK_M": BITS_ROWS, "BLOCK_WORDS": BITS_WORDS, "WHOLE_BLOCKS": kinds.whole}
    aligned = ("bits_ptr",)
    return Variant(keep_bits, types, constants, aligned=aligned, options=options(4, 1), label=kinds.label)
