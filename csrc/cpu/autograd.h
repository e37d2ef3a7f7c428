// A call of `lora_linear` on the C++ kernels, with autograd's boundary where gradients are recorded.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace peftkernels::cpu {

// Arguments that are known to be valid; the operator's schema says what they mean.
struct Call {
  at::Tensor x, weight, lora_A, lora_B;
  std::optional<at::Tensor> bias, gate, rank_state, rank_order, rank_counts;
  double scaling = 1.0;
  std::optional<at::Tensor> scaling_tensor;
  double dropout_p = 0.0;
  std::optional<at::Tensor> dropout_seed;
  std::optional<at::Tensor> given_shrink;
};

// y, through the dispatcher, so that profilers and modes see the operators. Where gradients are recorded, it saves and
// computes what the Python function `_LoraLinear` does.
at::Tensor lora_linear(const Call& call);

} // namespace peftkernels::cpu
