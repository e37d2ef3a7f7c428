#include "check_call.h"

#include <limits>
#include <vector>

namespace peftkernels::cpu {
namespace {

constexpr int64_t kMostRanks = std::numeric_limits<int32_t>::max();
// Values of RankState.
constexpr uint8_t kDead = 0, kProbe = 1, kActive = 2;

// x, or grad_y, whose dtype is that of computation.
template <OnFault fault>
bool is_first(const char* name, const at::Tensor& tensor, const char* shape) {
  if (!is_dense<fault>(name, tensor) || !has_float_dtype<fault>(name, tensor)) {
    return false;
  }
  const auto dtype = tensor.scalar_type();
  PEFTKERNELS_EXPECT(
      TYPE, dtype == at::kFloat || dtype == at::kBFloat16, name, ": found dtype ", in_words(dtype),
      ", expected float32 or bfloat16");
  PEFTKERNELS_EXPECT(VALUE, tensor.dim() > 0, name, ": found a 0-dim tensor, expected shape ", shape);
  return true;
}

template <OnFault fault>
bool fits_plan(const CallRecord& call, int64_t r) {
  if (call.rank_state == nullptr && call.rank_order == nullptr && call.rank_counts == nullptr) {
    return true;
  }
  PEFTKERNELS_EXPECT(
      TYPE, call.rank_state != nullptr && call.rank_order != nullptr && call.rank_counts != nullptr,
      "rank_plan: found a part of a plan, expected state, order and counts");
  const auto &state = *call.rank_state, &order = *call.rank_order, &counts = *call.rank_counts;
  const Name names[]{"rank_plan.state", "rank_plan.order", "rank_plan.counts"};
  return is_dense<fault>(names[0], state) && is_dense<fault>(names[1], order) && is_dense<fault>(names[2], counts) &&
      has_dtype<fault>(names[0], state, at::kByte) && has_dtype<fault>(names[1], order, at::kInt) &&
      has_dtype<fault>(names[2], counts, at::kInt) && has_shape<fault>(names[0], state, {r}, "(r,)") &&
      has_shape<fault>(names[1], order, {r}, "(r,)") && has_shape<fault>(names[2], counts, {2}, "(2,)") &&
      is_readable<fault>(names[0], state) && is_readable<fault>(names[1], order) &&
      is_readable<fault>(names[2], counts);
}

// Every rank once, as many ACTIVE and PROBE ones as the counts say, each in its state.
void check_plan_values(const at::Tensor& state, const at::Tensor& order, const at::Tensor& counts) {
  const int64_t r = order.size(0), order_step = order.stride(0), state_step = state.stride(0);
  const auto* const numbers = counts.const_data_ptr<int32_t>();
  const int64_t active = numbers[0], live = numbers[counts.stride(0)];
  TORCH_CHECK_VALUE(
      0 <= active && active <= live && live <= r, "rank_plan.counts: found [", active, ", ", live,
      "], expected [n_active, n_active + n_probe] of ", r, " ranks");
  const auto* const places = order.const_data_ptr<int32_t>();
  const auto* const states = state.const_data_ptr<uint8_t>();
  uint64_t few[16] = {};
  std::vector<uint64_t> many;
  uint64_t* seen = few;
  if (r > 64 * 16) {
    many.resize(static_cast<size_t>(r + 63) / 64);
    seen = many.data();
  }
  for (int64_t i = 0; i < r; ++i) {
    const int64_t rank = places[i * order_step];
    TORCH_CHECK_VALUE(
        0 <= rank && rank < r, "rank_plan.order: found rank ", rank, " at place ", i, ", expected ranks from 0 to ",
        r - 1);
    const uint64_t bit = uint64_t{1} << (rank % 64);
    TORCH_CHECK_VALUE((seen[rank / 64] & bit) == 0, "rank_plan.order: found rank ", rank, " twice, expected it once");
    seen[rank / 64] |= bit;
    const uint8_t expected = i < active ? kActive : i < live ? kProbe : kDead;
    TORCH_CHECK_VALUE(
        states[rank * state_step] == expected, "rank_plan.state: found ", int{states[rank * state_step]}, " for rank ",
        rank, ", expected ", int{expected}, " by the plan's order and counts");
  }
}

template <OnFault fault>
bool fits_dropout(const CallRecord& call) {
  PEFTKERNELS_EXPECT(
      VALUE, call.dropout_p >= 0.0 && call.dropout_p <= 1.0, "dropout_p: found ", call.dropout_p,
      ", expected a float in [0, 1]");
  if (call.dropout_seed == nullptr) {
    PEFTKERNELS_EXPECT(
        TYPE, call.draws_seed || call.dropout_p == 0.0, "dropout_seed: found None beside dropout_p = ", call.dropout_p,
        ", expected a 0-dim int64 tensor");
    return true;
  }
  const auto& seed = *call.dropout_seed;
  return is_dense<fault>("dropout_seed", seed) && has_dtype<fault>("dropout_seed", seed, at::kLong) &&
      has_shape<fault>("dropout_seed", seed, {}, "a 0-dim tensor") && is_readable<fault>("dropout_seed", seed);
}

int64_t rows_of(const at::Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    rows *= tensor.size(dim);
  }
  return rows;
}

// S, given to a forward pass or saved for a backward pass.
template <OnFault fault>
bool fits_shrink(const CallRecord& call, const at::Tensor& first, int64_t r) {
  if (call.shrink == nullptr) {
    return true;
  }
  const auto& shrink = *call.shrink;
  if (!is_dense<fault>("shrink", shrink) || !has_shape<fault>("shrink", shrink, {rows_of(first), r}, "(M, r)")) {
    return false;
  }
  PEFTKERNELS_EXPECT(
      TYPE, shrink.scalar_type() == first.scalar_type(), "shrink: found dtype ", in_words(shrink.scalar_type()),
      ", expected the dtype of computation, ", in_words(first.scalar_type()));
  PEFTKERNELS_EXPECT(
      VALUE, call.grad_y != nullptr || call.dropout_p == 0.0, "shrink: found one beside dropout_p = ", call.dropout_p,
      ", expected dropout_p = 0: it has no mask");
  return is_readable<fault>("shrink", shrink);
}

// x beside grad_y.
template <OnFault fault>
bool fits_gradient(const at::Tensor& x, const at::Tensor& grad_y, int64_t k) {
  if (!is_first<fault>("x", x, "(..., K)")) {
    return false;
  }
  PEFTKERNELS_EXPECT(
      TYPE, x.scalar_type() == grad_y.scalar_type(), "x: found dtype ", in_words(x.scalar_type()),
      ", expected grad_y's, ", in_words(grad_y.scalar_type()));
  PEFTKERNELS_EXPECT(
      VALUE, x.sizes().slice(0, x.dim() - 1) == grad_y.sizes().slice(0, grad_y.dim() - 1) && x.size(-1) == k,
      "x: found shape ", in_words(x.sizes()), ", expected (..., K) with grad_y's rows, ", in_words(grad_y.sizes()),
      ", and weight's K = ", k);
  return is_readable<fault>("x", x);
}

} // namespace

