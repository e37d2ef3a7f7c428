// The products of product.h through ATen's brgemm, which picks its instructions at run time; for processors and dtypes
// without kernels of our own. Called by product.cpp only.
#pragma once

#include "product.h"

namespace peftkernels::cpu::brgemm {

// 2 where brgemm multiplies 16-bit operands in pairs, else 1. ATen does not tell, so a small product is tried once.
template <typename T>
int64_t depth_group();

template <typename T>
void multiply(const Product<T>& product, float* to, int64_t to_stride);
template <typename T>
void multiply_rounded(const Product<T>& product, T* to, int64_t to_stride);
template <typename T>
void sum_over_rows(const RowSums<T>& sums, float* to, int64_t to_stride, bool accumulate);

// Releases the tile configuration that some processors hold.
template <typename T>
void release();

} // namespace peftkernels::cpu::brgemm
