"""Device code of dropout: Philox4x32-10 recomputed from the seed, or its decisions read from bits.

Element i of x, viewed as (M, K), takes word i mod 4 of Philox at counter (i div 4, 0, 0) under the seed, and is kept
where that word is at least round(p·2³²); see `reference.dropout_factor`.
"""

import triton
import triton.language as tl


def threshold(p: float) -> tuple[int, float]:
    """The smallest word that keeps an element, as it fits 32 bits, and what a kept element is multiplied by."""
    least = round(p * 2.0**32)
    return (0xFFFFFFFF, 0.0) if least > 0xFFFFFFFF else (least, 1.0 / (1.0 - p))


@triton.jit
def block_words(seed, block):
    """The four words of Philox blocks, int64 of any shape."""
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def random_words(seed_ptr, rows, first, K, COUNT: tl.constexpr, WHOLE_BLOCKS: tl.constexpr):
    """The words of elements (rows, first … first + COUNT), uint32 (rows, COUNT).

    WHOLE_BLOCKS: K, `first` and COUNT are multiples of 4, so that each Philox block serves four neighbours.
    """
    seed = tl.load(seed_ptr)
    wide = rows.to(tl.int64) * K + first
    if WHOLE_BLOCKS:
        block = (wide // 4)[:, None] + tl.arange(0, COUNT // 4)[None, :]
    else:
        flat = wide[:, None] + tl.arange(0, COUNT)[None, :]
        block = flat // 4
    word0, word1, word2, word3 = block_words(seed, block)
    if WHOLE_BLOCKS:
        # The last dimension of a join is its two arguments: (word0, word1), (word2, word3) in memory order.
        words = tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), (rows.shape[0], COUNT))
    else:
        place = flat % 4
        words = tl.where(place < 2, tl.where(place == 0, word0, word1), tl.where(place == 2, word2, word3))
    return words


@triton.jit
def dropout_factor(seed_ptr, rows, first, K, least, keep_scale, COUNT: tl.constexpr, WHOLE_BLOCKS: tl.constexpr):
    """What elements of x are multiplied by: 0 or 1/(1-p), fp32 (rows, COUNT)."""
    words = random_words(seed_ptr, rows, first, K, COUNT, WHOLE_BLOCKS)
    return tl.where(words >= least.to(tl.uint32), keep_scale, 0.0)


@triton.jit
def factor_from_bits(bits_ptr, rows, first, M, K, keep_scale, COUNT: tl.constexpr):
    """The same from the bits that `keep_bits` wrote; `first` and COUNT are multiples of 32."""
    row_words = tl.cdiv(K, 32)
    word = first // 32 + tl.arange(0, COUNT // 32)
    inside = (rows < M)[:, None] & (word < row_words)[None, :]
    words = tl.load(bits_ptr + rows.to(tl.int64)[:, None] * row_words + word[None, :], mask=inside, other=0)
    kept = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(kept, (rows.shape[0], COUNT)).to(tl.float32) * keep_scale
