#include "autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <type_traits>
#include <utility>

#include "operators.h"
#include "plain.h"

namespace peftkernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Outputs named(Forward::Results results) {
  return {std::move(std::get<0>(results)), std::move(std::get<1>(results))};
}

Gradients named(Backward::Results results) {
  return std::apply([](auto&... gradient) { return Gradients{std::move(gradient)...}; }, results);
}

// Below autograd, which the functions of this file are themselves: its fallback for operators would box every argument.
// Modes that intercept operators come after it and still do.
Outputs run_forward(const Forward& call, const Backend& backend) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return at::hasCallbacks() ? named(Operator<Forward>::dispatch(call, backend)) : backend.run(call);
}

// What hooks of saved tensors and modes have made of the call since the forward pass is anybody's guess.
Gradients run_backward(const Backward& call) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto& backend = backend_of(call.grad_y);
  if (!is_plain(call, backend)) {
    return named(Operator<Backward>::dispatch(call, backend));
  }
  check(call, backend);
  return backend.run(call);
}

// The arguments of a backward pass between the passes: its tensors in autograd's care, its numbers beside them.

using Fields = decltype(Backward::arguments(std::declval<Backward&>()));

template <typename Field>
constexpr bool is_tensor = std::is_same_v<Field, at::Tensor> || std::is_same_v<Field, OptionalTensor>;

template <typename... All>
constexpr size_t count_tensors(const std::tuple<All&...>* /*fields*/) {
  return (size_t{is_tensor<All>} + ...);
}

constexpr size_t kTensors = count_tensors(static_cast<const Fields*>(nullptr));
constexpr size_t kNumbers = std::tuple_size_v<Fields> - kTensors;

void save(AutogradContext* context, Backward call) {
  variable_list tensors(kTensors);
  std::array<at::IValue, kNumbers> numbers;
  size_t tensor = 0, number = 0;
  const auto put = [&](auto& argument) {
    using Argument = std::decay_t<decltype(argument)>;
    if constexpr (std::is_same_v<Argument, at::Tensor>) {
      tensors[tensor++] = std::move(argument);
    } else if constexpr (std::is_same_v<Argument, OptionalTensor>) {
      if (auto& place = tensors[tensor++]; argument) {
        place = *std::move(argument);
      }
    } else if constexpr (std::is_same_v<Argument, double>) {
      numbers[number++] = argument;
    } else {
      int64_t needs = 0;
      for (size_t place = 0; place < kDifferentiable; ++place) {
        needs |= int64_t{argument[place]} << place;
      }
      numbers[number++] = needs;
    }
  };
  std::apply([&put](auto&... arguments) { (put(arguments), ...); }, Backward::arguments(call));
  context->save_for_backward(std::move(tensors));
  context->saved_data["numbers"] =
      std::apply([](auto&... each) { return c10::ivalue::Tuple::create(std::move(each)...); }, numbers);
}

Backward saved(AutogradContext* context) {
  auto tensors = context->get_saved_variables();
  const auto& numbers = context->saved_data["numbers"].toTupleRef().elements();
  Backward call;
  size_t tensor = 0, number = 0;
  const auto get = [&](auto& argument) {
    using Argument = std::decay_t<decltype(argument)>;
    if constexpr (std::is_same_v<Argument, at::Tensor>) {
      argument = std::move(tensors[tensor++]);
    } else if constexpr (std::is_same_v<Argument, OptionalTensor>) {
      if (auto& found = tensors[tensor++]; found.defined()) {
        argument = std::move(found);
      }
    } else if constexpr (std::is_same_v<Argument, double>) {
      argument = numbers[number++].toDouble();
    } else {
      const auto needs = numbers[number++].toInt();
      for (size_t place = 0; place < kDifferentiable; ++place) {
        argument[place] = (needs >> place & 1) != 0;
      }
    }
  };
  std::apply([&get](auto&... arguments) { (get(arguments), ...); }, Backward::arguments(call));
  return call;
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
struct DifferentiableGradients : torch::autograd::Function<DifferentiableGradients> {
  // `inputs` are those that there are, since autograd takes no list with gaps.
  static variable_list forward(
      AutogradContext* context, at::TensorList gradients, at::TensorList /*inputs*/, const Backward& call,
      bool x_left_out) {
    save(context, call);
    context->saved_data["x_left_out"] = x_left_out;
    variable_list views;
    for (const auto& gradient : gradients) {
      views.push_back(gradient.view_as(gradient));
    }
    return views;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto call = saved(context);
    // Only gradients that are needed have a place among `grads`.
    Gradients weights;
    auto next = grads.begin();
    for (size_t place = 0; place < kDifferentiable; ++place) {
      if (call.needs[place]) {
        weights[place] = *next++;
      }
    }
    TORCH_CHECK(second_derivatives, "lora_linear: nothing was set that computes second derivatives");
    const auto derivatives = second_derivatives(weights, call, context->saved_data["x_left_out"].toBool());
    variable_list results(grads.size());
    const auto inputs = inputs_of(call);
    for (size_t place = 0; place < inputs.size(); ++place) {
      if (inputs[place].defined()) {
        results.push_back(derivatives[place]);
      }
    }
    results.resize(results.size() + 2); // of what is no list of tensors
    return results;
  }
};

// Lets the gradients that are there be differentiated again.
void make_differentiable(Gradients& gradients, const Backward& call, bool x_left_out) {
  const auto needed = only_defined(gradients), inputs = only_defined(inputs_of(call));
  auto views = DifferentiableGradients::apply(at::TensorList(needed), at::TensorList(inputs), call, x_left_out);
  auto next = views.begin();
  for (auto& gradient : gradients) {
    if (gradient.defined()) {
      gradient = *next++;
    }
  }
}

} // namespace

