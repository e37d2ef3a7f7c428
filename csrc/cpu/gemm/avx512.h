// For files with code for AVX-512 beside a portable version. The package is built for the baseline instruction set;
// functions marked PEFTKERNELS_AVX512 are called only after `has_avx512_kernels` (product.h) said so.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10))
#define PEFTKERNELS_BUILDS_AVX512 1

#ifndef __clang__
// GCC's own intrinsics start from variables that they leave undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

// Code for fp32 contains no bf16 instruction: compilers emit them for intrinsics alone.
#define PEFTKERNELS_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,bmi2")))
#define PEFTKERNELS_AVX512_INLINE PEFTKERNELS_AVX512 __attribute__((always_inline)) inline

namespace peftkernels::cpu {

// Rounded to nearest even; every NaN becomes the quiet NaN that c10 writes.
PEFTKERNELS_AVX512_INLINE __m256i rounded_bf16(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7FC0)));
}

} // namespace peftkernels::cpu

#endif
