// The operators that csrc/cpu implements; `peftkernels/_ops.py` declares them, `peftkernels/reference.py` defines them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace peftkernels::cpu {

std::tuple<at::Tensor, at::Tensor> lora_linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& gate,
    const std::optional<at::Tensor>& rank_state, const std::optional<at::Tensor>& rank_order,
    const std::optional<at::Tensor>& rank_counts, double scaling, const std::optional<at::Tensor>& scaling_tensor,
    double dropout_p, const std::optional<at::Tensor>& dropout_seed, bool save_shrink,
    const std::optional<at::Tensor>& given_shrink);

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients lora_linear_backward(
    const at::Tensor& grad_y, const std::optional<at::Tensor>& x, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& shrink,
    const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& rank_state,
    const std::optional<at::Tensor>& rank_order, const std::optional<at::Tensor>& rank_counts, double scaling,
    const std::optional<at::Tensor>& scaling_tensor, double dropout_p, const std::optional<at::Tensor>& dropout_seed,
    std::array<bool, 6> needs);

at::Tensor lora_shrink(const at::Tensor& x, at::TensorList lora_A);

} // namespace peftkernels::cpu
