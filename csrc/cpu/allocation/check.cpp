#include "check.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

namespace peftkernels::cpu {
namespace {

constexpr auto kRaise = OnFault::Raise;
// Of a layer: A, B, E.
constexpr int64_t kFactors = 3;
constexpr int64_t kMostRanks = std::numeric_limits<int32_t>::max();
// The largest value of RankState.
constexpr int64_t kActive = 2;

Name at_place(const char* text, size_t place) {
  return {text, static_cast<int64_t>(place)};
}

void check_dense(const Name& name, const at::Tensor& tensor) {
  is_dense<kRaise>(name, tensor, c10::DispatchKey::CPU);
}

void check_contiguous(
    const Name& name, const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape, const char* meaning) {
  check_dense(name, tensor);
  has_dtype<kRaise>(name, tensor, dtype);
  has_shape<kRaise>(name, tensor, shape, meaning);
  TORCH_CHECK_VALUE(
      tensor.is_contiguous(), name, ": found strides ", in_words(tensor.strides()), ", expected a contiguous tensor");
  is_readable<kRaise>(name, tensor);
}

bool share_storage(const at::Tensor& one, const at::Tensor& other) {
  return one.storage().unsafeGetStorageImpl() == other.storage().unsafeGetStorageImpl();
}

// Where a tensor's elements begin and end in memory.
std::pair<const char*, const char*> extent(const at::Tensor& tensor) {
  const auto* const base = static_cast<const char*>(tensor.storage().data());
  const auto begin = tensor.storage_offset() * static_cast<int64_t>(tensor.element_size());
  return {base + begin, base + std::max(begin, tensor.numel() == 0 ? begin : reach(tensor))};
}

// Returns true if each element has memory of its own: every stride is longer than what the shorter ones reach, as in
// all tensors but windows that slide over memory and dimensions that are expanded.
bool is_without_overlap(const at::Tensor& tensor) {
  if (tensor.is_contiguous()) {
    return true;
  }
  std::vector<std::pair<int64_t, int64_t>> steps; // stride and size
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) > 1) {
      steps.emplace_back(tensor.stride(dim), tensor.size(dim));
    }
  }
  std::sort(steps.begin(), steps.end());
  int64_t reached = 0;
  for (const auto& [stride, size] : steps) {
    if (stride <= reached) {
      return false;
    }
    reached += (size - 1) * stride;
  }
  return true;
}

void check_matrix(const Name& name, const at::Tensor& factor) {
  check_dense(name, factor);
  has_float_dtype<kRaise>(name, factor);
  TORCH_CHECK_VALUE(factor.dim() == 2, name, ": found shape ", in_words(factor.sizes()), ", expected a matrix");
  is_readable<kRaise>(name, factor);
}

} // namespace

void check_without_overlap(const Name& name, const at::Tensor& tensor, const char* what, const at::Tensor& written) {
  if (!share_storage(tensor, written)) {
    return;
  }
  const auto [begin, end] = extent(tensor);
  const auto [first, last] = extent(written);
  TORCH_CHECK_VALUE(
      end <= first || last <= begin, name, ": found memory of ", what, ", which is written, expected memory of its own");
}

void check_written(const Name& name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(
      !tensor.is_inference() || c10::InferenceMode::is_enabled(), name,
      ": found an inference tensor, which is written in inference mode only");
  TORCH_CHECK_VALUE(
      is_without_overlap(tensor), name, ": found strides ", in_words(tensor.strides()),
      ", by which elements share memory, expected memory of its own for each");
}

