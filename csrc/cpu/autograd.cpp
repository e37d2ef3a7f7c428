#include "autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <utility>

#include "lora_linear.h"

namespace peftkernels::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Below autograd, which these functions are themselves: its fallback for operators would box every argument. Modes
// that intercept operators come after it and still do.
template <typename Signature, typename... Arguments>
auto call_operator(const c10::TypedOperatorHandle<Signature>& handle, Arguments&&... arguments) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return handle.call(std::forward<Arguments>(arguments)...);
}

at::Tensor run_forward(const Call& call, bool save_shrink, at::Tensor* shrink) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("peftkernels::lora_linear_fwd", "cpu")
                                 .typed<decltype(lora_linear_forward)>();
  auto [y, saved] = call_operator(
      handle, call.x, call.weight, call.lora_A, call.lora_B, call.bias, call.gate, call.rank_state, call.rank_order,
      call.rank_counts, call.scaling, call.scaling_tensor, call.dropout_p, call.dropout_seed, save_shrink,
      call.given_shrink);
  if (save_shrink) {
    *shrink = call.given_shrink ? *call.given_shrink : std::move(saved);
  }
  return std::move(y);
}

// The places of what is saved for the backward pass; undefined where there is nothing to save.
enum Saved : size_t { kX, kWeight, kA, kB, kBias, kShrink, kGate, kState, kOrder, kCounts, kScaling, kSeed, kSavedCount };

std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

SecondDerivatives second_derivatives;

variable_list only_defined(at::TensorList tensors) {
  variable_list defined;
  for (const auto& tensor : tensors) {
    if (tensor.defined()) {
      defined.push_back(tensor);
    }
  }
  return defined;
}

// Gradients that are there, as functions of what they depend on: for those who differentiate them again.
struct Gradients : torch::autograd::Function<Gradients> {
  // `arguments` are grad_y, x, weight, lora_A, lora_B and gate, undefined where there is none; `present` are those that
  // there are, since autograd takes no list with gaps.
  static variable_list forward(
      AutogradContext* context, at::TensorList gradients, at::TensorList /*present*/, const Arguments& arguments,
      const BackwardPass& pass) {
    variable_list saved(arguments.begin(), arguments.end());
    for (const auto* const tensor : {&pass.bias, &pass.shrink, &pass.state, &pass.scaling_tensor, &pass.seed}) {
      saved.push_back(*tensor);
    }
    context->save_for_backward(std::move(saved));
    context->saved_data["needs"] = c10::List<bool>(pass.needs);
    context->saved_data["scaling"] = pass.scaling;
    context->saved_data["dropout_p"] = pass.dropout_p;
    context->saved_data["x_left_out"] = pass.x_left_out;
    variable_list views;
    for (const auto& gradient : gradients) {
      views.push_back(gradient.view_as(gradient));
    }
    return views;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto needs = context->saved_data["needs"].toBoolList();
    Arguments arguments;
    std::copy_n(saved.begin(), arguments.size(), arguments.begin());
    BackwardPass pass{{}, saved[6], saved[7], saved[8], saved[9], saved[10], context->saved_data["scaling"].toDouble(),
                      context->saved_data["dropout_p"].toDouble(), context->saved_data["x_left_out"].toBool()};
    // Only gradients that were asked for have a place among `grads`.
    std::array<at::Tensor, 6> weights;
    auto next = grads.begin();
    for (size_t i = 0; i < weights.size(); ++i) {
      pass.needs[i] = needs[i];
      if (pass.needs[i]) {
        weights[i] = *next++;
      }
    }
    TORCH_CHECK(second_derivatives, "lora_linear: nothing was set that computes second derivatives");
    variable_list results(grads.size());
    const auto derivatives = second_derivatives(weights, arguments, pass);
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (arguments[i].defined()) {
        results.push_back(derivatives[i]);
      }
    }
    results.resize(results.size() + 2); // of what is no list of tensors
    return results;
  }
};

// Lets the gradients that are there be differentiated again.
void make_differentiable(variable_list& gradients, const Arguments& arguments, const BackwardPass& pass) {
  const auto asked = only_defined(gradients), present = only_defined(arguments);
  auto views = Gradients::apply(at::TensorList(asked), at::TensorList(present), arguments, pass);
  auto next = views.begin();
  for (auto& gradient : gradients) {
    if (gradient.defined()) {
      gradient = *next++;
    }
  }
}

} // namespace

