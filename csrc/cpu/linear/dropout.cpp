#include "dropout.h"

#include <array>
#include <cmath>
#include <cstring>

#include "cpu/gemm/avx512.h"
#include "cpu/gemm/product.h"

namespace peftkernels::cpu {
namespace {

// Words of one Philox block; element i of x has word i % 4 of block i / 4.
constexpr int64_t kWords = 4;
// Blocks whose bits fill a 32-bit word.
constexpr int64_t kBlocks = 8;
constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kKeyStep0 = 0x9E3779B9, kKeyStep1 = 0xBB67AE85;

std::array<uint32_t, kWords> philox(uint64_t seed, uint64_t block) {
  std::array<uint32_t, kWords> c = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0};
  auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = uint64_t{kMultiplier0} * c[0], product1 = uint64_t{kMultiplier1} * c[2];
    c = {
        static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key0, static_cast<uint32_t>(product1),
        static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key1, static_cast<uint32_t>(product0)};
    key0 += kKeyStep0;
    key1 += kKeyStep1;
  }
  return c;
}

uint32_t kept_by_block(uint64_t seed, uint64_t first_block, uint32_t last_dropped) {
  uint32_t kept = 0;
  for (int64_t i = 0; i < kBlocks; ++i) {
    const auto words = philox(seed, first_block + static_cast<uint64_t>(i));
    for (int64_t j = 0; j < kWords; ++j) {
      kept |= uint32_t{words[j] > last_dropped} << (kWords * i + j);
    }
  }
  return kept;
}

template <typename T>
void apply_by_element(const uint8_t* bits, int64_t bit, int64_t count, float scale, const T* from, T* to) {
  for (int64_t i = 0; i < count; ++i) {
    const bool kept = ((bits[(bit + i) / 8] >> ((bit + i) % 8)) & 1) != 0;
    to[i] = static_cast<T>(static_cast<float>(from[i]) * (kept ? scale : 0.0f));
  }
}

#ifdef PEFTKERNELS_BUILDS_AVX512

constexpr int64_t kLanes = 16;

// Eight blocks, a 64-bit lane each. Only a lane's low half counts: multiplications read nothing else, so the halves
// above it are left as they come.
PEFTKERNELS_AVX512 void keep_words(
    uint64_t seed, uint64_t first_block, uint32_t last_dropped, int64_t count, uint32_t* kept) {
  const __m512i multiplier0 = _mm512_set1_epi64(kMultiplier0), multiplier1 = _mm512_set1_epi64(kMultiplier1);
  const __m512i limit = _mm512_set1_epi64(last_dropped);
  const __m512i low_half = _mm512_set1_epi64(0xFFFFFFFF);
  const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t word = 0; word < count; ++word) {
    const __m512i block = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first_block + word * kBlocks)), lanes);
    __m512i c0 = block, c1 = _mm512_srli_epi64(block, 32);
    __m512i c2 = _mm512_setzero_si512(), c3 = c2;
    auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kRounds; ++round) {
      const __m512i product0 = _mm512_mul_epu32(c0, multiplier0), product1 = _mm512_mul_epu32(c2, multiplier1);
      constexpr int kXorOfThree = 0x96;
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1, _mm512_set1_epi64(key0), kXorOfThree);
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3, _mm512_set1_epi64(key1), kXorOfThree);
      c1 = product1;
      c3 = product0;
      key0 += kKeyStep0;
      key1 += kKeyStep1;
    }
    const auto above = [&](__m512i words) PEFTKERNELS_AVX512 {
      return static_cast<uint32_t>(_mm512_cmpgt_epu64_mask(_mm512_and_si512(words, low_half), limit));
    };
    kept[word] = _pdep_u32(above(c0), 0x11111111) | _pdep_u32(above(c1), 0x22222222) |
        _pdep_u32(above(c2), 0x44444444) | _pdep_u32(above(c3), 0x88888888);
  }
}

PEFTKERNELS_AVX512_INLINE __m512 factors_at(const uint8_t* bits, int64_t bit, __m512 scale) {
  uint32_t word;
  std::memcpy(&word, bits + bit / 8, sizeof(word));
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(word >> (bit % 8)), scale);
}

