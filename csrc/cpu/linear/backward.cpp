// lora_linear_bwd.cpu: one pass over rows of G, then sums over all rows.
#include <ATen/DimVector.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include "backward_pass.h"
#include "factor_sums.h"
#include "kernels.h"
#include "operands.h"
#include "row_pass.h"

namespace peftkernels::cpu {
namespace {

template <typename scalar_t>
void run(const BackwardOperands& call, const at::Tensor& grad_x, FactorGradients& gradients) {
  const auto rows = RowPass<scalar_t>(call, grad_x).run();
  FactorSums<scalar_t>(call, rows, gradients).run();
}

} // namespace

Gradients lora_linear_backward(const Backward& call) {
  using Operand = c10::MaybeOwned<at::Tensor>;
  const auto dtype = call.grad_y.scalar_type();
  const auto& adapter = call.adapter;
  const auto& needs = call.needs;
  const int64_t r = adapter.r(), N = call.weight.N(), K = call.weight.K();
  const auto grads = as_rows(call.grad_y, N);
  const auto x = call.x ? as_rows(*call.x, K) : Operand();
  const auto shrink = call.shrink ? call.shrink->expect_contiguous() : Operand();
  const auto A = readable_factor(adapter.A, dtype), B = readable_factor(adapter.B, dtype);
  const auto ranks = live_ranks(adapter, needs[kGate]);
  const auto dropout = dropout_of(adapter);

  at::Tensor grad_x;
  if (needs[kX]) {
    at::DimVector shape(call.grad_y.sizes());
    shape.back() = K;
    grad_x = at::empty(shape, call.grad_y.options());
  }
  // Sums over nothing, whatever the number of rows: that of rows without elements may be of any magnitude.
  const bool sums = grads->size(0) > 0 && (N > 0 || K > 0);
  FactorGradients gradients{
      Gradient(needs[kA], adapter.A, sums && ranks.active == r),
      Gradient(needs[kB], adapter.B, sums && ranks.active > 0),
      Gradient(needs[kBias], call.bias ? *call.bias : call.grad_y, sums),
      Gradient(needs[kGate], adapter.gate ? *adapter.gate : adapter.A, sums && ranks.live() == r)};
  if (sums) {
    const BackwardOperands operands{*grads, *x, call.weight.dense, *A, *B, *shrink, ranks, dropout, needs};
    AT_DISPATCH_SWITCH(
        dtype, "lora_linear_bwd.cpu", AT_DISPATCH_CASE(at::kFloat, [&] { run<float>(operands, grad_x, gradients); })
        AT_DISPATCH_CASE(at::kBFloat16, [&] { run<at::BFloat16>(operands, grad_x, gradients); }));
  }
  Gradients results;
  results[kX] = std::move(grad_x);
  results[kA] = gradients.A.tensor();
  results[kB] = gradients.B.tensor();
  results[kBias] = gradients.bias.tensor();
  results[kGate] = gradients.gate.tensor();
  return results;
}

} // namespace peftkernels::cpu
