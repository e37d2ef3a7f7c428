#include "matmul.h"

#include <ATen/Context.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

namespace peftkernels::cpu {
namespace {

// Whether the product of two rows with operands in pairs comes out right; ATen raises where it has no such kernel.
template <typename T>
bool multiplies_pairs() {
  const T a[2][4] = {{T(1.0f), T(2.0f), T(3.0f), T(4.0f)}, {T(5.0f), T(6.0f), T(7.0f), T(8.0f)}};
  // Columns (1, 10, 0, 0) and (0, 0, 1, 10) as pairs along the depth.
  const T b[2][2][2] = {{{T(1.0f), T(10.0f)}, {T(0.0f), T(0.0f)}}, {{T(0.0f), T(0.0f)}, {T(1.0f), T(10.0f)}}};
  float c[2][2] = {};
  try {
    at::native::cpublas::brgemm(2, 2, 4, 4, 2, 2, false, &a[0][0], &b[0][0][0], &c[0][0], true);
    at::native::cpublas::brgemm_release(true);
  } catch (const c10::Error&) {
    return false;
  }
  return c[0][0] == 21.0f && c[0][1] == 43.0f && c[1][0] == 65.0f && c[1][1] == 87.0f;
}

template <typename T>
int64_t tried_group() {
  // The library can be switched off while the process runs, and its kernels with it.
  if (!at::globalContext().userEnabledMkldnn()) {
    return 1;
  }
  static const bool pairs = multiplies_pairs<T>();
  return pairs ? 2 : 1;
}

} // namespace

template <>
int64_t depth_group<float>() {
  return 1;
}

template <>
int64_t depth_group<c10::BFloat16>() {
  return tried_group<c10::BFloat16>();
}

template <>
int64_t depth_group<c10::Half>() {
  return tried_group<c10::Half>();
}

} // namespace peftkernels::cpu
