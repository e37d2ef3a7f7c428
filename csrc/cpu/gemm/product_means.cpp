#include "product_means.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/mul.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>
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
// Elements from which on a matrix is worth it.
constexpr int64_t kLeast = 1024;
// The most elements of ATen's vectors.
constexpr int kWidest = 16;

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
inline __attribute__((always_inline)) void column_means_of(
    const T* a, const T* b, int64_t rows, int64_t columns, int order, T* means) {
  if (order == kOneLane) {
    sum_columns<T, kOneLane>(a, b, rows, columns, means);
  } else {
    sum_columns<T, kFourLanes>(a, b, rows, columns, means);
  }
  for (int64_t column = 0; column < columns; ++column) {
    means[column] /= static_cast<T>(rows);
  }
}

// A row is summed as a matrix of `width` columns, whose sums are added to that of the elements that are left over.
template <typename T>
inline __attribute__((always_inline)) void row_means_of(
    const T* a, const T* b, int64_t rows, int64_t columns, int width, T* means) {
  const int64_t length = columns / width;
  for (int64_t row = 0; row < rows; ++row) {
    const T *const left = a + row * columns, *const right = b + row * columns;
    T sums[kWidest];
    sum_columns<T, kFourLanes>(left, right, length, width, sums);
    T total = 0;
    for (int64_t column = length * width; column < columns; ++column) {
      total += left[column] * right[column];
    }
    for (int lane = 0; lane < width; ++lane) {
      total += sums[lane];
    }
    means[row] = total / static_cast<T>(columns);
  }
}

PEFTKERNELS_MULTIVERSION
void take_column_means(const float* a, const float* b, int64_t rows, int64_t columns, int order, float* means) {
  column_means_of(a, b, rows, columns, order, means);
}

PEFTKERNELS_MULTIVERSION
void take_column_means(const double* a, const double* b, int64_t rows, int64_t columns, int order, double* means) {
  column_means_of(a, b, rows, columns, order, means);
}

PEFTKERNELS_MULTIVERSION
void take_row_means(const float* a, const float* b, int64_t rows, int64_t columns, int width, float* means) {
  row_means_of(a, b, rows, columns, width, means);
}

PEFTKERNELS_MULTIVERSION
void take_row_means(const double* a, const double* b, int64_t rows, int64_t columns, int width, double* means) {
  row_means_of(a, b, rows, columns, width, means);
}

template <typename T>
void take_means(bool of_rows, const T* a, const T* b, int64_t rows, int64_t columns, int order, T* means) {
  if (of_rows) {
    take_row_means(a, b, rows, columns, order, means);
  } else {
    take_column_means(a, b, rows, columns, order, means);
  }
}

// Returns true if sums in this order have at::mean's bits. Two orders agree in nearly half of all sums by chance, so
// many are compared.
template <typename T>
bool has_order(bool of_rows, int64_t rows, int64_t columns, int order) {
  constexpr int64_t kSums = 64;
  const int64_t count = of_rows ? rows : columns;
  std::vector<T> a(rows * columns), b(rows * columns), means(count);
  uint64_t state = 1;
  // Numbers of all bits that T has: products and sums of shorter ones would need no rounding.
  const auto draw = [&state] {
    constexpr int kBits = std::numeric_limits<T>::digits;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<T>(state >> (64 - kBits)) / static_cast<T>(uint64_t{1} << kBits);
  };
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  const auto left = at::from_blob(a.data(), {rows, columns}, options);
  const auto right = at::from_blob(b.data(), {rows, columns}, options);
  for (int64_t compared = 0; compared < kSums; compared += count) {
    std::generate(a.begin(), a.end(), draw);
    std::generate(b.begin(), b.end(), draw);
    const auto expected = at::mean(at::mul(left, right), of_rows ? 1 : 0);
    take_means(of_rows, a.data(), b.data(), rows, columns, order, means.data());
    if (std::memcmp(expected.template const_data_ptr<T>(), means.data(), count * sizeof(T)) != 0) {
      return false;
    }
  }
  return true;
}

// The order of at::mean: lanes for columns, the width of ATen's vectors for rows. 0 where it is none of these.
template <typename T>
int find_order(bool of_rows, int64_t rows, int64_t columns) {
  constexpr int kLanes[] = {kOneLane, kFourLanes}, kWidths[] = {32 / sizeof(T), 64 / sizeof(T)};
  for (const int order : of_rows ? kWidths : kLanes) {
    if (has_order<T>(of_rows, rows, columns, order)) {
      return order;
    }
  }
  return 0;
}

template <typename T>
int known_order(bool of_rows, int64_t rows, int64_t columns) {
  static std::mutex mutex;
  static std::map<std::tuple<bool, int64_t, int64_t>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = known.try_emplace({of_rows, rows, columns}, 0);
  if (is_new) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    entry->second = find_order<T>(of_rows, rows, columns);
  }
  return entry->second;
}

template <typename T>
bool means_if_known(bool of_rows, const T* a, const T* b, int64_t rows, int64_t columns, T* means) {
  // Of few elements the sums are so alike in all orders that comparing them would take long to tell.
  if (rows * columns < kLeast || (!of_rows && columns % kColumns != 0)) {
    return false;
  }
  const int order = known_order<T>(of_rows, rows, columns);
  if (order != 0) {
    take_means(of_rows, a, b, rows, columns, order, means);
  }
  return order != 0;
}

} // namespace

bool column_means(const float* a, const float* b, int64_t rows, int64_t columns, float* means) {
  return means_if_known(false, a, b, rows, columns, means);
}

bool column_means(const double* a, const double* b, int64_t rows, int64_t columns, double* means) {
  return means_if_known(false, a, b, rows, columns, means);
}

bool row_means(const float* a, const float* b, int64_t rows, int64_t columns, float* means) {
  return means_if_known(true, a, b, rows, columns, means);
}

bool row_means(const double* a, const double* b, int64_t rows, int64_t columns, double* means) {
  return means_if_known(true, a, b, rows, columns, means);
}

} // namespace peftkernels::cpu
