#include "cache_state.h"

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <limits>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "memory.h"

namespace peftkernels::cpu {
namespace {

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

} // namespace

int64_t CacheState::held() const {
  int64_t sum = 0;
  for (const auto& [key, weight] : weights) {
    sum += weight.bytes();
  }
  return sum;
}

std::optional<int64_t> CacheState::allowed() const {
  if (!limit.share) {
    return limit.bytes;
  }
  const auto available = available_memory();
  if (!available) {
    return std::nullopt;
  }
  return static_cast<int64_t>(*limit.share * static_cast<double>(*available + held()));
}

int64_t CacheState::room() const {
  const auto bytes = allowed();
  return bytes ? *bytes - held() - promised : std::numeric_limits<int64_t>::max();
}

void CacheState::drop_packs(KnownWeight& weight, Dropped& dropped) {
  dropped.push_back({weight.storage, std::move(weight.packs)});
  weight.packs.clear();
  weight.checksums.reset();
}

Weights::iterator CacheState::erase(Weights::iterator it, Dropped& dropped) {
  refused -= it->second.missing_bytes > 0 ? 1 : 0;
  drop_packs(it->second, dropped);
  return weights.erase(it);
}

void CacheState::erase_dead(Dropped& dropped) {
  erase_if([](const KnownWeight& weight) { return weight.storage.expired(); }, dropped);
}

KnownWeight* CacheState::find(const WeightKey& key, const at::Tensor& weight, Dropped& dropped) {
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

bool CacheState::admit(KnownWeight& weight, int64_t bytes, Dropped& dropped) {
  if (weight.missing_bytes > 0 && !request_room(weight, dropped)) {
    return false;
  }
  if (room() < bytes) {
    refuse(weight, bytes, /*out_of_memory=*/false, dropped);
    return false;
  }
  promised += bytes;
  return true;
}

void CacheState::refuse(KnownWeight& weight, int64_t bytes, bool out_of_memory, Dropped& dropped) {
  refused += weight.missing_bytes > 0 ? 0 : 1;
  weight.missing_bytes = std::max<int64_t>(1, weight.bytes() + bytes);
  weight.out_of_memory = out_of_memory;
  weight.requests = 0;
  weight.requests_since = clock;
  drop_packs(weight, dropped);
}

bool CacheState::request_room(KnownWeight& weight, Dropped& dropped) {
  if (++weight.requests < kRefusalsBeforeEviction) {
    return false;
  }
  const auto missing = weight.missing_bytes - room();
  int64_t idle = 0;
  for (const auto& [key, other] : weights) {
    idle += other.used < weight.requests_since ? other.bytes() : 0;
  }
  if (idle < missing) {
    weight.requests = 0;
    weight.requests_since = clock;
    return false;
  }
  drop_oldest(missing, dropped);
  weight.missing_bytes = 0;
  --refused;
  return true;
}

void CacheState::drop_oldest(int64_t bytes, Dropped& dropped) {
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

KnownWeight& CacheState::add(const WeightKey& key, const at::Tensor& weight) {
  auto& known = weights.emplace(key, KnownWeight(weight, ++serials)).first->second;
  known.used = clock;
  watch(weight);
  return known;
}

CacheState& cache() {
  // Never destroyed: threads may still run kernels while static objects are torn down.
  static CacheState* const instance = [] {
#if !defined(_WIN32)
    // A child gets the cache as it is while no thread has it locked; threads that were making packs are gone there.
    const auto in_child = [] {
      cache().promised = 0;
      cache().mutex.unlock();
    };
    pthread_atfork([] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); }, in_child);
#endif
    return new CacheState;
  }();
  return *instance;
}

} // namespace peftkernels::cpu
