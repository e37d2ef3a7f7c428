#include "dtype_set.h"

namespace peftkernels {

std::string DtypeSet::in_words() const {
  std::vector<std::string> names;
  for (unsigned number = 0; number < kCount; ++number) {
    const auto dtype = static_cast<at::ScalarType>(number);
    if (contains(dtype)) {
      names.emplace_back(c10::getDtypeNames(dtype).first);
    }
  }
  std::string words;
  for (size_t i = 0; i < names.size(); ++i) {
    words += (i == 0 ? "" : i + 1 < names.size() ? ", " : " or ") + names[i];
  }
  return words;
}

} // namespace peftkernels
