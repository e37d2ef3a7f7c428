// sum_over_rows of product.h for AVX-512: x and G are read as they lie, row after row; a rank's factor is broadcast.
#include <c10/util/Exception.h>

#include <algorithm>

#include "avx512_units.h"
#include "product_avx512.h"

#ifdef PEFTKERNELS_BUILDS_AVX512

namespace peftkernels::cpu::avx512 {
namespace {

// Rows that one step of sum_over_rows adds up, so that its 64 columns of them stay in the first-level cache.
constexpr int64_t kSumRows = 64;

// 64 columns of one row (fp32) or of a pair of rows (bf16, in the order of `unpack`) as vectors of a right operand.
struct Fp32Rows {
  using Unit = Fp32;
  static constexpr int64_t kRows = 1;

  PEFTKERNELS_AVX512_INLINE static void load(
      const float* row, int64_t, bool, uint64_t lanes, __m512 (&columns)[kMostVectors]) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kMostVectors; ++v) {
      columns[v] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> (v * kLanes)), row + v * kLanes);
    }
  }
  template <int R>
  PEFTKERNELS_AVX512_INLINE static void in_order(__m512 (&)[R][kMostVectors]) {}
};

struct Bf16Rows {
  using Unit = Bf16;
  static constexpr int64_t kRows = 2;

  PEFTKERNELS_AVX512_INLINE static void load(
      const uint16_t* row, int64_t stride, bool single, uint64_t lanes, __m512i (&columns)[kMostVectors]) {
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      const auto* const from = row + half * 2 * kLanes;
      const auto wanted = static_cast<__mmask32>(lanes >> (half * 2 * kLanes));
      const auto a = _mm512_maskz_loadu_epi16(wanted, from);
      const auto b = single ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(wanted, from + stride);
      columns[2 * half] = _mm512_unpacklo_epi16(a, b);
      columns[2 * half + 1] = _mm512_unpackhi_epi16(a, b);
    }
  }
  template <int R>
  PEFTKERNELS_AVX512_INLINE static void in_order(__m512 (&sums)[R][kMostVectors]) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kMostVectors; v += 2) {
        const __m512 low = sums[i][v], high = sums[i][v + 1];
        sums[i][v] = _mm512_permutex2var_ps(low, first, high);
        sums[i][v + 1] = _mm512_permutex2var_ps(low, second, high);
      }
    }
  }
};

// A step of sum_over_rows: R ranks from `rank` on, 64 columns from `column` on, rows [first, first + rows).
template <typename Rows, int R, typename T>
PEFTKERNELS_AVX512 void add_rows(
    const RowSums<T>& p, int64_t rank, int64_t column, int64_t first, int64_t rows, bool near, bool adds,
    float* to, int64_t to_stride) {
  using Unit = typename Rows::Unit;
  // Rows that are brought near before they are used; the strided walk is one that the processor does not foresee.
  constexpr int64_t kRowsAhead = 8;
  constexpr int64_t kRows = Rows::kRows;
  const uint64_t lanes = p.width - column >= kPanelColumns ? ~uint64_t{0} : (uint64_t{1} << (p.width - column)) - 1;
  const auto* right = bits_of(p.right) + first * p.right_stride + column;
  // Rows come in pairs where Unit::kGroup is 2, so a row's left operand begins at rows · ranks in either layout.
  const auto* left = bits_of(p.left) + first * p.ranks + rank * Unit::kGroup;
  __m512 sums[R][kMostVectors];
  clear(sums);
  for (int64_t row = 0; row < rows; row += kRows) {
    if (!near) {
      for (int64_t next = 0; next < kRows; ++next) {
        const auto* const line = reinterpret_cast<const char*>(right + (kRowsAhead + next) * p.right_stride);
        for (size_t byte = 0; byte < kPanelColumns * sizeof(T); byte += 64) {
          _mm_prefetch(line + byte, _MM_HINT_T0);
        }
      }
    }
    const bool single = row + kRows > rows;
    typename Unit::Vector columns[kMostVectors];
    Rows::load(right, p.right_stride, single, lanes, columns);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const auto factor = Unit::broadcast(left + i * Unit::kGroup);
#pragma GCC unroll 4
      for (int v = 0; v < kMostVectors; ++v) {
        sums[i][v] = Unit::multiply_add(sums[i][v], factor, columns[v]);
      }
    }
    right += kRows * p.right_stride;
    left += kRows * p.ranks;
  }
  Rows::in_order(sums);
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kMostVectors; ++v) {
      const auto wanted = static_cast<__mmask16>(lanes >> (v * kLanes));
      float* const at = to + (rank + i) * to_stride + column + v * kLanes;
      const auto before = _mm512_maskz_loadu_ps(static_cast<__mmask16>(adds ? wanted : 0), at);
      _mm512_mask_storeu_ps(at, wanted, _mm512_add_ps(before, sums[i][v]));
    }
  }
}

