// Which kernels serve a product: our own where they exist and are faster, else ATen's.
#include "product.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>
#include <type_traits>

#include "product_avx512.h"
#include "product_brgemm.h"

namespace peftkernels::cpu {
namespace {

bool wants_portable_kernels() {
  static const bool portable = [] {
    const char* const value = std::getenv("PEFTKERNELS_CPU_ISA");
    const std::string isa = value == nullptr ? "native" : value;
    TORCH_CHECK_VALUE(
        isa == "native" || isa == "portable", "PEFTKERNELS_CPU_ISA: found '", isa, "', expected 'native' or 'portable'");
    return isa == "portable";
  }();
  return portable;
}

} // namespace

template <>
bool has_avx512_kernels<float>() {
  static const bool has = !wants_portable_kernels() && avx512::supports_fp32();
  return has;
}

template <>
bool has_avx512_kernels<c10::BFloat16>() {
  // With AMX, brgemm multiplies bf16 several times as fast as any vector unit.
  static const bool has =
      !wants_portable_kernels() && avx512::supports_bf16() && !avx512::supports_amx_bf16();
  return has;
}

template <typename T>
int64_t depth_group() {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return has_avx512_kernels<T>() ? 2 : brgemm::depth_group<T>();
  } else {
    return brgemm::depth_group<T>();
  }
}

template <typename T>
void multiply(const Product<T>& product, float* to, int64_t to_stride) {
  if (has_avx512_kernels<T>()) {
    avx512::multiply(product, to, to_stride);
    return;
  }
  brgemm::multiply(product, to, to_stride);
}

template <typename T>
void multiply_rounded(const Product<T>& product, T* to, int64_t to_stride) {
  if constexpr (std::is_same_v<T, float>) {
    multiply(product, to, to_stride);
  } else {
    if (has_avx512_kernels<T>()) {
      avx512::multiply_rounded(product, to, to_stride);
      return;
    }
    brgemm::multiply_rounded(product, to, to_stride);
  }
}

template <typename T>
void sum_over_rows(const RowSums<T>& sums, float* to, int64_t to_stride, bool accumulate) {
  if (has_avx512_kernels<T>()) {
    avx512::sum_over_rows(sums, to, to_stride, accumulate);
    return;
  }
  brgemm::sum_over_rows(sums, to, to_stride, accumulate);
}

template <typename T>
void release_kernels() {
  if (!has_avx512_kernels<T>()) {
    brgemm::release<T>();
  }
}

template int64_t depth_group<float>();
template int64_t depth_group<c10::BFloat16>();
template void multiply(const Product<float>&, float*, int64_t);
template void multiply(const Product<c10::BFloat16>&, float*, int64_t);
template void multiply_rounded(const Product<float>&, float*, int64_t);
template void multiply_rounded(const Product<c10::BFloat16>&, c10::BFloat16*, int64_t);
template void sum_over_rows(const RowSums<float>&, float*, int64_t, bool);
template void sum_over_rows(const RowSums<c10::BFloat16>&, float*, int64_t, bool);
template void release_kernels<float>();
template void release_kernels<c10::BFloat16>();

} // namespace peftkernels::cpu
