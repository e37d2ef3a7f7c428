#include "rows.h"

#include <algorithm>
#include <cstring>

#include "multiversion.h"

namespace peftkernels::cpu {
namespace {

inline float widened(uint16_t bf16) {
  const uint32_t bits = uint32_t{bf16} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  // Rounding could carry a NaN's payload into the exponent; NaN is written as the quiet NaN that c10 uses.
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : nearest);
}

PEFTKERNELS_MULTIVERSION
void round_to_bf16(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = rounded(from[i]);
  }
}

PEFTKERNELS_MULTIVERSION
void widen_bf16(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = widened(from[i]);
  }
}

PEFTKERNELS_MULTIVERSION
float dot_fp32(const float* a, const float* b, int64_t count) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

PEFTKERNELS_MULTIVERSION
float dot_bf16(const uint16_t* a, const uint16_t* b, int64_t count) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    sum += widened(a[i]) * widened(b[i]);
  }
  return sum;
}

PEFTKERNELS_MULTIVERSION
void scale_columns_fp32(
    const float* from, int64_t from_stride, int64_t rows, int64_t columns, const float* factor, float* to) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      to[row * columns + i] = from[row * from_stride + i] * factor[i];
    }
  }
}

PEFTKERNELS_MULTIVERSION
void scale_columns_bf16(
    const float* from, int64_t from_stride, int64_t rows, int64_t columns, const float* factor, uint16_t* to) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      to[row * columns + i] = rounded(from[row * from_stride + i] * factor[i]);
    }
  }
}

PEFTKERNELS_MULTIVERSION
void gather_columns_fp32(
    const float* from, int64_t from_stride, int64_t rows, const int32_t* index, int64_t columns, const float* factor,
    float* to) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* const from_row = from + row * from_stride;
    float* const to_row = to + row * columns;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      to_row[i] = from_row[index[i]] * factor[i];
    }
  }
}

PEFTKERNELS_MULTIVERSION
void add_products_fp32(const float* a, const float* b, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; ++i) {
    sums[i] += a[i] * b[i];
  }
}

PEFTKERNELS_MULTIVERSION
void add_row_fp32(const float* from, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; ++i) {
    sums[i] += from[i];
  }
}

PEFTKERNELS_MULTIVERSION
void add_row_bf16(const uint16_t* from, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; ++i) {
    sums[i] += widened(from[i]);
  }
}

PEFTKERNELS_MULTIVERSION
void interleave(const uint16_t* first, const uint16_t* second, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t pair = uint32_t{first[i]} | (uint32_t{second[i]} << 16);
    std::memcpy(to + 2 * i, &pair, sizeof(pair));
  }
}

const uint16_t* bits_of(const c10::BFloat16* values) {
  return reinterpret_cast<const uint16_t*>(values);
}

uint16_t* bits_of(c10::BFloat16* values) {
  return reinterpret_cast<uint16_t*>(values);
}

} // namespace

void convert_row(const float* from, int64_t count, float* to) {
  std::copy(from, from + count, to);
}

void convert_row(const float* from, int64_t count, c10::BFloat16* to) {
  round_to_bf16(from, count, bits_of(to));
}

void convert_row(const float* from, int64_t count, c10::Half* to) {
  std::transform(from, from + count, to, [](float value) { return static_cast<c10::Half>(value); });
}

void convert_row(const c10::BFloat16* from, int64_t count, float* to) {
  widen_bf16(bits_of(from), count, to);
}

void convert_row(const c10::Half* from, int64_t count, float* to) {
  std::transform(from, from + count, to, [](c10::Half value) { return static_cast<float>(value); });
}

float dot(const float* a, const float* b, int64_t count) {
  return dot_fp32(a, b, count);
}

float dot(const c10::BFloat16* a, const c10::BFloat16* b, int64_t count) {
  return dot_bf16(bits_of(a), bits_of(b), count);
}

void scale_columns(
    const float* from, int64_t from_stride, int64_t rows, int64_t columns, const float* factor, float* to) {
  scale_columns_fp32(from, from_stride, rows, columns, factor, to);
}

void scale_columns(
    const float* from, int64_t from_stride, int64_t rows, int64_t columns, const float* factor, c10::BFloat16* to) {
  scale_columns_bf16(from, from_stride, rows, columns, factor, bits_of(to));
}

void gather_columns(
    const float* from, int64_t from_stride, int64_t rows, const int32_t* index, int64_t columns, const float* factor,
    float* to) {
  gather_columns_fp32(from, from_stride, rows, index, columns, factor, to);
}

void add_products(const float* a, const float* b, int64_t count, float* sums) {
  add_products_fp32(a, b, count, sums);
}

void add_row(const float* from, int64_t count, float* sums) {
  add_row_fp32(from, count, sums);
}

void add_row(const c10::BFloat16* from, int64_t count, float* sums) {
  add_row_bf16(bits_of(from), count, sums);
}

void pair_rows(const uint16_t* first, const uint16_t* second, int64_t count, uint16_t* to) {
  if (second != nullptr) {
    interleave(first, second, count, to);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    to[2 * i] = first[i];
    to[2 * i + 1] = 0;
  }
}

} // namespace peftkernels::cpu
