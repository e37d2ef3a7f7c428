// The one matrix kernel everything here is built from, and the operand layouts it wants.
//
// C (M x N, fp32, row-major) = or += A (M x depth, row-major) · B (depth x N), through ATen's brgemm, which picks its
// instructions at run time. 16-bit right operands lie in VNNI pairs, [depth/2][N][2], on processors that want them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace peftkernels::cpu {

inline int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return divide_up(value, multiple) * multiple;
}

// How many consecutive depth elements of one column lie side by side in a right operand: 2 where the processor's
// 16-bit kernels want pairs (VNNI), else 1. ATen does not tell, so a small product is tried once.
template <typename T>
int64_t depth_group();

// `depth` must be a multiple of `group`; rows of A hold `depth` readable elements.
template <typename T>
void matmul(
    int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
    int64_t ldc, bool accumulate, int64_t group) {
  at::native::cpublas::brgemm(rows, columns, depth, lda, ldb, ldc, accumulate, a, b, c, group == 2);
}

// Depth of one step of `matmul_steps`. Each step is summed by itself before it is added to C, so shorter steps round
// less: at K = 4096 the root mean square error in fp32 is 4.4 times the library's in one step, 1.35 times in these.
constexpr int64_t kDepthStep = 384;

// As `matmul`, step by step along the depth. With a depth of 0 nothing is written; returns whether C holds sums.
template <typename T>
bool matmul_steps(
    int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
    int64_t ldc, bool accumulate, int64_t group) {
  for (int64_t d = 0; d < depth; d += kDepthStep) {
    matmul(
        rows, columns, std::min(kDepthStep, depth - d), a + d, lda, b + d * ldb, ldb, c, ldc, accumulate, group);
    accumulate = true;
  }
  return accumulate;
}

// Releases the tile configuration that some processors hold; called once when a thread has done its share.
template <typename T>
void release_matmul(int64_t group) {
  at::native::cpublas::brgemm_release(group == 2);
}

// One rounding from the source's dtype to the operand's.
template <typename To, typename From>
To converted(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else {
    return static_cast<To>(static_cast<float>(value));
  }
}

template <int64_t Group, bool DepthInner, typename To, typename From, typename DepthOffset, typename WidthOffset>
void pack_groups(
    const From* from, int64_t depth, int64_t width, int64_t ld, DepthOffset depth_offset, WidthOffset width_offset,
    To* to) {
  // Blocks of source and result that fit the first-level cache together, whichever of the two is walked across.
  constexpr int64_t kBlock = 16;
  for (int64_t begin = 0; begin < depth; begin += kBlock) {
    const int64_t end = std::min(depth, begin + kBlock);
    To* const block = to + begin * ld;
    const auto copy = [&](int64_t d, int64_t w) {
      const int64_t step = d - begin;
      block[(step / Group) * ld * Group + w * Group + step % Group] =
          converted<To>(from[depth_offset(d) + width_offset(w)]);
    };
    if constexpr (DepthInner) {
      for (int64_t w = 0; w < width; ++w) {
        for (int64_t d = begin; d < end; ++d) {
          copy(d, w);
        }
      }
    } else {
      for (int64_t d = begin; d < end; ++d) {
        for (int64_t w = 0; w < width; ++w) {
          copy(d, w);
        }
      }
    }
  }
  for (int64_t d = 0; d < round_up(depth, Group); ++d) {
    for (int64_t w = d < depth ? width : 0; w < ld; ++w) {
      to[(d / Group) * ld * Group + w * Group + d % Group] = To(0.0f);
    }
  }
}

// Writes the right operand of `depth` x `width` whose element (d, w) is from[depth_offset(d) + width_offset(w)],
// grouped by `group` along the depth and zero-padded to whole groups and to `ld` columns.
// DepthInner walks the source along its depth, for sources that are contiguous in that direction.
template <bool DepthInner, typename To, typename From, typename DepthOffset, typename WidthOffset>
void pack_operand(
    const From* from, int64_t depth, int64_t width, int64_t ld, int64_t group, DepthOffset depth_offset,
    WidthOffset width_offset, To* to) {
  if (group == 2) {
    pack_groups<2, DepthInner>(from, depth, width, ld, depth_offset, width_offset, to);
  } else {
    pack_groups<1, DepthInner>(from, depth, width, ld, depth_offset, width_offset, to);
  }
}

} // namespace peftkernels::cpu
