// A few elements of a weight, by which a change that no version counter tells of is noticed.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <cstring>

namespace peftkernels::cpu {

// The bits of elements spread over a weight (N, K), and where they lie.
class WeightSample {
 public:
  explicit WeightSample(const at::Tensor& weight) : size_(weight.element_size()) {
    const int64_t rows = weight.size(0), columns = weight.size(1);
    if (rows * columns == 0) {
      return;
    }
    // Rows in even steps and columns in steps of the golden ratio (as a fraction of 2^32): a band of either that holds
    // none is narrow.
    constexpr uint64_t kGolden = 2654435769, kOne = uint64_t{1} << 32;
    for (int64_t i = 0; i < kCount; ++i) {
      const int64_t row = (2 * i + 1) * rows / (2 * kCount);
      const auto part = static_cast<double>(static_cast<uint64_t>(i + 1) * kGolden % kOne) / kOne;
      const auto column = static_cast<int64_t>(part * static_cast<double>(columns));
      offsets_[i] = (row * weight.stride(0) + column * weight.stride(1)) * size_;
    }
    bits_ = read(weight.const_data_ptr());
  }

  // Whether a weight of the same shape and dtype that begins at `data` has the same elements at the same places. All
  // are read before any is compared, so that the reads wait for memory together.
  bool matches(const void* data) const {
    return data == nullptr || read(data) == bits_;
  }

 private:
  static constexpr int64_t kCount = 32;
  using Bits = std::array<uint64_t, kCount>;

  Bits read(const void* data) const {
    const auto* const bytes = static_cast<const char*>(data);
    return size_ == 2 ? read_as<uint16_t>(bytes) : size_ == 4 ? read_as<uint32_t>(bytes) : read_as<uint64_t>(bytes);
  }

  template <typename T>
  Bits read_as(const char* bytes) const {
    Bits bits;
    for (int64_t i = 0; i < kCount; ++i) {
      T value;
      std::memcpy(&value, bytes + offsets_[i], sizeof(T));
      bits[i] = value;
    }
    return bits;
  }

  int64_t size_;
  std::array<int64_t, kCount> offsets_{};
  Bits bits_{};
};

} // namespace peftkernels::cpu
