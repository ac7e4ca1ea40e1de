// Forward and backward of single_query_attention. A block takes one image's rows or, with splits, part of them, in
// tiles of 16 rows, which arrive in shared memory by asynchronous copies, some tiles ahead. Each warp of a group
// multiplies its 64 channels of a tile by the queries on the tensor cores; the group adds up these partial scores, and
// each warp multiplies the weights by its 64 channels. The normalised token (t - mean) rstd is never formed: the
// products take t - shift, which is exact or rounded no more than a normalised token would be; rstd and the rest of the
// mean enter in float32 afterwards.
#pragma once

#include "common/mma.cuh"
#include "single_query_attention_plan.h"

namespace tokenfusion {
namespace single_query_attention {

// The sum of x, or the largest, over the lanes whose numbers differ in bits below `lanes` alone.
template <int lanes>
TF_DEVICE float sum_lanes(float x) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
template <int lanes>
TF_DEVICE float max_lanes(float x) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

template <typename T, int kQueryTiles, bool kBackward>
struct Kernel {
  typedef Shared<T, kQueryTiles, kBackward> Memory;
  typedef Matrix<T> M;
  static constexpr int kQueries = Memory::kQueries;
  static constexpr int kVector = 16 / sizeof(T);        // elements of 16 bytes
  static constexpr int kRowVectors = kSlab / kVector;   // of a warp's part of a row
  static constexpr int kRowsAtOnce = 32 / kRowVectors;  // that a warp copies with one instruction
  static constexpr int kWeighingWarps = kQueries / 2;   // at most: each weighs two queries at a time
  static constexpr int kProducts = kBackward ? 2 * kQueryTiles : kQueryTiles;
  static constexpr bool kAlwaysShift = sizeof(T) == 4;  // else where t - shift is exact for nearly all t

  const Params& p;
  const Plan& plan;
  Memory s;
  int warps, groups, group, thread, warp, lane;  // thread and warp are numbers in the group
  int units;                                     // of 16 channels each, that this warp has
  int image, split, first_tile, end_tile;
  const T *tokens, *extra_token;
  float per_channel, per_shift_channel;  // 1 / count

  TF_DEVICE Kernel(const Params& params, const Plan& plan_, char* memory) : p(params), plan(plan_) {
    warps = plan.warps, groups = plan.groups;
    group = thread_index() / (32 * warps), thread = thread_index() % (32 * warps);
    warp = thread / 32, lane = thread % 32;
    s.layout(memory, warps, groups, plan.stages, group);
    const int left = (p.channels - kSlab * warp) / 16;
    units = left < kUnits ? left : kUnits;
    image = block_index() / p.splits, split = block_index() % p.splits;
    first_tile = first_tile_of(p, split) + group, end_tile = first_tile_of(p, split + 1);
    per_channel = 1.0f / p.channels;
    per_shift_channel = 1.0f / (8 * kVector < p.channels ? 8 * kVector : p.channels);
    tokens = static_cast<const T*>(p.tokens) + image * p.tokens_batch_stride;
    extra_token =
        p.extra_token == nullptr ? nullptr : static_cast<const T*>(p.extra_token) + image * p.extra_token_stride;
  }

  TF_DEVICE void group_barrier() { barrier(1 + group, 32 * warps); }
  TF_DEVICE void block_barrier() { barrier(0, 32 * warps * groups); }
  TF_DEVICE int64_t query_row(int q) const { return int64_t(image) * p.queries + q; }
  TF_DEVICE int64_t partial_row(int q) const { return (int64_t(image) * p.splits + split) * p.queries + q; }
  TF_DEVICE T* slab(int stage) const { return s.tiles + stage * kTile * s.pitch + warp * kSlab; }

  // Begins to copy this warp's part of a tile; rows beyond the last are zeros.
  TF_DEVICE void fetch(int tile, int stage) {
    const int column = lane % kRowVectors * kVector;
    if (tile < end_tile && column < 16 * units) {
      T* const to = slab(stage) + column;
      const T* const from = tokens + warp * kSlab + column;
#pragma unroll
      for (int i = 0; i < kTile; i += kRowsAtOnce) {
        const int row = i + lane / kRowVectors;
        const int j = tile * kTile + row;
        const T* source = from + (j - (extra_token != nullptr)) * p.tokens_stride;
        if (extra_token != nullptr && j == 0) source = extra_token + warp * kSlab + column;
        copy_async(to + row * s.pitch, j < p.rows ? source : tokens, j < p.rows);
      }
    }
    commit_copies();
  }