Inputs inputs_of(const Backward& call) {
  const auto or_undefined = [](const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); };
  return {
      call.grad_y, or_undefined(call.x), call.weight.dense, call.adapter.A, call.adapter.B,
      or_undefined(call.adapter.gate)};
}

void set_second_derivatives(SecondDerivatives function) {
  second_derivatives = std::move(function);
}

// Outside the unnamed namespace because autograd prints this name as that of y's node.
struct LoraLinearBackward : torch::autograd::Function<LoraLinearBackward> {
  // The tensors that autograd differentiates come first; they are those of `call`.
  static at::Tensor forward(
      AutogradContext* context, const at::Tensor& x, const at::Tensor& lora_A, const at::Tensor& /*lora_B*/,
      const OptionalTensor& bias, const OptionalTensor& /*gate*/, const Forward& call, const Backend& backend) {
    auto [y, shrink] = run_forward(call, backend);
    Backward pass{{}, {}, call.weight, call.adapter, bias, {}, {}};
    if (call.save_shrink) {
      pass.shrink = call.shrink ? *call.shrink : std::move(shrink);
    }
    if (lora_A.requires_grad()) {
      pass.x = x;
    } else if (x.requires_grad()) {
      context->saved_data["x_left_out"] = true;
    }
    save(context, std::move(pass));
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto call = saved(context);
    call.grad_y = grads[0];
    // Only tensors that were there have an edge, numbered in order.
    size_t edge = 0;
    const auto needs_next = [&](bool is_there) { return is_there && context->needs_input_grad(edge++); };
    for (const size_t place : {kX, kA, kB}) {
      call.needs[place] = needs_next(true);
    }
    call.needs[kBias] = needs_next(call.bias.has_value());
    call.needs[kGate] = needs_next(call.adapter.gate.has_value());
    auto gradients = run_backward(call);
    for (size_t place = 0; place < kDifferentiable; ++place) {
      if (!call.needs[place]) {
        gradients[place].reset();
      }
    }
    if (at::GradMode::is_enabled()) {
      make_differentiable(gradients, call, context->saved_data.count("x_left_out") > 0);
    }
    return {gradients[kX], gradients[kA], gradients[kB], gradients[kBias], gradients[kGate], {}, {}};
  }
};

at::Tensor lora_linear(Forward& call, const Backend& backend) {
  const auto requires_grad = [](const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); };
  const auto& adapter = call.adapter;
  const bool saves_shrink = adapter.B.requires_grad() || requires_grad(adapter.gate);
  const bool differentiable =
      saves_shrink || call.x.requires_grad() || adapter.A.requires_grad() || requires_grad(call.bias);
  if (differentiable && at::GradMode::is_enabled()) {
    call.save_shrink = saves_shrink;
    return LoraLinearBackward::apply(
        call.x, adapter.A, adapter.B, call.bias, adapter.gate, std::as_const(call), backend);
  }
  return run_forward(call, backend).y;
}

} // namespace peftkernels
