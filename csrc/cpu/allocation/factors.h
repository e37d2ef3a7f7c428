// What the operators of rank allocation share: factors of any float dtype, read and written in the dtype of arithmetic.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "cpu/gemm/rows.h"

namespace peftkernels::cpu {

// Calls `call` with a value of the C++ type of a float dtype.
template <typename Call>
void with_float_type(at::ScalarType dtype, const char* name, const Call& call) {
  switch (dtype) {
    case at::kFloat:
      return call(float{});
    case at::kDouble:
      return call(double{});
    case at::kBFloat16:
      return call(c10::BFloat16{});
    case at::kHalf:
      return call(c10::Half{});
    default:
      TORCH_CHECK_TYPE(false, name, ": found dtype ", dtype, ", expected float32, float64, bfloat16 or float16");
  }
}

template <typename From, typename To>
void convert_elements(const From* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<To, float> && !std::is_same_v<From, double>) {
    convert_row(from, count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = static_cast<To>(from[i]);
    }
  }
}

// Elements that lie one after the other in memory, null where all are zero.
struct Elements {
  const void* data = nullptr;
  at::ScalarType dtype = at::kFloat;

  // Elements [first, first + count) as T: where they lie, or converted into `scratch`.
  template <typename T>
  const T* read(int64_t first, int64_t count, T* scratch) const {
    if (data == nullptr) {
      std::fill(scratch, scratch + count, T(0));
      return scratch;
    }
    if (dtype == c10::CppTypeToScalarType<T>::value) {
      return static_cast<const T*>(data) + first;
    }
    with_float_type(dtype, "factors", [&](auto type) {
      convert_elements(static_cast<const decltype(type)*>(data) + first, count, scratch);
    });
    return scratch;
  }
};

} // namespace peftkernels::cpu
