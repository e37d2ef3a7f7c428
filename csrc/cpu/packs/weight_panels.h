// A frozen weight's panels for one call.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/gemm/parallel.h"
#include "cpu/gemm/product.h"
#include "cpu/gemm/scratch.h"
#include "pack.h"
#include "pack_cache.h"

namespace peftkernels::cpu {

// The panels lie in a pack where there is memory for one. Else each is packed when it is asked for, in little memory
// and for every block of rows anew.
template <typename T>
class WeightPanels {
 public:
  WeightPanels() = default;
  // `rows` of x or G are multiplied with them. The weight stays where it is meanwhile.
  WeightPanels(const at::Tensor& weight, Direction direction, int64_t rows)
      : weight_(&weight),
        direction_(direction),
        size_(round_up(weight.size(direction == Direction::Forward ? 1 : 0), depth_group<T>()) * kPanelColumns),
        pack_(packed_weight(weight, kDtype, direction, rows)),
        packed_(pack_.defined() ? pack_.const_data_ptr<T>() : nullptr) {}

  // Until the calling thread asks for another one.
  const T* operator[](int64_t panel) const {
    if (packed_ != nullptr) {
      return packed_ + panel * size_;
    }
    auto* const to = thread_scratch<T, Scratch::WeightPanel>(size_);
    pack_panel(*weight_, kDtype, direction_, depth_group<T>(), panel, to);
    return to;
  }

  // The panel where it can be read ahead of its use, else null.
  const T* ahead(int64_t panel) const {
    return packed_ == nullptr ? nullptr : packed_ + panel * size_;
  }

 private:
  static constexpr auto kDtype = c10::CppTypeToScalarType<T>::value;

  const at::Tensor* weight_ = nullptr;
  Direction direction_ = Direction::Forward;
  int64_t size_ = 0;
  at::Tensor pack_;
  const T* packed_ = nullptr;
};

} // namespace peftkernels::cpu
