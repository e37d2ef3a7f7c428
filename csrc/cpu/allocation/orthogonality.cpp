#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <unordered_set>
#include <vector>

#include "check.h"
#include "cpu/gemm/multiversion.h"
#include "cpu/gemm/parallel.h"
#include "cpu/gemm/scratch.h"
#include "cpu/gemm/transpose.h"
#include "factors.h"
#include "operators.h"

namespace peftkernels::cpu {
namespace {

// Elements of factors that are worth a thread.
constexpr int64_t kThreadShare = 32768;

// 64 bytes of elements, one vector where the processor has such.
template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(64)));
  static constexpr int64_t kCount = 64 / sizeof(T);
};

template <typename T>
inline __attribute__((always_inline)) void load_lanes(const T* from, typename Lanes<T>::Vector* to) {
  std::memcpy(to, from, sizeof(*to));
}

template <typename T>
inline __attribute__((always_inline)) T sum_of_lanes(const typename Lanes<T>::Vector& lanes) {
  T sums[Lanes<T>::kCount];
  std::memcpy(sums, &lanes, sizeof(sums));
  for (int64_t width = Lanes<T>::kCount / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) {
      sums[i] += sums[i + width];
    }
  }
  return sums[0];
}

// Rows and columns of a Gram matrix that are summed side by side.
constexpr int64_t kTileRows = 2, kTileColumns = 4;

// gram (r x r) = rows · rowsᵀ for rows (r x length)
template <typename T>
inline __attribute__((always_inline)) void gram_of(const T* rows, int64_t r, int64_t length, T* gram) {
  using Vector = typename Lanes<T>::Vector;
  const int64_t whole = length - length % Lanes<T>::kCount;
  for (int64_t i = 0; i < r; i += kTileRows) {
    for (int64_t j = 0; j < i + kTileRows && j < r; j += kTileColumns) {
      // Beyond the last one a row is multiplied again, for nothing.
      const T *left[kTileRows], *right[kTileColumns];
      for (int64_t a = 0; a < kTileRows; ++a) {
        left[a] = rows + std::min(i + a, r - 1) * length;
      }
      for (int64_t b = 0; b < kTileColumns; ++b) {
        right[b] = rows + std::min(j + b, r - 1) * length;
      }
      Vector sums[kTileRows][kTileColumns] = {};
      for (int64_t k = 0; k < whole; k += Lanes<T>::kCount) {
        Vector own[kTileRows], other;
        for (int64_t a = 0; a < kTileRows; ++a) {
          load_lanes(left[a] + k, &own[a]);
        }
        for (int64_t b = 0; b < kTileColumns; ++b) {
          load_lanes(right[b] + k, &other);
          for (int64_t a = 0; a < kTileRows; ++a) {
            sums[a][b] += own[a] * other;
          }
        }
      }
      for (int64_t a = 0; a < kTileRows && i + a < r; ++a) {
        for (int64_t b = 0; b < kTileColumns && j + b <= i + a; ++b) {
          T sum = sum_of_lanes<T>(sums[a][b]);
          for (int64_t k = whole; k < length; ++k) {
            sum += left[a][k] * right[b][k];
          }
          gram[(i + a) * r + j + b] = gram[(j + b) * r + i + a] = sum;
        }
      }
    }
  }
}

// Rows of a product, and vectors of each, that are summed side by side.
constexpr int64_t kProductRows = 4, kProductVectors = 2;

// to (r x length) = factors (r x r) · rows (r x length)
template <typename T>
inline __attribute__((always_inline)) void product_of(
    const T* factors, const T* rows, int64_t r, int64_t length, T* to) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t kStep = kProductVectors * Lanes<T>::kCount;
  const int64_t whole = length - length % kStep;
  for (int64_t i = 0; i < r; i += kProductRows) {
    // Beyond the last one a row is summed again, for nothing.
    int64_t own[kProductRows];
    for (int64_t a = 0; a < kProductRows; ++a) {
      own[a] = std::min(i + a, r - 1);
    }
    for (int64_t k = 0; k < whole; k += kStep) {
      Vector sums[kProductRows][kProductVectors] = {};
      for (int64_t j = 0; j < r; ++j) {
        Vector row[kProductVectors];
        for (int64_t v = 0; v < kProductVectors; ++v) {
          load_lanes(rows + j * length + k + v * Lanes<T>::kCount, &row[v]);
        }
        for (int64_t a = 0; a < kProductRows; ++a) {
          for (int64_t v = 0; v < kProductVectors; ++v) {
            sums[a][v] += factors[own[a] * r + j] * row[v];
          }
        }
      }
      for (int64_t a = 0; a < kProductRows; ++a) {
        std::memcpy(to + own[a] * length + k, &sums[a], sizeof(sums[a]));
      }
    }
    for (int64_t a = 0; a < kProductRows && i + a < r; ++a) {
      for (int64_t k = whole; k < length; ++k) {
        T sum = 0;
        for (int64_t j = 0; j < r; ++j) {
          sum += factors[own[a] * r + j] * rows[j * length + k];
        }
        to[own[a] * length + k] = sum;
      }
    }
  }
}

