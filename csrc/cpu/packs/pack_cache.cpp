#include "pack_cache.h"

#include <algorithm>
#include <memory>
#include <new>
#include <utility>

#include "cache_state.h"
#include "known_weight.h"

namespace peftkernels::cpu {
namespace {

// Weights that died without a word (see `watch`) are looked for this often, and before a pack is made.
constexpr int64_t kCallsPerSweep = 1024;

// Gives promised bytes back, which a kept pack has taken up by then.
struct Promise {
  ~Promise() {
    const std::lock_guard<std::mutex> guard(state.mutex);
    state.promised -= bytes;
  }

  CacheState& state;
  int64_t bytes;
};

// The pack that is kept of the weight, if there is one and the weight is as it was. Undefined where there is none.
at::Tensor kept_pack(const at::Tensor& weight, const PackKind& kind, int64_t rows) {
  const WeightKey key(weight);
  auto& state = cache();
  Dropped dropped;
  at::Tensor panels;
  std::shared_ptr<const WeightChecksums> checksums;
  WeightChecksums::Share share{};
  int64_t serial = 0;
  {
    const std::lock_guard<std::mutex> guard(state.mutex);
    if (++state.clock % kCallsPerSweep == 0) {
      state.erase_dead(dropped);
    }
    auto* const known = state.find(key, weight, dropped);
    if (known == nullptr) {
      return panels;
    }
    known->used = state.clock;
    const auto* const found = known->find(kind);
    if (found == nullptr) {
      return panels;
    }
    ++state.hits;
    panels = found->panels;
    checksums = known->checksums;
    share = known->next_share(rows);
    serial = known->serial;
  }
  if (checksums->match(weight.const_data_ptr(), share)) {
    return panels;
  }
  panels.reset();
  const std::lock_guard<std::mutex> guard(state.mutex);
  --state.hits;
  const auto found = state.weights.find(key);
  if (found != state.weights.end() && found->second.serial == serial) {
    state.erase(found, dropped);
  }
  return panels;
}

// Asks for `bytes` to keep a pack in. The weight's serial number where they are promised.
std::optional<int64_t> request(const at::Tensor& weight, const PackKind& kind, int64_t bytes) {
  const WeightKey key(weight);
  auto& state = cache();
  Dropped dropped; // freed before more is taken
  const std::lock_guard<std::mutex> guard(state.mutex);
  ++state.misses;
  if (!keeps(state.mode, kind.direction)) {
    return std::nullopt;
  }
  state.erase_dead(dropped);
  auto* known = state.find(key, weight, dropped);
  if (known == nullptr) {
    known = &state.add(key, weight);
  }
  return state.admit(*known, bytes, dropped) ? std::optional<int64_t>(known->serial) : std::nullopt;
}

// Null where there is no memory for them.
std::shared_ptr<const WeightChecksums> checksums_of(const at::Tensor& weight) {
  try {
    return std::make_shared<const WeightChecksums>(weight);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

} // namespace

at::Tensor packed_weight(const at::Tensor& weight, at::ScalarType dtype, Direction direction, int64_t rows) {
  const PackKind kind{dtype, direction, depth_group_of(dtype)};
  if (auto kept = kept_pack(weight, kind, rows); kept.defined()) {
    return kept;
  }
  auto& state = cache();
  const int64_t bytes = packed_bytes(weight, dtype, direction, kind.group);
  const auto serial = request(weight, kind, bytes);
  if (!serial) {
    return pack(weight, dtype, direction, kind.group, /*kept=*/false);
  }
  // Packing needs no lock: two threads that want the same pack at once both make it, and the first one's is kept.
  const Promise promise{state, bytes};
  const auto checksums = checksums_of(weight);
  auto panels = checksums == nullptr ? at::Tensor() : pack(weight, dtype, direction, kind.group, /*kept=*/true);
  Dropped dropped;
  const std::lock_guard<std::mutex> guard(state.mutex);
  auto* const known = state.find(WeightKey(weight), weight, dropped);
  // Meanwhile the cache may have been cleared, set to another mode, or filled up and its room requested by another
  // thread; and the weight may have changed and been met again by another thread, as it is now and not as it was packed.
  if (known == nullptr || known->serial != *serial || known->missing_bytes > 0 || !keeps(state.mode, direction)) {
    return panels;
  }
  if (!panels.defined()) {
    state.refuse(*known, bytes, /*out_of_memory=*/true, dropped);
    return panels;
  }
  if (known->checksums != nullptr && !(*known->checksums == *checksums)) {
    // It has changed unseen since its other pack was made, or while one of the two was.
    state.drop_packs(*known, dropped);
    return panels;
  }
  if (const auto* const found = known->find(kind)) {
    return found->panels;
  }
  known->checksums = checksums;
  known->packs.push_back({kind, panels});
  return panels;
}

bool is_refused(const at::Tensor& weight) {
  auto& state = cache();
  if (state.refused.load(std::memory_order_relaxed) == 0 || !weight.has_storage()) {
    return false;
  }
  const std::lock_guard<std::mutex> guard(state.mutex);
  const auto found = state.weights.find(WeightKey(weight));
  return found != state.weights.end() && found->second.missing_bytes > 0;
}

Refusal request_again(const at::Tensor& weight) {
  auto& state = cache();
  Dropped dropped;
  const std::lock_guard<std::mutex> guard(state.mutex);
  ++state.clock;
  const auto found = state.weights.find(WeightKey(weight));
  if (found == state.weights.end() || found->second.missing_bytes == 0 || state.request_room(found->second, dropped)) {
    return Refusal::None;
  }
  return found->second.out_of_memory ? Refusal::Memory : Refusal::Limit;
}

PackMode pack_mode() {
  return cache().mode;
}

void set_pack_mode(PackMode mode) {
  auto& state = cache();
  Dropped dropped;
  const std::lock_guard<std::mutex> guard(state.mutex);
  state.mode = mode;
  for (auto& [key, weight] : state.weights) {
    const auto first = std::stable_partition(weight.packs.begin(), weight.packs.end(), [mode](const Pack& pack) {
      return keeps(mode, pack.kind.direction);
    });
    dropped.push_back({weight.storage, {first, weight.packs.end()}});
    weight.packs.erase(first, weight.packs.end());
  }
  state.erase_if([](const KnownWeight& weight) { return weight.packs.empty(); }, dropped);
}

void set_pack_limit(const PackLimit& limit) {
  auto& state = cache();
  Dropped dropped;
  const std::lock_guard<std::mutex> guard(state.mutex);
  state.limit = limit;
  state.drop_oldest(-state.room(), dropped);
  // Those that were refused may ask anew.
  state.erase_if([](const KnownWeight& weight) { return weight.packs.empty(); }, dropped);
}

PackCacheStats pack_cache_stats() {
  auto& state = cache();
  Dropped dropped;
  const std::lock_guard<std::mutex> guard(state.mutex);
  state.erase_dead(dropped);
  PackCacheStats stats{0, 0, state.held(), state.refused, state.hits, state.misses, state.allowed()};
  for (const auto& [key, weight] : state.weights) {
    stats.weights += weight.packs.empty() ? 0 : 1;
    stats.packs += static_cast<int64_t>(weight.packs.size());
  }
  return stats;
}

void forget_weight(const at::Tensor& weight) {
  if (!weight.key_set().has_backend(c10::BackendComponent::CPUBit) || !weight.has_storage()) {
    return;
  }
  auto& state = cache();
  Dropped dropped;
  const std::lock_guard<std::mutex> guard(state.mutex);
  const auto& storage = weight.storage();
  state.erase_if([&storage](const KnownWeight& known) { return known.shares_memory_with(storage); }, dropped);
}

void clear_pack_cache() {
  auto& state = cache();
  Dropped dropped;
  const std::lock_guard<std::mutex> guard(state.mutex);
  state.erase_if([](const KnownWeight&) { return true; }, dropped);
}

} // namespace peftkernels::cpu