const Place* check_places(const at::Tensor& table, const at::Tensor& sensitivity, const at::Tensor& uncertainty) {
  check_dense("sensitivity", sensitivity);
  const auto dtype = sensitivity.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble, "sensitivity: found dtype ", in_words(dtype),
      ", expected float32 or float64");
  TORCH_CHECK_VALUE(
      sensitivity.dim() == 1, "sensitivity: found shape ", in_words(sensitivity.sizes()), ", expected one dimension");
  check_contiguous("sensitivity", sensitivity, dtype, sensitivity.sizes(), "one dimension");
  check_contiguous("uncertainty", uncertainty, dtype, sensitivity.sizes(), "sensitivity's");
  check_contiguous("table", table, at::kLong, {table.dim() > 0 ? table.size(0) : 0, 3}, "(factors, 3)");
  static_assert(sizeof(Place) == 3 * sizeof(int64_t));
  const auto* const all = reinterpret_cast<const Place*>(table.const_data_ptr<int64_t>());
  int64_t end = 0;
  for (int64_t factor = 0; factor < table.size(0); ++factor) {
    const auto& place = all[factor];
    int64_t numel = 0, behind = 0;
    TORCH_CHECK_VALUE(
        place.rows >= 0 && place.columns >= 0 && place.offset >= end &&
            !__builtin_mul_overflow(place.rows, place.columns, &numel) &&
            !__builtin_add_overflow(place.offset, numel, &behind) && behind <= sensitivity.numel(),
        "table: found factor ", factor, " of (", place.rows, ", ", place.columns, ") at ", place.offset,
        ", expected one between ", end, " and ", sensitivity.numel(), ", where the averages end");
    end = behind;
  }
  return all;
}

void check_layers(const Place* places, int64_t factors) {
  TORCH_CHECK_VALUE(factors % kFactors == 0, "table: found ", factors, " factors, expected A, B and E of every layer");
  for (int64_t layer = 0; layer < factors; layer += kFactors) {
    const auto &a = places[layer], &b = places[layer + 1], &e = places[layer + 2];
    TORCH_CHECK_VALUE(
        a.rows == b.columns && a.rows == e.rows && e.columns == 1, "table: found factors of (", a.rows, ", ", a.columns,
        "), (", b.rows, ", ", b.columns, ") and (", e.rows, ", ", e.columns,
        "), expected A (r, K), B (N, r) and E (r, 1) of a layer");
  }
}

void check_factor(const Name& name, const at::Tensor& factor, const Place& place, const at::Tensor& written) {
  check_matrix(name, factor);
  has_shape<kRaise>(name, factor, {place.rows, place.columns}, "the table's");
  check_without_overlap(name, factor, "the averages", written);
}

void check_beta(const char* name, double beta) {
  TORCH_CHECK_VALUE(beta >= 0.0 && beta <= 1.0, name, ": found ", beta, ", expected a float in [0, 1]");
}

void check_flag(const char* name, const std::optional<at::Tensor>& flag) {
  if (!flag) {
    return;
  }
  check_dense(name, *flag);
  has_dtype<kRaise>(name, *flag, at::kBool);
  TORCH_CHECK_VALUE(flag->numel() == 1, name, ": found shape ", in_words(flag->sizes()), ", expected a 0-dim tensor");
  is_readable<kRaise>(name, *flag);
}

