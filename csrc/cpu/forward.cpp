// lora_linear_fwd.cpu: one pass over the packed frozen weight; bias and low-rank product join each output tile while its
// sums are in registers, the latter as a last, short piece of the depth.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "adapter.h"
#include "check_call.h"
#include "lora_linear.h"
#include "operands.h"
#include "product.h"
#include "rows.h"
#include "scratch.h"
#include "weight_panels.h"

namespace peftkernels::cpu {
namespace {

// Up to this many rows, S is computed by dot products with A as it lies: packing Aᵀ would cost as much as using it.
constexpr int64_t kDotRows = 4;

template <typename scalar_t>
class Forward {
 public:
  Forward(
      const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
      const at::Tensor& bias, const LiveRanks& ranks, const Dropout& dropout, const at::Tensor& given, at::Tensor& y,
      at::Tensor& shrink)
      : x_(left_rows<scalar_t>(rows)),
        rows_(rows.size(0)),
        depth_(rows.size(1)),
        columns_(weight.size(0)),
        lora_A_(lora_A),
        lora_B_(lora_B),
        bias_(bias),
        ranks_(ranks),
        dropout_(dropout),
        y_(y.data_ptr<scalar_t>()),
        shrink_(shrink.size(0) > 0 ? shrink.data_ptr<scalar_t>() : nullptr),
        group_(depth_group<scalar_t>()),
        panels_(weight, Direction::Forward, rows_) {
    if (given.defined()) {
      given_ = left_rows<scalar_t>(given);
    }
  }

  void run() {
    const int64_t panels = divide_up(columns_, kPanelColumns);
    const int64_t threads = threads_for(rows_ * columns_ * depth_);
    const RowBlocks blocks(rows_, threads);
    prepare_shrink();
    prepare_tail(panels, blocks.whole);
    run_row_blocks(
        blocks, panels, threads, [this](int64_t begin, int64_t end) { shrink_rows(begin, end); },
        [this](int64_t begin, int64_t end, int64_t first_panel, int64_t end_panel) {
          output_tiles(begin, end, first_panel, end_panel);
        },
        [] { release_kernels<scalar_t>(); });
  }

 private:
  // Where S goes: straight into the saved tensor where ranks lie in place. An S that is given is read as it lies, or its
  // active columns are copied side by side.
  void prepare_shrink() {
    const int64_t live = ranks_.live();
    if (live == 0) {
      return;
    }
    if (given_.data != nullptr && ranks_.in_place) {
      tail_ = given_;
      return;
    }
    if (given_.data == nullptr) {
      prepare_product();
    }
    saves_in_place_ = shrink_ != nullptr && ranks_.in_place && live == lora_A_.size(0);
    tail_rows_ = saves_in_place_ ? shrink_ : thread_scratch<scalar_t, Scratch::TailRows>(rows_ * live);
    tail_ = {tail_rows_, live};
  }

  // A of the live ranks as right operand.
  void prepare_product() {
    const int64_t live = ranks_.live();
    live_A_ = live_rows<scalar_t>(lora_A_, ranks_, live);
    if (rows_ > kDotRows) {
      auto* const operand = thread_scratch<scalar_t, Scratch::ShrinkOperand>(round_up(depth_, group_) * live);
      pack_from_rows(live_A_, depth_, live, depth_, operand, live);
      shrink_operand_ = operand;
    }
  }

  // scaling · ĝ goes into B, of which every call packs a copy anyway; panels of a single row block are packed by the
  // tasks that use them.
  void prepare_tail(int64_t panels, bool shared) {
    if (bias_.defined()) {
      convert_bias();
    }
    const int64_t active = ranks_.active;
    if (active == 0) {
      return;
    }
    live_B_ = live_columns<scalar_t>(lora_B_, ranks_, active, ranks_.plain ? nullptr : ranks_.factor.data());
    if (shared) {
      tail_size_ = round_up(active, group_) * kPanelColumns;
      auto* const operand = thread_scratch<scalar_t, Scratch::TailOperand>(panels * tail_size_);
      for (int64_t panel = 0; panel < panels; ++panel) {
        pack_tail(panel, operand + panel * tail_size_);
      }
      tail_operand_ = operand;
    }
  }

