// lora_linear_fwd.cpu: one pass over the packed frozen weight; the low-rank product and the bias are added to each
// output tile while it is in cache, as a last, short step through the depth.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "adapter.h"
#include "lora_linear.h"
#include "matmul.h"
#include "multiversion.h"
#include "pack_cache.h"
#include "rounding.h"

namespace peftkernels::cpu {
namespace {

// Below this many rows, S is computed by dot products with A as it lies: packing Aᵀ would cost as much as using it.
constexpr int64_t kDotRows = 4;

template <typename scalar_t>
class Forward {
 public:
  Forward(
      const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
      const at::Tensor& bias, const LiveRanks& ranks, const Dropout& dropout, at::Tensor& y, at::Tensor& shrink)
      : x_(left_rows<scalar_t>(rows)),
        rows_(rows.size(0)),
        depth_(rows.size(1)),
        columns_(weight.size(0)),
        a_(lora_A.const_data_ptr<scalar_t>()),
        b_(lora_B.const_data_ptr<scalar_t>()),
        bias_(bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr),
        r_(lora_A.size(0)),
        ranks_(ranks),
        dropout_(dropout),
        y_(y.data_ptr<scalar_t>()),
        shrink_(shrink.size(0) > 0 ? shrink.data_ptr<scalar_t>() : nullptr),
        group_(depth_group<scalar_t>()),
        padded_depth_(round_up(depth_, group_)),
        tail_depth_(round_up(ranks.active + (bias_ != nullptr ? 1 : 0), group_)),
        pack_(packed_weight(weight, rows.scalar_type(), Direction::Forward)),
        packed_(pack_.const_data_ptr<scalar_t>()) {}

  void run() {
    const int64_t panels = divide_up(columns_, kPanelColumns);
    tail_ = thread_scratch<scalar_t, Scratch::TailRows>(rows_ * tail_depth_);
    pack_adapter(panels);
    run_row_blocks(
        rows_, panels, threads_for(rows_ * columns_ * depth_), [this](int64_t block) { shrink_rows(block); },
        [this](int64_t block, int64_t begin, int64_t end) { output_tiles(block, begin, end); },
        [this] { release_matmul<scalar_t>(group_); });
  }

 private:
  // Aᵀ of the live ranks as right operand of the shrink, and Bᵀ with the bias as its last row as that of the tail.
  void pack_adapter(int64_t panels) {
    const auto& index = ranks_.index;
    const int64_t live = ranks_.live();
    if (rows_ > kDotRows) {
      shrink_operand_ = thread_scratch<scalar_t, Scratch::ShrinkOperand>(padded_depth_ * live);
      pack_operand<true>(
          a_, depth_, live, live, group_, [](int64_t d) { return d; },
          [&](int64_t w) { return index[w] * depth_; }, shrink_operand_);
    }
    tail_operand_ = thread_scratch<scalar_t, Scratch::TailOperand>(panels * tail_depth_ * kPanelColumns);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = panel * kPanelColumns;
      const int64_t width = std::min(kPanelColumns, columns_ - first);
      auto* const to = tail_operand_ + panel * tail_depth_ * kPanelColumns;
      pack_operand<false>(
          b_, ranks_.active, width, kPanelColumns, group_, [&](int64_t d) { return index[d]; },
          [&](int64_t w) { return (first + w) * r_; }, to);
      if (bias_ != nullptr) {
        const int64_t d = ranks_.active;
        for (int64_t w = 0; w < kPanelColumns; ++w) {
          for (int64_t odd = d; odd < tail_depth_; ++odd) {
            const auto value = odd == d && w < width ? bias_[first + w] : scalar_t(0.0f);
            to[(odd / group_) * kPanelColumns * group_ + w * group_ + odd % group_] = value;
          }
        }
      }
    }
  }

  int64_t block_rows(int64_t block) const {
    return std::min(kRowBlock, rows_ - block * kRowBlock);
  }

