// The product of two matrices of bfloat16 numbers in a thread's cache, by the tiles of AMX.
//
// The left side is rows along the depth, the right side pairs along it: row k of a tile has, for each column, elements
// 2k and 2k + 1 of the depth. What lies beyond the depth is zero on both sides.
#pragma once

#include "amx.h"
#include "start.h"

#if TF_AMX

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

constexpr int64_t kStep = 2 * kAmxWords;  // of the depth, that a tile holds

// A side of a product, in bytes: from a row of a tile to the next, from a step of the depth to the next, and from a
// tile of 16 rows of the left or columns of the right side to the next.
struct TileSide {
  const void* data;
  int64_t row, step, next;

  TF_INLINE const char* at(int64_t tile) const { return static_cast<const char*>(data) + tile * next; }
};

// c = start + a b; the result, and what it starts from, may have 16 rows and columns more than they should.
struct TileProduct {
  int64_t steps;
  TileSide a, b;
  float* c;
  int64_t c_pitch;
  const float* bias = nullptr;

  template <Start start>
  void run(int64_t rows, int64_t columns) const {
    const int64_t row_tiles = (rows + kAmxRows - 1) / kAmxRows, column_tiles = (columns + kAmxWords - 1) / kAmxWords;
    for (int64_t j = 0; j < column_tiles; j += 2)
      for (int64_t i = 0; i < row_tiles; i += 2) {
        if (i + 1 < row_tiles) {
          j + 1 < column_tiles ? block<start, 2, 2>(i, j) : block<start, 2, 1>(i, j);
        } else {
          j + 1 < column_tiles ? block<start, 1, 2>(i, j) : block<start, 1, 1>(i, j);
        }
      }
  }

 private:
  template <Start start, int tile>
  TF_INLINE void begin(int64_t row, int64_t column) const {
    if constexpr (start == Start::kZero) amx_zero<tile>();
    if constexpr (start == Start::kBias) amx_load<tile>(bias + column, 0);
    if constexpr (start == Start::kSum) amx_load<tile>(c + row * c_pitch + column, c_pitch * sizeof(float));
  }

  template <int tile>
  TF_INLINE void end(int64_t row, int64_t column) const {
    amx_store<tile>(c + row * c_pitch + column, c_pitch * sizeof(float));
  }

  template <Start start, int rows, int columns>
  TF_INLINE void block(int64_t i, int64_t j) const {
    const int64_t row = i * kAmxRows, column = j * kAmxWords, lower = row + kAmxRows, right = column + kAmxWords;
    begin<start, 0>(row, column);
    if constexpr (columns == 2) begin<start, 1>(row, right);
    if constexpr (rows == 2) begin<start, 2>(lower, column);
    if constexpr (rows == 2 && columns == 2) begin<start, 3>(lower, right);
    const char *first_rows = a.at(i), *second_rows = a.at(i + 1), *first_columns = b.at(j),
               *second_columns = b.at(j + 1);
    for (int64_t s = 0; s < steps; ++s) {
      amx_load<6>(first_columns + s * b.step, b.row);
      if constexpr (columns == 2) amx_load<7>(second_columns + s * b.step, b.row);
      amx_load<4>(first_rows + s * a.step, a.row);
      amx_multiply<0, 4, 6>();
      if constexpr (columns == 2) amx_multiply<1, 4, 7>();
      if constexpr (rows == 2) {
        amx_load<5>(second_rows + s * a.step, a.row);
        amx_multiply<2, 5, 6>();
        if constexpr (columns == 2) amx_multiply<3, 5, 7>();
      }
    }
    end<0>(row, column);
    if constexpr (columns == 2) end<1>(row, right);
    if constexpr (rows == 2) end<2>(lower, column);
    if constexpr (rows == 2 && columns == 2) end<3>(lower, right);
  }
};

// Row number r of a left side that lies as tiles, [rows / 16, steps]: its steps are kAmxBytes apart. Tiles whose rows
// lie one after the other are loaded up to twice as fast as those of a matrix.
TF_INLINE char* row_of_tiles(char* tiles, int64_t steps, int64_t r) {
  return tiles + r / kAmxRows * steps * kAmxBytes + r % kAmxRows * 64;
}

// The first `count` numbers of a step; beyond them zeros, and nothing is read.
TF_INLINE U32 load_step(const bf16* p, int64_t count) {
  return (U32)_mm512_maskz_loadu_epi16(count < kStep ? (1u << count) - 1 : ~0u, p);
}

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion

#endif
