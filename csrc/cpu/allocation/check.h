// What the operators of rank allocation ask of their arguments before anything is written: all of these raise.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "check_tensor.h"

namespace peftkernels::cpu {

// Where a factor lies in the flat buffers, and its shape: a row of the table of `FactorLayout`.
struct Place {
  int64_t offset, rows, columns;

  int64_t numel() const {
    return rows * columns;
  }
};

// The rows of `table`, int64 (factors, 3), of two averages alike: every factor inside of them, one behind the other.
const Place* check_places(const at::Tensor& table, const at::Tensor& sensitivity, const at::Tensor& uncertainty);

// The factors are A (r, K), B (N, r) and E (r, 1) of layer after layer, from which scores are made.
void check_layers(const Place* places, int64_t factors);

// A parameter or a gradient of a place, which is not part of what is written.
void check_factor(const Name& name, const at::Tensor& factor, const Place& place, const at::Tensor& written);

// The tensor shares no memory with `written`, which is called `what`.
void check_without_overlap(const Name& name, const at::Tensor& tensor, const char* what, const at::Tensor& written);

// Of the averages' decay.
void check_beta(const char* name, double beta);

// What is written in place is nobody's inference tensor outside of inference mode, and no element of it stands for two.
void check_written(const Name& name, const at::Tensor& tensor);

// A bool tensor of one element.
void check_flag(const char* name, const std::optional<at::Tensor>& flag);

// The plans' states, orders and counts and the gates (r, 1), and as many values of `keep` as there are ranks.
void check_mask(
    const at::Tensor& keep, const std::optional<at::Tensor>& mask_now, at::TensorList gates, at::TensorList states,
    at::TensorList orders, at::TensorList counts, int64_t masked_state);

// Layers' factors, which of their ranks are kept, and what gradients are added to, each where it is given.
void check_orthogonality(at::TensorList lora_A, at::TensorList lora_B, at::TensorList keep, at::TensorList add_to);

} // namespace peftkernels::cpu