void check_mask(
    const at::Tensor& keep, const std::optional<at::Tensor>& mask_now, at::TensorList gates, at::TensorList states,
    at::TensorList orders, at::TensorList counts, int64_t masked_state) {
  const size_t layers = gates.size();
  TORCH_CHECK_VALUE(
      states.size() == layers && orders.size() == layers && counts.size() == layers, "states, orders, counts: found ",
      states.size(), ", ", orders.size(), " and ", counts.size(), " tensors, expected ", layers,
      " of each, one for each gate");
  TORCH_CHECK_VALUE(
      masked_state >= 0 && masked_state <= kActive, "masked_state: found ", masked_state,
      ", expected 0 (DEAD), 1 (PROBE) or 2 (ACTIVE)");
  check_dense("keep", keep);
  int64_t ranks = 0;
  for (size_t layer = 0; layer < layers; ++layer) {
    const auto& gate = gates[layer];
    const auto gate_name = at_place("gates", layer);
    check_matrix(gate_name, gate);
    const int64_t r = gate.size(0);
    TORCH_CHECK_VALUE(
        gate.size(1) == 1 && r <= kMostRanks, gate_name, ": found shape ", in_words(gate.sizes()), ", expected (r, 1)");
    check_written(gate_name, gate);
    const std::pair<Name, const at::Tensor&> written[]{
        {at_place("states", layer), states[layer]},
        {at_place("orders", layer), orders[layer]},
        {at_place("counts", layer), counts[layer]}};
    check_contiguous(written[0].first, states[layer], at::kByte, {r}, "(r,)");
    check_contiguous(written[1].first, orders[layer], at::kInt, {r}, "(r,)");
    check_contiguous(written[2].first, counts[layer], at::kInt, {2}, "(2,)");
    for (size_t i = 0; i < 3; ++i) {
      check_written(written[i].first, written[i].second);
      check_without_overlap(written[i].first, written[i].second, "the gates", gate);
      check_without_overlap(written[i].first, written[i].second, "the plan", written[(i + 1) % 3].second);
      check_without_overlap("keep", keep, "a plan", written[i].second);
    }
    ranks += r;
  }
  check_contiguous("keep", keep, at::kBool, {ranks}, "(Σ r,)");
  check_flag("mask_now", mask_now);
}

void check_orthogonality(at::TensorList lora_A, at::TensorList lora_B, at::TensorList keep, at::TensorList add_to) {
  const size_t n = lora_A.size();
  TORCH_CHECK_VALUE(n > 0, "lora_A: found no tensor, expected one for each layer");
  TORCH_CHECK_VALUE(
      lora_B.size() == n && (keep.empty() || keep.size() == n) && (add_to.empty() || add_to.size() == 2 * n),
      "lora_B, keep, add_to: found ", lora_B.size(), ", ", keep.size(), " and ", add_to.size(), " tensors, expected ",
      n, ", 0 or ", n, ", and 0 or ", 2 * n);
  for (size_t layer = 0; layer < n; ++layer) {
    const auto &A = lora_A[layer], &B = lora_B[layer];
    check_matrix(at_place("lora_A", layer), A);
    check_matrix(at_place("lora_B", layer), B);
    TORCH_CHECK_VALUE(
        A.size(0) == B.size(1), at_place("lora_B", layer), ": found shape ", in_words(B.sizes()),
        ", expected (N, r) with lora_A's r = ", A.size(0));
    if (!keep.empty()) {
      const auto name = at_place("keep", layer);
      check_dense(name, keep[layer]);
      has_dtype<kRaise>(name, keep[layer], at::kBool);
      TORCH_CHECK_VALUE(
          keep[layer].numel() == A.size(0), name, ": found shape ", in_words(keep[layer].sizes()), ", expected (r,) = (",
          A.size(0), ",)");
      is_readable<kRaise>(name, keep[layer]);
    }
  }
  std::vector<std::pair<const char*, const char*>> written;
  for (size_t i = 0; i < add_to.size(); ++i) {
    const auto name = at_place("add_to", i);
    const auto& factor = i < n ? lora_A[i] : lora_B[i - n];
    check_matrix(name, add_to[i]);
    has_shape<kRaise>(name, add_to[i], factor.sizes(), "the factor's");
    check_written(name, add_to[i]);
    check_without_overlap(name, add_to[i], "its factor", factor);
    if (add_to[i].numel() > 0) {
      written.push_back(extent(add_to[i]));
    }
  }
  // One that is given twice is added to twice; parts of one in another would be added to by two threads at once.
  std::sort(written.begin(), written.end());
  for (size_t i = 1; i < written.size(); ++i) {
    TORCH_CHECK_VALUE(
        written[i] == written[i - 1] || written[i].first >= written[i - 1].second,
        "add_to: found tensors that share a part of their memory, expected memory of its own for each");
  }
}

} // namespace peftkernels::cpu
