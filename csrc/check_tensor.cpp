#include "check_tensor.h"

#include <c10/core/TensorOptions.h>

#include <sstream>

namespace peftkernels {

std::ostream& operator<<(std::ostream& to, const Name& name) {
  to << name.text;
  return name.place < 0 ? to : to << '[' << name.place << ']';
}

std::string in_words(at::IntArrayRef shape) {
  std::ostringstream words;
  words << '(';
  for (size_t i = 0; i < shape.size(); ++i) {
    words << (i > 0 ? ", " : "") << shape[i];
  }
  words << (shape.size() == 1 ? ",)" : ")");
  return words.str();
}

std::string in_words(at::ScalarType dtype) {
  return std::string("torch.").append(c10::getDtypeNames(dtype).first);
}

int64_t reach(const at::Tensor& tensor) {
  int64_t last = tensor.storage_offset(), bytes = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    int64_t step = 0;
    if (__builtin_mul_overflow(tensor.size(dim) - 1, tensor.stride(dim), &step) ||
        __builtin_add_overflow(last, step, &last)) {
      return -1;
    }
  }
  const auto itemsize = static_cast<int64_t>(tensor.element_size());
  return __builtin_mul_overflow(last + 1, itemsize, &bytes) ? -1 : bytes;
}

void refuse_place(const Name& name, const at::Tensor& tensor, c10::DispatchKey key) {
  const auto device = c10::dispatchKeyToDeviceType(key);
  TORCH_CHECK_TYPE(tensor.defined(), name, ": found no tensor, expected one");
  TORCH_CHECK_VALUE(
      tensor.device().type() == device, name, ": found device ", tensor.device(), ", expected ",
      c10::DeviceTypeName(device, /*lower_case=*/true));
  TORCH_CHECK_TYPE(!tensor.is_nested(), name, ": found a nested tensor, expected a dense one");
  TORCH_CHECK_TYPE(false, name, ": found layout ", tensor.layout(), ", expected a dense tensor");
}

void refuse_storage(const Name& name, const at::Tensor& tensor) {
  const auto* const impl = tensor.unsafeGetTensorImpl();
  TORCH_CHECK_VALUE(impl->has_storage(), name, ": found a tensor without a storage, expected one");
  TORCH_CHECK_VALUE(
      false, name, ": found a storage of ", tensor.storage().nbytes(), " bytes, expected ", reach(tensor),
      ": it was freed or made smaller");
}

} // namespace peftkernels
