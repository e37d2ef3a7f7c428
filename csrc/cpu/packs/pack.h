// Frozen weights as right operands of the matrix kernels, laid out in panels.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace peftkernels::cpu {

// Forward: right operand Wᵀ (K x N) for x·Wᵀ.  Backward: right operand W (N x K) for G·W.
enum class Direction : int64_t { Forward = 0, Backward = 1 };

// `depth_group` of a dtype that is known at run time only.
int64_t depth_group_of(at::ScalarType dtype);

// The weight (N, K) as panels [columns/64][depth][64] (depth in groups of `group`, see product.h), in dtype `dtype`.
// `kept` says whether the pack will outlive the call: then it is worth fresh memory in huge pages. An undefined tensor
// where the system has no memory for it.
at::Tensor pack(const at::Tensor& weight, at::ScalarType dtype, Direction direction, int64_t group, bool kept);

// One panel of that, by the calling thread alone.
void pack_panel(
    const at::Tensor& weight, at::ScalarType dtype, Direction direction, int64_t group, int64_t panel, void* to);

// The bytes that `pack` takes.
int64_t packed_bytes(const at::Tensor& weight, at::ScalarType dtype, Direction direction, int64_t group);

} // namespace peftkernels::cpu