  void convert_bias() {
    if constexpr (std::is_same_v<scalar_t, float>) {
      bias_row_ = bias_.const_data_ptr<float>();
    } else {
      float* const to = thread_scratch<float, Scratch::Bias>(columns_);
      convert_row(bias_.const_data_ptr<scalar_t>(), columns_, to);
      bias_row_ = to;
    }
  }

  int64_t width_of(int64_t panel) const {
    return std::min(kPanelColumns, columns_ - panel * kPanelColumns);
  }

  void pack_tail(int64_t panel, scalar_t* to) const {
    const int64_t active = ranks_.active;
    pack_from_rows(live_B_ + panel * kPanelColumns * active, active, width_of(panel), active, to, kPanelColumns);
  }

  void shrink_rows(int64_t begin, int64_t end) {
    const int64_t live = ranks_.live(), count = end - begin;
    if (tail_rows_ == nullptr) {
      return;
    }
    if (given_.data != nullptr) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t i = 0; i < live; ++i) {
          tail_rows_[row * live + i] = given_.data[row * given_.stride + ranks_.index[i]];
        }
      }
      return;
    }
    const auto rows = dropout_ ? dropped_rows(begin, end) : LeftRows<scalar_t>{x_.data + begin * x_.stride, x_.stride};
    scalar_t* const to = tail_rows_ + begin * live;
    if (shrink_operand_ == nullptr) {
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t i = 0; i < live; ++i) {
          to[row * live + i] = static_cast<scalar_t>(dot(rows.data + row * rows.stride, live_A_ + i * depth_, depth_));
        }
      }
    } else {
      Product<scalar_t> product{count, live, depth_, rows.data, rows.stride, shrink_operand_, live};
      multiply_rounded(product, to, live);
    }
    if (shrink_ != nullptr && !saves_in_place_) {
      const int64_t r = lora_A_.size(0);
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t i = 0; i < live; ++i) {
          shrink_[(begin + row) * r + ranks_.index[i]] = to[row * live + i];
        }
      }
    }
  }

  LeftRows<scalar_t> dropped_rows(int64_t begin, int64_t end) const {
    const int64_t count = end - begin;
    auto* const to = thread_scratch<scalar_t, Scratch::Rows>(count * depth_);
    auto* const bits = thread_scratch<uint8_t, Scratch::Kept>(Dropout::bytes_for(count * depth_));
    dropout_.keep(begin * depth_, count * depth_, bits);
    const int64_t bit = Dropout::first_bit(begin * depth_);
    for (int64_t row = 0; row < count; ++row) {
      const scalar_t* const from = x_.data + (begin + row) * x_.stride;
      dropout_.apply(bits, bit + row * depth_, depth_, from, to + row * depth_);
    }
    return {to, depth_};
  }

  void output_tiles(int64_t begin, int64_t end, int64_t first_panel, int64_t end_panel) {
    Product<scalar_t> product{};
    product.rows = end - begin;
    product.depth = depth_;
    product.left = x_.data + begin * x_.stride;
    product.left_stride = x_.stride;
    product.right_stride = kPanelColumns;
    product.tail_depth = ranks_.active;
    product.tail_left = ranks_.active > 0 ? tail_.data + begin * tail_.stride : nullptr;
    product.tail_left_stride = tail_.stride;
    product.tail_right_stride = kPanelColumns;
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      product.width = width_of(panel);
      product.right = panels_[panel];
      product.ahead = panel + 1 < end_panel ? panels_.ahead(panel + 1) : nullptr;
      product.start = bias_row_ == nullptr ? nullptr : bias_row_ + panel * kPanelColumns;
      if (tail_operand_ != nullptr) {
        product.tail_right = tail_operand_ + panel * tail_size_;
      } else if (ranks_.active > 0) {
        auto* const operand = thread_scratch<scalar_t, Scratch::TailPanel>(round_up(ranks_.active, group_) * kPanelColumns);
        pack_tail(panel, operand);
        product.tail_right = operand;
      }
      multiply_rounded(product, y_ + begin * columns_ + panel * kPanelColumns, columns_);
    }
  }

  LeftRows<scalar_t> x_, given_{nullptr, 0};
  int64_t rows_, depth_, columns_;
  const at::Tensor &lora_A_, &lora_B_, &bias_;
  const LiveRanks& ranks_;
  const Dropout& dropout_;
  scalar_t *y_, *shrink_;
  int64_t group_;
  WeightPanels<scalar_t> panels_;
  int64_t tail_size_ = 0;
  const float* bias_row_ = nullptr;
  const scalar_t *live_A_ = nullptr, *live_B_ = nullptr;
  const scalar_t *shrink_operand_ = nullptr, *tail_operand_ = nullptr;
  // S of the live ranks, which the tail reads; scaling and gates are in its other operand. Null where S is given and
  // read as it lies.
  scalar_t* tail_rows_ = nullptr;
  LeftRows<scalar_t> tail_{nullptr, 0};
  bool saves_in_place_ = false;
};

} // namespace

