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

#include "adapter.h"
#include "allocation.h"
#include "allocation_factors.h"
#include "multiversion.h"
#include "scratch.h"

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

  Elements elements(const char* name, const at::Tensor& tensor, const Place& place) {
    TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, ": found a tensor on ", tensor.device(), ", expected the CPU");
    TORCH_CHECK_VALUE(
        tensor.dim() == 2 && tensor.size(0) == place.rows && tensor.size(1) == place.columns, name,
        ": found shape ", tensor.sizes(), ", expected [", place.rows, ", ", place.columns, "]");
    with_float_type(tensor.scalar_type(), name, [](auto) {});
    if (tensor.is_contiguous()) {
      return {tensor.const_data_ptr(), tensor.scalar_type()};
    }
    copies.push_back(tensor.contiguous());
    return {copies.back().const_data_ptr(), tensor.scalar_type()};
  }
};

Factors collect(at::TensorList parameters, const OptionalTensors& gradients, const at::Tensor& table, const Place* places) {
  const auto count = static_cast<size_t>(table.size(0));
  TORCH_CHECK_VALUE(
      parameters.size() == count && gradients.size() == count, "parameters: found ", parameters.size(), " and ",
      gradients.size(), " gradients, expected ", count, " of each");
  Factors factors;
  factors.all.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const auto& place = places[i];
    const std::optional<at::Tensor> gradient = gradients.get(i);
    Factor factor{factors.elements("parameters", parameters[i], place), {}, place.offset, place.numel()};
    if (gradient && gradient->defined()) {
      factor.gradient = factors.elements("gradients", *gradient, place);
    }
    factors.all.push_back(factor);
  }
  return factors;
}

// Calls work(p, g, count, position in the flat buffers) for blocks of the factors between two positions; those of a
// higher position first when `backwards`, so that what was read last, and is still near, is read first.
template <typename T, typename Work>
void for_blocks(const std::vector<Factor>& factors, int64_t begin, int64_t end, bool backwards, const Work& work) {
  std::array<T, kBlock> p_scratch, g_scratch;
  const auto block = [&](const Factor& factor, int64_t first, int64_t last) {
    const T* const p = factor.parameter.read(first, last - first, p_scratch.data());
    const T* const g = factor.gradient.read(first, last - first, g_scratch.data());
    return work(p, g, last - first, factor.offset + first);
  };
  const auto before = [](int64_t position, const Factor& factor) { return position < factor.offset; };
  auto factor = std::upper_bound(factors.begin(), factors.end(), backwards ? end - 1 : begin, before) - 1;
  const auto step = backwards ? -1 : 1;
  for (;; factor += step) {
    const int64_t first = std::max<int64_t>(0, begin - factor->offset), last = std::min(factor->numel, end - factor->offset);
    if (!backwards) {
      for (int64_t at = first; at < last; at += kBlock) {
        if (!block(*factor, at, std::min(last, at + kBlock))) {
          return;
        }
      }
    } else {
      for (int64_t at = last; at > first; at -= kBlock) {
        block(*factor, std::max(first, at - kBlock), at);
      }
    }
    const bool is_last = backwards ? factor->offset <= begin || factor == factors.begin()
                                   : factor + 1 == factors.end() || (factor + 1)->offset >= end;
    if (is_last) {
      return;
    }
  }
}

template <typename T>
bool update(
    const std::vector<Factor>& factors, int64_t numel, double beta1, double beta2, bool skip, T* sensitivity,
    T* uncertainty) {
  std::atomic<bool> all_finite{true};
  at::parallel_for(0, numel, kThreadShare, [&](int64_t begin, int64_t end) {
    for_blocks<T>(factors, begin, end, false, [&](const T* p, const T* g, int64_t count, int64_t) {
      if (!finite(largest_magnitude(p, g, count))) {
        all_finite.store(false, std::memory_order_relaxed);
      }
      return all_finite.load(std::memory_order_relaxed);
    });
  });
  if (!all_finite || skip) {
    return all_finite;
  }
  const Smoothing<T> first(beta1), second(beta2);
  at::parallel_for(0, numel, kThreadShare, [&](int64_t begin, int64_t end) {
    for_blocks<T>(factors, begin, end, true, [&](const T* p, const T* g, int64_t count, int64_t at) {
      smooth(p, g, count, first, second, sensitivity + at, uncertainty + at);
      return true;
    });
  });
  return true;
}