  void shrink_rows(int64_t block) {
    const int64_t first = block * kRowBlock, count = block_rows(block), live = ranks_.live();
    if (live == 0) {
      fill_tail(first, count, nullptr);
      return;
    }
    const auto rows = dropout_ ? dropped_rows(first, count) : padded_rows<scalar_t, Scratch::Rows>(x_, first, count, depth_, padded_depth_);
    auto* const products = thread_scratch<float, Scratch::Products>(count * live);
    if (rows_ <= kDotRows) {
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t i = 0; i < live; ++i) {
          products[row * live + i] = dot(rows.data + row * rows.stride, a_ + ranks_.index[i] * depth_, depth_);
        }
      }
    } else if (!matmul_steps(
                   count, live, padded_depth_, rows.data, rows.stride, shrink_operand_, live, products, live, false,
                   group_)) {
      std::fill(products, products + count * live, 0.0f);
    }
    if (shrink_ != nullptr) {
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t i = 0; i < live; ++i) {
          shrink_[(first + row) * r_ + ranks_.index[i]] = static_cast<scalar_t>(products[row * live + i]);
        }
      }
    }
    fill_tail(first, count, products);
  }

  // The left operand of the tail: S ⊙ ĝ · scaling, then a column of ones that picks up the bias, then padding.
  void fill_tail(int64_t first, int64_t count, const float* products) {
    for (int64_t row = 0; row < count; ++row) {
      scalar_t* const to = tail_ + (first + row) * tail_depth_;
      for (int64_t i = 0; i < ranks_.active; ++i) {
        to[i] = static_cast<scalar_t>(products[row * ranks_.live() + i] * ranks_.factor[i]);
      }
      for (int64_t i = ranks_.active; i < tail_depth_; ++i) {
        to[i] = static_cast<scalar_t>(i == ranks_.active && bias_ != nullptr ? 1.0f : 0.0f);
      }
    }
  }

  LeftRows<scalar_t> dropped_rows(int64_t first, int64_t count) const {
    auto* const to = thread_scratch<scalar_t, Scratch::Rows>(count * padded_depth_);
    for (int64_t row = 0; row < count; ++row) {
      dropout_.apply((first + row) * depth_, depth_, x_.data + (first + row) * x_.stride, to + row * padded_depth_);
      std::fill(to + row * padded_depth_ + depth_, to + (row + 1) * padded_depth_, scalar_t(0.0f));
    }
    return {to, padded_depth_};
  }

  void output_tiles(int64_t block, int64_t first_panel, int64_t end_panel) {
    const int64_t first = block * kRowBlock, count = block_rows(block);
    const auto rows = padded_rows<scalar_t, Scratch::PaddedRows>(x_, first, count, depth_, padded_depth_);
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      const int64_t column = panel * kPanelColumns;
      const int64_t width = std::min(kPanelColumns, columns_ - column);
      const OutputTile<scalar_t> tile(y_ + first * columns_ + column, columns_, count, width);
      bool accumulate = matmul_steps(
          count, width, padded_depth_, rows.data, rows.stride, packed_ + panel * padded_depth_ * kPanelColumns,
          kPanelColumns, tile.sums(), tile.stride(), false, group_);
      if (tail_depth_ > 0) {
        const scalar_t* const right = tail_operand_ + panel * tail_depth_ * kPanelColumns;
        matmul(
            count, width, tail_depth_, tail_ + first * tail_depth_, tail_depth_, right, kPanelColumns, tile.sums(),
            tile.stride(), accumulate, group_);
        accumulate = true;
      }
      if (!accumulate) {
        tile.clear();
      }
      tile.store();
    }
  }

  LeftRows<scalar_t> x_;
  int64_t rows_, depth_, columns_;
  const scalar_t *a_, *b_, *bias_;
  int64_t r_;
  const LiveRanks& ranks_;
  const Dropout& dropout_;
  scalar_t *y_, *shrink_;
  int64_t group_, padded_depth_, tail_depth_;
  at::Tensor pack_;
  const scalar_t* packed_;
  // The calling thread's scratch, read by all: the adapter's right operands, and S ⊙ ĝ · scaling of every row.
  scalar_t *shrink_operand_ = nullptr, *tail_operand_ = nullptr, *tail_ = nullptr;
};

} // namespace

std::tuple<at::Tensor, at::Tensor> lora_linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& gate,
    const std::optional<at::Tensor>& rank_state, const std::optional<at::Tensor>& rank_order,
    const std::optional<at::Tensor>& rank_counts, double scaling, const std::optional<at::Tensor>& scaling_tensor,
    double dropout_p, const std::optional<at::Tensor>& dropout_seed, bool save_shrink) {
  const auto dtype = x.scalar_type();
  const int64_t r = lora_A.size(0);
  const auto rows = as_rows(x, weight.size(1));
  const auto ranks = live_ranks(r, gate, rank_order, rank_counts, scaling, scaling_tensor, save_shrink);
  const auto dropout = dropout_of(dropout_p, dropout_seed);

  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  auto y = at::empty(shape, x.options());
  // Every live column of S is written; a DEAD rank's column must read as zero.
  const bool every_rank = ranks.live() == r;
  const int64_t shrink_rows = save_shrink ? rows.size(0) : 0;
  auto shrink = every_rank ? at::empty({shrink_rows, r}, x.options()) : at::zeros({shrink_rows, r}, x.options());
  const auto factor_A = lora_A.to(dtype).contiguous();
  const auto factor_B = lora_B.to(dtype).contiguous();
  const auto bias_row = bias ? bias->to(dtype).contiguous() : at::Tensor();
  AT_DISPATCH_SWITCH(
      dtype, "lora_linear_fwd.cpu",
      AT_DISPATCH_CASE(at::kFloat, [&] { Forward<float>(rows, weight, factor_A, factor_B, bias_row, ranks, dropout, y, shrink).run(); })
      AT_DISPATCH_CASE(at::kBFloat16, [&] { Forward<at::BFloat16>(rows, weight, factor_A, factor_B, bias_row, ranks, dropout, y, shrink).run(); })
      AT_DISPATCH_CASE(at::kHalf, [&] { Forward<at::Half>(rows, weight, factor_A, factor_B, bias_row, ranks, dropout, y, shrink).run(); }));
  return {y, shrink};
}

} // namespace peftkernels::cpu
