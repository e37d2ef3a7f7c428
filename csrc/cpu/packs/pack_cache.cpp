#include "pack_cache.h"

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "known_weight.h"
#include "memory.h"

namespace peftkernels::cpu {
namespace {

// Weights that died without a word (see `watch`) are looked for this often, and before a pack is made.
constexpr int64_t kCallsPerSweep = 1024;

using Weights = std::unordered_map<WeightKey, KnownWeight, WeightKeyHash>;

// What was taken out of the cache while it was locked, to be freed when it no longer is: unmapping memory takes its
// time, and the last reference to a storage may need Python's lock.
struct Remains {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  std::vector<Pack> packs;
};
using Dropped = std::vector<Remains>;

bool keeps(PackMode mode, Direction direction) {
  return mode == PackMode::Both || (mode == PackMode::ForwardOnly && direction == Direction::Forward);
}

// Its functions want the mutex held.
struct Cache {
  std::mutex mutex;
  Weights weights;
  std::atomic<PackMode> mode{PackMode::Both}; // read without the mutex too
  PackLimit limit;
  int64_t promised = 0; // bytes of packs that are being made
  int64_t hits = 0, misses = 0, clock = 0, serials = 0;
  std::atomic<int64_t> refused{0}; // weights; read without the mutex too

  int64_t held() const {
    int64_t sum = 0;
    for (const auto& [key, weight] : weights) {
      sum += weight.bytes();
    }
    return sum;
  }

  std::optional<int64_t> allowed() const {
    if (!limit.share) {
      return limit.bytes;
    }
    const auto available = available_memory();
    if (!available) {
      return std::nullopt;
    }
    return static_cast<int64_t>(*limit.share * static_cast<double>(*available + held()));
  }

  int64_t room() const {
    const auto bytes = allowed();
    return bytes ? *bytes - held() - promised : std::numeric_limits<int64_t>::max();
  }

  void drop_packs(KnownWeight& weight, Dropped& dropped) {
    dropped.push_back({weight.storage, std::move(weight.packs)});
    weight.packs.clear();
    weight.checksums.reset();
  }

  Weights::iterator erase(Weights::iterator it, Dropped& dropped) {
    refused -= it->second.wanted > 0 ? 1 : 0;
    drop_packs(it->second, dropped);
    return weights.erase(it);
  }

  template <typename Predicate>
  void erase_if(const Predicate& predicate, Dropped& dropped) {
    for (auto it = weights.begin(); it != weights.end();) {
      it = predicate(it->second) ? erase(it, dropped) : std::next(it);
    }
  }

  void erase_dead(Dropped& dropped) {
    erase_if([](const KnownWeight& weight) { return weight.storage.expired(); }, dropped);
  }

  // What is known of the weight as it is now. What was known of it as it was before a change is dropped.
  KnownWeight* find(const WeightKey& key, const at::Tensor& weight, Dropped& dropped) {
    const auto found = weights.find(key);
    if (found == weights.end()) {
      return nullptr;
    }
    if (!found->second.is(weight)) {
      erase(found, dropped);
      return nullptr;
    }
    return &found->second;
  }

  // Whether `bytes` more may be kept for the weight; they are promised then.
  bool admit(KnownWeight& weight, int64_t bytes, Dropped& dropped) {
    if (weight.wanted > 0 && !asked_enough(weight, dropped)) {
      return false;
    }
    if (room() < bytes) {
      refuse(weight, bytes, /*out_of_memory=*/false, dropped);
      return false;
    }
    promised += bytes;
    return true;
  }

  void refuse(KnownWeight& weight, int64_t bytes, bool out_of_memory, Dropped& dropped) {
    refused += weight.wanted > 0 ? 0 : 1;
    weight.wanted = std::max<int64_t>(1, weight.bytes() + bytes);
    weight.out_of_memory = out_of_memory;
    weight.asked = 0;
    weight.asked_since = clock;
    drop_packs(weight, dropped);
  }

  // Counts a request of a refused weight; true when there is room for it, made at the cost of others if need be.
  bool asked_enough(KnownWeight& weight, Dropped& dropped) {
    if (++weight.asked < kPatience) {
      return false;
    }
    const auto missing = weight.wanted - room();
    int64_t idle = 0;
    for (const auto& [key, other] : weights) {
      idle += other.used < weight.asked_since ? other.bytes() : 0;
    }
    if (idle < missing) {
      weight.asked = 0;
      weight.asked_since = clock;
      return false;
    }
    drop_oldest(missing, dropped);
    weight.wanted = 0;
    --refused;
    return true;
  }

  // Drops the packs of weights, those first that have not been used for longest, until `bytes` are dropped.
  void drop_oldest(int64_t bytes, Dropped& dropped) {
    std::vector<KnownWeight*> oldest;
    for (auto& [key, weight] : weights) {
      oldest.push_back(&weight);
    }
    std::sort(oldest.begin(), oldest.end(), [](const auto* a, const auto* b) { return a->used < b->used; });
    for (auto* const weight : oldest) {
      if (bytes <= 0) {
        return;
      }
      bytes -= weight->bytes();
      drop_packs(*weight, dropped);
    }
  }
};

Cache& cache() {
  // Never destroyed: threads may still run kernels while static objects are torn down.
  static Cache* const instance = [] {
#if !defined(_WIN32)
    // A child gets the cache as it is while no thread has it locked; threads that were making packs are gone there.
    const auto in_child = [] {
      cache().promised = 0;
      cache().mutex.unlock();
    };
    pthread_atfork([] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); }, in_child);
#endif
    return new Cache;
  }();
  return *instance;
}

// Forgets every weight that lies in the memory at `memory`.
void forget(const void* memory) {
  auto& state = cache();
  Dropped dropped;
  const std::lock_guard<std::mutex> guard(state.mutex);
  state.erase_if([memory](const KnownWeight& weight) { return weight.memory == memory; }, dropped);
}

// Takes the packs along when the weight's memory is freed. Only memory of torch's own allocator can tell, whose way of
// freeing is known; weights in other memory (a mapped file, numpy's) are found dead later.
void watch(const at::Tensor& weight) {
  static const auto plain = c10::GetDefaultCPUAllocator()->raw_deleter();
  auto& memory = weight.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks();
  if (memory.get() == memory.get_context()) {
    static_cast<void>(memory.compare_exchange_deleter(plain, [](void* freed) {
      forget(freed);
      plain(freed);
    }));
  }
}

// Gives promised bytes back, which a kept pack has taken up by then.
struct Promise {
  ~Promise() {
    const std::lock_guard<std::mutex> guard(state.mutex);
    state.promised -= bytes;
  }

  Cache& state;
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
    known = &state.weights.emplace(key, KnownWeight(weight, ++state.serials)).first->second;
    known->used = state.clock;
    watch(weight);
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
  // Meanwhile the cache may have been cleared, set to another mode, or filled up and asked by another thread; and the
  // weight may have changed and been met again by another thread, as it is now and not as it was packed.
  if (known == nullptr || known->serial != *serial || known->wanted > 0 || !keeps(state.mode, direction)) {
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
  return found != state.weights.end() && found->second.wanted > 0;
}

Refusal ask_again(const at::Tensor& weight) {
  auto& state = cache();
  Dropped dropped;
  const std::lock_guard<std::mutex> guard(state.mutex);
  ++state.clock;
  const auto found = state.weights.find(WeightKey(weight));
  if (found == state.weights.end() || found->second.wanted == 0 || state.asked_enough(found->second, dropped)) {
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
