// A weight as the pack cache remembers it: how it is recognised, how a change is noticed, and its packs.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "pack.h"
#include "weight_checksums.h"

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

// What a pack is made for, as in `pack`.
struct PackKind {
  bool operator==(const PackKind& other) const {
    return dtype == other.dtype && direction == other.direction && group == other.group;
  }

  at::ScalarType dtype;
  Direction direction;
  int64_t group;
};

struct Pack {
  PackKind kind;
  at::Tensor panels;
};

// Nothing for tensors made under inference mode, which have no counter.
inline std::optional<uint32_t> version_of(const at::Tensor& weight) {
  const auto& counter = weight.unsafeGetTensorImpl()->version_counter();
  return counter.enabled() ? std::optional<uint32_t>(counter.current_version()) : std::nullopt;
}

// What the cache knows of a weight.
struct KnownWeight {
  KnownWeight(const at::Tensor& weight, int64_t serial)
      : serial(serial),
        storage(weight.storage().getWeakStorageImpl()),
        memory(weight.storage().data()),
        memory_bytes(weight.storage().nbytes()),
        data(weight.const_data_ptr()),
        version(version_of(weight)) {}

  // Returns true if the weight is as it was, as far as its address and its version counter tell.
  bool is(const at::Tensor& weight) const {
    return data == weight.const_data_ptr() && version == version_of(weight);
  }

  // What a call with so many rows of x or G reads again, going on where the last call ended: as much as costs a few per
  // cent of its product. All of a weight that is small or that no counter tells of any change of, of one that a core's
  // cache holds 64 bytes of each line at least, and of any other as much from 65536 / (bytes of a line) rows on.
  WeightChecksums::Share next_share(int64_t rows) {
    constexpr int64_t kSmall = int64_t{1} << 15, kNear = int64_t{1} << 20;
    const int64_t all = checksums->diagonals(), blocks = checksums->blocks(), bytes = checksums->bytes();
    if (!version || bytes <= kSmall) {
      return {0, all, 0, blocks};
    }
    const int64_t rows_for_all = bytes <= kNear ? 128 : 1024;
    const int64_t budget = std::min(rows_for_all, rows) * all * blocks / rows_for_all;
    if (bytes <= kNear || budget >= blocks) {
      const WeightChecksums::Share share{next_diagonal, std::max<int64_t>(1, budget / blocks), 0, blocks};
      next_diagonal = (next_diagonal + share.diagonals) % all;
      next_block = 0;
      return share;
    }
    const int64_t count = std::min(blocks - next_block, std::max<int64_t>(1, budget));
    const WeightChecksums::Share share{next_diagonal, 1, next_block, count};
    next_block = (next_block + count) % blocks;
    next_diagonal = (next_diagonal + (next_block == 0 ? 1 : 0)) % all;
    return share;
  }

  // Returns true if it lies in memory that `other` has a part of.
  bool shares_memory_with(const c10::Storage& other) const {
    const auto begin = reinterpret_cast<uintptr_t>(memory), other_begin = reinterpret_cast<uintptr_t>(other.data());
    return storage._unsafe_get_target() == other.unsafeGetStorageImpl() ||
        (begin < other_begin + other.nbytes() && other_begin < begin + memory_bytes);
  }

  // Its pack of this kind, if there is one.
  const Pack* find(const PackKind& kind) const {
    for (const auto& pack : packs) {
      if (pack.kind == kind) {
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
  std::optional<uint32_t> version;
  std::shared_ptr<const WeightChecksums> checksums; // there are some where there are packs
  int64_t next_diagonal = 0, next_block = 0; // what is read again next
  std::vector<Pack> packs;
  int64_t used = 0;
  // Of a refused weight: the bytes there was no room for, whether it was the system that had none, and how many requests
  // of them there have been since when.
  int64_t missing_bytes = 0, requests = 0, requests_since = 0;
  bool out_of_memory = false;
};

} // namespace peftkernels::cpu
