#include "dropout.h"

#include <algorithm>
#include <cmath>

#include "multiversion.h"

namespace peftkernels::cpu {
namespace {

// Philox blocks made at a time, each of four 32-bit words.
constexpr int64_t kBlocks = 64;
constexpr int64_t kWords = 4 * kBlocks;

// words[4·i + j] = word j of Philox4x32-10 at counter first_block + i
PEFTKERNELS_MULTIVERSION
void philox_words(uint64_t seed, uint64_t first_block, uint32_t* words) {
  uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
  for (int64_t i = 0; i < kBlocks; ++i) {
    const uint64_t counter = first_block + static_cast<uint64_t>(i);
    c0[i] = static_cast<uint32_t>(counter);
    c1[i] = static_cast<uint32_t>(counter >> 32);
    c2[i] = 0;
    c3[i] = 0;
  }
  auto key0 = static_cast<uint32_t>(seed);
  auto key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int64_t i = 0; i < kBlocks; ++i) {
      const uint64_t product0 = uint64_t{0xD2511F53} * c0[i];
      const uint64_t product1 = uint64_t{0xCD9E8D57} * c2[i];
      c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ key0;
      c1[i] = static_cast<uint32_t>(product1);
      c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ key1;
      c3[i] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  for (int64_t i = 0; i < kBlocks; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

PEFTKERNELS_MULTIVERSION
void factors_of(const uint32_t* words, int64_t count, uint32_t last_dropped, float scale, float* factors) {
  for (int64_t i = 0; i < count; ++i) {
    factors[i] = words[i] > last_dropped ? scale : 0.0f;
  }
}

} // namespace

Dropout::Dropout(double p, int64_t seed) : enabled_(true), seed_(static_cast<uint64_t>(seed)) {
  const double threshold = std::nearbyint(p * 4294967296.0);
  drops_any_ = threshold > 0.0;
  last_dropped_ = drops_any_ ? static_cast<uint32_t>(static_cast<uint64_t>(threshold) - 1) : 0;
  // All words are dropped at p = 1, where the scale of kept elements has no value.
  scale_ = p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f;
}

template <typename T>
void Dropout::apply(int64_t first, int64_t count, const T* from, T* to) const {
  // Multiplying, rather than selecting, lets NaN and inf through as PyTorch's dropout does.
  uint32_t words[kWords];
  float factors[kWords];
  int64_t done = 0;
  while (done < count) {
    const int64_t flat = first + done;
    const int64_t skipped = flat % 4;
    const int64_t step = std::min(count - done, kWords - skipped);
    if (drops_any_) {
      philox_words(seed_, static_cast<uint64_t>(flat / 4), words);
      factors_of(words + skipped, step, last_dropped_, scale_, factors);
    } else {
      std::fill(factors, factors + step, scale_);
    }
    for (int64_t i = 0; i < step; ++i) {
      to[done + i] = static_cast<T>(static_cast<float>(from[done + i]) * factors[i]);
    }
    done += step;
  }
}

template void Dropout::apply(int64_t, int64_t, const float*, float*) const;
template void Dropout::apply(int64_t, int64_t, const c10::BFloat16*, c10::BFloat16*) const;
template void Dropout::apply(int64_t, int64_t, const c10::Half*, c10::Half*) const;

} // namespace peftkernels::cpu
