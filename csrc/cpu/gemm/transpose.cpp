#include "transpose.h"

#include <algorithm>
#include <cstring>

#include "avx512.h"
#include "product.h"

namespace peftkernels::cpu {
namespace {

constexpr int64_t kBlock = 16;

void transpose_by_word(
    const char* from, int64_t row_bytes, int64_t rows, int64_t columns, uint32_t* to, int64_t to_stride) {
  // Blocks of source and result that fit the first-level cache together.
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t end = std::min(columns, begin + kBlock);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = begin; column < end; ++column) {
        std::memcpy(to + column * to_stride + row, from + row * row_bytes + column * sizeof(uint32_t), sizeof(uint32_t));
      }
    }
  }
}

#ifdef PEFTKERNELS_BUILDS_AVX512

// Sixteen rows of sixteen words; rows and columns beyond the given counts are neither read nor written.
PEFTKERNELS_AVX512 void transpose_block(
    const char* from, int64_t row_bytes, int64_t rows, int64_t columns, uint32_t* to, int64_t to_stride) {
  const auto read = static_cast<__mmask16>(columns >= kBlock ? 0xFFFF : (1U << columns) - 1);
  const auto written = static_cast<__mmask16>(rows >= kBlock ? 0xFFFF : (1U << rows) - 1);
  __m512i row[kBlock], mixed[kBlock];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kBlock; ++i) {
    row[i] = i < rows ? _mm512_maskz_loadu_epi32(read, from + i * row_bytes) : _mm512_setzero_si512();
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kBlock; i += 2) {
    mixed[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    mixed[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < kBlock; i += 4) {
    row[i] = _mm512_unpacklo_epi64(mixed[i], mixed[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(mixed[i], mixed[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(mixed[i + 1], mixed[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(mixed[i + 1], mixed[i + 3]);
  }
  // row[4·q + c] holds, in its quarter p, column 4·p + c of rows 4·q … 4·q + 3.
#pragma GCC unroll 4
  for (int64_t c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(row[c], row[4 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(row[c], row[4 + c], 0xDD);
    const __m512i even_high = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0xDD);
    mixed[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    mixed[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xDD);
    mixed[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    mixed[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kBlock; ++i) {
    if (i < columns) {
      _mm512_mask_storeu_epi32(to + i * to_stride, written, mixed[i]);
    }
  }
}

#endif

} // namespace

void transpose_words(
    const void* from, int64_t row_bytes, int64_t rows, int64_t columns, void* to, int64_t to_stride) {
  const auto* const source = static_cast<const char*>(from);
  auto* const result = static_cast<uint32_t*>(to);
#ifdef PEFTKERNELS_BUILDS_AVX512
  if (has_avx512_kernels<float>()) {
    for (int64_t row = 0; row < rows; row += kBlock) {
      for (int64_t column = 0; column < columns; column += kBlock) {
        transpose_block(
            source + row * row_bytes + column * static_cast<int64_t>(sizeof(uint32_t)), row_bytes,
            std::min(kBlock, rows - row), std::min(kBlock, columns - column), result + column * to_stride + row,
            to_stride);
      }
    }
    return;
  }
#endif
  transpose_by_word(source, row_bytes, rows, columns, result, to_stride);
}

} // namespace peftkernels::cpu
