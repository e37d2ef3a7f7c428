#include "product_brgemm.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <type_traits>

#include "rows.h"
#include "scratch.h"

namespace peftkernels::cpu::brgemm {
namespace {

// Depth of one call. Each is summed by itself before it is added to the others, so shorter steps round less: at
// K = 4096 the root mean square error in fp32 is 4.4 times the library's in one step, 1.35 times in these.
constexpr int64_t kDepthStep = 384;
constexpr int64_t kSumRows = 256;

// Returns true if the product of two rows with operands in pairs comes out right; ATen raises where it has no such
// kernel.
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

// sums += left · right, with rows of `left` copied beside zeros where the depth is not a whole number of groups.
template <typename T>
void add(
    int64_t rows, int64_t width, int64_t depth, const T* left, int64_t left_stride, const T* right,
    int64_t right_stride, float* sums, int64_t sums_stride) {
  const int64_t group = depth_group<T>();
  const int64_t padded = (depth + group - 1) / group * group;
  if (padded != depth) {
    T* const copy = thread_scratch<T, Scratch::Pairs>(rows * padded);
    for (int64_t row = 0; row < rows; ++row) {
      std::copy(left + row * left_stride, left + row * left_stride + depth, copy + row * padded);
      copy[row * padded + depth] = T(0.0f);
    }
    left = copy;
    left_stride = padded;
  }
  for (int64_t d = 0; d < padded; d += kDepthStep) {
    at::native::cpublas::brgemm(
        rows, width, std::min(kDepthStep, padded - d), left_stride, right_stride, sums_stride, true, left + d,
        right + d * right_stride, sums, group == 2);
  }
}

} // namespace

template <typename T>
int64_t depth_group() {
  if constexpr (std::is_same_v<T, float>) {
    return 1;
  } else {
    // The library can be switched off while the process runs, and its kernels with it.
    if (!at::globalContext().userEnabledMkldnn()) {
      return 1;
    }
    static const bool pairs = multiplies_pairs<T>();
    return pairs ? 2 : 1;
  }
}

template <typename T>
void multiply(const Product<T>& p, float* to, int64_t to_stride) {
  const int64_t group = depth_group<T>();
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.start == nullptr) {
      std::fill(to + row * to_stride, to + row * to_stride + p.width, 0.0f);
    } else {
      const float* const start = p.start + row * p.start_stride;
      std::copy(start, start + p.width, to + row * to_stride);
    }
  }
  for (int64_t column = 0; column < p.width && p.rows > 0; column += kPanelColumns) {
    const int64_t width = std::min(kPanelColumns, p.width - column);
    add(p.rows, width, p.depth, p.left, p.left_stride, p.right + column * group, p.right_stride, to + column,
        to_stride);
    add(p.rows, width, p.tail_depth, p.tail_left, p.tail_left_stride, p.tail_right + column * group,
        p.tail_right_stride, to + column, to_stride);
  }
}

template <typename T>
void multiply_rounded(const Product<T>& p, T* to, int64_t to_stride) {
  float* const sums = thread_scratch<float, Scratch::Tile>(p.rows * p.width);
  brgemm::multiply(p, sums, p.width);
  for (int64_t row = 0; row < p.rows; ++row) {
    convert_row(sums + row * p.width, p.width, to + row * to_stride);
  }
}

template <typename T>
void sum_over_rows(const RowSums<T>& p, float* to, int64_t to_stride, bool accumulate) {
  const int64_t group = depth_group<T>();
  for (int64_t i = 0; i < p.ranks && !accumulate; ++i) {
    std::fill(to + i * to_stride, to + i * to_stride + p.width, 0.0f);
  }
  for (int64_t first = 0; first < p.rows && p.ranks > 0; first += kSumRows) {
    const int64_t rows = std::min(kSumRows, p.rows - first), padded = (rows + group - 1) / group * group;
    // The left operand on its side, then a panel of the right one, element by element: these processors pay for it.
    T* const left = thread_scratch<T, Scratch::Pairs>(p.ranks * padded + padded * kPanelColumns);
    for (int64_t i = 0; i < p.ranks; ++i) {
      for (int64_t row = 0; row < padded; ++row) {
        const int64_t at = ((first + row) / group) * p.ranks * group + i * group + row % group;
        left[i * padded + row] = row < rows ? p.left[at] : T(0.0f);
      }
    }
    T* const right = left + p.ranks * padded;
    for (int64_t column = 0; column < p.width; column += kPanelColumns) {
      const int64_t width = std::min(kPanelColumns, p.width - column);
      for (int64_t row = 0; row < padded; ++row) {
        for (int64_t w = 0; w < width; ++w) {
          right[(row / group) * width * group + w * group + row % group] =
              row < rows ? p.right[(first + row) * p.right_stride + column + w] : T(0.0f);
        }
      }
      at::native::cpublas::brgemm(
          p.ranks, width, padded, padded, width, to_stride, true, left, right, to + column, group == 2);
    }
  }
}

template <typename T>
void release() {
  at::native::cpublas::brgemm_release(depth_group<T>() == 2);
}

template int64_t depth_group<float>();
template int64_t depth_group<c10::BFloat16>();
template void multiply(const Product<float>&, float*, int64_t);
template void multiply(const Product<c10::BFloat16>&, float*, int64_t);
template void multiply_rounded(const Product<c10::BFloat16>&, c10::BFloat16*, int64_t);
template void sum_over_rows(const RowSums<float>&, float*, int64_t, bool);
template void sum_over_rows(const RowSums<c10::BFloat16>&, float*, int64_t, bool);
template void release<float>();
template void release<c10::BFloat16>();

} // namespace peftkernels::cpu::brgemm
