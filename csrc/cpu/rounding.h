// Where fp32 sums become results: output tiles, and the dot product of short rows.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "adapter.h"

namespace peftkernels::cpu {

// to[i] = from[i], rounded once to nearest even
void round_row(const float* from, int64_t count, float* to);
void round_row(const float* from, int64_t count, c10::BFloat16* to);
void round_row(const float* from, int64_t count, c10::Half* to);

// Σ a[i]·b[i] in fp32
float dot(const float* a, const float* b, int64_t count);
float dot(const c10::BFloat16* a, const c10::BFloat16* b, int64_t count);
float dot(const c10::Half* a, const c10::Half* b, int64_t count);

// A tile of the output while it is being summed: in place for fp32, in a scratch buffer that `store` rounds otherwise.
template <typename T>
class OutputTile {
 public:
  OutputTile(T* to, int64_t to_stride, int64_t rows, int64_t columns)
      : to_(to), to_stride_(to_stride), rows_(rows), columns_(columns) {
    if constexpr (std::is_same_v<T, float>) {
      sums_ = to;
      stride_ = to_stride;
    } else {
      sums_ = thread_scratch<float, Scratch::Tile>(rows * columns);
      stride_ = columns;
    }
  }

  float* sums() const {
    return sums_;
  }

  int64_t stride() const {
    return stride_;
  }

  void clear() const {
    for (int64_t row = 0; row < rows_; ++row) {
      std::fill(sums_ + row * stride_, sums_ + row * stride_ + columns_, 0.0f);
    }
  }

  void store() const {
    if constexpr (!std::is_same_v<T, float>) {
      for (int64_t row = 0; row < rows_; ++row) {
        round_row(sums_ + row * stride_, columns_, to_ + row * to_stride_);
      }
    }
  }

 private:
  T* to_;
  int64_t to_stride_, rows_, columns_;
  float* sums_;
  int64_t stride_;
};

} // namespace peftkernels::cpu