void set_second_derivatives(SecondDerivatives function) {
  second_derivatives = std::move(function);
}

// Outside the unnamed namespace because autograd prints this name as that of y's node.
struct LoraLinearBackward : torch::autograd::Function<LoraLinearBackward> {
  // The tensors that autograd differentiates come first; they are those of `call`.
  static at::Tensor forward(
      AutogradContext* context, const at::Tensor& x, const at::Tensor& lora_A, const at::Tensor& lora_B,
      const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& gate, const Call& call) {
    const bool save_shrink = lora_B.requires_grad() || (gate && gate->requires_grad());
    variable_list saved(kSavedCount);
    auto y = run_forward(call, save_shrink, &saved[kShrink]);
    if (lora_A.requires_grad()) {
      saved[kX] = x;
    } else if (x.requires_grad()) {
      context->saved_data["x_left_out"] = true;
    }
    saved[kWeight] = call.weight;
    saved[kA] = lora_A;
    saved[kB] = lora_B;
    const auto save = [&](Saved place, const std::optional<at::Tensor>& tensor) {
      if (tensor) {
        saved[place] = *tensor;
      }
    };
    save(kBias, bias);
    save(kGate, gate);
    save(kState, call.rank_state);
    save(kOrder, call.rank_order);
    save(kCounts, call.rank_counts);
    save(kScaling, call.scaling_tensor);
    save(kSeed, call.dropout_seed);
    context->save_for_backward(std::move(saved));
    context->saved_data["scaling"] = call.scaling;
    if (call.dropout_seed) {
      context->saved_data["dropout_p"] = call.dropout_p;
    }
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto handle = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("peftkernels::lora_linear_bwd", "cpu")
                                   .typed<decltype(lora_linear_backward)>();
    const auto saved = context->get_saved_variables();
    // Only tensors that were there have an edge, numbered in order.
    const bool has_bias = saved[kBias].defined();
    const size_t gate_edge = has_bias ? 4 : 3;
    const bool needs_gate = saved[kGate].defined() && context->needs_input_grad(gate_edge);
    const std::array<bool, 6> needs{
        context->needs_input_grad(0), false, context->needs_input_grad(1), context->needs_input_grad(2),
        has_bias && context->needs_input_grad(3), needs_gate};
    const double dropout_p = saved[kSeed].defined() ? context->saved_data["dropout_p"].toDouble() : 0.0;
    auto [x, weight, lora_A, lora_B, bias, gate] = call_operator(
        handle, grads[0], if_defined(saved[kX]), saved[kWeight], saved[kA], saved[kB], if_defined(saved[kBias]),
        if_defined(saved[kShrink]), if_defined(saved[kGate]), if_defined(saved[kState]), if_defined(saved[kOrder]),
        if_defined(saved[kCounts]), context->saved_data["scaling"].toDouble(), if_defined(saved[kScaling]),
        dropout_p, if_defined(saved[kSeed]), needs);
    const auto asked = [&needs](size_t argument, at::Tensor& gradient) {
      return needs[argument] ? std::move(gradient) : at::Tensor();
    };
    variable_list gradients{asked(0, x), asked(2, lora_A), asked(3, lora_B), asked(4, bias), asked(5, gate), {}};
    if (at::GradMode::is_enabled()) {
      const BackwardPass pass{needs, saved[kBias], saved[kShrink], saved[kState], saved[kScaling], saved[kSeed],
                              context->saved_data["scaling"].toDouble(), dropout_p,
                              context->saved_data.count("x_left_out") > 0};
      make_differentiable(
          gradients, {grads[0], saved[kX], saved[kWeight], saved[kA], saved[kB], saved[kGate]}, pass);
    }
    return gradients;
  }
};

at::Tensor lora_linear(const Call& call) {
  const bool differentiable = call.x.requires_grad() || call.lora_A.requires_grad() || call.lora_B.requires_grad() ||
      (call.gate && call.gate->requires_grad()) || (call.bias && call.bias->requires_grad());
  if (differentiable && at::GradMode::is_enabled()) {
    return LoraLinearBackward::apply(call.x, call.lora_A, call.lora_B, call.bias, call.gate, call);
  }
  return run_forward(call, false, nullptr);
}

} // namespace peftkernels::cpu
