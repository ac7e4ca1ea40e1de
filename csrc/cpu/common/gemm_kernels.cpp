#include "gemm_amx.h"
#include "gemm_panels.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

constexpr int kRows = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 4;  // rows whose sums of a panel fill the registers
constexpr int64_t kDepth = 384;                                 // words; a longer sum would lose precision

// sum + a * b, of words.
template <typename T>
TF_INLINE Vec<float> multiply_add(Vec<float> sum, Vec<float> a, Vec<float> b) {
  if constexpr (kPerWord<T> == 1) return sum + a * b;
#if TF_VECTOR_BYTES == 64
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#endif
  return sum;
}

TF_INLINE Vec<float> broadcast_word(const float* p) {
  VecOf<float>::index bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return (Vec<float>)(VecOf<float>::bits{} + bits);
}

template <typename T>
int64_t scratch_bytes(int64_t depth, int64_t terms) {
  return (kLanes + kRows * (words_of<T>(depth) + kUnroll * terms)) * sizeof(float);
}

// total[i] += scale * (row i of a times a panel of b), for packed a. Not inlined: beside other code, the
// compiler would not leave all registers to the sums.
template <typename T, int rows>
__attribute__((noinline)) void add_product(const float* a, const float* b, int64_t words, const Vec<float>* scale,
                                           Vec<float> (*total)[kVectors]) {
  Vec<float> sums[rows][kVectors] = {};
  for (int64_t k = 0; k < words; k += kUnroll, a += kUnroll * rows, b += kUnroll * kPanel)
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const Vec<float> first = load(b + u * kPanel), second = load(b + u * kPanel + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const Vec<float> row = broadcast_word(a + u * rows + i);
        sums[i][0] = multiply_add<T>(sums[i][0], row, first);
        sums[i][1] = multiply_add<T>(sums[i][1], row, second);
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) total[i][v] += scale[v] * sums[i][v];
}

// `rows` rows of a, packed; `count` of the rows of out exist.
template <typename T, int rows>
struct Strip {
  const GemmCall& call;
  const float* a;
  T* out[rows];
  int64_t count;

  // Columns j, j + 1, ... of a panel, of run number `run`, whose rows of out begin `run_offset` further.
  void panel(int64_t j, int64_t run, int64_t run_offset) const {
    Vec<float> total[rows][kVectors], scale[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = j + v * kLanes, lanes = call.columns - at;
      const Vec<float> bias = call.bias ? load_lanes(call.bias + at, lanes) : Vec<float>{};
      for (int i = 0; i < rows; ++i)
        total[i][v] = call.accumulate && i < count ? bias + load_lanes(out[i] + run_offset + at, lanes) : bias;
    }
    for (int64_t i = 0; i < count; ++i)
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out[i] + run_offset + j + v * kLanes, 1);
    const float* left = a;
    for (const GemmTerm* term = call.terms; term < call.terms + call.count; ++term) {
      const int64_t words = words_of<T>(term->depth);
      const float* const right =
          static_cast<const float*>(term->b) + (run * round_up(call.columns, kPanel) + j) * words;
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = j + v * kLanes;
        scale[v] = term->scale ? load_lanes(term->scale + at, call.columns - at) : broadcast(1.0f);
      }
      for (int64_t k = 0; k < words; k += kDepth)
        add_product<T, rows>(left + k * rows, right + k * kPanel, words - k < kDepth ? words - k : kDepth, scale,
                             total);
      left += words * rows;
    }
    for (int64_t i = 0; i < count; ++i)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = j + v * kLanes;
        store_lanes(out[i] + run_offset + at, total[i][v], call.columns - at);
      }
  }
};

// Fetches the share of the kRows rows of a from `first` on that has to be in the cache once column j of `columns` is
// done.
template <typename T>
TF_INLINE void prefetch(const GemmCall& call, int64_t first, int64_t j, int64_t columns) {
  const int64_t count = call.rows - first < kRows ? call.rows - first : kRows;
  for (const GemmTerm* term = call.terms; term < call.terms + call.count; ++term) {
    if (term->a.depth_stride != 1) continue;
    const int64_t begin = j * term->depth / columns, end = (j + kPanel) * term->depth / columns;
    for (int64_t i = 0; i < count; ++i) {
      const T* const line =
          static_cast<const T*>(term->a.data) + offset_of(first + i, term->a.line_stride, term->a.line_offsets);
      for (int64_t k = begin; k < end; k += 64 / sizeof(T)) __builtin_prefetch(line + k, 0, 2);
    }
  }
}

template <typename T, int rows>
void run_strip(const GemmCall& call, int64_t first) {
  const int64_t left = call.rows - first;
  float* const a = static_cast<float*>(call.scratch);
  Strip<T, rows> strip{call, a, {}, left < rows ? left : rows};
  float* next = a;
  for (const GemmTerm* term = call.terms; term < call.terms + call.count; ++term) {
    pack_lines<T>(term->a, first, strip.count, term->depth, rows, next);
    next += words_of<T>(term->depth) * rows;
  }
  for (int64_t i = 0; i < strip.count; ++i)
    strip.out[i] = static_cast<T*>(call.out) + offset_of(first + i, call.out_stride, call.out_offsets);
  const int64_t runs = call.run_offsets ? call.runs : 1;
  for (int64_t r = 0; r < runs; ++r)
    for (int64_t j = 0; j < call.columns; j += kPanel) {
      prefetch<T>(call, first + rows, r * call.columns + j, runs * call.columns);
      strip.panel(j, r, call.run_offsets ? call.run_offsets[r] : 0);
    }
}

template <typename T>
void run(const GemmCall& call) {
  int64_t row = 0;
  for (; row + kRows <= call.rows; row += kRows) run_strip<T, kRows>(call, row);
  if (call.rows - row > kRows / 2)
    run_strip<T, kRows>(call, row);
  else if (row < call.rows)
    run_strip<T, kRows / 2>(call, row);
}

template <typename T>
constexpr GemmKernels::ForDtype for_dtype() {
  return {kRows, kPanel, packed_bytes<T>, pack<T>, scratch_bytes<T>, run<T>};
}

constexpr GemmKernels::ForDtype by_tiles() {
#if TF_AMX
  return {kStripRows, kPanel, packed_bytes<bf16, kAmxWords>, pack<bf16, kAmxWords>, AmxBlock::bytes, run_amx};
#else
  return {};
#endif
}

bool takes_bfloat16() {
#if TF_VECTOR_BYTES == 64
  return __builtin_cpu_supports("avx512bf16");
#else
  return true;
#endif
}

}  // namespace

const GemmKernels gemm = {for_dtype<float>(), for_dtype<bf16>(), by_tiles(), takes_bfloat16};

}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
