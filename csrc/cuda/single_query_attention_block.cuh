// Forward and backward of single_query_attention. A block takes one image's rows or, with splits, part of them, in
// tiles of 16 rows. A warp has a tile to itself, with up to kMaxUnits * 16 channels; of more channels, a group of warps
// shares a tile and its partial products through shared memory. Each warp has a ring of its own, which asynchronous
// copies fill some tiles ahead, so that a warp with a tile to itself waits for no other. Scores, softmax and weights
// stay in the registers in which the tensor cores leave them. The normalised token (t - mean) rstd is never formed: the
// products take t - shift, where shift is the row's mean where that is far from zero, and else zero, so that nothing is
// rounded more than a normalised token would be; rstd and the rest of the mean enter in float32 afterwards.
#pragma once

#include <type_traits>

#include "single_query_attention_plan.h"

namespace tokenfusion {
namespace single_query_attention {

// The sum of x, or the largest, over the lanes that have the same columns of a product.
TF_DEVICE float sum_rows(float x) {
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}
TF_DEVICE float max_rows(float x) {
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}
TF_DEVICE float sum_warp(float x) { return sum_quad(sum_rows(x)); }
TF_DEVICE float max_warp(float x) {
  x = max_rows(x);
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

// An image's tokens: those of all images in a row from `first` on, `rows` of them with the extra one.
struct Bag {
  int64_t first;
  int64_t rows;
};
TF_DEVICE int64_t integer(const Integers& integers, int i, int64_t low, int64_t high) {
  const int64_t x =
      integers.is_long ? static_cast<const int64_t*>(integers.data)[i] : static_cast<const int32_t*>(integers.data)[i];
  return x < low ? low : x > high ? high : x;
}
TF_DEVICE Bag bag(const Params& p, int image) {
  int64_t first = image * p.length, count = p.length;
  if (p.offsets.data != nullptr) {
    first = integer(p.offsets, image, 0, p.length);
    count = integer(p.offsets, image + 1, first, p.length) - first;
  }
  if (p.lengths.data != nullptr) count = integer(p.lengths, image, 0, count);
  return {first, count + (p.extra_token != nullptr)};
}

// kFull: every warp has kMaxUnits units.
template <typename T, int kQueryTiles, bool kFull, bool kBackward>
struct Kernel {
  typedef Shared<T, kQueryTiles, kBackward> Memory;
  typedef Matrix<T> M;
  static constexpr int kQueries = Memory::kQueries, kOperands = Memory::kOperands;
  static constexpr int kMaxUnits = Plan::max_units(kQueryTiles, sizeof(T), kFull);
  static constexpr int kVector = 16 / sizeof(T);  // elements of 16 bytes
  static constexpr int kProducts = kOperands / 8;
  static constexpr bool kIsFloat = sizeof(T) == 4;

  const Params& p;
  const Plan& plan;
  Memory s;
  int warps, groups, group, warp, lane;  // warp is a number in the group
  int units;                             // of 16 channels each, that this warp has
  int image, split;
  Bag rows;
  int first_tile, end_tile;
  const T* tokens;
  int parity = 0;                              // of the tile, among those of this group
  float sums[kMaxUnits][kQueryTiles][4] = {};  // channels 16 u + lane / 4 (+ 8), queries 8 i + lane % 4 * 2 (+ 1)

  TF_DEVICE Kernel(const Params& params, const Plan& plan_, char* memory) : p(params), plan(plan_) {
    warps = plan.warps, groups = plan.groups;
    lane = lane_index(), group = thread_index() / 32 / warps, warp = thread_index() / 32 % warps;
    s.layout(memory, plan, group);
    units = units_of(warp);
    image = block_index() / p.splits, split = block_index() % p.splits;
    rows = bag(p, image);
    const int64_t tiles = (rows.rows + kTile - 1) / kTile;
    first_tile = int(tiles * split / p.splits) + group, end_tile = int(tiles * (split + 1) / p.splits);
    const int64_t first_row = p.offsets.data == nullptr ? 0 : rows.first;
    tokens = static_cast<const T*>(p.tokens) + image * p.tokens_batch_stride + first_row * p.tokens_stride;
  }

  TF_DEVICE int first_channel() const { return warp * plan.units * kUnit; }
  TF_DEVICE int units_of(int of_warp) const {
    if constexpr (kFull) return kMaxUnits;
    const int left = p.channels / kUnit - of_warp * plan.units;
    return left < plan.units ? left : plan.units;
  }
  TF_DEVICE bool has(int unit) const { return kFull || unit < units; }
  TF_DEVICE void group_barrier() { warps == 1 ? warp_barrier() : barrier(1 + group, 32 * warps); }
  TF_DEVICE void block_barrier() { barrier(0, 32 * warps * groups); }
  TF_DEVICE int64_t query_row(int q) const { return int64_t(image) * p.queries + q; }
  TF_DEVICE int64_t partial_row(int q) const { return (int64_t(image) * p.splits + split) * p.queries + q; }
  TF_DEVICE T* slab(int stage) const { return s.tiles + stage * kTile * s.pitch + first_channel(); }

  // Begins to copy this warp's part of a tile; rows beyond the last are zeros.
  TF_DEVICE void fetch(int tile, int stage) {
    if (tile < end_tile) {
      const int channels = kUnit * units, column = lane % 8 * kVector;
      T* const to = slab(stage) + lane / 8 * s.pitch + column;
#pragma unroll
      for (int i = 0; i < kTile; i += 4) {
        const int64_t j = int64_t(tile) * kTile + i + lane / 8;
        const T* source = tokens + (j - (p.extra_token != nullptr)) * p.tokens_stride;
        if (p.extra_token != nullptr && j == 0)
          source = static_cast<const T*>(p.extra_token) + image * p.extra_token_stride;
        source = (j < rows.rows ? source : static_cast<const T*>(p.tokens)) + first_channel() + column;
#pragma unroll
        for (int k = 0; k < kMaxUnits * kUnit; k += 8 * kVector)
          if (kFull && (k / kUnit + 8 * kVector / kUnit <= kMaxUnits) || column + k < channels)
            copy_async(to + i * s.pitch + k, source + k, j < rows.rows);
      }
    }
    commit_copies();
  }

  // Copies rows [queries, channels] to s.operands, padded with zeros, and takes their sums. Of every
  // 8 * interleave rows of s.operands it fills 8, from `first` on.
  TF_DEVICE void fill_operands(const void* from_rows, int64_t stride, int first, int interleave) {
    for (int q = group * warps + warp; q < kQueries; q += warps * groups) {
      const int row = q / 8 * 8 * interleave + first + q % 8;
      const T* const from = static_cast<const T*>(from_rows) + q * stride;
      float all = 0, mine = 0;
#pragma unroll 1
      for (int w = 0; w < warps; ++w) {
        float sum = 0;
        for (int k = lane; k < kUnit * plan.units; k += 32) {
          const int c = w * plan.units * kUnit + k;
          const T x = q < p.queries && c < p.channels ? from[c] : from_float<T>(0);
          put_operand(row, c, x);
          sum += to_float(x);
        }
        sum = sum_warp(sum);
        if (lane == w) mine = sum;
        all += sum;
      }
      if (lane == warps) mine = all;
      if (lane <= warps) s.operand_sum[lane * kOperands + row] = mine;
    }
  }
  TF_DEVICE void put_operand(int row, int c, T x) {
    if constexpr (Memory::kPieces == 2) {
      M::split(x, s.operands[row * s.pitch + c], s.operands[(kOperands + row) * s.pitch + c]);
    } else {
      s.operands[row * s.pitch + c] = x;
    }
  }

  // Rows lane / 4 and lane / 4 + 8 of a tile: n = (t - shift - rest) rstd, where t are this warp's channels; rstd is 0
  // where there is no row.
  struct Rows {
    bool there[2];
    float shift[2] = {}, rest[2] = {}, rstd[2];
    bool shifted = false;  // any row of the tile
  };

  // A number near the row's mean where it is far from zero, else zero.
  static TF_DEVICE float choose_shift(const typename M::A& a, int i, float mean) {
    if constexpr (kIsFloat) {
      return mean;
    } else {  // an outlier among the elements of one lane does not decide
      float variance = M::variance_of_own(a, i, mean);
      variance = fminf(variance, shuffle_xor(variance, 1));
      variance = fminf(variance, shuffle_xor(variance, 2));
      return mean * mean > 16 * variance ? to_float(from_float<T>(mean)) : 0;
    }
  }

  // No shift for a row of which it would make an element infinite.
  TF_DEVICE void keep_finite(const typename M::A (&a)[kMaxUnits], Rows& r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = 0;
#pragma unroll
      for (int u = 0; u < kMaxUnits; ++u)
        if (has(u)) largest = fmaxf(largest, M::largest_shifted(a[u], i, r.shift[i]));
      largest = fmaxf(largest, shuffle_xor(largest, 1));
      largest = fmaxf(largest, shuffle_xor(largest, 2));
      if (largest == kInfinity) r.shift[i] = 0;
    }
  }

  TF_DEVICE typename M::SplitB load_operand(const T* rows) const {
    if constexpr (Memory::kPieces == 2) {
      return M::load_split_b_transposed(rows, kOperands * s.pitch, s.pitch);
    } else {
      return M::split(M::load_b_transposed(rows, s.pitch));
    }
  }

  // The products of a tile's normalised rows with the operands; score[i][2 j + e] is that of row lane / 4 + 8 j and
  // operand 8 i + lane % 4 * 2 + e.
  TF_DEVICE Rows multiply(int tile, const T* slab, float (&score)[kProducts][4]) {
    Rows r;
    typename M::A a[kMaxUnits];
    float rest[2] = {}, square[2] = {};  // sums of t - shift, and of squares about its mean, over this warp's channels
    const float count = kUnit * units, per_own_channel = 1 / count;
    typename M::RowSums row_sums, row_rests;
    typename M::RowSquares row_squares;
#pragma unroll
    for (int u = 0; u < kMaxUnits; ++u)
      if (has(u)) a[u] = M::load_a(slab + kUnit * u, s.pitch);
    if (p.normalize) {
#pragma unroll
      for (int u = 0; u < kMaxUnits; ++u)
        if (has(u)) row_sums.add(a[u]);
      row_sums.finish(rest);
#pragma unroll
      for (int i = 0; i < 2; ++i) r.shift[i] = choose_shift(a[0], i, rest[i] * per_own_channel);
      r.shifted = kIsFloat || any_lane(r.shift[0] != 0 || r.shift[1] != 0);
      if constexpr (kIsHalf<T>) {
        if (r.shifted) keep_finite(a, r);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) rest[i] -= count * r.shift[i];
    }
    typename std::conditional<kBackward, typename M::FiniteProduct, typename M::Product>::type products[kProducts];
    const T* const operands = s.operands + first_channel();
#pragma unroll
    for (int u = 0; u < kMaxUnits; ++u) {
      if (has(u)) {
        if (kIsFloat) a[u] = M::load_a(slab + kUnit * u, s.pitch);  // twice, as the registers do not hold all of them
        if (r.shifted) M::shift_rows(a[u], r.shift);
        if (p.normalize) {
          row_squares.add(a[u]);
          if (kIsFloat) row_rests.add(a[u]);
        }
        const typename M::SplitA split_a = M::split(a[u]);
#pragma unroll
        for (int i = 0; i < kProducts; ++i)
          products[i].add(split_a, load_operand(operands + 8 * i * s.pitch + kUnit * u));
      }
    }
    if (p.normalize) {
      if (kIsFloat) row_rests.finish(rest);  // more exact than the difference
      row_squares.finish(square);
#pragma unroll
      for (int i = 0; i < 2; ++i) square[i] -= rest[i] * (rest[i] * per_own_channel);
    }
#pragma unroll
    for (int i = 0; i < kProducts; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) score[i][k] = products[i][k];
    finish_rows(tile, rest, square, score, r);
    return r;
  }

  TF_DEVICE Four<float>* part(int of_warp, int k) const {
    return s.parts + ((parity * warps + of_warp) * Memory::kParts + k) * 32 + lane;
  }

  // From what this warp knows of the rows and of their products to what all warps do.
  TF_DEVICE void finish_rows(int tile, const float (&rest)[2], float (&square)[2], float (&score)[kProducts][4],
                             Rows& r) {
    if (warps > 1) {
      if (Memory::kBuffers == 1) group_barrier();  // all warps have read those of the last tile
#pragma unroll
      for (int i = 0; i < kProducts; ++i) *part(warp, i) = {score[i][0], score[i][1], score[i][2], score[i][3]};
      *part(warp, kProducts) = {rest[0], rest[1], square[0], square[1]};
      *part(warp, kProducts + 1) = {r.shift[0], r.shift[1], 0, 0};
      group_barrier();
      gather(square, score, r);
      parity ^= Memory::kBuffers - 1;
    } else if (p.normalize) {
#pragma unroll
      for (int i = 0; i < 2; ++i) r.rest[i] = rest[i] * p.per_channel;
      add_rest(0, r.rest, score);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      r.there[i] = int64_t(tile) * kTile + lane / 4 + 8 * i < rows.rows;
      const float variance = square[i] * p.per_channel;
      const float square_deviation = p.normalize ? (variance < 0 ? 0 : variance) + p.eps : 1;
      const float rstd = kIsFloat ? 1 / sqrtf(square_deviation) : rsqrtf(square_deviation);
      r.rstd[i] = r.there[i] ? rstd : 0;
#pragma unroll
      for (int k = 0; k < kProducts; ++k)
#pragma unroll
        for (int e = 0; e < 2; ++e) score[k][2 * i + e] *= r.rstd[i];
    }
  }
  // What the products of a warp have too much because it took t - shift instead of t - shift - rest.
  TF_DEVICE void add_rest(int of_warp, const float (&rest)[2], float (&score)[kProducts][4]) {
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      const float* const operand_sum = s.operand_sum + of_warp * kOperands + 8 * k + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) score[k][2 * i + e] -= rest[i] * operand_sum[e];
    }
  }
  // Sums over the warps of a group, in the same order in each of them. Means are taken relative to the shift of the
  // first warp, which is near enough for no digit to be lost.
  TF_DEVICE void gather(float (&square)[2], float (&score)[kProducts][4], Rows& r) {
    float mean[2] = {};
    const Four<float> base = *part(0, kProducts + 1);
    if (p.normalize) {
#pragma unroll 1
      for (int w = 0; w < warps; ++w) {
        const Four<float> of_rows = *part(w, kProducts), shift = *part(w, kProducts + 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) mean[i] += of_rows.x[i] + kUnit * units_of(w) * (shift.x[i] - base.x[i]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mean[i] *= p.per_channel;
        r.rest[i] = mean[i] - (r.shift[i] - base.x[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) square[i] = 0;
#pragma unroll
    for (int k = 0; k < kProducts; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) score[k][j] = 0;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) {
#pragma unroll
      for (int k = 0; k < kProducts; ++k) {
        const Four<float> products = *part(w, k);
#pragma unroll
        for (int j = 0; j < 4; ++j) score[k][j] += products.x[j];
      }
      if (p.normalize) {
        const Four<float> of_rows = *part(w, kProducts), shift = *part(w, kProducts + 1);
        const float count = kUnit * units_of(w);
        float rest[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          rest[i] = mean[i] - (shift.x[i] - base.x[i]);
          const float apart = of_rows.x[i] / count - rest[i];
          square[i] += of_rows.x[2 + i] + count * apart * apart;
        }
        add_rest(w, rest, score);
      }
    }
  }

  // Rounds to elements of T and returns what they are to be multiplied by: float16 has too few exponents for rstd.
  static TF_DEVICE float round_to_elements(float (&x)[kQueryTiles][4]) {
    float scale = 1;
    if constexpr (kIsHalf<T>) {
      float largest = 1e-30f;
#pragma unroll
      for (int i = 0; i < kQueryTiles; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) largest = fmaxf(largest, fabsf(x[i][k]));
      scale = max_warp(largest) / 32768;
    }
    const float per_scale = 1 / scale;
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) x[i][k] = to_float(from_float<T>(x[i][k] * per_scale));
    return scale;
  }

  // Accumulates tile^T weights.
  TF_DEVICE void accumulate(const T* slab, const Rows& r, const typename M::B (&weights)[kQueryTiles], float scale) {
    T* const shift = s.shift + warp * kTile;
    if (r.shifted) {
      if (lane % 4 == 0) shift[lane / 4] = from_float<T>(r.shift[0]), shift[lane / 4 + 8] = from_float<T>(r.shift[1]);
      warp_barrier();
    }
    typename M::SplitB split_weights[kQueryTiles];
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) split_weights[i] = M::split(weights[i]);
#pragma unroll
    for (int u = 0; u < kMaxUnits; ++u) {
      if (has(u)) {
        typename M::A a = M::load_a_transposed(slab + kUnit * u, s.pitch);
        if (r.shifted) M::shift_columns(a, shift);
        const typename M::SplitA split_a = M::split(a);
#pragma unroll
        for (int i = 0; i < kQueryTiles; ++i) {
          typename M::FiniteProduct product;  // no weight but 0 goes with an infinite token
          product.add(split_a, split_weights[i]);
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[u][i][j] += product[j] * scale;
        }
      }
    }
  }

  // Numbers of queries 8 i + lane % 4 * 2 (+ 1), of which each lane has its rows' share.
  static TF_DEVICE void sum_all_rows(float (&x)[kQueryTiles][2]) {
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) x[i][0] = sum_rows(x[i][0]), x[i][1] = sum_rows(x[i][1]);
  }
  TF_DEVICE void write_queries(float* to, const float (&x)[kQueryTiles][2]) const {
    if (lane >= 4) return;
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) to[8 * i + 2 * lane] = x[i][0], to[8 * i + 2 * lane + 1] = x[i][1];
  }

  // Without what comes of the rest of the mean, which is a number a query.
  TF_DEVICE void write_result(float (&correction)[kQueryTiles][2]) {
    sum_all_rows(correction);
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) {
#pragma unroll
      for (int u = 0; u < kMaxUnits; ++u) {
        if (has(u)) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            s.result[(8 * i + lane % 4 * 2 + j % 2) * s.result_pitch + first_channel() + kUnit * u + lane / 4 +
                     j / 2 * 8] = sums[u][i][j] - correction[i][j % 2];
        }
      }
    }
  }

  // The frame of both directions: begin(), which fills in the block's operands; the steps of every tile; finish(), with
  // the results of all groups in shared memory.
  template <typename Direction>
  TF_DEVICE void run(Direction& direction) {
    for (int i = 0; i < plan.stages - 1; ++i) fetch(first_tile + i * groups, i);
    direction.begin();
    block_barrier();
    int stage = 0;
    for (int tile = first_tile; tile < end_tile; tile += groups) {
      wait_copies(plan.stages - 2);
      warp_barrier();
      fetch(tile + (plan.stages - 1) * groups, stage == 0 ? plan.stages - 1 : stage - 1);
      direction.step(tile, slab(stage));
      stage = stage + 1 == plan.stages ? 0 : stage + 1;
    }
    wait_copies(0);
    group_barrier();
    direction.write_results();
    block_barrier();
    direction.finish();
  }
};

}  // namespace single_query_attention
}  // namespace tokenfusion
