// A set of dtypes, handed over as data: by a backend, and by Python.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace peftkernels {

class DtypeSet {
 public:
  constexpr DtypeSet() = default;
  constexpr DtypeSet(std::initializer_list<at::ScalarType> dtypes) {
    for (const auto dtype : dtypes) {
      bits_ |= bit(dtype);
    }
  }
  explicit DtypeSet(const std::vector<at::ScalarType>& dtypes) {
    for (const auto dtype : dtypes) {
      bits_ |= bit(dtype);
    }
  }

  constexpr bool contains(at::ScalarType dtype) const {
    return (bits_ & bit(dtype)) != 0;
  }

  // "float32 or bfloat16"
  std::string in_words() const;

 private:
  static constexpr unsigned kCount = static_cast<unsigned>(at::ScalarType::NumOptions);
  static_assert(kCount <= 64, "one bit for each dtype");

  static constexpr uint64_t bit(at::ScalarType dtype) {
    return uint64_t{1} << static_cast<unsigned>(dtype);
  }

  uint64_t bits_ = 0;
};

} // namespace peftkernels
