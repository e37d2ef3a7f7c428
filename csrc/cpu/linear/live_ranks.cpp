#include "live_ranks.h"

#include <ATen/Functions.h>

#include <algorithm>

namespace peftkernels::cpu {

LiveRanks live_ranks(const Adapter& adapter, bool with_probe) {
  const auto& [state, order, counts] = adapter.ranks;
  const int64_t r = adapter.r();
  LiveRanks ranks;
  ranks.scaling =
      static_cast<float>(adapter.scaling_tensor ? adapter.scaling_tensor->item<double>() : adapter.scaling);
  ranks.active = r;
  int64_t live = r;
  if (counts) {
    const auto* const values = counts->const_data_ptr<int32_t>();
    ranks.active = values[0];
    live = with_probe ? values[counts->stride(0)] : values[0];
  }
  ranks.index.resize(static_cast<size_t>(live));
  const auto* const places = order ? order->const_data_ptr<int32_t>() : nullptr;
  const int64_t step = order ? order->stride(0) : 0;
  for (int64_t i = 0; i < live; ++i) {
    ranks.index[i] = places != nullptr ? places[i * step] : i;
    ranks.in_place = ranks.in_place && ranks.index[i] == i;
  }
  ranks.factor.assign(static_cast<size_t>(ranks.active), ranks.scaling);
  if (adapter.gate) {
    const auto& gate = *adapter.gate;
    const auto gates = gate.scalar_type() == at::kFloat && gate.is_contiguous()
        ? gate
        : gate.reshape({r}).to(at::kFloat).contiguous();
    const auto* const values = gates.const_data_ptr<float>();
    for (int64_t i = 0; i < ranks.active; ++i) {
      ranks.factor[i] = values[ranks.index[i]] * ranks.scaling;
    }
  }
  ranks.plain = std::all_of(ranks.factor.begin(), ranks.factor.end(), [](float factor) { return factor == 1.0f; });
  return ranks;
}

Dropout dropout_of(const Adapter& adapter) {
  return adapter.dropout_seed ? Dropout(adapter.dropout_p, adapter.dropout_seed->item<int64_t>()) : Dropout();
}

} // namespace peftkernels::cpu
