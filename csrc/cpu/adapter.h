// What forward and backward share: the operands of a call, and how its work is shared out among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "dropout.h"

namespace peftkernels::cpu {

inline int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return divide_up(value, multiple) * multiple;
}

// Rows of x or G that are worked on at a time.
constexpr int64_t kRowBlock = 128;
// Rows that stay together however a call is shared out: blocks are whole numbers of them, a single block's first pass
// is done in them, and what is summed over rows is summed over each of them first, in any number of threads.
constexpr int64_t kRowShare = 16;

// The ranks of a call in the order kernels walk them: `index` holds the ACTIVE ranks and, when asked for, the PROBE
// ranks behind them; `factor` is scaling · gate of each ACTIVE rank.
struct LiveRanks {
  std::vector<int64_t> index;
  int64_t active = 0;
  std::vector<float> factor;
  float scaling = 1.0f;
  bool in_place = true; // index[i] == i
  bool plain = true; // every factor is 1

  int64_t live() const {
    return static_cast<int64_t>(index.size());
  }
};

// Of a call that was checked: order and counts hold ranks.
LiveRanks live_ranks(
    int64_t r, const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& order,
    const std::optional<at::Tensor>& counts, double scaling, const std::optional<at::Tensor>& scaling_tensor,
    bool with_probe);

Dropout dropout_of(double p, const std::optional<at::Tensor>& seed);

// x viewed as (rows, columns) with unit column stride; copied only when its strides allow no such view.
at::Tensor as_rows(const at::Tensor& x, int64_t columns);

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

// Fewer multiply-adds than this take less time than waking a second thread and waiting for it.
constexpr int64_t kSerialWork = int64_t{1} << 17;

inline int64_t threads_for(int64_t multiply_adds) {
  return multiply_adds < kSerialWork ? 1 : at::get_num_threads();
}

// Runs task(0) … task(tasks - 1) on up to `threads` intra-op threads, each taking the next when free. Every task writes
// results of its own, so who runs which does not change them. `done` is called once by each thread.
template <typename Task, typename Done>
void run_tasks(int64_t tasks, int64_t threads, const Task& task, const Done& done) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min(tasks, threads);
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1)) {
      task(i);
    }
    done();
  });
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
