// Writes right operands in the layout of product.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "adapter.h"
#include "product.h"

namespace peftkernels::cpu {

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