  // Copies rows [queries, channels] to s.operands, padded with zeros, and takes their sums. Of every
  // 8 * interleave rows of s.operands it fills 8, from `first` on.
  TF_DEVICE void fill_operands(const void* rows, int64_t stride, int first, int interleave) {
    const int all_warps = warps * groups;
    for (int q = group * warps + warp; q < kQueries; q += all_warps) {
      const int row = q / 8 * 8 * interleave + first + q % 8;
      const T* const from = static_cast<const T*>(rows) + q * stride;
      float sum = 0;
      for (int c = lane; c < kSlab * warps; c += 32) {
        const T x = q < p.queries && c < p.channels ? from[c] : from_float<T>(0);
        s.operands[row * s.pitch + c] = x;
        sum += to_float(x);
      }
      sum = sum_lanes<32>(sum);
      if (lane == 0) s.operand_sum[row] = sum;
    }
  }

  // A number near each row's mean, from the first channels of the tile: subtracted where that keeps what is
  // significant.
  TF_DEVICE void choose_shift(int stage, T* shift) {
    for (int item = thread; item < 8 * kTile; item += 32 * warps) {
      const int row = item / 8, column = item % 8 * kVector;
      const bool there = column < p.channels;
      const T* const from = s.tiles + (stage * kTile + row) * s.pitch + column;
      float x[kVector], sum = 0, square = 0;
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += x[i] = there ? to_float(from[i]) : 0;
      const float mean = sum_lanes<8>(sum) * per_shift_channel;
#pragma unroll
      for (int i = 0; i < kVector; ++i) square += there ? (x[i] - mean) * (x[i] - mean) : 0;
      const float variance = sum_lanes<8>(square) * per_shift_channel;
      const bool wanted = kAlwaysShift || mean * mean > 16 * variance;
      if (item % 8 == 0) shift[row] = from_float<T>(wanted ? mean : 0);
    }
  }

  TF_DEVICE float* score(int of_warp, int k, int row) const {
    return s.scores + (of_warp * Memory::kScores + k) * Memory::kScorePitch + row;
  }

