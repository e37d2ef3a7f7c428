// The arguments of the layer's operators, listed once for C++: checks, autograd, the direct call, the dispatcher's
// entries and the kernels take a record whole. `arguments` gives a record's fields in the order of the operator's schema,
// which `peftkernels/ops/call.py` declares. A new optional argument is a field and a place at the end of both lists.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

namespace peftkernels {

using OptionalTensor = std::optional<at::Tensor>;

// A frozen weight (N, K).
struct Weight {
  template <typename Self>
  static auto arguments(Self& weight) {
    return std::tie(weight.dense);
  }

  int64_t N() const {
    return dense.size(0);
  }
  int64_t K() const {
    return dense.size(1);
  }

  at::Tensor dense;
};

// Which ranks are ACTIVE, PROBE or DEAD: all three tensors, or none where every rank is ACTIVE.
struct Ranks {
  OptionalTensor state, order, counts;
};

// scaling · ((drop(x)·Aᵀ) ⊙ gate)·Bᵀ
struct Adapter {
  template <typename Self>
  static auto factors(Self& adapter) {
    return std::tie(adapter.A, adapter.B);
  }
  template <typename Self>
  static auto arguments(Self& adapter) {
    return std::tie(
        adapter.gate, adapter.ranks.state, adapter.ranks.order, adapter.ranks.counts, adapter.scaling,
        adapter.scaling_tensor, adapter.dropout_p, adapter.dropout_seed);
  }

  int64_t r() const {
    return A.size(0);
  }

  at::Tensor A, B; // (r, K), (N, r)
  OptionalTensor gate; // (r,) or (r, 1)
  Ranks ranks;
  double scaling = 1.0;
  OptionalTensor scaling_tensor; // 0-dim, in the place of `scaling`
  double dropout_p = 0.0;
  OptionalTensor dropout_seed; // 0-dim
};

// What a call may be differentiated by, as `needs` and gradients have it.
enum Differentiable : size_t { kX, kWeight, kA, kB, kBias, kGate, kDifferentiable };

// peftkernels::lora_linear_fwd
struct Forward {
  static constexpr const char* kOperator = "peftkernels::lora_linear_fwd";
  using Results = std::tuple<at::Tensor, at::Tensor>;

  template <typename Self>
  static auto arguments(Self& call) {
    return std::tuple_cat(
        std::tie(call.x), Weight::arguments(call.weight), Adapter::factors(call.adapter), std::tie(call.bias),
        Adapter::arguments(call.adapter), std::tie(call.save_shrink, call.shrink));
  }

  // An S that the caller has needs no saving.
  bool saves_shrink() const {
    return save_shrink && !shrink;
  }

  at::Tensor x; // (..., K)
  Weight weight;
  Adapter adapter;
  OptionalTensor bias; // (N,)
  bool save_shrink = false;
  OptionalTensor shrink; // precomputed S = x·Aᵀ (M, r)
};

// peftkernels::lora_linear_bwd
struct Backward {
  static constexpr const char* kOperator = "peftkernels::lora_linear_bwd";
  using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

  template <typename Self>
  static auto arguments(Self& call) {
    return std::tuple_cat(
        std::tie(call.grad_y, call.x), Weight::arguments(call.weight), Adapter::factors(call.adapter),
        std::tie(call.bias, call.shrink), Adapter::arguments(call.adapter), std::tie(call.needs));
  }

  at::Tensor grad_y; // (..., N)
  OptionalTensor x; // (..., K), where the gradient of lora_A needs it
  Weight weight;
  Adapter adapter;
  OptionalTensor bias; // (N,)
  OptionalTensor shrink; // S (M, r), where a gradient needs it
  std::array<bool, kDifferentiable> needs{};
};

// y (..., N), and S (M, r) where it is saved, else undefined.
struct Outputs {
  at::Tensor y, shrink;
};

// The gradients that are needed; the others are undefined.
using Gradients = std::array<at::Tensor, kDifferentiable>;

} // namespace peftkernels