template <OnFault fault>
bool check_call(const CallRecord& call) {
  const bool forward = call.grad_y == nullptr;
  const char* const first_name = forward ? "x" : "grad_y";
  const at::Tensor &first = forward ? *call.x : *call.grad_y, &weight = *call.weight;
  const at::Tensor &lora_A = *call.lora_A, &lora_B = *call.lora_B;
  if (!is_first<fault>(first_name, first, forward ? "(..., K)" : "(..., N)") || !is_dense<fault>("weight", weight) ||
      !is_dense<fault>("lora_A", lora_A) || !is_dense<fault>("lora_B", lora_B) ||
      !has_float_dtype<fault>("weight", weight) || !has_float_dtype<fault>("lora_A", lora_A)) {
    return false;
  }
  PEFTKERNELS_EXPECT(
      VALUE, weight.dim() == 2, "weight: found shape ", in_words(weight.sizes()), ", expected (N, K)");
  const int64_t n = weight.size(0), k = weight.size(1);
  PEFTKERNELS_EXPECT(
      VALUE, first.size(-1) == (forward ? k : n), first_name, ": found shape ", in_words(first.sizes()), ", expected ",
      forward ? "(..., K) with weight's K = " : "(..., N) with weight's N = ", forward ? k : n);
  PEFTKERNELS_EXPECT(
      VALUE, lora_A.dim() == 2 && lora_A.size(1) == k && lora_A.size(0) <= kMostRanks, "lora_A: found shape ",
      in_words(lora_A.sizes()), ", expected (r, K) with weight's K = ", k);
  const int64_t r = lora_A.size(0);
  if (!has_shape<fault>("lora_B", lora_B, {n, r}, "(N, r)")) {
    return false;
  }
  PEFTKERNELS_EXPECT(
      TYPE, lora_B.scalar_type() == lora_A.scalar_type(), "lora_B: found dtype ", in_words(lora_B.scalar_type()),
      ", expected lora_A's, ", in_words(lora_A.scalar_type()));
  if (!is_readable<fault>(first_name, first) || !is_readable<fault>("weight", weight) ||
      !is_readable<fault>("lora_A", lora_A) || !is_readable<fault>("lora_B", lora_B) ||
      (!forward && call.x != nullptr && !fits_gradient<fault>(*call.x, first, k))) {
    return false;
  }
  if (call.bias != nullptr) {
    const auto& bias = *call.bias;
    if (!is_dense<fault>("bias", bias) || !has_float_dtype<fault>("bias", bias) ||
        !has_shape<fault>("bias", bias, {n}, "(N,)") || !is_readable<fault>("bias", bias)) {
      return false;
    }
  }
  if (call.gate != nullptr) {
    const auto& gate = *call.gate;
    if (!is_dense<fault>("gate", gate) || !has_float_dtype<fault>("gate", gate)) {
      return false;
    }
    PEFTKERNELS_EXPECT(
        VALUE, (gate.dim() == 1 || (gate.dim() == 2 && gate.size(1) == 1)) && gate.size(0) == r, "gate: found shape ",
        in_words(gate.sizes()), ", expected (r,) = (", r, ",) or (r, 1) = (", r, ", 1)");
    if (!is_readable<fault>("gate", gate)) {
      return false;
    }
  }
  if (!fits_plan<fault>(call, r)) {
    return false;
  }
  if (call.scaling_tensor != nullptr) {
    const auto& scaling = *call.scaling_tensor;
    if (!is_dense<fault>("scaling", scaling)) {
      return false;
    }
    PEFTKERNELS_EXPECT(
        VALUE, scaling.dim() == 0, "scaling: found shape ", in_words(scaling.sizes()),
        ", expected a float or a 0-dim tensor");
    if (!has_float_dtype<fault>("scaling", scaling) || !is_readable<fault>("scaling", scaling)) {
      return false;
    }
  }
  if (!fits_dropout<fault>(call) || !fits_shrink<fault>(call, first, r)) {
    return false;
  }
  if constexpr (fault == OnFault::Raise) {
    if (call.rank_state != nullptr) {
      check_plan_values(*call.rank_state, *call.rank_order, *call.rank_counts);
    }
  }
  return true;
}