template <typename Call>
void with_average_type(const at::Tensor& sensitivity, const at::Tensor& uncertainty, const Call& call) {
  TORCH_CHECK_TYPE(
      sensitivity.scalar_type() == uncertainty.scalar_type() && uncertainty.is_contiguous() &&
          sensitivity.sizes() == uncertainty.sizes(),
      "uncertainty: expected a tensor like sensitivity");
  if (sensitivity.scalar_type() == at::kDouble) {
    return call(double{});
  }
  TORCH_CHECK_TYPE(
      sensitivity.scalar_type() == at::kFloat, "sensitivity: found dtype ", sensitivity.scalar_type(),
      ", expected float32 or float64");
  call(float{});
}

// torch.mean of Ī·Ū over everything but the rank: ATen sums in an order of its own.
template <typename T>
void add_means(const Place& place, bool is_A, const T* sensitivity, const T* uncertainty, T* scores) {
  T* const products = thread_scratch<T, Scratch::Scores>(place.numel());
  multiply_elements(sensitivity + place.offset, uncertainty + place.offset, place.numel(), products);
  const auto factor =
      at::from_blob(products, {place.rows, place.columns}, at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value));
  const auto means = at::mean(factor, is_A ? 1 : 0);
  const T* const mean = means.template const_data_ptr<T>();
  for (int64_t i = 0; i < means.numel(); ++i) {
    scores[i] += mean[i];
  }
}

// Σ over the three factors of a layer, in the order s_E + (s_A + s_B).
template <typename T>
void layer_scores(const Place* factors, const T* sensitivity, const T* uncertainty, T* scores) {
  const Place &lora_A = factors[0], &lora_B = factors[1], &lora_E = factors[2];
  std::fill(scores, scores + lora_A.rows, T(0));
  add_means(lora_A, true, sensitivity, uncertainty, scores);
  add_means(lora_B, false, sensitivity, uncertainty, scores);
  for (int64_t i = 0; i < lora_E.rows; ++i) {
    scores[i] = sensitivity[lora_E.offset + i] * uncertainty[lora_E.offset + i] + scores[i];
  }
}

} // namespace

at::Tensor update_averages(
    at::TensorList parameters, const OptionalTensors& gradients, const at::Tensor& table,
    const at::Tensor& sensitivity, const at::Tensor& uncertainty, double beta1, double beta2,
    const std::optional<at::Tensor>& skip) {
  const auto factors = collect(parameters, gradients, table, places(table, sensitivity));
  const bool skipped = skip && *skip->const_data_ptr<bool>();
  bool all_finite = true;
  with_average_type(sensitivity, uncertainty, [&](auto type) {
    using T = decltype(type);
    if (!factors.all.empty()) {
      all_finite = update(
          factors.all, sensitivity.numel(), beta1, beta2, skipped, sensitivity.mutable_data_ptr<T>(),
          uncertainty.mutable_data_ptr<T>());
    }
  });
  if (all_finite && !skipped) {
    sensitivity.unsafeGetTensorImpl()->bump_version();
    uncertainty.unsafeGetTensorImpl()->bump_version();
  }
  return at::scalar_tensor(all_finite, at::kBool);
}

at::Tensor rank_scores(const at::Tensor& table, const at::Tensor& sensitivity, const at::Tensor& uncertainty) {
  const Place* const factors = places(table, sensitivity);
  const int64_t layers = table.size(0) / 3;
  std::vector<int64_t> first_rank(layers + 1);
  for (int64_t layer = 0; layer < layers; ++layer) {
    first_rank[layer + 1] = first_rank[layer] + factors[3 * layer].rows;
  }
  auto scores = at::empty({first_rank[layers]}, sensitivity.options());
  with_average_type(sensitivity, uncertainty, [&](auto type) {
    using T = decltype(type);
    const T* const average = sensitivity.const_data_ptr<T>();
    const T* const deviation = uncertainty.const_data_ptr<T>();
    T* const to = scores.mutable_data_ptr<T>();
    // ATen splits the sum over a single large row among the threads it has, which changes its rounding.
    const auto wants_all_threads = [&](int64_t layer) {
      const auto& lora_A = factors[3 * layer];
      return lora_A.rows == 1 && std::max(lora_A.columns, factors[3 * layer + 1].rows) >= at::internal::GRAIN_SIZE;
    };
    const auto one_layer = [&](int64_t layer) {
      if (!wants_all_threads(layer)) {
        const at::AutoDispatchBelowADInplaceOrView below_autograd;
        layer_scores(factors + 3 * layer, average, deviation, to + first_rank[layer]);
      }
    };
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), divide_up(sensitivity.numel(), kThreadShare));
    run_tasks(layers, threads, one_layer, [] {});
    for (int64_t layer = 0; layer < layers; ++layer) {
      if (wants_all_threads(layer)) {
        layer_scores(factors + 3 * layer, average, deviation, to + first_rank[layer]);
      }
    }
  });
  return scores;
}

} // namespace peftkernels::cpu
