// lora_linear_fwd.cpu: one pass over the packed frozen weight; bias and low-rank product join each output tile while its
// sums are in registers, the latter as a last, short piece of the depth.
#include <ATen/DimVector.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cpu/gemm/product.h"
#include "cpu/gemm/rows.h"
#include "cpu/gemm/scratch.h"
#include "cpu/packs/weight_panels.h"
#include "kernels.h"
#include "live_ranks.h"
#include "operands.h"
#include "row_blocks.h"

namespace peftkernels::cpu {
namespace {

// Up to this many rows, S is computed by dot products with A as it lies: packing Aᵀ would cost as much as using it.
constexpr int64_t kDotRows = 4;

// What a call reads: rows (M, K) and a precomputed S with unit column stride, factors as `readable_factor` gives them,
// the bias in x's dtype. Undefined where there is none.
struct ForwardOperands {
  const at::Tensor &x, &weight, &A, &B, &bias, &shrink;
  const LiveRanks& ranks;
  const Dropout& dropout;
};

template <typename scalar_t>
class ForwardPass {
 public:
  ForwardPass(const ForwardOperands& call, const Outputs& outputs)
      : x_(left_rows<scalar_t>(call.x)),
        M_(call.x.size(0)),
        N_(call.weight.size(0)),
        K_(call.x.size(1)),
        r_(call.A.size(0)),
        A_(call.A),
        B_(call.B),
        bias_(call.bias),
        ranks_(call.ranks),
        dropout_(call.dropout),
        y_(outputs.y.data_ptr<scalar_t>()),
        shrink_(outputs.shrink.defined() ? outputs.shrink.data_ptr<scalar_t>() : nullptr),
        group_(depth_group<scalar_t>()),
        panels_(call.weight, Direction::Forward, M_) {
    if (call.shrink.defined()) {
      precomputed_ = left_rows<scalar_t>(call.shrink);
    }
  }

  void run() {
    const int64_t panels = divide_up(N_, kPanelColumns);
    const int64_t threads = threads_for(M_ * N_ * K_);
    const RowBlocks blocks(M_, threads);
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
  // Where S goes: straight into the saved tensor where ranks lie in place. A precomputed S is read as it lies, or
  // its active columns are copied side by side.
  void prepare_shrink() {
    const int64_t live = ranks_.live();
    if (live == 0) {
      return;
    }
    if (precomputed_.data != nullptr && ranks_.in_place) {
      tail_ = precomputed_;
      return;
    }
    if (precomputed_.data == nullptr) {
      prepare_product();
    }
    saves_in_place_ = shrink_ != nullptr && ranks_.in_place && live == r_;
    tail_rows_ = saves_in_place_ ? shrink_ : thread_scratch<scalar_t, Scratch::TailRows>(M_ * live);
    tail_ = {tail_rows_, live};
  }

  // A of the live ranks as right operand.
  void prepare_product() {
    const int64_t live = ranks_.live();
    live_rows_A_ = live_rows<scalar_t>(A_, ranks_, live);
    if (M_ > kDotRows) {
      auto* const operand = thread_scratch<scalar_t, Scratch::ShrinkOperand>(round_up(K_, group_) * live);
      pack_from_rows(live_rows_A_, K_, live, K_, operand, live);
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
    live_B_ = live_columns<scalar_t>(B_, ranks_, active, ranks_.plain ? nullptr : ranks_.factor.data());
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
      float* const to = thread_scratch<float, Scratch::Bias>(N_);
      convert_row(bias_.const_data_ptr<scalar_t>(), N_, to);
      bias_row_ = to;
    }
  }

  int64_t width_of(int64_t panel) const {
    return std::min(kPanelColumns, N_ - panel * kPanelColumns);
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
    if (precomputed_.data != nullptr) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t i = 0; i < live; ++i) {
          tail_rows_[row * live + i] = precomputed_.data[row * precomputed_.stride + ranks_.index[i]];
        }
      }
      return;
    }
    const auto rows = dropout_ ? dropped_rows(begin, end) : LeftRows<scalar_t>{x_.data + begin * x_.stride, x_.stride};
    scalar_t* const to = tail_rows_ + begin * live;
    if (shrink_operand_ == nullptr) {
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t i = 0; i < live; ++i) {
          to[row * live + i] = static_cast<scalar_t>(dot(rows.data + row * rows.stride, live_rows_A_ + i * K_, K_));
        }
      }
    } else {
      Product<scalar_t> product{count, live, K_, rows.data, rows.stride, shrink_operand_, live};
      multiply_rounded(product, to, live);
    }
    if (shrink_ != nullptr && !saves_in_place_) {
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t i = 0; i < live; ++i) {
          shrink_[(begin + row) * r_ + ranks_.index[i]] = to[row * live + i];
        }
      }
    }
  }

  LeftRows<scalar_t> dropped_rows(int64_t begin, int64_t end) const {
    const int64_t count = end - begin;
    auto* const to = thread_scratch<scalar_t, Scratch::Rows>(count * K_);
    auto* const bits = thread_scratch<uint8_t, Scratch::Kept>(Dropout::bytes_for(count * K_));
    dropout_.keep(begin * K_, count * K_, bits);
    const int64_t bit = Dropout::first_bit(begin * K_);
    for (int64_t row = 0; row < count; ++row) {
      const scalar_t* const from = x_.data + (begin + row) * x_.stride;
      dropout_.apply(bits, bit + row * K_, K_, from, to + row * K_);
    }
    return {to, K_};
  }

  void output_tiles(int64_t begin, int64_t end, int64_t first_panel, int64_t end_panel) {
    Product<scalar_t> product{};
    product.rows = end - begin;
    product.depth = K_;
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
      multiply_rounded(product, y_ + begin * N_ + panel * kPanelColumns, N_);
    }
  }

  LeftRows<scalar_t> x_, precomputed_{nullptr, 0};
  int64_t M_, N_, K_, r_;
  const at::Tensor &A_, &B_, &bias_;
  const LiveRanks& ranks_;
  const Dropout& dropout_;
  scalar_t *y_, *shrink_;
  int64_t group_;
  WeightPanels<scalar_t> panels_;
  int64_t tail_size_ = 0;
  const float* bias_row_ = nullptr;
  const scalar_t *live_rows_A_ = nullptr, *live_B_ = nullptr;
  const scalar_t *shrink_operand_ = nullptr, *tail_operand_ = nullptr;
  // S of the live ranks, which the tail reads; scaling and gates are in its other operand. Null where a
  // precomputed S is read as it lies.
  scalar_t* tail_rows_ = nullptr;
  LeftRows<scalar_t> tail_{nullptr, 0};
  bool saves_in_place_ = false;
};

} // namespace

