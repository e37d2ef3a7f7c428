// What is asked of a tensor before its memory is touched. Every rule raises TypeError or ValueError in the words of the
// Python checks ("name: found …, expected …"), or returns false where a caller leaves what does not fit to others.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKey.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <ostream>
#include <string>

namespace peftkernels {

enum class OnFault { Raise, Decline };

// In a function that is templated on `OnFault fault` and returns bool: the condition, or the error.
#define PEFTKERNELS_EXPECT(KIND, condition, ...)   \
  do {                                             \
    if (C10_UNLIKELY(!(condition))) {              \
      if constexpr (fault == OnFault::Raise) {     \
        TORCH_CHECK_##KIND(false, __VA_ARGS__);    \
      }                                            \
      return false;                                \
    }                                              \
  } while (false)

// An argument, or a place in a list of them: "lora_A", "lora_A[2]".
struct Name {
  Name(const char* text, int64_t place = -1) : text(text), place(place) {}

  const char* text;
  int64_t place;
};

std::ostream& operator<<(std::ostream& to, const Name& name);

// (2, 3) and torch.float32, as Python writes them.
std::string in_words(at::IntArrayRef shape);
std::string in_words(at::ScalarType dtype);

constexpr bool is_float(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
}

// The bytes of its storage that a strided tensor reaches up to, or -1 where that is more than there can be.
int64_t reach(const at::Tensor& tensor);

// Returns true if the storage is there and holds all elements: it may have been freed, or made smaller, under the
// tensor.
inline bool is_backed(const at::Tensor& tensor) {
  const auto* const impl = tensor.unsafeGetTensorImpl();
  if (C10_UNLIKELY(!impl->has_storage())) {
    return false;
  }
  if (impl->numel() == 0) {
    return true;
  }
  const auto* const storage = impl->unsafe_storage().unsafeGetStorageImpl();
  int64_t end = 0;
  if (!impl->is_contiguous() ||
      __builtin_mul_overflow(impl->storage_offset() + impl->numel(), static_cast<int64_t>(impl->itemsize()), &end)) {
    end = reach(tensor);
  }
  return end >= 0 && static_cast<int64_t>(storage->nbytes()) >= end && storage->data() != nullptr;
}

// `key` is that of dense tensors on the device where it should be.
[[noreturn]] void refuse_place(const Name& name, const at::Tensor& tensor, c10::DispatchKey key);
[[noreturn]] void refuse_storage(const Name& name, const at::Tensor& tensor);

// A dense tensor on the device of `key`.
template <OnFault fault>
bool is_dense(const Name& name, const at::Tensor& tensor, c10::DispatchKey key) {
  if (C10_UNLIKELY(!tensor.defined() || !tensor.key_set().has(key))) {
    if constexpr (fault == OnFault::Raise) {
      refuse_place(name, tensor, key);
    }
    return false;
  }
  return true;
}

// Its elements can be read. Asked last, when the tensor is known to be the right one.
template <OnFault fault>
bool is_readable(const Name& name, const at::Tensor& tensor) {
  if (C10_UNLIKELY(!is_backed(tensor))) {
    if constexpr (fault == OnFault::Raise) {
      refuse_storage(name, tensor);
    }
    return false;
  }
  return true;
}

template <OnFault fault>
bool has_float_dtype(const Name& name, const at::Tensor& tensor) {
  PEFTKERNELS_EXPECT(
      TYPE, is_float(tensor.scalar_type()), name, ": found dtype ", in_words(tensor.scalar_type()),
      ", expected float32, bfloat16, float16 or float64");
  return true;
}

template <OnFault fault>
bool has_dtype(const Name& name, const at::Tensor& tensor, at::ScalarType dtype) {
  PEFTKERNELS_EXPECT(
      TYPE, tensor.scalar_type() == dtype, name, ": found dtype ", in_words(tensor.scalar_type()), ", expected ",
      in_words(dtype));
  return true;
}

// `meaning` says the shape in letters: "(N, r)".
template <OnFault fault>
bool has_shape(const Name& name, const at::Tensor& tensor, at::IntArrayRef shape, const char* meaning) {
  PEFTKERNELS_EXPECT(
      VALUE, tensor.sizes() == shape, name, ": found shape ", in_words(tensor.sizes()), ", expected ", meaning, " = ",
      in_words(shape));
  return true;
}

} // namespace peftkernels
