// Dropout by counter-based Philox4x32-10: the mask of an element depends on the seed and its place in x alone, so
// forward, backward and recomputation agree for any tiling. `peftkernels/reference.py` defines the mask.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

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

  // to[i] = from[i] · factor(first + i) for i in [0, count), where `first` is the flat index of the first element in
  // x viewed as (M, K) and factor is 0 or 1/(1-p). `to` may be `from`.
  template <typename T>
  void apply(int64_t first, int64_t count, const T* from, T* to) const;

 private:
  bool enabled_ = false;
  uint64_t seed_ = 0;
  uint32_t last_dropped_ = 0; // words up to this one are dropped, when anything is
  bool drops_any_ = false;
  float scale_ = 1.0f;
};

} // namespace peftkernels::cpu
