// Checksums of a weight, by which a change that no version counter tells of is noticed.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace peftkernels::cpu {

// A weight is read along its lines: its rows, or its columns where those lie together in memory. Every line is cut into
// stretches of 64 bytes, and diagonal d is stretch (i + d) mod n of each line i, where n is the number of stretches. So
// one diagonal has a part of every line, and all of them have every element. Each has a checksum of its own: eight
// polynomials modulo a prime near 2^64, of the words at each place of its stretches, in which no two words count alike.
class WeightChecksums {
 public:
  // Lines that have checksums of their own: threads share in a diagonal by them, and a call may read a part of one.
  static constexpr int64_t kBlockLines = 256;

  // Some diagonals, from `diagonal` on and at last from the first on again, of some blocks of lines.
  struct Share {
    int64_t diagonal, diagonals, block, blocks;
  };

  explicit WeightChecksums(const at::Tensor& weight);

  int64_t diagonals() const {
    return stretches_;
  }
  int64_t blocks() const {
    return (lines_ + kBlockLines - 1) / kBlockLines;
  }
  // Of the weight.
  int64_t bytes() const {
    return lines_ * line_bytes_;
  }
  // Returns true if a share of the weight, which begins at `data` now, is as it was.
  bool match(const void* data, const Share& share) const;

  bool operator==(const WeightChecksums& other) const {
    return sums_ == other.sums_;
  }

 private:
  static constexpr int64_t kLanes = 8; // 64-bit sums, one for each word of a stretch

  struct Part; // up to kTogether diagonals of a block of lines
  template <typename Use>
  void for_each_part(const Share& share, const Use& use) const;
  void sum(const char* data, const Part& part, uint64_t* to) const;
  void sum_elements(const char* data, const Part& part, uint64_t* to) const;

  int64_t lines_, line_bytes_, line_stride_, element_bytes_, element_stride_, stretches_; // strides in bytes
  std::vector<uint64_t> sums_; // [block of lines][diagonal][kLanes]
};

} // namespace peftkernels::cpu
