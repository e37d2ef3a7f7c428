// Packed copies of frozen weights, kept per weight and dropped with it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "product.h"

namespace peftkernels::cpu {

// Forward: right operand Wᵀ (K x N) for x·Wᵀ.  Backward: right operand W (N x K) for G·W.
enum class Direction : int64_t { Forward = 0, Backward = 1 };

enum class PackMode : int64_t { Both, ForwardOnly, Off };

struct PackCacheStats {
  int64_t entries;
  int64_t bytes;
  int64_t hits;
  int64_t misses;
};

// The weight (N, K) as panels [columns/64][depth][64] (depth in groups, see matmul.h), in dtype `dtype`.
// Taken from the cache when the mode keeps packs of this direction and the weight has not changed since: its storage,
// version counter and a sample of its elements are compared, the last because writes through `.data` move no counter.
at::Tensor packed_weight(const at::Tensor& weight, at::ScalarType dtype, Direction direction);

PackMode pack_mode();
void set_pack_mode(PackMode mode);
PackCacheStats pack_cache_stats();
void clear_pack_cache();

} // namespace peftkernels::cpu
