// The product of gemm.h in bfloat16 by the tiles of AMX, for gemm_kernels.cpp alone. The right side is packed as for
// vectors: 16 rows of a panel are two tiles side by side. Sums may be long: the result is rounded to bfloat16.
#pragma once

#include "amx.h"
#include "gemm_panels.h"

#if TF_AMX

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

constexpr int64_t kStepElements = 2 * kAmxWords;  // along k, that a tile holds
constexpr int64_t kStripRows = 2 * kAmxRows;      // rows that are computed together
constexpr int64_t kStripBytes = kStripRows * 64;  // of a step, packed
constexpr int64_t kStripsTogether = 8;            // for which a panel stays in the cache
constexpr int64_t kStepsTogether = 16;            // of a panel that do

// The rows of a strip as tiles read them: where they lie, or packed.
struct AmxStrip {
  const char* first;
  int64_t row_bytes, step_bytes;
};

TF_INLINE int64_t amx_steps(int64_t depth) { return words_of<bf16, kAmxWords>(depth) / kAmxWords; }

// Writes step s of row i to out + s * kStripBytes + i * 64, padded with zeros.
TF_INLINE void amx_pack(const GemmLines& m, int64_t first, int64_t count, int64_t depth, char* out) {
  const bf16* const data = static_cast<const bf16*>(m.data);
  const int64_t steps = amx_steps(depth);
  if (m.depth_stride == 1) {
    for (int64_t i = 0; i < kStripRows; ++i) {
      const bf16* const line = data + (i < count ? offset_of(first + i, m.line_stride, m.line_offsets) : 0);
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t left = i < count ? depth - s * kStepElements : 0;
        const Vec<float> words = load_words(line + s * kStepElements, left);
        __builtin_memcpy(out + s * kStripBytes + i * 64, &words, sizeof(words));
      }
    }
    return;
  }
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t half = 0; half < kStripRows; half += kAmxRows) {
      Vec<float> v[kAmxRows];
#pragma GCC unroll 16
      for (int k = 0; k < kAmxWords; ++k) {
        const int64_t element = s * kStepElements + 2 * k, left = depth - element;
        const bf16* const at = data + first + half + element * m.depth_stride;
        v[k] = left > 0 && half < count ? words_across(at, m.depth_stride, left, count - half) : Vec<float>{};
      }
      interleave<float, kAmxRows>(v);
#pragma GCC unroll 16
      for (int i = 0; i < kAmxRows; ++i) __builtin_memcpy(out + s * kStripBytes + (half + i) * 64, &v[i], sizeof(v[i]));
    }
}

TF_INLINE AmxStrip amx_strip(const GemmLines& m, int64_t first, int64_t count, int64_t depth, char* scratch) {
  const int64_t row_bytes = m.line_stride * sizeof(bf16);
  if (m.depth_stride == 1 && !m.line_offsets && count == kStripRows && depth % kStepElements == 0)
    return {static_cast<const char*>(m.data) + first * row_bytes, row_bytes, 64};
  amx_pack(m, first, count, depth, scratch);
  return {scratch, 64, kStripBytes};
}

// sums [kStripRows, kPanel] (+)= `steps` of the product of a strip and a panel.
TF_INLINE void amx_product(const AmxStrip& a, int64_t begin, int64_t steps, const float* b, bool accumulate,
                           float* sums) {
  constexpr int64_t kRowBytes = kPanel * sizeof(float);
  float* const lower = sums + kAmxRows * kPanel;
  if (accumulate) {
    amx_load<0>(sums, kRowBytes);
    amx_load<1>(sums + kAmxWords, kRowBytes);
    amx_load<2>(lower, kRowBytes);
    amx_load<3>(lower + kAmxWords, kRowBytes);
  } else {
    amx_zero<0>();
    amx_zero<1>();
    amx_zero<2>();
    amx_zero<3>();
  }
  const char *upper_rows = a.first + begin * a.step_bytes, *lower_rows = upper_rows + kAmxRows * a.row_bytes;
  for (int64_t s = 0; s < steps; ++s, upper_rows += a.step_bytes, lower_rows += a.step_bytes) {
    amx_load<6>(b + s * kAmxWords * kPanel, kRowBytes);
    amx_load<7>(b + s * kAmxWords * kPanel + kAmxWords, kRowBytes);
    amx_load<4>(upper_rows, a.row_bytes);
    amx_load<5>(lower_rows, a.row_bytes);
    amx_multiply<0, 4, 6>();
    amx_multiply<1, 4, 7>();
    amx_multiply<2, 5, 6>();
    amx_multiply<3, 5, 7>();
  }
  amx_store<0>(sums, kRowBytes);
  amx_store<1>(sums + kAmxWords, kRowBytes);
  amx_store<2>(lower, kRowBytes);
  amx_store<3>(lower + kAmxWords, kRowBytes);
}

