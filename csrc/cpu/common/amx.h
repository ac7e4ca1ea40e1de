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

constexpr int kAmxRows = 16, kAmxWords = 16;  // a word is a float, or a pair of bf16

struct AmxShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t count) { rows[tile] = uint8_t(count), row_bytes[tile] = 4 * kAmxWords; }
};

TF_INLINE void amx_configure(const AmxShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory"); }

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

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion

#endif