template bool check_call<OnFault::Raise>(const CallRecord&);
template bool check_call<OnFault::Decline>(const CallRecord&);

void check_needs(const CallRecord& call, const std::array<bool, 6>& needs) {
  TORCH_CHECK(
      !needs[1], "lora_linear_bwd.cpu: the weight's gradient was asked for; this kernel serves frozen weights");
  TORCH_CHECK_TYPE(
      call.x != nullptr || !needs[2], "x: found None, expected a tensor: the gradient of lora_A was asked for");
  TORCH_CHECK_TYPE(
      call.shrink != nullptr || !(needs[3] || needs[5]),
      "shrink: found None, expected a tensor: the gradient of lora_B or gate was asked for");
  TORCH_CHECK_TYPE(
      call.bias != nullptr || !needs[4], "bias: found None, expected a tensor: its gradient was asked for");
  TORCH_CHECK_TYPE(
      call.gate != nullptr || !needs[5], "gate: found None, expected a tensor: its gradient was asked for");
}

void check_shrink(const at::Tensor& x, at::TensorList lora_A) {
  constexpr auto fault = OnFault::Raise;
  is_first<fault>("x", x, "(..., K)");
  is_readable<fault>("x", x);
  TORCH_CHECK_VALUE(!lora_A.empty(), "lora_A: found no tensor, expected one for each adapter");
  for (size_t i = 0; i < lora_A.size(); ++i) {
    const auto& factor = lora_A[i];
    const Name name("lora_A", static_cast<int64_t>(i));
    is_dense<fault>(name, factor);
    has_float_dtype<fault>(name, factor);
    TORCH_CHECK_VALUE(
        factor.dim() == 2 && factor.size(1) == x.size(-1), name, ": found shape ", in_words(factor.sizes()),
        ", expected (r, K) with x's K = ", x.size(-1));
    is_readable<fault>(name, factor);
  }
}

} // namespace peftkernels::cpu
