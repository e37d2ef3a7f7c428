#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/gemm/multiversion.h"
#include "cpu/gemm/parallel.h"
#include "cpu/gemm/product_means.h"
#include "cpu/gemm/scratch.h"
#include "factors.h"
#include "operators.h"

// Averages are equal to the bit on every device and to HF peft's: a product and a sum are two operations, each rounded.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace peftkernels::cpu {
namespace {

// Elements that are worked on at a time; those of p, g, Ī and Ū stay in the first-level cache.
constexpr int64_t kBlock = 1024;
// Elements of a flat buffer that are worth a thread.
constexpr int64_t kThreadShare = 32768;

template <typename T>
struct Smoothing {
  // Rounded from the double that 1 - β is in Python.
  Smoothing(double beta) : kept(static_cast<T>(beta)), taken(static_cast<T>(1 - beta)) {}
  T kept, taken;
};

template <typename T, typename Bits>
inline __attribute__((always_inline)) Bits largest_magnitude_of(const T* p, const T* g, int64_t count) {
  constexpr Bits kMagnitude = ~Bits{0} >> 1;
  Bits largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) {
    const T product = p[i] * g[i];
    Bits bits;
    std::memcpy(&bits, &product, sizeof(bits));
    bits &= kMagnitude;
    largest = std::max(largest, bits);
  }
  return largest;
}

template <typename T>
inline __attribute__((always_inline)) void smooth_elements(
    const T* p, const T* g, int64_t count, Smoothing<T> first, Smoothing<T> second, T* sensitivity, T* uncertainty) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const T importance = std::abs(p[i] * g[i]);
    const T smoothed = sensitivity[i] * first.kept + importance * first.taken;
    sensitivity[i] = smoothed;
    uncertainty[i] = uncertainty[i] * second.kept + std::abs(importance - smoothed) * second.taken;
  }
}

// Bits of the largest |p·g|; infinities and NaN have larger ones than all finite numbers.
PEFTKERNELS_MULTIVERSION
uint32_t largest_magnitude(const float* p, const float* g, int64_t count) {
  return largest_magnitude_of<float, uint32_t>(p, g, count);
}

PEFTKERNELS_MULTIVERSION
uint64_t largest_magnitude(const double* p, const double* g, int64_t count) {
  return largest_magnitude_of<double, uint64_t>(p, g, count);
}

bool finite(uint32_t magnitude) {
  return magnitude < 0x7F800000;
}

bool finite(uint64_t magnitude) {
  return magnitude < 0x7FF0000000000000;
}

PEFTKERNELS_MULTIVERSION
void smooth(
    const float* p, const float* g, int64_t count, Smoothing<float> first, Smoothing<float> second,
    float* sensitivity, float* uncertainty) {
  smooth_elements(p, g, count, first, second, sensitivity, uncertainty);
}

PEFTKERNELS_MULTIVERSION
void smooth(
    const double* p, const double* g, int64_t count, Smoothing<double> first, Smoothing<double> second,
    double* sensitivity, double* uncertainty) {
  smooth_elements(p, g, count, first, second, sensitivity, uncertainty);
}

PEFTKERNELS_MULTIVERSION
void multiply_elements(const float* a, const float* b, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = a[i] * b[i];
  }
}

PEFTKERNELS_MULTIVERSION
void multiply_elements(const double* a, const double* b, int64_t count, double* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = a[i] * b[i];
  }
}

// A factor and its gradient; what is not contiguous is held as a copy.
struct Factor {
  Elements parameter, gradient;
  int64_t offset, numel;
};

struct Factors {
  std::vector<Factor> all;
  std::vector<at::Tensor> copies;

  Elements elements(const at::Tensor& tensor) {
    if (tensor.is_contiguous()) {
      return {tensor.const_data_ptr(), tensor.scalar_type()};
    }
    copies.push_back(tensor.contiguous());
    return {copies.back().const_data_ptr(), tensor.scalar_type()};
  }
};

// The factors of all places, which are not part of the averages.
Factors collect(
    at::TensorList parameters, const OptionalTensors& gradients, const Place* places, size_t count,
    const at::Tensor& sensitivity, const at::Tensor& uncertainty) {
  TORCH_CHECK_VALUE(
      parameters.size() == count && gradients.size() == count, "parameters: found ", parameters.size(), " and ",
      gradients.size(), " gradients, expected ", count, " of each");
  Factors factors;
  factors.all.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const auto& place = places[i];
    const std::optional<at::Tensor> gradient = gradients.get(i);
    const auto index = static_cast<int64_t>(i);
    const auto checked = [&](const Name& name, const at::Tensor& tensor) {
      check_factor(name, tensor, place, sensitivity);
      check_factor(name, tensor, place, uncertainty);
      return factors.elements(tensor);
    };
    Factor factor{checked({"parameters", index}, parameters[i]), {}, place.offset, place.numel()};
    if (gradient && gradient->defined()) {
      factor.gradient = checked({"gradients", index}, *gradient);
    }
    factors.all.push_back(factor);
  }
  return factors;
}

