// What a call's plan, gate, scaling and dropout come to.
#pragma once

#include <c10/util/SmallVector.h>

#include <cstdint>

#include "call.h"
#include "dropout.h"

namespace peftkernels::cpu {

// The ranks of a call in the order kernels walk them: `index` holds the ACTIVE ranks and, when asked for, the PROBE
// ranks behind them; `factor` is scaling · gate of each ACTIVE rank.
struct LiveRanks {
  static constexpr unsigned kFew = 32; // ranks that need no memory of their own

  c10::SmallVector<int64_t, kFew> index;
  int64_t active = 0;
  c10::SmallVector<float, kFew> factor;
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
