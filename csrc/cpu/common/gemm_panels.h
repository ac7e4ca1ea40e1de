// What the products of gemm.h share: words, and panels of packed lines. For gemm_kernels.cpp alone.
#pragma once

#include "gemm.h"
#include "vec.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

constexpr int kLanes = VecOf<float>::lanes;
constexpr int kVectors = 2;
constexpr int64_t kPanel = kVectors * kLanes;
constexpr int64_t kUnroll = 4;  // words

// Elements of a word, which is what is packed: a float, or a pair of bf16 along k where instructions may multiply
// pairs. Elsewhere bf16 is widened to float.
template <typename T>
constexpr int64_t kPerWord = TF_VECTOR_BYTES == 64 ? sizeof(float) / sizeof(T) : 1;

// Rounded up to whole steps of the loop, or to the rows of a tile: see gemm_amx.h.
template <typename T, int64_t kStep = kUnroll>
TF_INLINE int64_t words_of(int64_t depth) {
  return round_up((depth + kPerWord<T> - 1) / kPerWord<T>, kStep);
}

// The words of a line from p on, where it has `count` more elements.
template <typename T>
TF_INLINE Vec<float> load_words(const T* p, int64_t count) {
  if constexpr (kPerWord<T> * sizeof(T) != sizeof(float)) return load_lanes(p, count);
  Vec<float> v{};
  if (count >= kLanes * kPerWord<T>)
    __builtin_memcpy(&v, p, sizeof(v));
  else if (count > 0)
    __builtin_memcpy(&v, p, count * sizeof(T));
  return v;
}

TF_INLINE Vec<float> words_across(const float* p, int64_t, int64_t, int64_t count) { return load_lanes(p, count); }

// The same word of `count` neighbouring lines, each of which has `left` more elements.
TF_INLINE Vec<float> words_across(const bf16* p, int64_t depth_stride, int64_t left, int64_t count) {
  if constexpr (kPerWord<bf16> == 1) return load_lanes(p, count);
  const Vec<float> second = left > 1 ? load_lanes(p + depth_stride, count) : Vec<float>{};
  return (Vec<float>)((U32)load_lanes(p, count) >> 16 | (U32)second);
}

TF_INLINE int64_t offset_of(int64_t i, int64_t stride, const int64_t* offsets) {
  return offsets ? offsets[i] : i * stride;
}

// Writes word k of line first + i to out[k * pitch + i], for kLanes lines, of which `count` exist. Words are written in
// order: they may overwrite those of lines that do not exist.
template <typename T, int64_t kStep = kUnroll>
void pack_lines(const GemmLines& m, int64_t first, int64_t count, int64_t depth, int64_t pitch, float* out) {
  const T* const data = static_cast<const T*>(m.data);
  const int64_t words = words_of<T, kStep>(depth);
  if (m.depth_stride != 1) {
    const T* at = data + first;
    for (int64_t k = 0; k < words; ++k, at += kPerWord<T> * m.depth_stride, out += pitch) {
      const int64_t left = depth - k * kPerWord<T>;
      store(out, left > 0 ? words_across(at, m.depth_stride, left, count) : Vec<float>{});
    }
    return;
  }
  for (int64_t k = 0; k < words; k += kLanes) {
    Vec<float> v[kLanes] = {};
    for (int i = 0; i < kLanes; ++i)
      if (i < count) {
        const T* const line = data + offset_of(first + i, m.line_stride, m.line_offsets);
        v[i] = load_words(line + k * kPerWord<T>, depth - k * kPerWord<T>);
      }
    interleave<float, kLanes>(v);
    for (int i = 0; i < kLanes; ++i)
      if (k + i < words) store(out + (k + i) * pitch, v[i]);
  }
}

template <typename T, int64_t kStep = kUnroll>
int64_t packed_bytes(int64_t columns, int64_t depth) {
  return round_up(columns, kPanel) * words_of<T, kStep>(depth) * sizeof(float);
}

template <typename T, int64_t kStep = kUnroll>
void pack(const GemmLines& b, int64_t columns, int64_t depth, void* packed) {
  for (int64_t j = 0; j < columns; j += kPanel) {
    float* const panel = static_cast<float*>(packed) + j * words_of<T, kStep>(depth);
    for (int64_t v = 0; v < kPanel; v += kLanes)
      pack_lines<T, kStep>(b, j + v, columns - j - v, depth, kPanel, panel + v);
  }
}

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
