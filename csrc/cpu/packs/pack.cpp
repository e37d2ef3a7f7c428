#include "pack.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#include "cpu/gemm/parallel.h"
#include "cpu/gemm/product.h"
#include "memory.h"

namespace peftkernels::cpu {
namespace {

constexpr int64_t kHugePage = int64_t{1} << 21;
// Blocks of up to so many bytes malloc (glibc's) hands out again after they were freed; larger ones it maps each time.
constexpr int64_t kLargestRecycled = int64_t{1} << 25;

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

struct Operand {
  Operand(const at::Tensor& weight, Direction direction)
      : depth(weight.size(direction == Direction::Forward ? 1 : 0)),
        columns(weight.size(direction == Direction::Forward ? 0 : 1)),
        depth_stride(weight.stride(direction == Direction::Forward ? 1 : 0)),
        column_stride(weight.stride(direction == Direction::Forward ? 0 : 1)) {}

  int64_t panels() const {
    return divide_up(columns, kPanelColumns);
  }
  int64_t panel_size(int64_t group) const {
    return round_up(depth, group) * kPanelColumns;
  }

  int64_t depth, columns, depth_stride, column_stride;
};

template <typename To, typename From>
void pack_one(const Operand& operand, const From* data, int64_t group, int64_t panel, To* to) {
  const int64_t first = panel * kPanelColumns;
  const auto depth_offset = [&](int64_t d) { return d * operand.depth_stride; };
  const auto width_offset = [&](int64_t w) { return (first + w) * operand.column_stride; };
  const int64_t width = std::min(kPanelColumns, operand.columns - first);
  if (operand.depth_stride <= operand.column_stride) {
    pack_operand<true>(data, operand.depth, width, kPanelColumns, group, depth_offset, width_offset, to);
  } else {
    pack_operand<false>(data, operand.depth, width, kPanelColumns, group, depth_offset, width_offset, to);
  }
}

// use(the weight's elements, an element of `dtype`) with both in their types.
template <typename Use>
void with_types(const at::Tensor& weight, at::ScalarType dtype, const Use& use) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, weight.scalar_type(), "pack_weight", [&] {
    const auto* const data = weight.const_data_ptr<scalar_t>();
    AT_DISPATCH_SWITCH(
        dtype, "pack_weight",
        AT_DISPATCH_CASE(at::kFloat, [&] { use(data, float()); })
        AT_DISPATCH_CASE(at::kBFloat16, [&] { use(data, at::BFloat16()); }));
  });
}

} // namespace

int64_t depth_group_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return depth_group<at::BFloat16>();
    default:
      return 1;
  }
}

at::Tensor pack(const at::Tensor& weight, at::ScalarType dtype, Direction direction, int64_t group, bool kept) {
  const Operand operand(weight, direction);
  auto packed =
      empty_in_huge_pages(operand.panels(), operand.panel_size(group), dtype, kept ? kHugePage : kLargestRecycled);
  if (!packed.defined()) {
    return packed;
  }
  with_types(weight, dtype, [&](const auto* data, auto element) {
    auto* const to = packed.data_ptr<decltype(element)>();
    at::parallel_for(0, operand.panels(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        pack_one(operand, data, group, panel, to + panel * operand.panel_size(group));
      }
    });
  });
  return packed;
}

void pack_panel(
    const at::Tensor& weight, at::ScalarType dtype, Direction direction, int64_t group, int64_t panel, void* to) {
  with_types(weight, dtype, [&](const auto* data, auto element) {
    pack_one(Operand(weight, direction), data, group, panel, static_cast<decltype(element)*>(to));
  });
}

int64_t packed_bytes(const at::Tensor& weight, at::ScalarType dtype, Direction direction, int64_t group) {
  const Operand operand(weight, direction);
  return operand.panels() * operand.panel_size(group) * static_cast<int64_t>(c10::elementSize(dtype));
}

} // namespace peftkernels::cpu
