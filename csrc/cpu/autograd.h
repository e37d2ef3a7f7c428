// A call of `lora_linear` on the C++ kernels, with autograd's boundary where gradients are recorded.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

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

// What a backward pass had beside the tensors that it may be differentiated by; undefined where there is nothing.
// `x_left_out`: x requires grad and was not saved.
struct BackwardPass {
  std::array<bool, 6> needs;
  at::Tensor bias, shrink, state, scaling_tensor, seed;
  double scaling, dropout_p;
  bool x_left_out;
};

// grad_y, x, weight, lora_A, lora_B and gate; undefined where there is none.
using Arguments = std::array<at::Tensor, 6>;

// `composition.second_derivatives`: by each of the arguments, of the six gradients weighted with `grads`.
using SecondDerivatives = std::function<std::vector<at::Tensor>(
    const std::array<at::Tensor, 6>& grads, const Arguments& arguments, const BackwardPass& pass)>;

// Chooses what computes them, once for the process.
void set_second_derivatives(SecondDerivatives function);

} // namespace peftkernels::cpu