// Calls work(p, g, count, position in the factor) for one block of it after the other until one says false.
template <typename T, typename Work>
void for_blocks(const Factor& factor, const Work& work) {
  std::array<T, kBlock> p_scratch, g_scratch;
  for (int64_t first = 0; first < factor.numel; first += kBlock) {
    const int64_t count = std::min(kBlock, factor.numel - first);
    const T* const p = factor.parameter.read(first, count, p_scratch.data());
    const T* const g = factor.gradient.read(first, count, g_scratch.data());
    if (!work(p, g, count, first)) {
      return;
    }
  }
}

template <typename Call>
void with_average_type(const at::Tensor& sensitivity, const Call& call) {
  if (sensitivity.scalar_type() == at::kDouble) {
    call(double{});
  } else {
    call(float{});
  }
}

int64_t threads_for_elements(int64_t numel) {
  return std::min<int64_t>(at::get_num_threads(), divide_up(numel, kThreadShare));
}

// The scores of all ranks from the means of every factor by itself, which may be taken in any order.
template <typename T>
class Scores {
 public:
  Scores(const at::Tensor& table, const Place* places) : places_(places), factors_(table.size(0)) {
    for (int64_t factor = 0; factor < factors_; ++factor) {
      first_.push_back(static_cast<int64_t>(means_.size()));
      means_.resize(means_.size() + ranks(factor));
    }
  }

  // Takes Ī·Ū of a factor, unless that must be left to `finish`.
  void take(int64_t factor, const T* sensitivity, const T* uncertainty) {
    if (!wants_all_threads(factor)) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      take_now(factor, sensitivity, uncertainty);
    }
  }

  // (Σ r,), each s_E + (s_A + s_B); called by one thread, outside of parallel work.
  at::Tensor finish(const T* sensitivity, const T* uncertainty) {
    for (int64_t factor = 0; factor < factors_; ++factor) {
      if (wants_all_threads(factor)) {
        take_now(factor, sensitivity, uncertainty);
      }
    }
    std::vector<T> scores;
    for (int64_t layer = 0; layer < factors_; layer += kFactors) {
      const T *const a = means_.data() + first_[layer], *const b = means_.data() + first_[layer + 1],
              *const e = means_.data() + first_[layer + 2];
      for (int64_t i = 0; i < ranks(layer); ++i) {
        scores.push_back(e[i] + (a[i] + b[i]));
      }
    }
    const auto dtype = c10::CppTypeToScalarType<T>::value;
    auto result = at::empty({static_cast<int64_t>(scores.size())}, dtype);
    std::copy(scores.begin(), scores.end(), result.template mutable_data_ptr<T>());
    return result;
  }

 private:
  // Of a layer, in the order A, B, E.
  static constexpr int64_t kFactors = 3;

  int64_t ranks(int64_t factor) const {
    return factor % kFactors == 1 ? places_[factor].columns : places_[factor].rows;
  }

  // ATen splits the sum over a single large row among the threads it has, which changes its rounding.
  bool wants_all_threads(int64_t factor) const {
    return ranks(factor) == 1 && places_[factor].numel() >= at::internal::GRAIN_SIZE;
  }

  void take_now(int64_t factor, const T* sensitivity, const T* uncertainty) {
    const auto& place = places_[factor];
    T* const means = means_.data() + first_[factor];
    if (factor % kFactors == 2) {
      multiply_elements(sensitivity + place.offset, uncertainty + place.offset, place.rows, means);
      return;
    }
    const bool is_A = factor % kFactors == 0;
    const T *const average = sensitivity + place.offset, *const deviation = uncertainty + place.offset;
    if (!wants_all_threads(factor) &&
        (is_A ? row_means(average, deviation, place.rows, place.columns, means)
              : column_means(average, deviation, place.rows, place.columns, means))) {
      return;
    }
    T* const products = thread_scratch<T, Scratch::Scores>(place.numel());
    multiply_elements(average, deviation, place.numel(), products);
    const auto dtype = c10::CppTypeToScalarType<T>::value;
    // ATen sums in an order of its own, which HF peft's scores come from.
    const auto matrix = at::from_blob(products, {place.rows, place.columns}, at::TensorOptions().dtype(dtype));
    const auto mean = at::mean(matrix, is_A ? 1 : 0);
    std::copy_n(mean.template const_data_ptr<T>(), mean.numel(), means);
  }

  const Place* places_;
  int64_t factors_;
  std::vector<int64_t> first_;
  std::vector<T> means_;
};

