// The layer's operators on CPUs; `peftkernels/ops/reference.py` defines them.
#pragma once

#include <ATen/core/Tensor.h>

#include "call.h"

namespace peftkernels::cpu {

Outputs lora_linear_forward(const Forward& call);
Gradients lora_linear_backward(const Backward& call);
at::Tensor lora_shrink(const at::Tensor& x, at::TensorList lora_A);

} // namespace peftkernels::cpu
