#include "weight_checksums.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/gemm/avx512.h"
#include "cpu/gemm/parallel.h"
#include "cpu/gemm/product.h"

#if !defined(PEFTKERNELS_BUILDS_AVX512) && defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace peftkernels::cpu {
namespace {

constexpr int64_t kStretch = 64;
constexpr int64_t kWords = kStretch / 8;
// Diagonals that are summed together: the neighbouring stretches of a line.
constexpr int64_t kTogether = 4;
// Lines go to as many sums in turn, each of which waits for its own last product only.
constexpr int64_t kTurns = 4;
// Fewer bytes than this are read in less time than waking a second thread takes.
constexpr int64_t kSerialBytes = int64_t{1} << 20;

// s becomes (s + word) times 2^-32 modulo kFactor · 2^32 - 1, a safe prime.
constexpr uint64_t kFactor = 4294883355;

// The stretches of some diagonals, line after line.
struct Walk {
  const char* stretch(int64_t ahead) const {
    const int64_t place = at + ahead < stretches ? at + ahead : at + ahead - stretches;
    return line + std::min(place * kStretch, last);
  }
  void next() {
    at = at + 1 == stretches ? 0 : at + 1;
    line += stride;
  }

  const char* line;
  int64_t stride, at, stretches, last; // `last` is where a line's last stretch begins, which may share bytes with others
};

void add(const char* stretch, uint64_t* sums) {
#if defined(__SSE2__)
  const __m128i factor = _mm_set1_epi64x(kFactor);
  for (int64_t word = 0; word < kWords; word += 2) {
    auto* const to = reinterpret_cast<__m128i*>(sums + word);
    const auto* const from = reinterpret_cast<const __m128i*>(stretch + 8 * word);
    const __m128i sum = _mm_add_epi64(_mm_loadu_si128(to), _mm_loadu_si128(from));
    _mm_storeu_si128(to, _mm_add_epi64(_mm_mul_epu32(sum, factor), _mm_srli_epi64(sum, 32)));
  }
#else
  for (int64_t word = 0; word < kWords; ++word) {
    uint64_t value;
    std::memcpy(&value, stretch + 8 * word, 8);
    const uint64_t sum = sums[word] + value;
    sums[word] = (sum & 0xFFFFFFFF) * kFactor + (sum >> 32);
  }
#endif
}

// What the turns' sums of D diagonals come to: those of the later turns are added to the first one's as if read.
void fold(uint64_t (&sums)[kTurns][kTogether * kWords], int64_t diagonals, uint64_t* to) {
  for (int64_t d = 0; d < diagonals; ++d) {
    for (int64_t turn = 1; turn < kTurns; ++turn) {
      add(reinterpret_cast<const char*>(sums[turn] + d * kWords), sums[0] + d * kWords);
    }
  }
  std::copy_n(sums[0], diagonals * kWords, to);
}

void sum_lines(Walk walk, int64_t lines, int64_t diagonals, uint64_t* to) {
  uint64_t sums[kTurns][kTogether * kWords] = {};
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t d = 0; d < diagonals; ++d) {
      add(walk.stretch(d), sums[line % kTurns] + d * kWords);
    }
    walk.next();
  }
  fold(sums, diagonals, to);
}

#ifdef PEFTKERNELS_BUILDS_AVX512

PEFTKERNELS_AVX512_INLINE __m512i added(__m512i sum, __m512i stretch) {
  sum = _mm512_add_epi64(sum, stretch);
  return _mm512_add_epi64(_mm512_mul_epu32(sum, _mm512_set1_epi64(kFactor)), _mm512_srli_epi64(sum, 32));
}

// One line of each of the first `turns` turns.
template <int D>
PEFTKERNELS_AVX512_INLINE void add_turns(Walk& walk, int64_t turns, __m512i (&sums)[kTurns][D]) {
#pragma GCC unroll 4
  for (int turn = 0; turn < kTurns; ++turn) {
    if (turn < turns) {
#pragma GCC unroll 4
      for (int d = 0; d < D; ++d) {
        sums[turn][d] = added(sums[turn][d], _mm512_loadu_si512(walk.stretch(d)));
      }
      walk.next();
    }
  }
}

// As sum_lines, with the sums in registers.
template <int D>
PEFTKERNELS_AVX512 void sum_lines_avx512(Walk walk, int64_t lines, uint64_t* to) {
  __m512i sums[kTurns][D];
#pragma GCC unroll 4
  for (int turn = 0; turn < kTurns; ++turn) {
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) {
      sums[turn][d] = _mm512_setzero_si512();
    }
  }
  int64_t line = 0;
  for (; line + kTurns <= lines; line += kTurns) {
    add_turns<D>(walk, kTurns, sums);
  }
  add_turns<D>(walk, lines - line, sums);
#pragma GCC unroll 4
  for (int d = 0; d < D; ++d) {
    const __m512i first = added(added(sums[0][d], sums[1][d]), sums[2][d]);
    _mm512_storeu_si512(to + d * kWords, added(first, sums[3][d]));
  }
}