PEFTKERNELS_AVX512 void apply_by_vector(
    const uint8_t* bits, int64_t bit, int64_t count, float scale, const float* from, float* to) {
  const __m512 scales = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < count; i += kLanes) {
    const auto lanes = static_cast<__mmask16>(count - i >= kLanes ? 0xFFFF : (1U << (count - i)) - 1);
    const __m512 values = _mm512_maskz_loadu_ps(lanes, from + i);
    _mm512_mask_storeu_ps(to + i, lanes, _mm512_mul_ps(values, factors_at(bits, bit + i, scales)));
  }
}

PEFTKERNELS_AVX512 void apply_by_vector(
    const uint8_t* bits, int64_t bit, int64_t count, float scale, const c10::BFloat16* from, c10::BFloat16* to) {
  const __m512 scales = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < count; i += kLanes) {
    const auto lanes = static_cast<__mmask16>(count - i >= kLanes ? 0xFFFF : (1U << (count - i)) - 1);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from + i));
    const __m512 values = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    const __m512 dropped = _mm512_mul_ps(values, factors_at(bits, bit + i, scales));
    _mm256_mask_storeu_epi16(to + i, lanes, rounded_bf16(dropped));
  }
}

#endif

} // namespace

Dropout::Dropout(double p, int64_t seed) : enabled_(true), seed_(static_cast<uint64_t>(seed)) {
  const double threshold = std::nearbyint(p * 4294967296.0);
  drops_any_ = threshold > 0.0;
  last_dropped_ = drops_any_ ? static_cast<uint32_t>(static_cast<uint64_t>(threshold) - 1) : 0;
  // All words are dropped at p = 1, where the scale of kept elements has no value.
  scale_ = p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f;
}

int64_t Dropout::bytes_for(int64_t count) {
  // Whole words from a whole block on, and a word behind the last that vector loads may touch.
  constexpr int64_t kElementsPerWord = kWords * kBlocks;
  return ((count + kWords - 1 + kElementsPerWord - 1) / kElementsPerWord + 1) * static_cast<int64_t>(sizeof(uint32_t));
}

int64_t Dropout::first_bit(int64_t first) {
  return first % kWords;
}

void Dropout::keep(int64_t first, int64_t count, uint8_t* bits) const {
  const int64_t words = bytes_for(count) / static_cast<int64_t>(sizeof(uint32_t)) - 1;
  const auto block = static_cast<uint64_t>(first / kWords);
  if (!drops_any_) {
    std::memset(bits, 0xFF, static_cast<size_t>(words) * sizeof(uint32_t));
    return;
  }
#ifdef PEFTKERNELS_BUILDS_AVX512
  if (has_avx512_kernels<float>()) {
    keep_words(seed_, block, last_dropped_, words, reinterpret_cast<uint32_t*>(bits));
    return;
  }
#endif
  for (int64_t word = 0; word < words; ++word) {
    const uint32_t kept = kept_by_block(seed_, block + static_cast<uint64_t>(word * kBlocks), last_dropped_);
    // The lowest byte first, on any machine.
    for (size_t byte = 0; byte < sizeof(kept); ++byte) {
      bits[static_cast<size_t>(word) * sizeof(kept) + byte] = static_cast<uint8_t>(kept >> (8 * byte));
    }
  }
  return;
}

template <typename T>
void Dropout::apply(const uint8_t* bits, int64_t bit, int64_t count, const T* from, T* to) const {
#ifdef PEFTKERNELS_BUILDS_AVX512
  if (has_avx512_kernels<float>()) {
    apply_by_vector(bits, bit, count, scale_, from, to);
    return;
  }
#endif
  apply_by_element(bits, bit, count, scale_, from, to);
}

template void Dropout::apply(const uint8_t*, int64_t, int64_t, const float*, float*) const;
template void Dropout::apply(const uint8_t*, int64_t, int64_t, const c10::BFloat16*, c10::BFloat16*) const;

} // namespace peftkernels::cpu
