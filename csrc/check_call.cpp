#include "check_call.h"

#include <limits>
#include <vector>

namespace peftkernels {
namespace {

constexpr int64_t kMostRanks = std::numeric_limits<int32_t>::max();
// Values of RankState.
constexpr uint8_t kDead = 0, kProbe = 1, kActive = 2;

// What forward and backward have in common. `first` is x, or grad_y, whose dtype is that of computation.
struct Operands {
  bool forward;
  const at::Tensor& first;
  const Weight& weight;
  const Adapter& adapter;
  const OptionalTensor &bias, &shrink;
  const Backend& backend;

  const char* first_name() const {
    return forward ? "x" : "grad_y";
  }
};

template <OnFault fault>
bool is_first(const char* name, const at::Tensor& tensor, const char* shape, const Backend& backend) {
  if (!is_dense<fault>(name, tensor, backend.key) || !has_float_dtype<fault>(name, tensor)) {
    return false;
  }
  const auto dtype = tensor.scalar_type();
  PEFTKERNELS_EXPECT(
      TYPE, backend.dtypes.contains(dtype), name, ": found dtype ", in_words(dtype), ", expected ",
      backend.dtypes.in_words());
  PEFTKERNELS_EXPECT(VALUE, tensor.dim() > 0, name, ": found a 0-dim tensor, expected shape ", shape);
  return true;
}

template <OnFault fault>
bool fits_plan(const Ranks& ranks, int64_t r, const Backend& backend) {
  if (!ranks.state && !ranks.order && !ranks.counts) {
    return true;
  }
  PEFTKERNELS_EXPECT(
      TYPE, ranks.state && ranks.order && ranks.counts,
      "rank_plan: found a part of a plan, expected state, order and counts");
  const auto &state = *ranks.state, &order = *ranks.order, &counts = *ranks.counts;
  const Name names[]{"rank_plan.state", "rank_plan.order", "rank_plan.counts"};
  return is_dense<fault>(names[0], state, backend.key) && is_dense<fault>(names[1], order, backend.key) &&
      is_dense<fault>(names[2], counts, backend.key) && has_dtype<fault>(names[0], state, at::kByte) &&
      has_dtype<fault>(names[1], order, at::kInt) &&
      has_dtype<fault>(names[2], counts, at::kInt) && has_shape<fault>(names[0], state, {r}, "(r,)") &&
      has_shape<fault>(names[1], order, {r}, "(r,)") && has_shape<fault>(names[2], counts, {2}, "(2,)") &&
      is_readable<fault>(names[0], state) && is_readable<fault>(names[1], order) &&
      is_readable<fault>(names[2], counts);
}

// Every rank once, as many ACTIVE and PROBE ones as the counts say, each in its state.
template <OnFault fault>
bool fit_each_other(const at::Tensor& state, const at::Tensor& order, const at::Tensor& counts) {
  const int64_t r = order.size(0), order_step = order.stride(0), state_step = state.stride(0);
  const auto* const numbers = counts.const_data_ptr<int32_t>();
  const int64_t active = numbers[0], not_dead = numbers[counts.stride(0)];
  PEFTKERNELS_EXPECT(
      VALUE, 0 <= active && active <= not_dead && not_dead <= r, "rank_plan.counts: found [", active, ", ", not_dead,
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
    PEFTKERNELS_EXPECT(
        VALUE, 0 <= rank && rank < r, "rank_plan.order: found rank ", rank, " at place ", i,
        ", expected ranks from 0 to ", r - 1);
    const uint64_t bit = uint64_t{1} << (rank % 64);
    PEFTKERNELS_EXPECT(
        VALUE, (seen[rank / 64] & bit) == 0, "rank_plan.order: found rank ", rank, " twice, expected it once");
    seen[rank / 64] |= bit;
    const uint8_t expected = i < active ? kActive : i < not_dead ? kProbe : kDead;
    PEFTKERNELS_EXPECT(
        VALUE, states[rank * state_step] == expected, "rank_plan.state: found ", int{states[rank * state_step]},
        " for rank ", rank, ", expected ", int{expected}, " by the plan's order and counts");
  }
  return true;
}

template <OnFault fault>
bool fits_dropout(const Adapter& adapter, bool draws_seed, const Backend& backend) {
  PEFTKERNELS_EXPECT(
      VALUE, adapter.dropout_p >= 0.0 && adapter.dropout_p <= 1.0, "dropout_p: found ", adapter.dropout_p,
      ", expected a float in [0, 1]");
  if (!adapter.dropout_seed) {
    PEFTKERNELS_EXPECT(
        TYPE, draws_seed || adapter.dropout_p == 0.0, "dropout_seed: found None beside dropout_p = ", adapter.dropout_p,
        ", expected a 0-dim int64 tensor");
    return true;
  }
  const auto& seed = *adapter.dropout_seed;
  return is_dense<fault>("dropout_seed", seed, backend.key) && has_dtype<fault>("dropout_seed", seed, at::kLong) &&
      has_shape<fault>("dropout_seed", seed, {}, "a 0-dim tensor") && is_readable<fault>("dropout_seed", seed);
}

int64_t rows_of(const at::Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    rows *= tensor.size(dim);
  }
  return rows;
}

// S, precomputed for a forward pass or saved for a backward pass.
template <OnFault fault>
bool fits_shrink(const Operands& call, int64_t r) {
  if (!call.shrink) {
    return true;
  }
  const auto& shrink = *call.shrink;
  if (!is_dense<fault>("shrink", shrink, call.backend.key) ||
      !has_shape<fault>("shrink", shrink, {rows_of(call.first), r}, "(M, r)")) {
    return false;
  }
  PEFTKERNELS_EXPECT(
      TYPE, shrink.scalar_type() == call.first.scalar_type(), "shrink: found dtype ", in_words(shrink.scalar_type()),
      ", expected the dtype of computation, ", in_words(call.first.scalar_type()));
  PEFTKERNELS_EXPECT(
      VALUE, !call.forward || call.adapter.dropout_p == 0.0, "shrink: found one beside dropout_p = ",
      call.adapter.dropout_p, ", expected dropout_p = 0: it has no mask");
  return is_readable<fault>("shrink", shrink);
}

template <OnFault fault>
bool fits_bias(const at::Tensor& bias, int64_t n, const Backend& backend) {
  return is_dense<fault>("bias", bias, backend.key) && has_float_dtype<fault>("bias", bias) &&
      has_shape<fault>("bias", bias, {n}, "(N,)") && is_readable<fault>("bias", bias);
}

template <OnFault fault>
bool fits_gate(const at::Tensor& gate, int64_t r, const Backend& backend) {
  if (!is_dense<fault>("gate", gate, backend.key) || !has_float_dtype<fault>("gate", gate)) {
    return false;
  }
  PEFTKERNELS_EXPECT(
      VALUE, (gate.dim() == 1 || (gate.dim() == 2 && gate.size(1) == 1)) && gate.size(0) == r, "gate: found shape ",
      in_words(gate.sizes()), ", expected (r,) = (", r, ",) or (r, 1) = (", r, ", 1)");
  return is_readable<fault>("gate", gate);
}

template <OnFault fault>
bool fits_scaling(const at::Tensor& scaling, const Backend& backend) {
  if (!is_dense<fault>("scaling", scaling, backend.key)) {
    return false;
  }
  PEFTKERNELS_EXPECT(
      VALUE, scaling.dim() == 0, "scaling: found shape ", in_words(scaling.sizes()),
      ", expected a float or a 0-dim tensor");
  return has_float_dtype<fault>("scaling", scaling) && is_readable<fault>("scaling", scaling);
}

// The first operand, the weight and the factors.
template <OnFault fault>
bool fit_matrices(const Operands& call) {
  const auto &first = call.first, &weight = call.weight.dense, &lora_A = call.adapter.A, &lora_B = call.adapter.B;
  const char* const name = call.first_name();
  const auto key = call.backend.key;
  if (!is_first<fault>(name, first, call.forward ? "(..., K)" : "(..., N)", call.backend) ||
      !is_dense<fault>("weight", weight, key) || !is_dense<fault>("lora_A", lora_A, key) ||
      !is_dense<fault>("lora_B", lora_B, key) || !has_float_dtype<fault>("weight", weight) ||
      !has_float_dtype<fault>("lora_A", lora_A)) {
    return false;
  }
  PEFTKERNELS_EXPECT(
      VALUE, weight.dim() == 2, "weight: found shape ", in_words(weight.sizes()), ", expected (N, K)");
  const int64_t n = weight.size(0), k = weight.size(1);
  PEFTKERNELS_EXPECT(
      VALUE, first.size(-1) == (call.forward ? k : n), name, ": found shape ", in_words(first.sizes()), ", expected ",
      call.forward ? "(..., K) with weight's K = " : "(..., N) with weight's N = ", call.forward ? k : n);
  PEFTKERNELS_EXPECT(
      VALUE, lora_A.dim() == 2 && lora_A.size(1) == k && lora_A.size(0) <= kMostRanks, "lora_A: found shape ",
      in_words(lora_A.sizes()), ", expected (r, K) with weight's K = ", k);
  if (!has_shape<fault>("lora_B", lora_B, {n, lora_A.size(0)}, "(N, r)")) {
    return false;
  }
  PEFTKERNELS_EXPECT(
      TYPE, lora_B.scalar_type() == lora_A.scalar_type(), "lora_B: found dtype ", in_words(lora_B.scalar_type()),
      ", expected lora_A's, ", in_words(lora_A.scalar_type()));
  return is_readable<fault>(name, first) && is_readable<fault>("weight", weight) &&
      is_readable<fault>("lora_A", lora_A) && is_readable<fault>("lora_B", lora_B);
}

// Everything but the matrices.
template <OnFault fault>
bool fit_the_rest(const Operands& call, bool draws_seed) {
  const auto& adapter = call.adapter;
  const int64_t r = adapter.r();
  return (!call.bias || fits_bias<fault>(*call.bias, call.weight.N(), call.backend)) &&
      (!adapter.gate || fits_gate<fault>(*adapter.gate, r, call.backend)) &&
      fits_plan<fault>(adapter.ranks, r, call.backend) &&
      (!adapter.scaling_tensor || fits_scaling<fault>(*adapter.scaling_tensor, call.backend)) &&
      fits_dropout<fault>(adapter, draws_seed, call.backend) && fits_shrink<fault>(call, r);
}

// x beside grad_y.
void check_saved_x(const at::Tensor& x, const at::Tensor& grad_y, int64_t k, const Backend& backend) {
  constexpr auto fault = OnFault::Raise;
  is_first<fault>("x", x, "(..., K)", backend);
  TORCH_CHECK_TYPE(
      x.scalar_type() == grad_y.scalar_type(), "x: found dtype ", in_words(x.scalar_type()), ", expected grad_y's, ",
      in_words(grad_y.scalar_type()));
  TORCH_CHECK_VALUE(
      x.sizes().slice(0, x.dim() - 1) == grad_y.sizes().slice(0, grad_y.dim() - 1) && x.size(-1) == k,
      "x: found shape ", in_words(x.sizes()), ", expected (..., K) with grad_y's rows, ", in_words(grad_y.sizes()),
      ", and weight's K = ", k);
  is_readable<fault>("x", x);
}

// What a gradient that is needed is made of.
void check_needs(const Backward& call, const char* backend) {
  const auto& needs = call.needs;
  TORCH_CHECK(
      !needs[kWeight], "lora_linear_bwd.", backend,
      ": the weight's gradient was asked for; this kernel serves frozen weights");
  TORCH_CHECK_TYPE(
      call.x || !needs[kA], "x: found None, expected a tensor: the gradient of lora_A was asked for");
  TORCH_CHECK_TYPE(
      call.shrink || !(needs[kB] || needs[kGate]),
      "shrink: found None, expected a tensor: the gradient of lora_B or gate was asked for");
  TORCH_CHECK_TYPE(call.bias || !needs[kBias], "bias: found None, expected a tensor: its gradient was asked for");
  TORCH_CHECK_TYPE(
      call.adapter.gate || !needs[kGate], "gate: found None, expected a tensor: its gradient was asked for");
}

// Of a plan that was checked. On other devices than the CPU nobody reads it back.
template <OnFault fault>
bool fit_each_other(const Ranks& ranks, const Backend& backend) {
  return !ranks.state || backend.key != c10::DispatchKey::CPU ||
      fit_each_other<fault>(*ranks.state, *ranks.order, *ranks.counts);
}

} // namespace

