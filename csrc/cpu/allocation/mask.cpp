#include <cstring>

#include "check.h"
#include "operators.h"

namespace peftkernels::cpu {
namespace {

// Values of RankState.
constexpr uint8_t kDead = 0, kActive = 2;

// One layer's gates and plan, by tensors that are known to fit.
void apply_to_layer(
    const bool* keep, bool mask_now, int64_t r, const at::Tensor& gate, uint8_t masked_state, uint8_t* state,
    int32_t* order, int32_t* counts) {
  char* const gates = static_cast<char*>(gate.mutable_data_ptr());
  const int64_t gate_bytes = r == 0 ? 0 : gate.stride(0) * static_cast<int64_t>(gate.element_size());
  int32_t placed = 0;
  for (int64_t i = 0; i < r; ++i) {
    const bool active = keep[i] || !mask_now;
    state[i] = active ? kActive : masked_state;
    if (!active) {
      // Zero is all bits zero in every float dtype.
      std::memset(gates + i * gate_bytes, 0, gate.element_size());
    }
    if (state[i] == kActive) {
      order[placed++] = static_cast<int32_t>(i);
    }
  }
  counts[0] = placed;
  for (int64_t i = 0; i < r; ++i) {
    if (state[i] != kActive) {
      order[placed++] = static_cast<int32_t>(i);
    }
  }
  counts[1] = masked_state == kDead ? counts[0] : static_cast<int32_t>(r);
}

} // namespace

void apply_mask(
    const at::Tensor& keep, const std::optional<at::Tensor>& mask_now, at::TensorList gates, at::TensorList states,
    at::TensorList orders, at::TensorList counts, int64_t masked_state) {
  check_mask(keep, mask_now, gates, states, orders, counts, masked_state);
  const size_t layers = gates.size();
  const bool now = !mask_now || *mask_now->const_data_ptr<bool>();
  const bool* kept = keep.const_data_ptr<bool>();
  for (size_t layer = 0; layer < layers; ++layer) {
    const int64_t r = gates[layer].size(0);
    apply_to_layer(
        kept, now, r, gates[layer], static_cast<uint8_t>(masked_state), states[layer].mutable_data_ptr<uint8_t>(),
        orders[layer].mutable_data_ptr<int32_t>(), counts[layer].mutable_data_ptr<int32_t>());
    for (const auto& written : {gates[layer], states[layer], orders[layer], counts[layer]}) {
      written.unsafeGetTensorImpl()->bump_version();
    }
    kept += r;
  }
}

} // namespace peftkernels::cpu
