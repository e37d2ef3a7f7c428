// What the AVX-512 kernels share: how elements of each dtype are read and multiplied into fp32 sums.
#pragma once

#include "avx512.h"

#ifdef PEFTKERNELS_BUILDS_AVX512

#include <c10/util/BFloat16.h>

#include <array>
#include <cstdint>
#include <cstring>

#ifndef __clang__
// Partial redundancy elimination carries sums and operands around the loops in more registers than there are: with it,
// GCC 12 spills in every step, at two thirds of the speed.
#pragma GCC optimize("no-tree-pre")
#endif

namespace peftkernels::cpu::avx512 {

constexpr int64_t kLanes = 16;
constexpr int64_t kMostVectors = 4;
constexpr __mmask16 kAllLanes = 0xFFFF;

struct Fp32 {
  using Element = float;
  using Vector = __m512;
  static constexpr int64_t kGroup = 1;
  // Rows of a tile by its vectors a row: enough independent sums to hide the latency, few enough for 32 registers.
  static constexpr std::array<int64_t, kMostVectors> kTileRows = {12, 12, 8, 6};

  PEFTKERNELS_AVX512_INLINE static Vector load(__mmask16 lanes, const float* from) {
    return _mm512_maskz_loadu_ps(lanes, from);
  }
  PEFTKERNELS_AVX512_INLINE static Vector broadcast(const float* from) {
    return _mm512_set1_ps(*from);
  }
  PEFTKERNELS_AVX512_INLINE static __m512 multiply_add(__m512 sum, Vector a, Vector b) {
    return _mm512_fmadd_ps(a, b, sum);
  }
};

struct Bf16 {
  using Element = uint16_t;
  using Vector = __m512i;
  static constexpr int64_t kGroup = 2;
  static constexpr std::array<int64_t, kMostVectors> kTileRows = {8, 8, 8, 6};

  PEFTKERNELS_AVX512_INLINE static Vector load(__mmask16 lanes, const uint16_t* from) {
    return _mm512_maskz_loadu_epi32(lanes, from);
  }
  PEFTKERNELS_AVX512_INLINE static Vector broadcast(const uint16_t* from) {
    int pair;
    std::memcpy(&pair, from, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  PEFTKERNELS_AVX512_INLINE static __m512 multiply_add(__m512 sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

inline const float* bits_of(const float* values) {
  return values;
}

inline const uint16_t* bits_of(const c10::BFloat16* values) {
  return reinterpret_cast<const uint16_t*>(values);
}

// Loops over a tile's sums are unrolled whole, by demand: a sum that is reached through an index that the compiler does
// not know lives in memory instead of a register.
template <int R, int V>
PEFTKERNELS_AVX512_INLINE void clear(__m512 (&sums)[R][V]) {
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sums[i][v] = _mm512_setzero_ps();
    }
  }
}

} // namespace peftkernels::cpu::avx512

#endif
