// Loops over rows of elements, vectorised for the processor that runs them.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace peftkernels::cpu {

// to[i] = from[i], rounded once to nearest even where `to` is narrower
void convert_row(const float* from, int64_t count, float* to);
void convert_row(const float* from, int64_t count, c10::BFloat16* to);
void convert_row(const float* from, int64_t count, c10::Half* to);
void convert_row(const c10::BFloat16* from, int64_t count, float* to);
void convert_row(const c10::Half* from, int64_t count, float* to);

// Σ a[i]·b[i] in fp32
float dot(const float* a, const float* b, int64_t count);
float dot(const c10::BFloat16* a, const c10::BFloat16* b, int64_t count);

// to[row · columns + i] = from[row · from_stride + i] · factor[i], rounded once
void scale_columns(
    const float* from, int64_t from_stride, int64_t rows, int64_t columns, const float* factor, float* to);
void scale_columns(
    const float* from, int64_t from_stride, int64_t rows, int64_t columns, const float* factor, c10::BFloat16* to);

// to[row · columns + i] = from[row · from_stride + index[i]] · factor[i]
void gather_columns(
    const float* from, int64_t from_stride, int64_t rows, const int32_t* index, int64_t columns, const float* factor,
    float* to);

// sums[i] += a[i]·b[i]
void add_products(const float* a, const float* b, int64_t count, float* sums);

// sums[i] += from[i]
void add_row(const float* from, int64_t count, float* sums);
void add_row(const c10::BFloat16* from, int64_t count, float* sums);

// to[2·i] = first[i], to[2·i + 1] = second[i], or 0 where `second` is null
void pair_rows(const uint16_t* first, const uint16_t* second, int64_t count, uint16_t* to);

} // namespace peftkernels::cpu
