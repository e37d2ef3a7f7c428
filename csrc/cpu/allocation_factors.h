// What the operators of rank allocation share: factors of any float dtype, read and written in the dtype of arithmetic.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "rows.h"

namespace peftkernels::cpu {

// Where a factor lies in the flat buffers, and its shape: a row of the table of `FactorLayout`.
struct Place {
  int64_t offset, rows, columns;

  int64_t numel() const {
    return rows * columns;
  }
};

// The rows of `table`, int64 (factors, 3), checked against a flat buffer.
inline const Place* places(const at::Tensor& table, const at::Tensor& flat) {
  TORCH_CHECK_VALUE(
      table.scalar_type() == at::kLong && table.dim() == 2 && table.size(1) == 3 && table.is_contiguous(),
      "table: expected a contiguous int64 tensor (factors, 3)");
  TORCH_CHECK_VALUE(flat.dim() == 1 && flat.is_contiguous(), "averages: expected a contiguous tensor of one dimension");
  static_assert(sizeof(Place) == 3 * sizeof(int64_t));
  const auto* const all = reinterpret_cast<const Place*>(table.const_data_ptr<int64_t>());
  if (const int64_t factors = table.size(0)) {
    const auto& last = all[factors - 1];
    TORCH_CHECK_VALUE(
        last.offset + last.numel() <= flat.numel(), "averages: found ", flat.numel(), " elements, expected at least ",
        last.offset + last.numel());
  }
  return all;
}

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
