// Rows of x or G: as kernels read them, and in blocks that are worked on at a time.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/MaybeOwned.h>

#include <algorithm>
#include <cstdint>

#include "cpu/gemm/parallel.h"

namespace peftkernels::cpu {

// Rows of x or G that are worked on at a time.
constexpr int64_t kRowBlock = 128;
// Rows that stay together however a call is shared out: blocks are whole numbers of them, a single block's first pass
// is done in them, and what is summed over rows is summed over each of them first, in any number of threads.
constexpr int64_t kRowShare = 16;

// x viewed as (M, columns) with unit column stride; copied only when its strides allow no such view. It may be x, which
// stays where it is meanwhile.
c10::MaybeOwned<at::Tensor> as_rows(const at::Tensor& x, int64_t columns);

// Rows of a left operand as the matrix kernel reads them.
template <typename T>
struct LeftRows {
  const T* data;
  int64_t stride;
};

// The rows of a tensor (rows, columns) made by `as_rows`.
template <typename T>
LeftRows<T> left_rows(const at::Tensor& rows) {
  return {rows.const_data_ptr<T>(), rows.size(0) > 1 ? rows.stride(0) : rows.size(1)};
}

// A call's rows in blocks: as many as there are threads, or a multiple, each worked on whole while its rows are in
// cache; or, where that would make them shorter than kRowBlock, one block of all rows whose panels are shared out.
struct RowBlocks {
  RowBlocks(int64_t rows, int64_t threads) : rows(rows) {
    count = divide_up(rows, kRowBlock);
    if (count > 1 && count >= threads) {
      count = round_up(count, threads);
    }
    size = round_up(divide_up(rows, std::max<int64_t>(1, count)), kRowShare);
    count = rows == 0 ? 0 : divide_up(rows, size);
    whole = threads == 1 || (count > 1 && count >= threads);
  }

  int64_t begin(int64_t block) const {
    return block * size;
  }

  int64_t end(int64_t block) const {
    return std::min(rows, (block + 1) * size);
  }

  int64_t rows, count, size;
  bool whole;
};

// first(begin, end) for all rows, then second(begin, end, first_panel, end_panel) for all panels of all rows.
template <typename First, typename Second, typename Done>
void run_row_blocks(
    const RowBlocks& blocks, int64_t panels, int64_t threads, const First& first, const Second& second,
    const Done& done) {
  if (blocks.whole) {
    const auto both = [&](int64_t block) {
      first(blocks.begin(block), blocks.end(block));
      second(blocks.begin(block), blocks.end(block), 0, panels);
    };
    run_tasks(blocks.count, threads, both, done);
    return;
  }
  const int64_t shares = divide_up(blocks.rows, kRowShare);
  const auto share = [&](int64_t i) { first(i * kRowShare, std::min(blocks.rows, (i + 1) * kRowShare)); };
  // A share of the first pass takes less time than waking a thread for it.
  run_tasks(shares, shares < 3 ? 1 : threads, share, done);
  const auto panel = [&](int64_t task) {
    const int64_t block = task / panels;
    second(blocks.begin(block), blocks.end(block), task % panels, task % panels + 1);
  };
  run_tasks(blocks.count * panels, threads, panel, done);
}

} // namespace peftkernels::cpu