void sum_lines_avx512(const Walk& walk, int64_t lines, int64_t diagonals, uint64_t* to) {
  static_assert(kTurns == 4 && kTogether == 4);
  if (diagonals == kTogether) {
    sum_lines_avx512<kTogether>(walk, lines, to);
    return;
  }
  for (int64_t d = 0; d < diagonals; ++d) {
    Walk single = walk;
    single.at = (walk.at + d) % walk.stretches;
    sum_lines_avx512<1>(single, lines, to + d * kWords);
  }
}

#endif

} // namespace

struct WeightChecksums::Part {
  int64_t first_line, lines, first_diagonal, diagonals;
};

WeightChecksums::WeightChecksums(const at::Tensor& weight) : element_bytes_(weight.element_size()) {
  const bool by_rows = weight.stride(1) <= weight.stride(0);
  const int64_t line = by_rows ? 0 : 1, along = 1 - line;
  lines_ = weight.size(line);
  line_bytes_ = weight.size(along) * element_bytes_;
  line_stride_ = weight.stride(line) * element_bytes_;
  element_stride_ = weight.stride(along) * element_bytes_;
  stretches_ = lines_ == 0 ? 0 : divide_up(line_bytes_, kStretch);
  sums_.resize(static_cast<size_t>(blocks() * stretches_ * kWords));
  const auto* const data = static_cast<const char*>(weight.const_data_ptr());
  for_each_part({0, stretches_, 0, blocks()}, [&](const Part& part, int64_t place) {
    sum(data, part, sums_.data() + place);
  });
}

bool WeightChecksums::match(const void* data, const Share& share) const {
  std::atomic<bool> same{true};
  for_each_part(share, [&](const Part& part, int64_t place) {
    uint64_t sums[kTogether * kWords];
    sum(static_cast<const char*>(data), part, sums);
    if (std::memcmp(sums, sums_.data() + place, static_cast<size_t>(part.diagonals * kStretch)) != 0) {
      same.store(false, std::memory_order_relaxed);
    }
  });
  return same;
}

// use(part, place of its sums) for the parts of a share.
template <typename Use>
void WeightChecksums::for_each_part(const Share& share, const Use& use) const {
  const int64_t until_end = std::min(share.diagonals, stretches_ - share.diagonal);
  const int64_t parts_until_end = divide_up(until_end, kTogether);
  const int64_t parts = parts_until_end + divide_up(share.diagonals - until_end, kTogether);
  const auto task = [&](int64_t block, int64_t part) {
    const bool again = part >= parts_until_end;
    const int64_t begin = again ? (part - parts_until_end) * kTogether : share.diagonal + part * kTogether;
    const int64_t end = std::min(begin + kTogether, again ? share.diagonals - until_end : share.diagonal + until_end);
    const int64_t line = block * kBlockLines;
    use(Part{line, std::min(kBlockLines, lines_ - line), begin, end - begin}, (block * stretches_ + begin) * kWords);
  };
  if (share.blocks * kBlockLines * share.diagonals * kStretch >= kSerialBytes) {
    run_tasks(
        share.blocks * parts, at::get_num_threads(), [&](int64_t i) { task(share.block + i / parts, i % parts); }, [] {});
    return;
  }
  for (int64_t block = share.block; block < share.block + share.blocks; ++block) {
    for (int64_t part = 0; part < parts; ++part) {
      task(block, part);
    }
  }
}

void WeightChecksums::sum(const char* data, const Part& part, uint64_t* to) const {
  if (element_stride_ != element_bytes_ || line_bytes_ < kStretch) {
    sum_elements(data, part, to);
    return;
  }
  const Walk walk{
      data + part.first_line * line_stride_, line_stride_, (part.first_line + part.first_diagonal) % stretches_,
      stretches_, line_bytes_ - kStretch};
#ifdef PEFTKERNELS_BUILDS_AVX512
  if (has_avx512_kernels<float>()) {
    sum_lines_avx512(walk, part.lines, part.diagonals, to);
    return;
  }
#endif
  sum_lines(walk, part.lines, part.diagonals, to);
}

// For lines whose elements lie apart, or that are shorter than a stretch.
void WeightChecksums::sum_elements(const char* data, const Part& part, uint64_t* to) const {
  uint64_t sums[kTurns][kTogether * kWords] = {};
  const int64_t in_stretch = kStretch / element_bytes_, in_line = line_bytes_ / element_bytes_;
  for (int64_t line = 0; line < part.lines; ++line) {
    const int64_t row = part.first_line + line;
    for (int64_t d = 0; d < part.diagonals; ++d) {
      const int64_t begin = (row + part.first_diagonal + d) % stretches_ * in_stretch;
      char stretch[kStretch] = {};
      for (int64_t i = begin; i < std::min(begin + in_stretch, in_line); ++i) {
        std::memcpy(
            stretch + (i - begin) * element_bytes_, data + row * line_stride_ + i * element_stride_,
            static_cast<size_t>(element_bytes_));
      }
      add(stretch, sums[line % kTurns] + d * kWords);
    }
  }
  fold(sums, part.diagonals, to);
}

} // namespace peftkernels::cpu