template <typename Rows, typename T>
void add_ranks(
    const RowSums<T>& p, int64_t rank, int64_t ranks, int64_t column, int64_t first, int64_t rows, bool near,
    bool adds, float* to, int64_t to_stride) {
  switch (ranks) {
    case 1:
      return add_rows<Rows, 1>(p, rank, column, first, rows, near, adds, to, to_stride);
    case 2:
      return add_rows<Rows, 2>(p, rank, column, first, rows, near, adds, to, to_stride);
    case 3:
      return add_rows<Rows, 3>(p, rank, column, first, rows, near, adds, to, to_stride);
    case 4:
      return add_rows<Rows, 4>(p, rank, column, first, rows, near, adds, to, to_stride);
    case 5:
      return add_rows<Rows, 5>(p, rank, column, first, rows, near, adds, to, to_stride);
    default:
      return add_rows<Rows, 6>(p, rank, column, first, rows, near, adds, to, to_stride);
  }
}

template <typename Rows, typename T>
void sum_chunks(const RowSums<T>& p, float* to, int64_t to_stride, bool accumulate) {
  constexpr int64_t kMostRanks = 6;
  if (p.rows == 0 && !accumulate) {
    for (int64_t i = 0; i < p.ranks; ++i) {
      std::fill(to + i * to_stride, to + i * to_stride + p.width, 0.0f);
    }
  }
  const int64_t groups = (p.ranks + kMostRanks - 1) / kMostRanks;
  for (int64_t first = 0; first < p.rows; first += kSumRows) {
    const int64_t rows = std::min(kSumRows, p.rows - first);
    for (int64_t column = 0; column < p.width; column += kPanelColumns) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t rank = group * p.ranks / groups, end = (group + 1) * p.ranks / groups;
        add_ranks<Rows>(
            p, rank, end - rank, column, first, rows, group > 0, accumulate || first > 0, to, to_stride);
      }
    }
  }
}

} // namespace

void sum_over_rows(const RowSums<float>& sums, float* to, int64_t to_stride, bool accumulate) {
  sum_chunks<Fp32Rows>(sums, to, to_stride, accumulate);
}

void sum_over_rows(const RowSums<c10::BFloat16>& sums, float* to, int64_t to_stride, bool accumulate) {
  sum_chunks<Bf16Rows>(sums, to, to_stride, accumulate);
}

} // namespace peftkernels::cpu::avx512

#else

namespace peftkernels::cpu::avx512 {

void sum_over_rows(const RowSums<float>&, float*, int64_t, bool) {
  TORCH_CHECK(false, "peftkernels: this build has no AVX-512 kernels");
}

void sum_over_rows(const RowSums<c10::BFloat16>&, float*, int64_t, bool) {
  TORCH_CHECK(false, "peftkernels: this build has no AVX-512 kernels");
}

} // namespace peftkernels::cpu::avx512

#endif
