#include "pack_cache.h"

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "memory.h"
#include "weight_sample.h"

namespace peftkernels::cpu {
namespace {

// Weights that died without a word (see `watch`) are looked for this often, and before a pack is made.
constexpr int64_t kCallsPerSweep = 1024;

struct Key {
  explicit Key(const at::Tensor& weight)
      : storage(weight.storage().unsafeGetStorageImpl()),
        offset(weight.storage_offset()),
        rows(weight.size(0)),
        columns(weight.size(1)),
        row_stride(weight.stride(0)),
        column_stride(weight.stride(1)) {}

  bool operator==(const Key& other) const {
    return storage == other.storage && offset == other.offset && rows == other.rows && columns == other.columns &&
        row_stride == other.row_stride && column_stride == other.column_stride;
  }

  const c10::StorageImpl* storage;
  int64_t offset, rows, columns, row_stride, column_stride;
};

struct KeyHash {
  size_t operator()(const Key& key) const {
    return std::hash<const void*>()(key.storage) + static_cast<size_t>(key.offset);
  }
};

struct Pack {
  at::ScalarType dtype;
  Direction direction;
  int64_t group;
  at::Tensor panels;
};

uint32_t version_of(const at::Tensor& weight) {
  const auto& counter = weight.unsafeGetTensorImpl()->version_counter();
  return counter.enabled() ? counter.current_version() : 0;
}

struct Weight {
  explicit Weight(const at::Tensor& weight)
      : storage(weight.storage().getWeakStorageImpl()),
        memory(weight.storage().data()),
        data(weight.const_data_ptr()),
        version(version_of(weight)),
        sample(weight) {}

  bool is(const at::Tensor& weight) const {
    return data == weight.const_data_ptr() && version == version_of(weight) && sample.matches(data);
  }

  const Pack* find(at::ScalarType dtype, Direction direction, int64_t group) const {
    for (const auto& pack : packs) {
      if (pack.direction == direction && pack.dtype == dtype && pack.group == group) {
        return &pack;
      }
    }
    return nullptr;
  }

  int64_t bytes() const {
    int64_t sum = 0;
    for (const auto& pack : packs) {
      sum += static_cast<int64_t>(pack.panels.nbytes());
    }
    return sum;
  }

  // Weak: keeps the storage's address from being used again, but not its memory.
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  const void *memory, *data;
  uint32_t version;
  WeightSample sample;
  std::vector<Pack> packs;
  int64_t used = 0;
  // Of a refused weight: the bytes there was no room for, and how often they have been asked for since when.
  int64_t wanted = 0, asked = 0, asked_since = 0;
};

using Weights = std::unordered_map<Key, Weight, KeyHash>;

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
  int64_t hits = 0, misses = 0, clock = 0;
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

  void drop_packs(Weight& weight, Dropped& dropped) {
    dropped.push_back({weight.storage, std::move(weight.packs)});
    weight.packs.clear();
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
    erase_if([](const Weight& weight) { return weight.storage.expired(); }, dropped);
  }

  // What is known of the weight as it is now. What was known of it as it was before a change is dropped.
  Weight* find(const Key& key, const at::Tensor& weight, Dropped& dropped) {
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
  bool admit(Weight& weight, int64_t bytes, Dropped& dropped) {
    if (weight.wanted > 0 && !asked_enough(weight, dropped)) {
      return false;
    }
    if (room() < bytes) {
      weight.wanted = weight.bytes() + bytes;
      weight.asked = 0;
      weight.asked_since = clock;
      ++refused;
      drop_packs(weight, dropped);
      return false;
    }
    promised += bytes;
    return true;
  }

  // Counts a request of a refused weight; true when there is room for it, made at the cost of others if need be.
  bool asked_enough(Weight& weight, Dropped& dropped) {
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
    std::vector<Weight*> oldest;
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
    // A child gets the cache as no other thread holds it.
    pthread_atfork(
        [] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); }, [] { cache().mutex.unlock(); });
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
  state.erase_if([memory](const Weight& weight) { return weight.memory == memory; }, dropped);
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

} // namespace

at::Tensor packed_weight(const at::Tensor& weight, at::ScalarType dtype, Direction direction) {
  const int64_t group = depth_group_of(dtype);
  const int64_t bytes = packed_bytes(weight, dtype, direction, group);
  const Key key(weight);
  auto& state = cache();
  Dropped dropped;
  bool keep = false;
  {
    const std::lock_guard<std::mutex> guard(state.mutex);
    if (++state.clock % kCallsPerSweep == 0) {
      state.erase_dead(dropped);
    }
    auto* known = state.find(key, weight, dropped);
    if (known != nullptr) {
      known->used = state.clock;
      if (const auto* const found = known->find(dtype, direction, group)) {
        ++state.hits;
        return found->panels;
      }
    }
    ++state.misses;
    if (keeps(state.mode, direction)) {
      state.erase_dead(dropped);
      if (known == nullptr) {
        known = &state.weights.emplace(key, Weight(weight)).first->second;
        known->used = state.clock;
        watch(weight);
      }
      keep = state.admit(*known, bytes, dropped);
    }
  }
  // Freed before more is taken. Packing needs no lock: two threads that want the same pack at once both make it, and
  // the first one's is kept.
  dropped.clear();
  if (!keep) {
    return pack(weight, dtype, direction, group, /*kept=*/false);
  }
  const Promise promise{state, bytes};
  auto panels = pack(weight, dtype, direction, group, /*kept=*/true);
  const std::lock_guard<std::mutex> guard(state.mutex);
  auto* const known = state.find(key, weight, dropped);
  if (known == nullptr || !keeps(state.mode, direction)) {
    return panels;
  }
  if (const auto* const found = known->find(dtype, direction, group)) {
    return found->panels;
  }
  known->packs.push_back({dtype, direction, group, panels});
  return panels;
}

bool is_refused(const at::Tensor& weight) {
  auto& state = cache();
  if (state.refused.load(std::memory_order_relaxed) == 0 || !weight.has_storage()) {
    return false;
  }
  const std::lock_guard<std::mutex> guard(state.mutex);
  const auto found = state.weights.find(Key(weight));
  return found != state.weights.end() && found->second.wanted > 0;
}

bool ask_again(const at::Tensor& weight) {
  auto& state = cache();
  Dropped dropped;
  const std::lock_guard<std::mutex> guard(state.mutex);
  ++state.clock;
  const auto found = state.weights.find(Key(weight));
  return found == state.weights.end() || found->second.wanted == 0 || state.asked_enough(found->second, dropped);
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
      return keeps(mode, pack.direction);
    });
    dropped.push_back({weight.storage, {first, weight.packs.end()}});
    weight.packs.erase(first, weight.packs.end());
  }
  state.erase_if([](const Weight& weight) { return weight.packs.empty(); }, dropped);
}

void set_pack_limit(const PackLimit& limit) {
  auto& state = cache();
  Dropped dropped;
  const std::lock_guard<std::mutex> guard(state.mutex);
  state.limit = limit;
  state.drop_oldest(-state.room(), dropped);
  // Those that were refused may ask anew.
  state.erase_if([](const Weight& weight) { return weight.packs.empty(); }, dropped);
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

void clear_pack_cache() {
  auto& state = cache();
  Dropped dropped;
  const std::lock_guard<std::mutex> guard(state.mutex);
  state.erase_if([](const Weight&) { return true; }, dropped);
}

} // namespace peftkernels::cpu
