#include "column_means.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/mul.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "multiversion.h"

// Products and sums are rounded one by one, as ATen's are.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace peftkernels::cpu {
namespace {

// The orders in which ATen sums columns (SumKernel.cpp): `lanes` sums side by side, of every lanes-th row each, in partial
// sums of four levels. Which one it takes depends on the number of columns and on the processor.
constexpr int kOneLane = 1, kFourLanes = 4;
constexpr int64_t kLevels = 4;
// Columns in a vector, and vectors that are summed at a time: their chains of additions are independent.
constexpr int64_t kColumns = 4;
constexpr int kMostGroups = 4;

template <typename T>
struct Four {
  typedef T Vector __attribute__((vector_size(kColumns * sizeof(T))));
};

template <typename T, int lanes, int groups>
inline __attribute__((always_inline)) void sum_groups(
    const T* a, const T* b, int64_t rows, int64_t columns, T* sums) {
  using Vector = typename Four<T>::Vector;
  const int64_t length = rows / lanes;
  int64_t ceiling = 0;
  while ((int64_t{1} << ceiling) < length) {
    ++ceiling;
  }
  const int64_t power = std::max<int64_t>(4, ceiling / kLevels);
  const int64_t step = int64_t{1} << power, mask = step - 1;
  Vector partial[kLevels][lanes][groups] = {};
  const auto add_row = [&](int64_t row, int lane) {
    for (int g = 0; g < groups; ++g) {
      Vector left, right;
      std::memcpy(&left, a + row * columns + g * kColumns, sizeof(left));
      std::memcpy(&right, b + row * columns + g * kColumns, sizeof(right));
      partial[0][lane][g] += left * right;
    }
  };
  const auto add_lanes = [&](int64_t at) {
    for (int lane = 0; lane < lanes; ++lane) {
      add_row(at * lanes + lane, lane);
    }
  };
  const auto carry = [&](int64_t level) {
    for (int lane = 0; lane < lanes; ++lane) {
      for (int g = 0; g < groups; ++g) {
        partial[level][lane][g] += partial[level - 1][lane][g];
        partial[level - 1][lane][g] = Vector{};
      }
    }
  };
  int64_t at = 0;
  while (at + step <= length) {
    for (const int64_t end = at + step; at < end; ++at) {
      add_lanes(at);
    }
    for (int64_t level = 1; level < kLevels; ++level) {
      carry(level);
      if ((at & (mask << (level * power))) != 0) {
        break;
      }
    }
  }
  for (; at < length; ++at) {
    add_lanes(at);
  }
  for (int lane = 0; lane < lanes; ++lane) {
    for (int g = 0; g < groups; ++g) {
      for (int64_t level = 1; level < kLevels; ++level) {
        partial[0][lane][g] += partial[level][lane][g];
      }
    }
  }
  for (int64_t row = length * lanes; row < rows; ++row) {
    add_row(row, 0);
  }
  for (int g = 0; g < groups; ++g) {
    for (int lane = 1; lane < lanes; ++lane) {
      partial[0][0][g] += partial[0][lane][g];
    }
    std::memcpy(sums + g * kColumns, &partial[0][0][g], sizeof(Vector));
  }
}

template <typename T, int lanes>
inline __attribute__((always_inline)) void sum_columns(
    const T* a, const T* b, int64_t rows, int64_t columns, T* sums) {
  for (int64_t column = 0; column < columns;) {
    const int64_t groups = std::min<int64_t>((columns - column) / kColumns, kMostGroups);
    const T *const left = a + column, *const right = b + column;
    T* const to = sums + column;
    switch (groups) {
      case 1:
        sum_groups<T, lanes, 1>(left, right, rows, columns, to);
        break;
      case 2:
        sum_groups<T, lanes, 2>(left, right, rows, columns, to);
        break;
      case 3:
        sum_groups<T, lanes, 3>(left, right, rows, columns, to);
        break;
      default:
        sum_groups<T, lanes, kMostGroups>(left, right, rows, columns, to);
    }
    column += groups * kColumns;
  }
}

template <typename T>
inline __attribute__((always_inline)) void means_of(
    const T* a, const T* b, int64_t rows, int64_t columns, int lanes, T* means) {
  if (lanes == kOneLane) {
    sum_columns<T, kOneLane>(a, b, rows, columns, means);
  } else {
    sum_columns<T, kFourLanes>(a, b, rows, columns, means);
  }
  for (int64_t column = 0; column < columns; ++column) {
    means[column] /= static_cast<T>(rows);
  }
}

PEFTKERNELS_MULTIVERSION
void take_means(const float* a, const float* b, int64_t rows, int64_t columns, int lanes, float* means) {
  means_of(a, b, rows, columns, lanes, means);
}

PEFTKERNELS_MULTIVERSION
void take_means(const double* a, const double* b, int64_t rows, int64_t columns, int lanes, double* means) {
  means_of(a, b, rows, columns, lanes, means);
}

// The number of lanes with which the sums have at::mean's bits, on a matrix whose sums round differently in nearly every
// other order; 0 where none has.
template <typename T>
int find_lanes(int64_t rows, int64_t columns) {
  std::vector<T> a(rows * columns), b(rows * columns), means(columns);
  uint32_t state = 1;
  const auto draw = [&state] {
    state = state * 1664525u + 1013904223u;
    return static_cast<T>(state >> 8) / static_cast<T>(1 << 24);
  };
  std::generate(a.begin(), a.end(), draw);
  std::generate(b.begin(), b.end(), draw);
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  const auto left = at::from_blob(a.data(), {rows, columns}, options), right = at::from_blob(b.data(), {rows, columns}, options);
  const auto expected = at::mean(at::mul(left, right), 0);
  for (const int lanes : {kOneLane, kFourLanes}) {
    take_means(a.data(), b.data(), rows, columns, lanes, means.data());
    if (std::memcmp(expected.template const_data_ptr<T>(), means.data(), columns * sizeof(T)) == 0) {
      return lanes;
    }
  }
  return 0;
}

template <typename T>
int known_lanes(int64_t rows, int64_t columns) {
  static std::mutex mutex;
  static std::map<std::pair<int64_t, int64_t>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = known.try_emplace({rows, columns}, 0);
  if (is_new) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    entry->second = find_lanes<T>(rows, columns);
  }
  return entry->second;
}

template <typename T>
bool means_if_known(const T* a, const T* b, int64_t rows, int64_t columns, T* means) {
  if (rows == 0 || columns == 0 || columns % kColumns != 0) {
    return false;
  }
  const int lanes = known_lanes<T>(rows, columns);
  if (lanes != 0) {
    take_means(a, b, rows, columns, lanes, means);
  }
  return lanes != 0;
}

} // namespace

bool column_means(const float* a, const float* b, int64_t rows, int64_t columns, float* means) {
  return means_if_known(a, b, rows, columns, means);
}

bool column_means(const double* a, const double* b, int64_t rows, int64_t columns, double* means) {
  return means_if_known(a, b, rows, columns, means);
}

} // namespace peftkernels::cpu
