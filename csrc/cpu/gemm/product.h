// The products every operator is built from. Two implementations: our own AVX-512 kernels where the processor has
// those instructions, and ATen's brgemm everywhere else (product_avx512.cpp, product_brgemm.cpp).
//
// 16-bit right operands lie in pairs along the depth, [depth/2][columns][2], where `depth_group` says 2.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace peftkernels::cpu {

// Columns of a right operand that lie side by side in a packed weight: four 512-bit vectors of fp32 sums.
constexpr int64_t kPanelColumns = 64;

// A product's own sizes, whatever it is of: the depth of x·Wᵀ is K, that of G·W is N.
//
// left (rows x depth) · right (depth x width) + tail_left (rows x tail_depth) · tail_right (tail_depth x width) + start
template <typename T>
struct Product {
  int64_t rows, width, depth;
  const T* left;
  int64_t left_stride;
  const T* right;
  int64_t right_stride; // columns that each step of the depth holds, used or not
  int64_t tail_depth = 0;
  const T* tail_left = nullptr;
  int64_t tail_left_stride = 0;
  const T* tail_right = nullptr;
  int64_t tail_right_stride = 0;
  const float* start = nullptr; // (rows x width), or one row for all when its stride is 0
  int64_t start_stride = 0;
  const T* ahead = nullptr; // operand that the next product reads, to be brought near meanwhile
};

// Sums in fp32. The second form rounds each result once.
template <typename T>
void multiply(const Product<T>& product, float* to, int64_t to_stride);
template <typename T>
void multiply_rounded(const Product<T>& product, T* to, int64_t to_stride);

// to (ranks x width, fp32) = or += Σ over rows of left(row, rank) · right(row, column)
template <typename T>
struct RowSums {
  int64_t rows, ranks, width;
  const T* left; // [rows][ranks], or for 16-bit types pairs of rows [rows/2][ranks][2], an odd last row beside zeros
  const T* right;
  int64_t right_stride;
};

template <typename T>
void sum_over_rows(const RowSums<T>& sums, float* to, int64_t to_stride, bool accumulate);

// How many consecutive depth elements of one column lie side by side in a right operand: 2 where the kernels that
// serve T want pairs, else 1.
template <typename T>
int64_t depth_group();

// Returns true if T is served by our own AVX-512 kernels. PEFTKERNELS_CPU_ISA=portable says no for all types.
template <typename T>
bool has_avx512_kernels();

// Releases what some of brgemm's kernels hold; called once when a thread has done its share.
template <typename T>
void release_kernels();

} // namespace peftkernels::cpu
