// A call of `lora_linear` on a compiled backend, with autograd's boundary where gradients are recorded.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <vector>

#include "backend.h"
#include "call.h"

namespace peftkernels {

// y of a call that was checked and whose tensors are plain. Where anybody watches operators it goes through the
// dispatcher, so that profilers and modes see them. Where gradients are recorded, it saves and computes what the Python
// function `LoraLinearFunction` does, and sets the call's `save_shrink`.
at::Tensor lora_linear(Forward& call, const Backend& backend);

// The tensors by which gradients may be differentiated again: grad_y, x, weight, lora_A, lora_B and gate; undefined
// where there is none.
using Inputs = std::array<at::Tensor, 6>;
Inputs inputs_of(const Backward& call);

// `composition.second_derivatives`: by each of the inputs, of the gradients weighted with `grads`. `x_left_out`: x
// requires grad and was not saved.
using SecondDerivatives =
    std::function<std::vector<at::Tensor>(const Gradients& grads, const Backward& call, bool x_left_out)>;

// Chooses what computes them, once for the process.
void set_second_derivatives(SecondDerivatives function);

} // namespace peftkernels
