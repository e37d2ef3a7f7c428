// What is at work on a call beside plain tensors and plain autograd, which only torch's dispatcher follows.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <tuple>
#include <type_traits>

#include "backend.h"
#include "call.h"

namespace peftkernels {

inline bool contains(c10::DispatchKeySet all, c10::DispatchKeySet some) {
  return (some.raw_repr() & ~all.raw_repr()) == 0;
}

// No dispatch mode, no functorch transform, no tracer and no autocast is at work: they all say so in the thread's
// dispatch keys.
inline bool is_plain_thread(const Backend& backend) {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  constexpr auto may_be_excluded = c10::default_excluded_set | c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  return contains(c10::default_included_set, keys.included_) && contains(may_be_excluded, keys.excluded_) &&
      keys.excluded_.has(backend.autocast);
}

// A dense tensor on the backend's device that nobody intercepts: of no subclass, wrapped by nothing.
inline bool is_plain(const at::Tensor& tensor, const Backend& backend) {
  return contains(backend.plain_keys(), tensor.key_set());
}

// Every tensor of a record is plain, and so is the thread; no profiler watches it either.
template <typename Record>
bool is_plain(const Record& call, const Backend& backend) {
  const auto plain = [&backend](const auto& argument) {
    using Argument = std::decay_t<decltype(argument)>;
    if constexpr (std::is_same_v<Argument, at::Tensor>) {
      return is_plain(argument, backend);
    } else if constexpr (std::is_same_v<Argument, OptionalTensor>) {
      return !argument || is_plain(*argument, backend);
    } else {
      return true;
    }
  };
  return is_plain_thread(backend) && !at::hasCallbacks() &&
      std::apply([&plain](const auto&... arguments) { return (plain(arguments) && ...); }, Record::arguments(call));
}

} // namespace peftkernels
