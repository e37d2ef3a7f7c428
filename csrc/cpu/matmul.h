// The one matrix kernel everything here is built from, and the operand layouts it wants.
//
// C (M x N, fp32, row-major) = or += A (M x depth, row-major) · B (depth x N), through ATen's brgemm, which picks its
// instructions at run time. 16-bit right operands lie in VNNI pairs, [depth/2][N][2], on processors that want them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>

namespace peftkernels::cpu {

inline int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return divide_up(value, multiple) * multiple;
}

// How many consecutive depth elements of one column lie side by side in a right operand: 2 for VNNI, else 1.
template <typename T>
int64_t depth_group() {
  if constexpr (std::is_same_v<T, float>) {
    return 1;
  } else {
    return at::native::cpublas::could_pack(c10::CppTypeToScalarType<T>::value) ? 2 : 1;
  }
}

// `depth` must be a multiple of `group`; rows of A hold `depth` readable elements.
template <typename T>
void matmul(
    int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
    int64_t ldc, bool accumulate, int64_t group) {
  at::native::cpublas::brgemm(rows, columns, depth, lda, ldb, ldc, accumulate, a, b, c, group == 2);
}

// Releases the tile configuration that some processors hold; called once when a thread has done its share.
template <typename T>
void release_matmul(int64_t group) {
  at::native::cpublas::brgemm_release(group == 2);
}

// Writes the right operand of `depth` x `width` whose element (d, w) is from[depth_offset(d) + width_offset(w)],
// grouped by `group` along the depth and zero-padded to whole groups and to `ld` columns.
// DepthInner walks the source along its depth, for sources that are contiguous in that direction.
template <bool DepthInner, typename To, typename From, typename DepthOffset, typename WidthOffset>
void pack_operand(
    const From* from, int64_t depth, int64_t width, int64_t ld, int64_t group, DepthOffset depth_offset,
    WidthOffset width_offset, To* to) {
  constexpr int64_t kBlock = 16;
  const int64_t padded_depth = round_up(depth, group);
  const auto place = [=](int64_t d, int64_t w) { return (d / group) * ld * group + w * group + d % group; };
  for (int64_t begin = 0; begin < depth; begin += kBlock) {
    const int64_t end = std::min(depth, begin + kBlock);
    if constexpr (DepthInner) {
      for (int64_t w = 0; w < width; ++w) {
        for (int64_t d = begin; d < end; ++d) {
          to[place(d, w)] = static_cast<To>(static_cast<float>(from[depth_offset(d) + width_offset(w)]));
        }
      }
    } else {
      for (int64_t d = begin; d < end; ++d) {
        for (int64_t w = 0; w < width; ++w) {
          to[place(d, w)] = static_cast<To>(static_cast<float>(from[depth_offset(d) + width_offset(w)]));
        }
      }
    }
  }
  for (int64_t d = 0; d < padded_depth; ++d) {
    for (int64_t w = d < depth ? width : 0; w < ld; ++w) {
      to[place(d, w)] = To(0.0f);
    }
  }
}

} // namespace peftkernels::cpu
