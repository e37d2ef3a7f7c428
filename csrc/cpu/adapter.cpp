#include "adapter.h"

#include <ATen/Functions.h>

namespace peftkernels::cpu {

LiveRanks live_ranks(
    int64_t r, const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& order,
    const std::optional<at::Tensor>& counts, double scaling, const std::optional<at::Tensor>& scaling_tensor,
    bool with_probe) {
  LiveRanks ranks;
  ranks.scaling = static_cast<float>(scaling_tensor ? scaling_tensor->item<double>() : scaling);
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
  if (gate) {
    const auto gates = gate->scalar_type() == at::kFloat && gate->is_contiguous()
        ? *gate
        : gate->reshape({r}).to(at::kFloat).contiguous();
    const auto* const values = gates.const_data_ptr<float>();
    for (int64_t i = 0; i < ranks.active; ++i) {
      ranks.factor[i] = values[ranks.index[i]] * ranks.scaling;
    }
  }
  ranks.plain = std::all_of(ranks.factor.begin(), ranks.factor.end(), [](float factor) { return factor == 1.0f; });
  return ranks;
}

Dropout dropout_of(double p, const std::optional<at::Tensor>& seed) {
  return seed ? Dropout(p, seed->item<int64_t>()) : Dropout();
}

at::Tensor as_rows(const at::Tensor& x, int64_t columns) {
  if (x.dim() == 2 && columns > 1 && x.stride(1) == 1 && x.stride(0) >= columns) {
    return x;
  }
  int64_t count = 1;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) {
    count *= x.size(dim);
  }
  auto rows = x.reshape({count, columns});
  const bool unit_stride = columns <= 1 || rows.stride(1) == 1;
  const bool row_stride = count <= 1 || rows.stride(0) >= columns;
  return unit_stride && row_stride ? rows : rows.contiguous();
}

} // namespace peftkernels::cpu
