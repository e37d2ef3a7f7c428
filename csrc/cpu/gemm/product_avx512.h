// The products of product.h for processors with AVX-512. Called by product.cpp only.
#pragma once

#include "product.h"

namespace peftkernels::cpu::avx512 {

// Returns true if this build holds the kernels and this processor runs them.
bool supports_fp32();
bool supports_bf16();
// Returns true if the processor has matrix tiles for bf16, which these kernels do not use.
bool supports_amx_bf16();

void multiply(const Product<float>& product, float* to, int64_t to_stride);
void multiply(const Product<c10::BFloat16>& product, float* to, int64_t to_stride);
void multiply_rounded(const Product<c10::BFloat16>& product, c10::BFloat16* to, int64_t to_stride);
void sum_over_rows(const RowSums<float>& sums, float* to, int64_t to_stride, bool accumulate);
void sum_over_rows(const RowSums<c10::BFloat16>& sums, float* to, int64_t to_stride, bool accumulate);

} // namespace peftkernels::cpu::avx512
