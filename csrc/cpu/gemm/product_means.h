// Means of an elementwise product, with the rounding of at::mean and without what calling it costs.
#pragma once

#include <cstdint>

namespace peftkernels::cpu {

// The means of a⊙b, both (rows, columns), equal to the bit to at::mean of the rounded products: of each column, means
// (columns), or of each row, means (rows). False, and nothing is written, where this machine's ATen sums such a matrix
// in an order that is not known here; whether it does is found out by comparing once for each shape.
bool column_means(const float* a, const float* b, int64_t rows, int64_t columns, float* means);
bool column_means(const double* a, const double* b, int64_t rows, int64_t columns, double* means);
bool row_means(const float* a, const float* b, int64_t rows, int64_t columns, float* means);
bool row_means(const double* a, const double* b, int64_t rows, int64_t columns, double* means);

} // namespace peftkernels::cpu
