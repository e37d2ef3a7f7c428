#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <cmath>
#include <unordered_set>
#include <vector>

#include "adapter.h"
#include "allocation.h"
#include "allocation_factors.h"
#include "multiversion.h"
#include "scratch.h"

namespace peftkernels::cpu {
namespace {

// Elements of factors that are worth a thread.
constexpr int64_t kThreadShare = 32768;

// gram (r x r) = rows · rowsᵀ for rows (r x length)
template <typename T>
inline __attribute__((always_inline)) void gram_of(const T* rows, int64_t r, int64_t length, T* gram) {
  for (int64_t i = 0; i < r; ++i) {
    const T* const row = rows + i * length;
    for (int64_t j = 0; j <= i; j += 4) {
      // Beyond the diagonal a row is multiplied again, for nothing.
      const T* const others[] = {
          rows + j * length, rows + std::min(j + 1, i) * length, rows + std::min(j + 2, i) * length,
          rows + std::min(j + 3, i) * length};
      T sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
      for (int64_t k = 0; k < length; ++k) {
        sum0 += row[k] * others[0][k];
        sum1 += row[k] * others[1][k];
        sum2 += row[k] * others[2][k];
        sum3 += row[k] * others[3][k];
      }
      const T sums[] = {sum0, sum1, sum2, sum3};
      for (int64_t other = j; other < std::min(j + 4, i + 1); ++other) {
        gram[i * r + other] = gram[other * r + i] = sums[other - j];
      }
    }
  }
}

// to (length) = Σ_j factors[j] · row j
template <typename T>
inline __attribute__((always_inline)) void sum_rows(
    const T* rows, const T* factors, int64_t r, int64_t length, T* to) {
  for (int64_t j = 0; j < r; j += 4) {
    const auto row = [&](int64_t other) { return rows + std::min(other, r - 1) * length; };
    const auto factor = [&](int64_t other) { return other < r ? factors[other] : T(0); };
    const T *const row0 = row(j), *const row1 = row(j + 1), *const row2 = row(j + 2), *const row3 = row(j + 3);
    const T factor0 = factor(j), factor1 = factor(j + 1), factor2 = factor(j + 2), factor3 = factor(j + 3);
    if (j == 0) {
#pragma omp simd
      for (int64_t k = 0; k < length; ++k) {
        to[k] = (factor0 * row0[k] + factor1 * row1[k]) + (factor2 * row2[k] + factor3 * row3[k]);
      }
    } else {
#pragma omp simd
      for (int64_t k = 0; k < length; ++k) {
        to[k] += (factor0 * row0[k] + factor1 * row1[k]) + (factor2 * row2[k] + factor3 * row3[k]);
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
void combine_rows(const float* rows, const float* factors, int64_t r, int64_t length, float* to) {
  sum_rows(rows, factors, r, length, to);
}

PEFTKERNELS_MULTIVERSION
void combine_rows(const double* rows, const double* factors, int64_t r, int64_t length, double* to) {
  sum_rows(rows, factors, r, length, to);
}

// to += scale · from, the product rounded to the dtype of `to` first, as a gradient that autograd hands over is.
template <typename T, typename To>
void add_scaled(const T* from, int64_t stride, int64_t count, T scale, To* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] += static_cast<To>(scale * from[i * stride]);
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
  const T* const read = elements.read(0, numel, thread_scratch<T, Scratch::FactorRows>(numel));
  if (factor.is_A && factor.keep == nullptr) {
    return read;
  }
  T* const rows = thread_scratch<T, Scratch::FactorColumns>(numel);
  for (int64_t i = 0; i < r; ++i) {
    const T kept = factor.keep == nullptr || factor.keep[i] ? T(1) : T(0);
    const T* const from = factor.is_A ? read + i * length : read + i;
    const int64_t stride = factor.is_A ? 1 : r;
    for (int64_t k = 0; k < length; ++k) {
      rows[i * length + k] = kept * from[k * stride];
    }
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
  const int64_t r = factor.ranks(), length = factor.length();
  const bool adds = factor.add_to.defined();
  const auto& target = adds ? factor.add_to : factor.gradient;
  with_float_type(target.scalar_type(), "add_to", [&](auto type) {
    using To = decltype(type);
    To* const to = target.template mutable_data_ptr<To>();
    const auto put = [&](const T* from, int64_t stride, int64_t count, To* at) {
      if (adds) {
        add_scaled(from, stride, count, scale, at);
      } else {
        for (int64_t i = 0; i < count; ++i) {
          at[i] = static_cast<To>(scale * from[i * stride]);
        }
      }
    };
    if (factor.is_A) {
      put(rows, 1, r * length, to);
    } else {
      for (int64_t k = 0; k < length; ++k) {
        put(rows + k, length, r, to + k * r);
      }
    }
  });
}

// ‖M‖_F of a factor, its gradient delivered where one is wanted; share is w/(2n).
template <typename T>
double factor_term(const Factor& factor, double share, double scale) {
  const int64_t r = factor.ranks(), length = factor.length();
  const T* const rows = rows_of<T>(factor);
  T* const difference = thread_scratch<T, Scratch::Gram>(r * r);
  gram(rows, r, length, difference);
  for (int64_t i = 0; i < r; ++i) {
    difference[i * r + i] -= factor.keep == nullptr || factor.keep[i] ? T(1) : T(0);
  }
  const double norm = norm_of(difference, r * r);
  if (factor.gradient.defined() || factor.add_to.defined()) {
    const T coefficient = norm == 0 ? T(0) : static_cast<T>(2 * share / norm);
    std::for_each(difference, difference + r * r, [coefficient](T& value) { value *= coefficient; });
    T* const gradient = thread_scratch<T, Scratch::FactorGradient>(r * length);
    for (int64_t i = 0; i < r; ++i) {
      combine_rows(rows, difference + i * r, r, length, gradient + i * length);
    }
    deliver<T>(factor, gradient, static_cast<T>(scale));
  }
  return norm;
}

void check(const Factor& factor) {
  const auto& tensor = factor.tensor;
  TORCH_CHECK_VALUE(
      tensor.device().is_cpu() && tensor.dim() == 2, "factors: found ", tensor.sizes(), " on ", tensor.device(),
      ", expected a matrix on the CPU");
  with_float_type(tensor.scalar_type(), "factors", [](auto) {});
}

} // namespace

std::tuple<at::Tensor, std::vector<at::Tensor>> orthogonality(
    at::TensorList lora_A, at::TensorList lora_B, double weight, at::TensorList keep, at::TensorList add_to,
    double scale, bool gradients) {
  const size_t n = lora_A.size(), count = 2 * n;
  TORCH_CHECK_VALUE(
      lora_B.size() == n && (keep.empty() || keep.size() == n) && (add_to.empty() || add_to.size() == count),
      "lora_B, keep, add_to: found ", lora_B.size(), ", ", keep.size(), " and ", add_to.size(), " tensors, expected ",
      n, ", 0 or ", n, ", and 0 or ", count);
  std::vector<Factor> factors;
  std::vector<at::Tensor> kept;
  std::unordered_set<const void*> seen;
  factors.reserve(count);
  int64_t numel = 0;
  bool in_double = false;
  for (size_t i = 0; i < count; ++i) {
    const bool is_A = i < n;
    Factor factor{is_A ? lora_A[i] : lora_B[i - n], is_A, nullptr, {}, {}};
    check(factor);
    factor.tensor = factor.tensor.contiguous();
    if (!keep.empty()) {
      kept.push_back(keep[i % n].contiguous());
      TORCH_CHECK_VALUE(
          kept.back().scalar_type() == at::kBool && kept.back().numel() == factor.ranks(), "keep: found ",
          kept.back().scalar_type(), " ", kept.back().sizes(), ", expected bool [", factor.ranks(), "]");
      factor.keep = kept.back().const_data_ptr<bool>();
    }
    const auto dtype = factor.in_double() ? at::kDouble : at::kFloat;
    bool in_place = false;
    if (!add_to.empty()) {
      const auto& target = add_to[i];
      TORCH_CHECK_VALUE(
          target.sizes() == factor.tensor.sizes() && target.device().is_cpu(), "add_to: found ", target.sizes(), " on ",
          target.device(), ", expected ", factor.tensor.sizes(), " on the CPU");
      with_float_type(target.scalar_type(), "add_to", [](auto) {});
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
  const auto one_factor = [&](int64_t i) {
    const auto& factor = factors[i];
    norms[i] = factor.in_double() ? factor_term<double>(factor, share, applied) : factor_term<float>(factor, share, applied);
  };
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), divide_up(numel, kThreadShare));
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
