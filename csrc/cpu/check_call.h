// What the operators of csrc/cpu ask of their arguments before anything is computed: everything that is reachable from
// Python is served or raises. `peftkernels/_checks.py` says the same for the operators that are written in Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "check_tensor.h"

namespace peftkernels::cpu {

// The arguments of a forward or a backward pass; null where one is not there.
struct CallRecord {
  const at::Tensor *x, *grad_y; // of a forward pass x, of a backward pass grad_y and, where a gradient asks for it, x
  const at::Tensor *weight, *lora_A, *lora_B;
  const at::Tensor *bias, *gate, *rank_state, *rank_order, *rank_counts, *scaling_tensor;
  double dropout_p;
  const at::Tensor *dropout_seed, *shrink;
  bool draws_seed = false; // a seed that is not there will be made
};

inline const at::Tensor* or_null(const std::optional<at::Tensor>& tensor) {
  return tensor ? &*tensor : nullptr;
}

// Raises for the first argument that does not fit the others, or says whether all do.
template <OnFault fault>
bool check_call(const CallRecord& call);

// Raises where a backward pass lacks what a gradient that is asked for is made of: of x, weight, lora_A, lora_B, bias, gate.
void check_needs(const CallRecord& call, const std::array<bool, 6>& needs);

// Of lora_shrink; raises.
void check_shrink(const at::Tensor& x, at::TensorList lora_A);

} // namespace peftkernels::cpu
