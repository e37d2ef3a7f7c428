#include "pack_cache.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "matmul.h"

namespace peftkernels::cpu {
namespace {

constexpr int64_t kSamples = 32;
// Packs of weights that no longer exist are looked for this often, and whenever a new pack is made.
constexpr int64_t kCallsPerSweep = 64;
using Sample = std::array<uint32_t, kSamples>;

// storage, offset, N, K, strides, dtype, direction, depth group
using Key = std::tuple<
    const c10::StorageImpl*, int64_t, int64_t, int64_t, int64_t, int64_t, at::ScalarType, Direction, int64_t>;

struct Entry {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  const void* data;
  uint32_t version;
  Sample sample;
  at::Tensor pack;
};

struct Cache {
  std::mutex mutex;
  std::map<Key, Entry> entries;
  PackMode mode = PackMode::Both;
  int64_t hits = 0;
  int64_t misses = 0;
  int64_t calls = 0;
};

Cache& cache() {
  // Never destroyed: threads may still run kernels while static objects are torn down.
  static Cache* const instance = new Cache;
  return *instance;
}

uint32_t version_of(const at::Tensor& weight) {
  return weight.is_inference() ? 0 : static_cast<uint32_t>(weight._version());
}

// The bits of elements spread over the weight, at positions that fall into different rows and columns.
Sample sample_of(const at::Tensor& weight) {
  Sample sample{};
  const int64_t rows = weight.size(0), columns = weight.size(1), size = weight.element_size();
  const int64_t count = rows * columns;
  const auto* const data = static_cast<const char*>(weight.const_data_ptr());
  const int64_t step = std::max<int64_t>(1, count / kSamples) | 1;
  for (int64_t i = 0; i < kSamples && i * step < count; ++i) {
    const int64_t row = (i * step) / columns, column = (i * step) % columns;
    const char* const element = data + (row * weight.stride(0) + column * weight.stride(1)) * size;
    std::memcpy(&sample[i], element, std::min<int64_t>(size, sizeof(uint32_t)));
  }
  return sample;
}

void erase_dead(std::map<Key, Entry>& entries) {
  for (auto it = entries.begin(); it != entries.end();) {
    it = it->second.storage.expired() ? entries.erase(it) : std::next(it);
  }
}

bool keeps(PackMode mode, Direction direction) {
  return mode == PackMode::Both || (mode == PackMode::ForwardOnly && direction == Direction::Forward);
}

template <typename To, typename From>
void pack_panels(const at::Tensor& weight, Direction direction, int64_t group, To* packed) {
  const bool forward = direction == Direction::Forward;
  const int64_t depth = weight.size(forward ? 1 : 0), columns = weight.size(forward ? 0 : 1);
  const int64_t depth_stride = weight.stride(forward ? 1 : 0), column_stride = weight.stride(forward ? 0 : 1);
  const auto* const data = weight.const_data_ptr<From>();
  const int64_t panel_size = round_up(depth, group) * kPanelColumns;
  at::parallel_for(0, divide_up(columns, kPanelColumns), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanelColumns;
      const auto depth_offset = [=](int64_t d) { return d * depth_stride; };
      const auto width_offset = [=](int64_t w) { return (first + w) * column_stride; };
      const int64_t width = std::min(kPanelColumns, columns - first);
      To* const to = packed + panel * panel_size;
      if (depth_stride <= column_stride) {
        pack_operand<true>(data, depth, width, kPanelColumns, group, depth_offset, width_offset, to);
      } else {
        pack_operand<false>(data, depth, width, kPanelColumns, group, depth_offset, width_offset, to);
      }
    }
  });
}

at::Tensor pack(const at::Tensor& weight, at::ScalarType dtype, Direction direction, int64_t group) {
  const bool forward = direction == Direction::Forward;
  const int64_t depth = weight.size(forward ? 1 : 0), columns = weight.size(forward ? 0 : 1);
  auto packed = at::empty(
      {divide_up(columns, kPanelColumns), round_up(depth, group) * kPanelColumns}, weight.options().dtype(dtype));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, weight.scalar_type(), "pack_weight", [&] {
    using from_t = scalar_t;
    AT_DISPATCH_SWITCH(
        dtype, "pack_weight",
        AT_DISPATCH_CASE(at::kFloat, [&] { pack_panels<float, from_t>(weight, direction, group, packed.data_ptr<float>()); })
        AT_DISPATCH_CASE(at::kBFloat16, [&] { pack_panels<at::BFloat16, from_t>(weight, direction, group, packed.data_ptr<at::BFloat16>()); })
        AT_DISPATCH_CASE(at::kHalf, [&] { pack_panels<at::Half, from_t>(weight, direction, group, packed.data_ptr<at::Half>()); }));
  });
  return packed;
}

int64_t depth_group_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return depth_group<at::BFloat16>();
    case at::kHalf:
      return depth_group<at::Half>();
    default:
      return 1;
  }
}

} // namespace

at::Tensor packed_weight(const at::Tensor& weight, at::ScalarType dtype, Direction direction) {
  const int64_t group = depth_group_of(dtype);
  auto& state = cache();
  const std::lock_guard<std::mutex> guard(state.mutex);
  if (!keeps(state.mode, direction)) {
    ++state.misses;
    return pack(weight, dtype, direction, group);
  }
  const auto* const storage = weight.storage().unsafeGetStorageImpl();
  const Key key{
      storage, weight.storage_offset(), weight.size(0), weight.size(1), weight.stride(0), weight.stride(1),
      dtype,   direction,               group};
  const auto sample = sample_of(weight);
  const auto version = version_of(weight);
  if (++state.calls % kCallsPerSweep == 0) {
    erase_dead(state.entries);
  }
  const auto found = state.entries.find(key);
  if (found != state.entries.end()) {
    const auto& entry = found->second;
    if (!entry.storage.expired() && entry.data == weight.const_data_ptr() && entry.version == version &&
        entry.sample == sample) {
      ++state.hits;
      return entry.pack;
    }
    state.entries.erase(found);
  }
  ++state.misses;
  erase_dead(state.entries);
  auto packed = pack(weight, dtype, direction, group);
  state.entries.emplace(
      key, Entry{weight.storage().getWeakStorageImpl(), weight.const_data_ptr(), version, sample, packed});
  return packed;
}

PackMode pack_mode() {
  auto& state = cache();
  const std::lock_guard<std::mutex> guard(state.mutex);
  return state.mode;
}

void set_pack_mode(PackMode mode) {
  auto& state = cache();
  const std::lock_guard<std::mutex> guard(state.mutex);
  state.mode = mode;
  for (auto it = state.entries.begin(); it != state.entries.end();) {
    it = keeps(mode, std::get<Direction>(it->first)) ? std::next(it) : state.entries.erase(it);
  }
}

PackCacheStats pack_cache_stats() {
  auto& state = cache();
  const std::lock_guard<std::mutex> guard(state.mutex);
  erase_dead(state.entries);
  int64_t bytes = 0;
  for (const auto& [key, entry] : state.entries) {
    bytes += static_cast<int64_t>(entry.pack.nbytes());
  }
  return {static_cast<int64_t>(state.entries.size()), bytes, state.hits, state.misses};
}

void clear_pack_cache() {
  auto& state = cache();
  const std::lock_guard<std::mutex> guard(state.mutex);
  state.entries.clear();
}

} // namespace peftkernels::cpu
