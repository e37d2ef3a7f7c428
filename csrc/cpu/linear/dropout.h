// Dropout by counter-based Philox4x32-10: the mask of an element depends on the seed and its place in x alone, so
// forward, backward and recomputation agree for any tiling. `peftkernels/ops/reference.py` defines the mask.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace peftkernels::cpu {

class Dropout {
 public:
  Dropout() = default;
  // p in [0, 1]
  Dropout(double p, int64_t seed);

  explicit operator bool() const {
    return enabled_;
  }

  // Bytes that `keep` may write, and `apply` read, for `count` elements.
  static int64_t bytes_for(int64_t count);

  // Sets a bit for every element that is kept of [first, first + count), by flat index in x viewed as (M, K); the bit
  // of `first` is bit first_bit(first), the others follow it.
  void keep(int64_t first, int64_t count, uint8_t* bits) const;
  static int64_t first_bit(int64_t first);

  // to[i] = from[i] · factor for i in [0, count), where factor is 1/(1-p) where bit `bit` + i is set, else 0, so that
  // NaN and inf get through as in PyTorch's dropout. `to` may be `from`.
  template <typename T>
  void apply(const uint8_t* bits, int64_t bit, int64_t count, const T* from, T* to) const;

 private:
  bool enabled_ = false;
  uint64_t seed_ = 0;
  uint32_t last_dropped_ = 0; // words up to this one are dropped, when anything is
  bool drops_any_ = false;
  float scale_ = 1.0f;
};

} // namespace peftkernels::cpu
