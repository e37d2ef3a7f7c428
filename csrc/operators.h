// The operators of a compiled backend: what torch's dispatcher calls, and how a record gets there.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <type_traits>

#include "backend.h"
#include "call.h"
#include "check_call.h"

namespace peftkernels {

// What the schemas promise of results, which know none that are not there: an empty tensor in the place of each.
Forward::Results complete(const Forward& call, Outputs outputs);
Backward::Results complete(const Backward& call, Gradients gradients);

inline void check_or_raise(const Forward& call, const Backend& backend) {
  check<OnFault::Raise>(call, backend);
}
inline void check_or_raise(const Backward& call, const Backend& backend) {
  check(call, backend);
}

template <typename Record, typename Fields = decltype(Record::arguments(std::declval<Record&>()))>
struct Operator;

// The operator of a record, whose arguments it takes from the record's fields.
template <typename Record, typename... Fields>
struct Operator<Record, std::tuple<Fields&...>> {
  // As a function takes the argument: tensors by reference.
  template <typename Field>
  using Passed = std::conditional_t<
      std::is_same_v<Field, at::Tensor> || std::is_same_v<Field, OptionalTensor>, const Field&, Field>;
  using Function = typename Record::Results(Passed<Fields>...);

  // What the dispatcher calls.
  template <const Backend& backend>
  static typename Record::Results run(Passed<Fields>... arguments) {
    Record call;
    Record::arguments(call) = std::tie(arguments...);
    check_or_raise(call, backend);
    return complete(call, backend.run(call));
  }

  // Calls the backend's overload through the dispatcher.
  static typename Record::Results dispatch(const Record& call, const Backend& backend) {
    const auto overload =
        c10::Dispatcher::singleton().findSchemaOrThrow(Record::kOperator, backend.name).template typed<Function>();
    return std::apply(
        [&overload](const auto&... arguments) { return overload.call(arguments...); }, Record::arguments(call));
  }
};

template <const Backend& backend>
at::Tensor run_shrink(const at::Tensor& x, at::TensorList lora_A) {
  check_shrink(x, lora_A, backend);
  return backend.shrink(x, lora_A);
}

// Registers the backend's overloads of the layer's operators, and makes it that of its device.
template <const Backend& backend>
void register_operators(torch::Library& library) {
  const auto overload = [](const char* name) { return std::string(name) + "." + backend.name; };
  library.impl(overload(Forward::kOperator).c_str(), Operator<Forward>::run<backend>);
  library.impl(overload(Backward::kOperator).c_str(), Operator<Backward>::run<backend>);
  library.impl(overload("peftkernels::lora_shrink").c_str(), run_shrink<backend>);
  set_backend(backend);
}

} // namespace peftkernels