std::tuple<at::Tensor, at::Tensor> lora_linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& gate,
    const std::optional<at::Tensor>& rank_state, const std::optional<at::Tensor>& rank_order,
    const std::optional<at::Tensor>& rank_counts, double scaling, const std::optional<at::Tensor>& scaling_tensor,
    double dropout_p, const std::optional<at::Tensor>& dropout_seed, bool save_shrink,
    const std::optional<at::Tensor>& given_shrink) {
  check_call<OnFault::Raise>(
      {&x, nullptr, &weight, &lora_A, &lora_B, or_null(bias), or_null(gate), or_null(rank_state), or_null(rank_order),
       or_null(rank_counts), or_null(scaling_tensor), dropout_p, or_null(dropout_seed), or_null(given_shrink)});
  const auto dtype = x.scalar_type();
  const int64_t r = lora_A.size(0);
  const auto rows = as_rows(x, weight.size(1));
  const auto given = given_shrink ? as_rows(*given_shrink, r) : at::Tensor();
  const bool saves = save_shrink && !given_shrink;
  const auto ranks = live_ranks(r, gate, rank_order, rank_counts, scaling, scaling_tensor, saves);
  const auto dropout = dropout_of(dropout_p, dropout_seed);

  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  auto y = at::empty(shape, x.options());
  // Every live column of S is written; a DEAD rank's column must read as zero.
  const bool every_rank = ranks.live() == r;
  const int64_t shrink_rows = saves ? rows.size(0) : 0;
  auto shrink = every_rank ? at::empty({shrink_rows, r}, x.options()) : at::zeros({shrink_rows, r}, x.options());
  if (y.numel() == 0 && shrink.numel() == 0) {
    return {y, shrink}; // Sizes of what is empty may be of any magnitude.
  }
  const auto factor_A = readable_factor(lora_A, dtype);
  const auto factor_B = readable_factor(lora_B, dtype);
  const auto bias_row = bias ? bias->to(dtype).contiguous() : at::Tensor();
  AT_DISPATCH_SWITCH(
      dtype, "lora_linear_fwd.cpu",
      AT_DISPATCH_CASE(at::kFloat, [&] { Forward<float>(rows, weight, factor_A, factor_B, bias_row, ranks, dropout, given, y, shrink).run(); })
      AT_DISPATCH_CASE(at::kBFloat16, [&] { Forward<at::BFloat16>(rows, weight, factor_A, factor_B, bias_row, ranks, dropout, given, y, shrink).run(); }));
  return {y, shrink};
}

} // namespace peftkernels::cpu
