// Packed copies of frozen weights, kept per weight within a limit and dropped with the weight.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "pack.h"

namespace peftkernels::cpu {

enum class PackMode : int64_t { Both, ForwardOnly, Off };

// How much memory packs may take: so many bytes, or a share of what would be available if there were none. Any amount
// where neither is set.
struct PackLimit {
  std::optional<int64_t> bytes;
  std::optional<double> share;
};

struct PackCacheStats {
  int64_t weights; // that have packs
  int64_t packs;
  int64_t bytes;   // of the packs
  int64_t refused; // weights for whose packs there was no room
  int64_t hits, misses;
  std::optional<int64_t> limit; // in bytes, as things stand now
};

// The weight (N, K) as `pack` lays it out, in dtype `dtype`; `rows` of x or G will be multiplied with it. An undefined
// tensor where the system has no memory for it.
//
// Taken from the cache when the mode keeps packs of this direction and the weight has not changed since: its storage and
// version counter are compared, and checksums of a part of its elements, because no counter tells of writes through
// `.data` and numpy, and tensors made under inference mode have none. KnownWeight::next_share says which part.
//
// A weight is kept whole or not at all. Where a pack would exceed the limit, or the system has no memory for it, it is
// made for the call alone, and the weight's other pack is dropped too: a weight is served either from packs or by an
// implementation that needs none. No pack gives way to another weight's until that weight has been refused
// kRefusalsBeforeEviction times since the pack's last use, by which time the refused calls have cost more than packing.
// So a loop over more weights than fit keeps the same ones.
at::Tensor packed_weight(const at::Tensor& weight, at::ScalarType dtype, Direction direction, int64_t rows);

constexpr int64_t kRefusalsBeforeEviction = 16;

// Returns true if there was no room for the weight's packs, so that every call would pack it for itself.
bool is_refused(const at::Tensor& weight);

enum class Refusal : int64_t { None, Limit, Memory }; // there is no room within the limit, the system has no memory

// As a call would on a refused weight, without packing: counts a refusal, and says why it is refused still.
Refusal request_again(const at::Tensor& weight);

PackMode pack_mode();
void set_pack_mode(PackMode mode);
// Packs beyond the new limit are dropped, those of the weights first that have not been used for longest.
void set_pack_limit(const PackLimit& limit);
PackCacheStats pack_cache_stats();
// Forgets the weight and every other one in the same memory.
void forget_weight(const at::Tensor& weight);
void clear_pack_cache();

} // namespace peftkernels::cpu