// Some strips and their sums of a panel, all of which stay in the cache.
struct AmxBlock {
  float* sums;       // [kStripsTogether, kStripRows, kPanel]
  float* totals;     // the same, of several scaled terms
  AmxStrip* strips;  // [terms, kStripsTogether]
  char* packed;

  static constexpr int64_t kSumsBytes = kStripsTogether * kStripRows * kPanel * sizeof(float);
  static int64_t strips_bytes(int64_t terms) { return round_up(terms * kStripsTogether * sizeof(AmxStrip), 64); }
  static int64_t bytes(int64_t depth, int64_t terms) {
    return 2 * kSumsBytes + strips_bytes(terms) + (amx_steps(depth) + terms) * kStripsTogether * kStripBytes;
  }

  AmxBlock(void* memory, int64_t terms) {
    char* const first = static_cast<char*>(memory);
    sums = reinterpret_cast<float*>(first);
    totals = reinterpret_cast<float*>(first + kSumsBytes);
    strips = reinterpret_cast<AmxStrip*>(first + 2 * kSumsBytes);
    packed = first + 2 * kSumsBytes + strips_bytes(terms);
  }
};

// Adds a term's sums of a panel, whose first column is j, to the bias and to what came before; the last goes to the
// rows of out.
template <typename F>
TF_INLINE void amx_finish(const GemmCall& call, const AmxBlock& block, int64_t t, int64_t j, int64_t rows,
                          F row_of_out) {
  const int64_t left = call.columns - j;
  const float* const scales = call.terms[t].scale;
  const bool begins = t == 0 || !scales, ends = t + 1 == call.count;
  Vec<float> scale[kVectors], bias[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = v * kLanes;
    scale[v] = scales ? load_lanes(scales + j + at, left - at) : broadcast(1.0f);
    bias[v] = begins && call.bias ? load_lanes(call.bias + j + at, left - at) : Vec<float>{};
  }
  for (int64_t i = 0; i < rows; ++i) {
    bf16* const out = row_of_out(i) + j;
    Vec<float> total[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = i * kPanel + v * kLanes;
      total[v] = bias[v] + scale[v] * load(block.sums + at);
      if (!begins) total[v] += load(block.totals + at);
      if (begins && call.accumulate) total[v] += load_lanes(out + v * kLanes, left - v * kLanes);
    }
    if (!ends)
      for (int v = 0; v < kVectors; ++v) store(block.totals + i * kPanel + v * kLanes, total[v]);
    else if (left >= kPanel)
      store_pair(out, total[0], total[1]);
    else
      for (int v = 0; v < kVectors; ++v) store_lanes(out + v * kLanes, total[v], left - v * kLanes);
  }
}

void run_amx(const GemmCall& call) {
  constexpr int64_t kRowsTogether = kStripsTogether * kStripRows;
  amx_configure_whole();
  const AmxBlock block(call.scratch, call.count);
  for (int64_t first = 0; first < call.rows; first += kRowsTogether) {
    const int64_t rows = call.rows - first < kRowsTogether ? call.rows - first : kRowsTogether;
    const int64_t strips = (rows + kStripRows - 1) / kStripRows;
    char* packed = block.packed;
    for (int64_t t = 0; t < call.count; ++t)
      for (int64_t s = 0; s < strips; ++s, packed += amx_steps(call.terms[t].depth) * kStripBytes) {
        const int64_t row = s * kStripRows, count = rows - row < kStripRows ? rows - row : kStripRows;
        block.strips[t * kStripsTogether + s] =
            amx_strip(call.terms[t].a, first + row, count, call.terms[t].depth, packed);
      }
    const int64_t runs = call.run_offsets ? call.runs : 1;
    for (int64_t r = 0; r < runs; ++r) {
      bf16* const out = static_cast<bf16*>(call.out) + (call.run_offsets ? call.run_offsets[r] : 0);
      const auto row_of_out = [&](int64_t i) { return out + offset_of(first + i, call.out_stride, call.out_offsets); };
      for (int64_t j = 0; j < call.columns; j += kPanel) {
        for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(row_of_out(i) + j, 1);
        for (int64_t t = 0; t < call.count; ++t) {
          const GemmTerm& term = call.terms[t];
          const int64_t words = words_of<bf16, kAmxWords>(term.depth), steps = words / kAmxWords;
          const float* const b = static_cast<const float*>(term.b) + (r * round_up(call.columns, kPanel) + j) * words;
          int64_t k = 0;
          do {  // once at least: a term of no depth is a sum of zeros
            for (int64_t s = 0; s < strips; ++s)
              amx_product(block.strips[t * kStripsTogether + s], k,
                          steps - k < kStepsTogether ? steps - k : kStepsTogether, b + k * kAmxWords * kPanel,
                          k > 0 || (t > 0 && !term.scale), block.sums + s * kStripRows * kPanel);
          } while ((k += kStepsTogether) < steps);
          if (term.scale || t + 1 == call.count) amx_finish(call, block, t, j, rows, row_of_out);
        }
      }
    }
  }
  amx_release();
}

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion

#endif