PEFTKERNELS_MULTIVERSION
void gram(const float* rows, int64_t r, int64_t length, float* to) {
  gram_of(rows, r, length, to);
}

PEFTKERNELS_MULTIVERSION
void gram(const double* rows, int64_t r, int64_t length, double* to) {
  gram_of(rows, r, length, to);
}

PEFTKERNELS_MULTIVERSION
void multiply_rows(const float* factors, const float* rows, int64_t r, int64_t length, float* to) {
  product_of(factors, rows, r, length, to);
}

PEFTKERNELS_MULTIVERSION
void multiply_rows(const double* factors, const double* rows, int64_t r, int64_t length, double* to) {
  product_of(factors, rows, r, length, to);
}

// to += scale · from, the product rounded to the dtype of `to` first, as a gradient that autograd hands over is.
template <typename T, typename To>
void add_scaled(const T* from, int64_t count, T scale, To* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] += static_cast<To>(scale * from[i]);
  }
}

PEFTKERNELS_MULTIVERSION
void add_scaled(const float* from, int64_t count, float scale, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] += scale * from[i];
  }
}

// to (columns x rows) = fromᵀ
template <typename T>
void transpose(const T* from, int64_t rows, int64_t columns, T* to) {
  if constexpr (sizeof(T) == 4) {
    transpose_words(from, columns * static_cast<int64_t>(sizeof(T)), rows, columns, to, rows);
  } else {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        to[column * rows + row] = from[row * columns + column];
      }
    }
  }
}

// One factor of the term, and what becomes of its gradient: written to `gradient`, added to `add_to`, or nothing.
struct Factor {
  at::Tensor tensor;
  bool is_A;
  const bool* keep = nullptr;
  at::Tensor gradient, add_to;

  int64_t ranks() const {
    return tensor.size(is_A ? 0 : 1);
  }
  int64_t length() const {
    return tensor.size(is_A ? 1 : 0);
  }
  bool in_double() const {
    return tensor.scalar_type() == at::kDouble;
  }
};

// The ranks of a factor as rows (r x length), those that are not kept times zero.
template <typename T>
const T* rows_of(const Factor& factor) {
  const int64_t r = factor.ranks(), length = factor.length(), numel = r * length;
  const Elements elements{factor.tensor.const_data_ptr(), factor.tensor.scalar_type()};
  const T* const read = elements.read(0, numel, thread_scratch<T, Scratch::FactorElements>(numel));
  if (factor.is_A && factor.keep == nullptr) {
    return read;
  }
  T* const rows = thread_scratch<T, Scratch::FactorRows>(numel);
  if (factor.is_A) {
    std::copy(read, read + numel, rows);
  } else {
    transpose(read, length, r, rows);
  }
  for (int64_t i = 0; factor.keep != nullptr && i < r; ++i) {
    const T kept = factor.keep[i] ? T(1) : T(0);
    std::for_each(rows + i * length, rows + (i + 1) * length, [kept](T& value) { value *= kept; });
  }
  return rows;
}

template <typename T>
double norm_of(const T* gram, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += static_cast<double>(gram[i]) * static_cast<double>(gram[i]);
  }
  return std::sqrt(sum);
}

// Writes or adds the gradient of a factor: rank i of it is row i of `rows` (r x length).
template <typename T>
void deliver(const Factor& factor, const T* rows, T scale) {
  const int64_t r = factor.ranks(), length = factor.length(), numel = r * length;
  const T* in_order = rows;
  if (!factor.is_A) {
    T* const transposed = thread_scratch<T, Scratch::FactorElements>(numel);
    transpose(rows, r, length, transposed);
    in_order = transposed;
  }
  if (!factor.add_to.defined()) {
    T* const to = factor.gradient.template mutable_data_ptr<T>();
    std::transform(in_order, in_order + numel, to, [scale](T value) { return scale * value; });
    return;
  }
  with_float_type(factor.add_to.scalar_type(), "add_to", [&](auto type) {
    add_scaled(in_order, numel, scale, factor.add_to.template mutable_data_ptr<decltype(type)>());
  });
}