Outputs lora_linear_forward(const Forward& call) {
  const auto dtype = call.x.scalar_type();
  const auto& adapter = call.adapter;
  const int64_t r = adapter.r();
  const auto rows = as_rows(call.x, call.weight.K());
  const auto ranks = live_ranks(adapter, call.saves_shrink());
  const auto dropout = dropout_of(adapter);

  Outputs outputs;
  at::DimVector shape(call.x.sizes());
  shape.back() = call.weight.N();
  outputs.y = at::empty(shape, call.x.options());
  if (call.saves_shrink()) {
    // Every live column of S is written; a DEAD rank's column must read as zero.
    const bool every_rank = ranks.live() == r;
    outputs.shrink = every_rank ? at::empty({rows->size(0), r}, call.x.options())
                                : at::zeros({rows->size(0), r}, call.x.options());
  }
  if (outputs.y.numel() == 0 && (!outputs.shrink.defined() || outputs.shrink.numel() == 0)) {
    return outputs; // Sizes of what is empty may be of any magnitude.
  }
  const auto A = readable_factor(adapter.A, dtype), B = readable_factor(adapter.B, dtype);
  const auto bias = call.bias ? call.bias->to(dtype).contiguous() : at::Tensor();
  const auto shrink = call.shrink ? as_rows(*call.shrink, r) : c10::MaybeOwned<at::Tensor>();
  const ForwardOperands operands{*rows, call.weight.dense, *A, *B, bias, *shrink, ranks, dropout};
  AT_DISPATCH_SWITCH(
      dtype, "lora_linear_fwd.cpu",
      AT_DISPATCH_CASE(at::kFloat, [&] { ForwardPass<float>(operands, outputs).run(); })
      AT_DISPATCH_CASE(at::kBFloat16, [&] { ForwardPass<at::BFloat16>(operands, outputs).run(); }));
  return outputs;
}

} // namespace peftkernels::cpu
