// The tiles of AMX: eight registers of up to 16 rows of 64 bytes, and their products of bfloat16. They are written as
// assembly, so that no other code of the file may be compiled for them; who calls them asks isa.h's `amx_allowed`
// first.
#pragma once

#include "vec.h"

#if TF_VECTOR_BYTES == 64 && defined(__x86_64__)
#define TF_AMX 1

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

constexpr int kAmxRows = 16, kAmxWords = 16;          // a word is a float, or a pair of bf16
constexpr int64_t kAmxFloats = kAmxRows * kAmxWords;  // of a tile
constexpr int64_t kAmxBytes = kAmxFloats * sizeof(float);

struct AmxShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t count) { rows[tile] = uint8_t(count), row_bytes[tile] = 4 * kAmxWords; }
};

TF_INLINE void amx_configure(const AmxShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory"); }

// All tiles have 16 rows.
TF_INLINE void amx_configure_whole() {
  AmxShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.set(tile, kAmxRows);
  amx_configure(shapes);
}

TF_INLINE void amx_release() { asm volatile("tilerelease" : : : "memory"); }

template <int tile>
TF_INLINE void amx_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// Rows lie `stride` bytes apart.
template <int tile>
TF_INLINE void amx_load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
TF_INLINE void amx_store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(tile) : "memory");
}

// sum[i][j] += a[i][2k] b[k][2j] + a[i][2k + 1] b[k][2j + 1], summed over k.
template <int sum, int a, int b>
TF_INLINE void amx_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
}

constexpr U32 kUpper = U32{} + 0xffff0000u;

// Two vectors of bfloat16 numbers, held as floats, as pairs.
TF_INLINE U32 as_pairs(Vec<float> first, Vec<float> second) { return (U32)first >> 16 | ((U32)second & kUpper); }

// To bfloat16, held as floats.
TF_INLINE Vec<float> rounded(Vec<float> x) { return (Vec<float>)(((U32)x + 0x8000u) & kUpper); }

TF_INLINE void store_words(void* p, U32 words) { __builtin_memcpy(p, &words, sizeof(words)); }
TF_INLINE U32 load_words(const void* p) {
  U32 words;
  __builtin_memcpy(&words, p, sizeof(words));
  return words;
}

// The words of 16 rows, transposed: 16 lines of 64 bytes, `pitch` words apart.
template <typename F>
TF_INLINE void store_transposed(void* out, int64_t pitch, F row) {
  Vec<float> v[kAmxRows];
#pragma GCC unroll 16
  for (int i = 0; i < kAmxRows; ++i) v[i] = (Vec<float>)row(i);
  interleave<float, kAmxRows>(v);
#pragma GCC unroll 16
  for (int i = 0; i < kAmxRows; ++i) store(static_cast<float*>(out) + i * pitch, v[i]);
}

TF_INLINE void store_narrow(bf16* p, Vec<float> v) {
  U16 half;
  asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(v));
  __builtin_memcpy(p, &half, sizeof(half));
}

TF_INLINE void store_pair(bf16* p, Vec<float> first, Vec<float> second) {
  Vec<float> both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(first), "v"(second));
  __builtin_memcpy(p, &both, sizeof(both));
}

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion

#endif
