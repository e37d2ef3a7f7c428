// A weight as the pack cache remembers it: how it is recognised, how a change is noticed, and its packs.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "pack.h"
#include "weight_sample.h"

namespace peftkernels::cpu {

// Which elements of which storage a weight (N, K) is.
struct WeightKey {
  explicit WeightKey(const at::Tensor& weight)
      : storage(weight.storage().unsafeGetStorageImpl()),
        offset(weight.storage_offset()),
        rows(weight.size(0)),
        columns(weight.size(1)),
        row_stride(weight.stride(0)),
        column_stride(weight.stride(1)) {}

  bool operator==(const WeightKey& other) const {
    return storage == other.storage && offset == other.offset && rows == other.rows && columns == other.columns &&
        row_stride == other.row_stride && column_stride == other.column_stride;
  }

  const c10::StorageImpl* storage;
  int64_t offset, rows, columns, row_stride, column_stride;
};

struct WeightKeyHash {
  size_t operator()(const WeightKey& key) const {
    return std::hash<const void*>()(key.storage) + static_cast<size_t>(key.offset);
  }
};

// A pack and what it is made for, as in `pack`.
struct Pack {
  at::ScalarType dtype;
  Direction direction;
  int64_t group;
  at::Tensor panels;
};

inline uint32_t version_of(const at::Tensor& weight) {
  const auto& counter = weight.unsafeGetTensorImpl()->version_counter();
  return counter.enabled() ? counter.current_version() : 0;
}

// What the cache knows of a weight.
struct KnownWeight {
  KnownWeight(const at::Tensor& weight, int64_t serial)
      : serial(serial),
        storage(weight.storage().getWeakStorageImpl()),
        memory(weight.storage().data()),
        memory_bytes(weight.storage().nbytes()),
        data(weight.const_data_ptr()),
        version(version_of(weight)),
        sample(weight) {}

  // Whether the weight is as it was.
  bool is(const at::Tensor& weight) const {
    return data == weight.const_data_ptr() && version == version_of(weight) && sample.matches(data);
  }

  // Whether it lies in memory that `other` has a part of.
  bool shares_memory_with(const c10::Storage& other) const {
    const auto begin = reinterpret_cast<uintptr_t>(memory), other_begin = reinterpret_cast<uintptr_t>(other.data());
    return storage._unsafe_get_target() == other.unsafeGetStorageImpl() ||
        (begin < other_begin + other.nbytes() && other_begin < begin + memory_bytes);
  }

  // Its pack of this kind, if there is one.
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

  // No two have the same: a weight that is forgotten and known again is another one.
  int64_t serial;
  // Weak: keeps the storage's address from being used again, but not its memory.
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  const void* memory;
  size_t memory_bytes;
  const void* data;
  uint32_t version;
  WeightSample sample;
  std::vector<Pack> packs;
  int64_t used = 0;
  // Of a refused weight: the bytes there was no room for, and how often they have been asked for since when.
  int64_t wanted = 0, asked = 0, asked_since = 0;
};

} // namespace peftkernels::cpu
