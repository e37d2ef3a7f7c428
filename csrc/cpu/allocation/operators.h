// The operators of rank allocation that csrc/cpu implements; `peftkernels/ops/allocation.py` declares them,
// `peftkernels/allocation/kernels` says what they mean.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace peftkernels::cpu {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// finite and, where `with_scores` and the averages were updated, what rank_scores gives for them, else an empty tensor.
std::tuple<at::Tensor, at::Tensor> update_averages(
    at::TensorList parameters, const OptionalTensors& gradients, const at::Tensor& table,
    const at::Tensor& sensitivity, const at::Tensor& uncertainty, double beta1, double beta2,
    const std::optional<at::Tensor>& skip, bool with_scores);

at::Tensor rank_scores(const at::Tensor& table, const at::Tensor& sensitivity, const at::Tensor& uncertainty);

void apply_mask(
    const at::Tensor& keep, const std::optional<at::Tensor>& mask_now, at::TensorList gates, at::TensorList states,
    at::TensorList orders, at::TensorList counts, int64_t masked_state);

std::tuple<at::Tensor, std::vector<at::Tensor>> orthogonality(
    at::TensorList lora_A, at::TensorList lora_B, double weight, at::TensorList keep, at::TensorList add_to,
    double scale, bool gradients);

} // namespace peftkernels::cpu
