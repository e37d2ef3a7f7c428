// The adapter's factors in the dtype of computation, in the order of a call's live ranks, and packed as operands.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/MaybeOwned.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/gemm/product.h"
#include "cpu/gemm/rows.h"
#include "cpu/gemm/scratch.h"
#include "cpu/gemm/transpose.h"
#include "live_ranks.h"

namespace peftkernels::cpu {

// A factor as `live_rows` and `live_columns` read it: contiguous, in fp32 or in the dtype of computation. It may be the
// factor itself, which stays where it is meanwhile.
inline c10::MaybeOwned<at::Tensor> readable_factor(const at::Tensor& factor, at::ScalarType dtype) {
  const bool read_directly = factor.scalar_type() == dtype || factor.scalar_type() == at::kFloat;
  return read_directly ? factor.expect_contiguous() : c10::MaybeOwned<at::Tensor>::owned(factor.to(dtype).contiguous());
}

// from[0 … count) of a readable factor as T
template <typename T>
void copy_elements(const at::Tensor& factor, int64_t first, int64_t count, T* to) {
  if (factor.scalar_type() == at::kFloat) {
    convert_row(factor.const_data_ptr<float>() + first, count, to);
  } else {
    const auto* const from = factor.const_data_ptr<T>() + first;
    std::copy(from, from + count, to);
  }
}

// Rows of the first `count` live ranks of A (r, K): [count][K]. As they lie, where ranks and dtype allow it.
template <typename T>
const T* live_rows(const at::Tensor& lora_A, const LiveRanks& ranks, int64_t count) {
  const int64_t K = lora_A.size(1);
  if (ranks.in_place && std::is_same_v<T, float>) {
    return reinterpret_cast<const T*>(lora_A.const_data_ptr<float>());
  }
  if (ranks.in_place && lora_A.scalar_type() != at::kFloat) {
    return lora_A.const_data_ptr<T>();
  }
  T* const to = thread_scratch<T, Scratch::FactorA>(count * K);
  if (ranks.in_place) {
    copy_elements(lora_A, 0, count * K, to);
    return to;
  }
  for (int64_t i = 0; i < count; ++i) {
    copy_elements(lora_A, ranks.index[i] * K, K, to + i * K);
  }
  return to;
}

// Columns of the first `count` live ranks of B (N, r): [N][count], times `factor` of each where it is not null. As they
// lie, where ranks, dtype and factors allow it.
template <typename T>
const T* live_columns(const at::Tensor& lora_B, const LiveRanks& ranks, int64_t count, const float* factor) {
  const int64_t N = lora_B.size(0), r = lora_B.size(1);
  const bool fp32 = lora_B.scalar_type() == at::kFloat;
  const bool as_they_lie = ranks.in_place && count == r && factor == nullptr;
  if (as_they_lie && fp32 == std::is_same_v<T, float>) {
    return static_cast<const T*>(lora_B.const_data_ptr());
  }
  T* const to = thread_scratch<T, Scratch::FactorB>(N * count);
  if (as_they_lie) {
    copy_elements(lora_B, 0, N * count, to);
    return to;
  }
  const std::vector<float> ones(factor == nullptr ? static_cast<size_t>(count) : 0, 1.0f);
  const float* const by = factor == nullptr ? ones.data() : factor;
  if (fp32 && ranks.in_place) {
    scale_columns(lora_B.const_data_ptr<float>(), r, N, count, by, to);
    return to;
  }
  const std::vector<int32_t> index(ranks.index.begin(), ranks.index.begin() + count);
  if (fp32 && std::is_same_v<T, float>) {
    gather_columns(lora_B.const_data_ptr<float>(), r, N, index.data(), count, by, reinterpret_cast<float*>(to));
    return to;
  }
  // By way of fp32 rows, rounded once.
  float* const wide = thread_scratch<float, Scratch::WideRow>(r + count);
  for (int64_t n = 0; n < N; ++n) {
    const float* row = wide;
    if (fp32) {
      row = lora_B.const_data_ptr<float>() + n * r;
    } else {
      convert_row(lora_B.const_data_ptr<T>() + n * r, r, wide);
    }
    gather_columns(row, r, 1, index.data(), count, by, wide + r);
    convert_row(wide + r, count, to + n * count);
  }
  return to;
}

// `width` rows of `depth` contiguous elements as right operand [depth][ld], zeros behind an odd depth.
template <typename T>
void pack_from_rows(const T* from, int64_t from_stride, int64_t width, int64_t depth, T* to, int64_t ld) {
  if constexpr (std::is_same_v<T, float>) {
    transpose_words(from, from_stride * static_cast<int64_t>(sizeof(T)), width, depth, to, ld);
  } else {
    const int64_t group = depth_group<T>();
    if (group == 2) {
      transpose_words(from, from_stride * static_cast<int64_t>(sizeof(T)), width, depth / 2, to, ld);
      for (int64_t w = 0; depth % 2 != 0 && w < width; ++w) {
        T* const pair = to + (depth / 2 * ld + w) * 2;
        pair[0] = from[w * from_stride + depth - 1];
        pair[1] = T(0.0f);
      }
      return;
    }
    for (int64_t w = 0; w < width; ++w) {
      for (int64_t d = 0; d < depth; ++d) {
        to[d * ld + w] = from[w * from_stride + d];
      }
    }
  }
}

// Rows (depth x width) as pairs along the depth, [depth/2][width][2].
template <typename T>
void pair_up(const T* from, int64_t from_stride, int64_t depth, int64_t width, T* to) {
  static_assert(sizeof(T) == sizeof(uint16_t));
  const auto* const bits = reinterpret_cast<const uint16_t*>(from);
  for (int64_t d = 0; d < depth; d += 2) {
    const uint16_t* const second = d + 1 < depth ? bits + (d + 1) * from_stride : nullptr;
    pair_rows(bits + d * from_stride, second, width, reinterpret_cast<uint16_t*>(to) + d * width);
  }
}

} // namespace peftkernels::cpu