// Asks for memory that is used soon. Factors are small and lie apart: the processor foresees no stream.
void bring_near(const at::Tensor& tensor) {
#if defined(__GNUC__)
  constexpr int64_t kLine = 64;
  const auto* const from = static_cast<const char*>(tensor.const_data_ptr());
  for (int64_t byte = 0; byte < static_cast<int64_t>(tensor.nbytes()); byte += kLine) {
    __builtin_prefetch(from + byte, 0, 2);
  }
#endif
}

// ‖M‖_F of a factor, its gradient delivered where one is wanted; share is w/(2n).
template <typename T>
double factor_term(const Factor& factor, double share, double scale, const at::Tensor* next) {
  const int64_t r = factor.ranks(), length = factor.length();
  const T* const rows = rows_of<T>(factor);
  if (factor.add_to.defined()) {
    bring_near(factor.add_to);
  }
  T* const difference = thread_scratch<T, Scratch::Gram>(r * r);
  gram(rows, r, length, difference);
  for (int64_t i = 0; i < r; ++i) {
    difference[i * r + i] -= factor.keep == nullptr || factor.keep[i] ? T(1) : T(0);
  }
  const double norm = norm_of(difference, r * r);
  if (factor.gradient.defined() || factor.add_to.defined()) {
    const T coefficient = norm == 0 ? T(0) : static_cast<T>(2 * share / norm);
    std::for_each(difference, difference + r * r, [coefficient](T& value) { value *= coefficient; });
    if (next != nullptr) {
      bring_near(*next);
    }
    T* const gradient = thread_scratch<T, Scratch::FactorGradient>(r * length);
    multiply_rows(difference, rows, r, length, gradient);
    deliver<T>(factor, gradient, static_cast<T>(scale));
  }
  return norm;
}

} // namespace

std::tuple<at::Tensor, std::vector<at::Tensor>> orthogonality(
    at::TensorList lora_A, at::TensorList lora_B, double weight, at::TensorList keep, at::TensorList add_to,
    double scale, bool gradients) {
  check_orthogonality(lora_A, lora_B, keep, add_to);
  const size_t n = lora_A.size(), count = 2 * n;
  std::vector<Factor> factors;
  std::vector<at::Tensor> kept;
  std::unordered_set<const void*> seen;
  factors.reserve(count);
  int64_t numel = 0;
  bool in_double = false;
  for (size_t i = 0; i < count; ++i) {
    const bool is_A = i < n;
    Factor factor{is_A ? lora_A[i] : lora_B[i - n], is_A, nullptr, {}, {}};
    factor.tensor = factor.tensor.contiguous();
    if (!keep.empty()) {
      kept.push_back(keep[i % n].contiguous());
      factor.keep = kept.back().const_data_ptr<bool>();
    }
    const auto dtype = factor.in_double() ? at::kDouble : at::kFloat;
    bool in_place = false;
    if (!add_to.empty()) {
      const auto& target = add_to[i];
      // A tensor that is given twice is not added to by two threads at once.
      in_place = target.is_contiguous() && seen.insert(target.const_data_ptr()).second;
    }
    if (in_place) {
      factor.add_to = add_to[i];
    } else if (gradients || !add_to.empty()) {
      factor.gradient = at::empty(factor.tensor.sizes(), dtype);
    }
    numel += factor.tensor.numel();
    in_double = in_double || factor.in_double();
    factors.push_back(std::move(factor));
  }
  const double share = weight / static_cast<double>(count), applied = add_to.empty() ? 1.0 : scale;
  std::vector<double> norms(count);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), divide_up(numel, kThreadShare));
  const auto one_factor = [&](int64_t i) {
    const auto& factor = factors[i];
    const auto following = static_cast<size_t>(i + threads);
    const at::Tensor* const next = following < count ? &factors[following].tensor : nullptr;
    norms[i] = factor.in_double() ? factor_term<double>(factor, share, applied, next)
                                  : factor_term<float>(factor, share, applied, next);
  };
  run_tasks(static_cast<int64_t>(count), threads, one_factor, [] {});

  std::vector<at::Tensor> returned;
  for (size_t i = 0; i < count; ++i) {
    if (add_to.empty()) {
      if (gradients) {
        returned.push_back(factors[i].gradient);
      }
    } else if (factors[i].add_to.defined()) {
      add_to[i].unsafeGetTensorImpl()->bump_version();
    } else {
      add_to[i].add_(factors[i].gradient.to(add_to[i].scalar_type()));
    }
  }
  double sum = 0;
  for (const double norm : norms) {
    sum += norm;
  }
  return {at::scalar_tensor(sum * share, in_double ? at::kDouble : at::kFloat), std::move(returned)};
}

} // namespace peftkernels::cpu
