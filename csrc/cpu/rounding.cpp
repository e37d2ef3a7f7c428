#include "rounding.h"

#include <cstring>

#include "multiversion.h"

namespace peftkernels::cpu {
namespace {

PEFTKERNELS_MULTIVERSION
void round_to_bf16(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof(bits));
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    // Rounding could carry a NaN's payload into the exponent; NaN is written as the quiet NaN that c10 uses.
    to[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
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
    const uint32_t left = uint32_t{a[i]} << 16, right = uint32_t{b[i]} << 16;
    float left_value, right_value;
    std::memcpy(&left_value, &left, sizeof(left));
    std::memcpy(&right_value, &right, sizeof(right));
    sum += left_value * right_value;
  }
  return sum;
}

} // namespace

void round_row(const float* from, int64_t count, float* to) {
  std::copy(from, from + count, to);
}

void round_row(const float* from, int64_t count, c10::BFloat16* to) {
  round_to_bf16(from, count, reinterpret_cast<uint16_t*>(to));
}

void round_row(const float* from, int64_t count, c10::Half* to) {
  std::transform(from, from + count, to, [](float value) { return static_cast<c10::Half>(value); });
}

float dot(const float* a, const float* b, int64_t count) {
  return dot_fp32(a, b, count);
}

float dot(const c10::BFloat16* a, const c10::BFloat16* b, int64_t count) {
  return dot_bf16(reinterpret_cast<const uint16_t*>(a), reinterpret_cast<const uint16_t*>(b), count);
}

float dot(const c10::Half* a, const c10::Half* b, int64_t count) {
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    sum += static_cast<float>(a[i]) * static_cast<float>(b[i]);
  }
  return sum;
}

} // namespace peftkernels::cpu