  // This warp's share of the scores of a tile, and of its rows' sums.
  TF_DEVICE void write_partial_scores(const T* tile, const T* shift) {
    const T* const operands = s.operands + warp * kSlab;
    typename M::Product products[kProducts];
    typename M::RowSums sums;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (u < units) {
        typename M::A a = M::load_a(tile + 16 * u, s.pitch);
        if (p.normalize) {
          M::shift_rows(a, shift);
          sums.add(a);
        }
#pragma unroll
        for (int i = 0; i < kProducts; ++i)
          products[i].add(a, M::load_b_transposed(operands + 8 * i * s.pitch + 16 * u, s.pitch));
      }
    }
    const int row = lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      *score(warp, 8 * i + column, row) = products[i][0], *score(warp, 8 * i + column + 1, row) = products[i][1];
      *score(warp, 8 * i + column, row + 8) = products[i][2],
                                         *score(warp, 8 * i + column + 1, row + 8) = products[i][3];
    }
    if (p.normalize) {
      float sum[2], square[2];
      sums.finish(sum, square);
      if (holds_row_sums()) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          *score(warp, Memory::kScores - 2, row + 8 * i) = sum[i];
          *score(warp, Memory::kScores - 1, row + 8 * i) = square[i];
        }
      }
    }
  }

  TF_DEVICE float sum_of_warps(int k, int row) const {
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += *score(w, k, row);
    return sum;
  }

  // One row as its scores need it: n = (t - shift - rest) rstd; rstd is 0 where there is no row.
  struct Row {
    bool there;
    float rest, rstd, largest_rstd;
  };
  TF_DEVICE Row make_row(int tile, int row) const {
    Row r{tile * kTile + row < p.rows, 0, 1, 1};
    if (p.normalize) {
      r.rest = sum_of_warps(Memory::kScores - 2, row) * per_channel;
      const float variance = sum_of_warps(Memory::kScores - 1, row) * per_channel - r.rest * r.rest;
      r.rstd = 1 / sqrtf((variance < 0 ? 0 : variance) + p.eps);
    }
    if (!r.there) r.rest = r.rstd = 0;
    r.largest_rstd = max_lanes<16>(r.rstd);
    return r;
  }
  TF_DEVICE float full_score(const Row& r, int operand, int k, int row) const {
    return r.rstd * (sum_of_warps(k, row) - r.rest * s.operand_sum[operand]);
  }

  // The weight as the product takes it: without the magnitude of rstd, so that float16 can hold it.
  TF_DEVICE float store_weight(const Row& r, int q, int row, float weight) {
    const T rounded = from_float<T>(weight * (r.rstd / r.largest_rstd));
    s.weights[q * Memory::kWeightPitch + row] = rounded;
    return to_float(rounded) * r.largest_rstd;
  }

  // Accumulates tile^T weights: sums[u][i] holds channels 16 u + lane / 4 (+ 8), queries 8 i + lane % 4 * 2 (+ 1).
  TF_DEVICE void accumulate(const T* tile, const T* shift, float (&sums)[kUnits][kQueryTiles][4]) {
    typename M::B weights[kQueryTiles];
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i)
      weights[i] = M::load_b_transposed(s.weights + 8 * i * Memory::kWeightPitch, Memory::kWeightPitch);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (u < units) {
        typename M::A a = M::load_a_transposed(tile + 16 * u, s.pitch);
        if (p.normalize) M::shift_columns(a, shift);
#pragma unroll
        for (int i = 0; i < kQueryTiles; ++i) {
          typename M::Product product;
          product.add(a, weights[i]);
          const float* const scale = s.scale + 2 * (8 * i + lane % 4 * 2);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sums[u][i][j] = sums[u][i][j] * scale[j % 2 * 2] + product[j] * scale[j % 2 * 2 + 1];
        }
      }
    }
  }

  TF_DEVICE void write_result(const float (&sums)[kUnits][kQueryTiles][4]) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (u < units) {
#pragma unroll
        for (int i = 0; i < kQueryTiles; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            s.result[(8 * i + lane % 4 * 2 + j % 2) * s.result_pitch + warp * kSlab + 16 * u + lane / 4 + j / 2 * 8] =
                sums[u][i][j];
      }
    }
  }

  // The frame of both directions: begin(), which fills in the block's operands; the steps of every tile; finish(), with
  // the results of all groups in shared memory.
  template <typename Direction>
  TF_DEVICE void run(Direction& direction) {
    float sums[kUnits][kQueryTiles][4] = {};
    for (int i = 0; i < plan.stages - 1; ++i) fetch(first_tile + i * groups, i);
    direction.begin();
    wait_copies(plan.stages - 2);
    block_barrier();
    if (p.normalize && first_tile < end_tile) choose_shift(0, s.shift);
    int stage = 0;
    T *shift = s.shift, *next_shift = s.shift + kTile;
    for (int tile = first_tile; tile < end_tile; tile += groups) {
      T* const mine = slab(stage);
      const int next_stage = stage + 1 == plan.stages ? 0 : stage + 1;
      group_barrier();
      fetch(tile + (plan.stages - 1) * groups, stage == 0 ? plan.stages - 1 : stage - 1);
      write_partial_scores(mine, shift);
      group_barrier();
      if (warp < kWeighingWarps) direction.weigh(tile, shift);
      wait_copies(plan.stages - 2);
      group_barrier();
      accumulate(mine, shift, sums);
      direction.write_gradients(tile, mine);
      if (p.normalize && tile + groups < end_tile) choose_shift(next_stage, next_shift);
      stage = next_stage;
      T* const used = shift;
      shift = next_shift, next_shift = used;
    }
    wait_copies(0);
    group_barrier();
    write_result(sums);
    block_barrier();
    direction.finish();
  }
};

}  // namespace single_query_attention
}  // namespace tokenfusion
