// The pack cache's state: what is known of weights, and which of their packs there is room for.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <iterator>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "known_weight.h"
#include "pack_cache.h"

namespace peftkernels::cpu {

using Weights = std::unordered_map<WeightKey, KnownWeight, WeightKeyHash>;

// What was taken out of the cache while it was locked, to be freed when it no longer is: unmapping memory takes its
// time, and the last reference to a storage may need Python's lock.
struct Remains {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  std::vector<Pack> packs;
};
using Dropped = std::vector<Remains>;

// Returns true if packs of this direction are kept.
inline bool keeps(PackMode mode, Direction direction) {
  return mode == PackMode::Both || (mode == PackMode::ForwardOnly && direction == Direction::Forward);
}

// Its functions want the mutex held.
struct CacheState {
  int64_t held() const; // bytes of all packs
  std::optional<int64_t> allowed() const;
  int64_t room() const;

  void drop_packs(KnownWeight& weight, Dropped& dropped);
  Weights::iterator erase(Weights::iterator it, Dropped& dropped);
  void erase_dead(Dropped& dropped);

  template <typename Predicate>
  void erase_if(const Predicate& predicate, Dropped& dropped) {
    for (auto it = weights.begin(); it != weights.end();) {
      it = predicate(it->second) ? erase(it, dropped) : std::next(it);
    }
  }

  // What is known of the weight as it is now. What was known of it as it was before a change is dropped.
  KnownWeight* find(const WeightKey& key, const at::Tensor& weight, Dropped& dropped);
  // What is known of it from now on.
  KnownWeight& add(const WeightKey& key, const at::Tensor& weight);

  // Returns true if `bytes` more may be kept for the weight; they are promised then.
  bool admit(KnownWeight& weight, int64_t bytes, Dropped& dropped);
  void refuse(KnownWeight& weight, int64_t bytes, bool out_of_memory, Dropped& dropped);
  // Counts a request of a refused weight. Returns true if there is room for it, made at the cost of others if need be.
  bool request_room(KnownWeight& weight, Dropped& dropped);
  // Drops the packs of weights, those first that have not been used for longest, until `bytes` are dropped.
  void drop_oldest(int64_t bytes, Dropped& dropped);

  std::mutex mutex;
  Weights weights;
  std::atomic<PackMode> mode{PackMode::Both}; // read without the mutex too
  PackLimit limit;
  int64_t promised = 0; // bytes of packs that are being made
  int64_t hits = 0, misses = 0, clock = 0, serials = 0;
  std::atomic<int64_t> refused{0}; // weights; read without the mutex too
};

// The process's one.
CacheState& cache();

} // namespace peftkernels::cpu
