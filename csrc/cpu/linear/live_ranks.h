// What a call's plan, gate, scaling and dropout come to.
#pragma once

#include <cstdint>
#include <vector>

#include "call.h"
#include "dropout.h"

namespace peftkernels::cpu {

// The ranks of a call in the order kernels walk them: `index` holds the ACTIVE ranks and, when asked for, the PROBE
// ranks behind them; `factor` is scaling · gate of each ACTIVE rank.
struct LiveRanks {
  std::vector<int64_t> index;
  int64_t active = 0;
  std::vector<float> factor;
  float scaling = 1.0f;
  bool in_place = true; // index[i] == i
  bool plain = true; // every factor is 1

  int64_t live() const {
    return static_cast<int64_t>(index.size());
  }
};

// Of an adapter that was checked: order and counts hold ranks.
LiveRanks live_ranks(const Adapter& adapter, bool with_probe);

Dropout dropout_of(const Adapter& adapter);

} // namespace peftkernels::cpu