template <OnFault fault>
bool check(const Forward& call, const Backend& backend, bool draws_seed) {
  const Operands operands{true, call.x, call.weight, call.adapter, call.bias, call.shrink, backend};
  return fit_matrices<fault>(operands) && fit_the_rest<fault>(operands, draws_seed) &&
      fit_each_other<fault>(call.adapter.ranks, backend);
}

template bool check<OnFault::Raise>(const Forward&, const Backend&, bool);
template bool check<OnFault::Decline>(const Forward&, const Backend&, bool);

void check(const Backward& call, const Backend& backend) {
  constexpr auto fault = OnFault::Raise;
  const Operands operands{false, call.grad_y, call.weight, call.adapter, call.bias, call.shrink, backend};
  fit_matrices<fault>(operands);
  if (call.x) {
    check_saved_x(*call.x, call.grad_y, call.weight.K(), backend);
  }
  fit_the_rest<fault>(operands, /*draws_seed=*/false);
  fit_each_other<fault>(call.adapter.ranks, backend);
  check_needs(call, backend.name);
}

void check_shrink(const at::Tensor& x, at::TensorList lora_A, const Backend& backend) {
  constexpr auto fault = OnFault::Raise;
  is_first<fault>("x", x, "(..., K)", backend);
  is_readable<fault>("x", x);
  TORCH_CHECK_VALUE(!lora_A.empty(), "lora_A: found no tensor, expected one for each adapter");
  for (size_t i = 0; i < lora_A.size(); ++i) {
    const auto& factor = lora_A[i];
    const Name name("lora_A", static_cast<int64_t>(i));
    is_dense<fault>(name, factor, backend.key);
    has_float_dtype<fault>(name, factor);
    TORCH_CHECK_VALUE(
        factor.dim() == 2 && factor.size(1) == x.size(-1), name, ": found shape ", in_words(factor.sizes()),
        ", expected (r, K) with x's K = ", x.size(-1));
    is_readable<fault>(name, factor);
  }
}

} // namespace peftkernels
