// Working memory that a thread keeps between calls.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <memory>
#include <new>

namespace peftkernels::cpu {

// What a thread's scratch buffers hold; one name, one buffer, so that no two uses at the same time share one.
enum class Scratch {
  Rows, // rows of x or G, dropped or padded
  Products, // fp32 products of a row block
  Tile, // fp32 sums of an output tile
  Pairs, // operands in the layout that brgemm wants
  ShrinkOperand, // A as right operand
  TailOperand, // B with its factors as right operand
  TailPanel, // one panel of that
  TailRows, // left operand of the tail
  Bias, // bias in fp32
  WeightPanel, // a panel of a weight for whose pack there is no memory
  FactorA, // A of the live ranks, in the dtype of computation
  WideRow, // a row of B in fp32, and what is gathered from it
  FactorB, // B of the live ranks, in the dtype of computation
  ActiveShrink, // S of the active ranks as left operand
  PairedExpand, // H with its factors in pairs of rows
  GateRow, // S of one row in fp32
  DroppedShare, // the adapter's share of a tile of ∂x
  Kept, // bits of the elements that dropout keeps
  Scores, // Ī·Ū of a factor
  FactorElements, // a factor in the dtype of arithmetic, and its gradient in the same order
  FactorRows, // a factor's ranks as rows
  Gram, // products of a factor's ranks with each other
  FactorGradient, // the gradient of the orthogonality term by a factor, ranks as rows
};

// `count` elements of the calling thread, aligned to cache lines; contents are undefined.
template <typename T, Scratch Slot>
T* thread_scratch(int64_t count) {
  constexpr std::align_val_t kAlignment{64};
  struct Release {
    void operator()(T* memory) const {
      ::operator delete(memory, kAlignment);
    }
  };
  static thread_local std::unique_ptr<T, Release> memory;
  static thread_local int64_t capacity = 0;
  if (capacity < count) {
    // Nothing is there, should the allocation fail.
    memory.reset();
    capacity = 0;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    memory.reset(static_cast<T*>(::operator new(bytes, kAlignment, std::nothrow)));
    TORCH_CHECK_WITH(
        OutOfMemoryError, memory != nullptr, "lora_linear: cannot allocate ", bytes, " bytes of working memory");
    capacity = count;
  }
  return memory.get();
}

} // namespace peftkernels::cpu