// Returns true if every p·g is finite.
template <typename T>
bool all_finite(const std::vector<Factor>& factors, int64_t threads) {
  std::atomic<bool> finite_so_far{true};
  const auto look = [&](int64_t i) {
    for_blocks<T>(factors[i], [&](const T* p, const T* g, int64_t count, int64_t) {
      if (!finite(largest_magnitude(p, g, count))) {
        finite_so_far.store(false, std::memory_order_relaxed);
      }
      return finite_so_far.load(std::memory_order_relaxed);
    });
  };
  run_tasks(static_cast<int64_t>(factors.size()), threads, look, [] {});
  return finite_so_far;
}

// Updates the averages and, where `scores` is not null, takes each factor's scores while its averages are near.
template <typename T>
void update(
    const std::vector<Factor>& factors, int64_t threads, double beta1, double beta2, T* sensitivity, T* uncertainty,
    Scores<T>* scores) {
  const Smoothing<T> first(beta1), second(beta2);
  const auto count = static_cast<int64_t>(factors.size());
  const auto one_factor = [&](int64_t i) {
    // The last factor first: it was looked at last, and is still near.
    const int64_t index = count - 1 - i;
    const int64_t offset = factors[index].offset;
    for_blocks<T>(factors[index], [&](const T* p, const T* g, int64_t elements, int64_t at) {
      smooth(p, g, elements, first, second, sensitivity + offset + at, uncertainty + offset + at);
      return true;
    });
    if (scores != nullptr) {
      scores->take(index, sensitivity, uncertainty);
    }
  };
  run_tasks(count, threads, one_factor, [] {});
}

} // namespace

std::tuple<at::Tensor, at::Tensor> update_averages(
    at::TensorList parameters, const OptionalTensors& gradients, const at::Tensor& table,
    const at::Tensor& sensitivity, const at::Tensor& uncertainty, double beta1, double beta2,
    const std::optional<at::Tensor>& skip, bool with_scores) {
  const Place* const all_places = check_places(table, sensitivity, uncertainty);
  if (with_scores) {
    check_layers(all_places, table.size(0));
  }
  check_beta("beta1", beta1);
  check_beta("beta2", beta2);
  check_flag("skip", skip);
  check_written("sensitivity", sensitivity);
  check_written("uncertainty", uncertainty);
  check_without_overlap("uncertainty", uncertainty, "sensitivity", sensitivity);
  const auto factors =
      collect(parameters, gradients, all_places, static_cast<size_t>(table.size(0)), sensitivity, uncertainty);
  const bool skipped = skip && *skip->const_data_ptr<bool>();
  bool is_finite = true;
  at::Tensor scores;
  with_average_type(sensitivity, [&](auto type) {
    using T = decltype(type);
    const int64_t threads = threads_for_elements(sensitivity.numel());
    is_finite = all_finite<T>(factors.all, threads);
    if (is_finite && !skipped) {
      T* const average = sensitivity.mutable_data_ptr<T>();
      T* const deviation = uncertainty.mutable_data_ptr<T>();
      std::optional<Scores<T>> taken;
      if (with_scores) {
        taken.emplace(table, all_places);
      }
      update(factors.all, threads, beta1, beta2, average, deviation, taken ? &*taken : nullptr);
      sensitivity.unsafeGetTensorImpl()->bump_version();
      uncertainty.unsafeGetTensorImpl()->bump_version();
      if (taken) {
        scores = taken->finish(average, deviation);
      }
    }
  });
  if (!scores.defined()) {
    scores = at::empty({0}, sensitivity.options());
  }
  return {at::scalar_tensor(is_finite, at::kBool), scores};
}

at::Tensor rank_scores(const at::Tensor& table, const at::Tensor& sensitivity, const at::Tensor& uncertainty) {
  const Place* const all_places = check_places(table, sensitivity, uncertainty);
  check_layers(all_places, table.size(0));
  at::Tensor result;
  with_average_type(sensitivity, [&](auto type) {
    using T = decltype(type);
    const T* const average = sensitivity.const_data_ptr<T>();
    const T* const deviation = uncertainty.const_data_ptr<T>();
    Scores<T> scores(table, all_places);
    const auto take = [&](int64_t factor) { scores.take(factor, average, deviation); };
    run_tasks(table.size(0), threads_for_elements(sensitivity.numel()), take, [] {});
    result = scores.finish(average, deviation);
  });
  return result;
}

} // namespace peftkernels::cpu
