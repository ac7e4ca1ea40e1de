// Forward and backward of single_query_attention. A block takes one image's rows or, with splits, part of them, in
// tiles of 16 rows, which arrive in shared memory by asynchronous copies, some tiles ahead. Each warp of a group
// multiplies its 64 channels of a tile by the queries on the tensor cores; the group adds up these partial scores, and
// each warp multiplies the weights by its 64 channels. The normalised token (t - mean) rstd is never formed: the
// products take t - shift, which is exact or rounded no more than a normalised token would be; rstd and the rest of the
// mean enter in float32 afterwards.
#pragma once

#include "dtype.h"
#include "matrix.cuh"
#include "single_query_attention.h"

namespace tokenfusion {
namespace single_query_attention {

typedef SingleQueryAttentionParams Params;
typedef SingleQueryAttentionPlan Plan;

constexpr int kTile = Plan::kTile, kSlab = Plan::kSlab;
constexpr int kUnits = kSlab / 16;  // steps of the products over a warp's channels

// The shared memory of a block and, in it, of one of its groups.
template <typename T, int kQueryTiles, bool kBackward>
struct Shared {
  static constexpr int kQueries = 8 * kQueryTiles;
  static constexpr int kOperands = kBackward ? 2 * kQueries : kQueries;
  static constexpr int kScores = kOperands + 2;  // a row's scores, its sum and its sum of squares
  static constexpr int kPad = 16 / sizeof(T);
  static constexpr int kScorePitch =
      sizeof(T) == 4 ? kTile + 1 : kTile + 4;  // + 4: no two lanes of a product in a bank
  static constexpr int kWeightPitch = kTile + kPad;
  static constexpr int kPairPitch = 16 * kQueryTiles + kPad;

  int pitch, result_pitch;
  int64_t group_bytes;

  T* operands;         // [kOperands, pitch]; backward: for every 8 queries, 8 rows of grad_context, then 8 of query
  float* operand_sum;  // [kOperands]
  float *delta, *log_sum_exp;  // [kQueries]

  T* tiles;                       // [stages, kTile, pitch]
  float* result;                  // [kQueries, result_pitch], in the place of the tiles at the end
  float* scores;                  // [warps, kScores, kScorePitch]
  T* weights;                     // [kQueries, kWeightPitch]
  float* scale;                   // [kQueries, 2]: what the sum so far and the tile's share are multiplied by
  T* shift;                       // [2, kTile]
  float *maximum, *total;         // [kQueries], of the online softmax
  float *correction, *excess;     // [kQueries]
  T* pairs;                       // [kTile, kPairPitch]: for every 8 queries, 8 weights, then 8 gradients of scores
  float *row_sums, *rstd, *mean;  // [warps, 2, kTile], [kTile]

  // Lays out the memory of a block with these groups, for one group's threads; returns the size.
  TF_HOST_DEVICE int64_t layout(char* memory, int warps, int groups, int stages, int group) {
    pitch = kSlab * warps + kPad, result_pitch = kSlab * warps + 4;
    char* next = memory;
    take(next, operands, kOperands * pitch);
    take(next, operand_sum, kOperands);
    take(next, delta, kBackward ? kQueries : 0);
    take(next, log_sum_exp, kBackward ? kQueries : 0);
    char* const first = next;
    layout_group(next, warps, stages);
    group_bytes = next - first;
    next = first + group * group_bytes;
    layout_group(next, warps, stages);
    return first - memory + groups * group_bytes;
  }

  // The same array of another group.
  template <typename U>
  TF_DEVICE U* of_group(U* mine, int distance) const {
    return reinterpret_cast<U*>(reinterpret_cast<char*>(mine) + distance * group_bytes);
  }

 private:
  TF_HOST_DEVICE void layout_group(char*& next, int warps, int stages) {
    const int tile_bytes = stages * kTile * pitch * int(sizeof(T)), result_bytes = kQueries * result_pitch * 4;
    tiles = reinterpret_cast<T*>(next);
    take(next, result, (tile_bytes > result_bytes ? tile_bytes : result_bytes) / 4);
    take(next, scores, warps * kScores * kScorePitch);
    take(next, weights, kQueries * kWeightPitch);
    take(next, scale, 2 * kQueries);
    take(next, shift, 2 * kTile);
    take(next, maximum, kBackward ? 0 : kQueries);
    take(next, total, kBackward ? 0 : kQueries);
    take(next, correction, kQueries);
    take(next, excess, kBackward ? kQueries : 0);
    take(next, pairs, kBackward ? kTile * kPairPitch : 0);
    take(next, row_sums, kBackward ? warps * 2 * kTile : 0);
    take(next, rstd, kBackward ? kTile : 0);
    take(next, mean, kBackward ? kTile : 0);
  }

  template <typename U>
  static TF_HOST_DEVICE void take(char*& next, U*& array, int count) {
    array = reinterpret_cast<U*>(next);
    next += (count * sizeof(U) + 15) / 16 * 16;
  }
};

// x summed, or the largest, over lanes of which the number differs in bits below `lanes`.
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
  int units;                                     // of 16 channels that this warp has
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
    const int tiles = (p.rows + kTile - 1) / kTile;
    first_tile = int(tiles * split / p.splits) + group, end_tile = int(tiles * (split + 1) / p.splits);
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

  // Copies rows [queries, channels] to s.operands, padded with zeros, and takes their sums. Of every 8 rows in
  // `interleave` times 8 the first 8 from `first` on are filled.
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

  // weights as the product takes them: of rstd's order removed, so that float16 can hold them
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

  // The frame of both directions: before() with the block's operands, the steps of every tile, after() with the results
  // of all groups in shared memory.
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

template <typename T, int kQueryTiles>
struct Forward : Kernel<T, kQueryTiles, false> {
  typedef Kernel<T, kQueryTiles, false> Base;
  using Base::group, Base::groups, Base::image, Base::lane, Base::p, Base::s, Base::split, Base::thread, Base::warp,
      Base::warps;
  using Base::kQueries, Base::Base;

  TF_DEVICE void begin() {
    this->fill_operands(static_cast<const T*>(p.query) + image * p.query_batch_stride, p.query_stride, 0, 1);
    for (int q = thread; q < kQueries; q += 32 * warps) {
      s.maximum[q] = -kInfinity;
      s.total[q] = s.correction[q] = 0;
    }
  }

  // Online softmax; each query is weighed by 16 lanes, one a row.
  TF_DEVICE void weigh(int tile, const T*) {
    const int row = lane % 16;
    const typename Base::Row r = this->make_row(tile, row);
    for (int pair = warp; pair < kQueries / 2; pair += warps) {
      const int q = 2 * pair + lane / 16;
      const float score = r.there ? this->full_score(r, q, q, row) : -kInfinity;
      const float before = s.maximum[q], maximum = fmaxf(before, max_lanes<16>(score));
      const float origin = maximum == -kInfinity ? 0 : maximum;
      const float keep = maximum == before ? 1 : expf(before - origin);
      const float weight = expf(score - origin);
      const float rounded = this->store_weight(r, q, row, weight);
      const float total = sum_lanes<16>(weight), correction = sum_lanes<16>(rounded * r.rest);
      if (row == 0) {
        s.maximum[q] = maximum;
        s.total[q] = s.total[q] * keep + total;
        s.correction[q] = s.correction[q] * keep + correction;
        s.scale[2 * q] = keep, s.scale[2 * q + 1] = r.largest_rstd;
      }
    }
  }

  TF_DEVICE void write_gradients(int, T*) {}

  TF_DEVICE void finish() {
    for (int q = group * warps + warp; q < p.queries; q += warps * groups) {
      float maximum = -kInfinity, total = 0;
      for (int g = -group; g < groups - group; ++g) maximum = fmaxf(maximum, s.of_group(s.maximum, g)[q]);
      const float origin = maximum == -kInfinity ? 0 : maximum;
      for (int g = -group; g < groups - group; ++g)
        total += s.of_group(s.total, g)[q] * expf(s.of_group(s.maximum, g)[q] - origin);
      const int64_t row = p.splits == 1 ? this->query_row(q) : this->partial_row(q);
      for (int c = 4 * lane; c < p.channels; c += 128) {
        float sums[4] = {};
        for (int g = -group; g < groups - group; ++g) {
          const float weight = expf(s.of_group(s.maximum, g)[q] - origin), correction = s.of_group(s.correction, g)[q];
          const float* const from = s.of_group(s.result, g) + q * s.result_pitch + c;
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[i] += weight * (from[i] - correction);
        }
        if (p.splits == 1) {
          store_four(static_cast<T*>(p.context) + row * p.channels + c, sums, 1 / total);
        } else {
          store_four(p.partial_context + row * p.channels + c, sums, 1);
        }
      }
      if (lane == 0) {
        if (p.splits == 1) {
          p.log_sum_exp[row] = maximum + logf(total);
        } else {
          p.partial_max[row] = maximum, p.partial_sum[row] = total;
        }
      }
    }
  }
};

template <typename T, int kQueryTiles>
struct Backward : Kernel<T, kQueryTiles, true> {
  typedef Kernel<T, kQueryTiles, true> Base;
  typedef typename Base::M M;
  typedef typename Base::Memory Memory;
  using Base::group, Base::groups, Base::image, Base::lane, Base::p, Base::s, Base::split, Base::thread, Base::units,
      Base::warp, Base::warps;
  using Base::kQueries, Base::kRowsAtOnce, Base::kRowVectors, Base::kVector, Base::Base;

  static TF_DEVICE int grad_row(int q) { return q / 8 * 16 + q % 8; }
  static TF_DEVICE int operand_row(int q) { return grad_row(q) + 8; }  // that of the query

  TF_DEVICE void begin() {
    const T* const grad_context = static_cast<const T*>(p.grad_context) + this->query_row(0) * p.channels;
    const T* const context = static_cast<const T*>(p.context) + this->query_row(0) * p.channels;
    this->fill_operands(grad_context, p.channels, 0, 2);
    this->fill_operands(static_cast<const T*>(p.query) + image * p.query_batch_stride, p.query_stride, 8, 2);
    for (int q = group * warps + warp; q < p.queries; q += warps * groups) {
      float delta = 0;
      for (int c = lane; c < p.channels; c += 32)
        delta += to_float(grad_context[q * p.channels + c]) * to_float(context[q * p.channels + c]);
      delta = sum_lanes<32>(delta);
      if (lane == 0) s.delta[q] = delta, s.log_sum_exp[q] = p.log_sum_exp[this->query_row(q)];
    }
    for (int q = thread; q < kQueries; q += 32 * warps) s.correction[q] = s.excess[q] = 0;
  }

  // Weights and gradients of the scores; each query is weighed by 16 lanes, one a row.
  TF_DEVICE void weigh(int tile, const T* shift) {
    const int row = lane % 16;
    const typename Base::Row r = this->make_row(tile, row);
    float mean = 0, slope = 0;
    for (int pair = warp; pair < kQueries / 2; pair += warps) {
      const int q = 2 * pair + lane / 16, of_grad = grad_row(q), of_query = operand_row(q);
      const bool there = r.there && q < p.queries;
      const float score = this->full_score(r, of_query, of_query, row);
      const float grad_weight = this->full_score(r, of_grad, of_grad, row);
      const float weight = there ? expf(score - s.log_sum_exp[q]) : 0;
      // a lone token has weight 1 whatever its score
      const float grad_score = there && p.rows > 1 ? weight * (grad_weight - s.delta[q]) : 0;
      mean += weight * s.operand_sum[of_grad] + grad_score * s.operand_sum[of_query];
      slope += weight * grad_weight + grad_score * score;
      s.pairs[row * Memory::kPairPitch + of_grad] = from_float<T>(weight);
      s.pairs[row * Memory::kPairPitch + of_query] = from_float<T>(grad_score);
      const float rounded = this->store_weight(r, q, row, grad_score);
      const float correction = sum_lanes<16>(rounded * r.rest);
      const float excess = sum_lanes<16>(r.there ? rounded / r.rstd : 0);
      if (row == 0) {
        s.correction[q] += correction, s.excess[q] += excess;
        s.scale[2 * q] = 1, s.scale[2 * q + 1] = r.largest_rstd;
      }
    }
    if (!p.normalize) return;
    mean += shuffle_xor(mean, 16), slope += shuffle_xor(slope, 16);
    if (lane < 16) {
      s.row_sums[2 * warp * kTile + row] = mean, s.row_sums[(2 * warp + 1) * kTile + row] = slope;
      if (warp == 0) s.rstd[row] = r.rstd, s.mean[row] = to_float(shift[row]) + r.rest;
    }
  }

  // With dn = sum_q p_q grad_context_q + ds_q query_q, the gradient of a token is rstd (dn - mean(dn) - n mean(dn n)),
  // whose means come from sums over the queries that are known already. It takes the token's place in the tile, from
  // where it is stored in vectors.
  TF_DEVICE void write_gradients(int tile, T* tokens) {
    if (p.grad_tokens == nullptr && p.grad_extra_token == nullptr) return;
    const int row = lane / 4, column = lane % 4 * 2;
    float rstd[2], centre[2], mean[2] = {}, slope[2] = {};
    if (p.normalize) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        for (int w = 0; w < warps && w < Base::kWeighingWarps; ++w) {
          mean[i] += s.row_sums[2 * w * kTile + row + 8 * i];
          slope[i] += s.row_sums[(2 * w + 1) * kTile + row + 8 * i];
        }
        rstd[i] = s.rstd[row + 8 * i], centre[i] = s.mean[row + 8 * i];
        mean[i] *= this->per_channel, slope[i] *= rstd[i] * this->per_channel;
      }
    }
    typename M::A pairs[kQueryTiles];
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) pairs[i] = M::load_a(s.pairs + 16 * i, Memory::kPairPitch);
    warp_barrier();
#pragma unroll
    for (int u = 0; u < 2 * kUnits; ++u) {
      if (u < 2 * units) {
        typename M::Product product;
#pragma unroll
        for (int i = 0; i < kQueryTiles; ++i)
          product.add(pairs[i], M::load_b(s.operands + 16 * i * s.pitch + warp * kSlab + 8 * u, s.pitch));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          T* const token = tokens + (row + j / 2 * 8) * s.pitch + 8 * u + column + j % 2;
          float grad = product[j];
          if (p.normalize) {
            const int i = j / 2;
            grad = rstd[i] * (grad - mean[i] - (to_float(*token) - centre[i]) * slope[i]);
          }
          *token = from_float<T>(grad);
        }
      }
    }
    warp_barrier();
    const int part = lane % kRowVectors * kVector;
    if (part >= 16 * units) return;
    const bool has_extra = p.extra_token != nullptr;
    const int64_t rows = p.rows - has_extra;
#pragma unroll
    for (int i = 0; i < kTile; i += kRowsAtOnce) {
      const int j = tile * kTile + i + lane / kRowVectors;
      const bool is_extra = has_extra && j == 0;
      T* const grads = static_cast<T*>(is_extra ? p.grad_extra_token : p.grad_tokens);
      if (j < p.rows && grads != nullptr) {
        const int64_t to = is_extra ? image : image * rows + (j - has_extra);
        const T* const from = tokens + (i + lane / kRowVectors) * s.pitch + part;
        *reinterpret_cast<Vector16*>(grads + to * p.channels + warp * kSlab + part) =
            *reinterpret_cast<const Vector16*>(from);
      }
    }
  }

  // The score gradients sum to zero but for rounding, whose share of the query's gradient goes here.
  TF_DEVICE void finish() {
    if (p.grad_query == nullptr) return;
    for (int q = group * warps + warp; q < p.queries; q += warps * groups) {
      float excess = 0;
      for (int g = -group; g < groups - group; ++g) excess += s.of_group(s.excess, g)[q];
      const T* const context = static_cast<const T*>(p.context) + this->query_row(q) * p.channels;
      const int64_t row = p.splits == 1 ? this->query_row(q) : this->partial_row(q);
      for (int c = 4 * lane; c < p.channels; c += 128) {
        float sums[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = -excess * to_float(context[c + i]);
        for (int g = -group; g < groups - group; ++g) {
          const float correction = s.of_group(s.correction, g)[q];
          const float* const from = s.of_group(s.result, g) + q * s.result_pitch + c;
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[i] += from[i] - correction;
        }
        if (p.splits == 1) {
          store_four(static_cast<T*>(p.grad_query) + row * p.channels + c, sums, 1);
        } else {
          store_four(p.partial_grad_query + row * p.channels + c, sums, 1);
        }
      }
    }
  }
};

// Joins the splits of one query in a fixed order; a block is one query of one image.
template <typename T>
TF_DEVICE void combine_forward(const Params& p) {
  const int64_t image = block_index() / p.queries, q = block_index() % p.queries;
  const int64_t first = image * p.splits * p.queries + q;
  float maximum = -kInfinity, total = 0;
  for (int i = 0; i < p.splits; ++i) maximum = fmaxf(maximum, p.partial_max[first + i * p.queries]);
  const float origin = maximum == -kInfinity ? 0 : maximum;
  for (int i = 0; i < p.splits; ++i)
    total += p.partial_sum[first + i * p.queries] * expf(p.partial_max[first + i * p.queries] - origin);
  for (int c = 4 * thread_index(); c < p.channels; c += 4 * block_threads()) {
    float sums[4] = {};
    for (int i = 0; i < p.splits; ++i) {
      const int64_t row = first + i * p.queries;
      const float weight = expf(p.partial_max[row] - origin);
      float part[4];
      load_four(part, p.partial_context + row * p.channels + c);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] += weight * part[j];
    }
    store_four(static_cast<T*>(p.context) + block_index() * p.channels + c, sums, 1 / total);
  }
  if (thread_index() == 0) p.log_sum_exp[block_index()] = maximum + logf(total);
}

template <typename T>
TF_DEVICE void combine_backward(const Params& p) {
  const int64_t image = block_index() / p.queries, q = block_index() % p.queries;
  for (int c = 4 * thread_index(); c < p.channels; c += 4 * block_threads()) {
    float sums[4] = {};
    for (int i = 0; i < p.splits; ++i) {
      const int64_t row = (image * p.splits + i) * p.queries + q;
      float part[4];
      load_four(part, p.partial_grad_query + row * p.channels + c);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] += part[j];
    }
    store_four(static_cast<T*>(p.grad_query) + block_index() * p.channels + c, sums, 1);
  }
}

// The block for these sizes, in at most `most_bytes` of shared memory where that is possible, and such that a
// multiprocessor takes two where its registers do.
template <typename T, int kQueryTiles, bool kBackward>
Plan make_plan(const Params& p, int64_t most_bytes) {
  constexpr int kWarpsEnough = 8, kStagesEnough = 4, kTwoBlocksThreads = 256;
  constexpr int64_t kTwoBlocksBytes = 100 << 10;
  constexpr int kMaxWarps = Plan::max_warps(kQueryTiles, sizeof(T));
  const int tiles = (p.rows + kTile - 1) / kTile / p.splits;
  Plan plan;
  plan.warps = (p.channels + kSlab - 1) / kSlab;
  plan.groups = (kWarpsEnough < kMaxWarps ? kWarpsEnough : kMaxWarps) / plan.warps;
  if (plan.groups > tiles) plan.groups = tiles;
  if (plan.groups < 1) plan.groups = 1;
  plan.stages = kStagesEnough;
  for (;;) {
    Shared<T, kQueryTiles, kBackward> shared;
    plan.shared_bytes = shared.layout(nullptr, plan.warps, plan.groups, plan.stages, 0);
    const bool alone = plan.stages == 2 || plan.threads() > kTwoBlocksThreads;
    if (plan.shared_bytes <= most_bytes && (alone || plan.shared_bytes <= kTwoBlocksBytes)) return plan;
    if (plan.stages > 2)
      --plan.stages;
    else if (plan.groups > 1)
      --plan.groups;
    else
      return plan;
  }
}

template <typename T, int n>
struct Variant {
  typedef T Element;
  static constexpr int query_tiles = n;
};

// f(Variant) for the dtype and the number of queries.
template <typename T, typename F>
auto with_variant(int queries, F f) {
  switch (Plan::query_tiles_for(queries)) {
    case 1:
      return f(Variant<T, 1>());
    case 2:
      return f(Variant<T, 2>());
    default:
      return f(Variant<T, 4>());
  }
}
template <typename F>
auto with_variant(Dtype dtype, int queries, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return with_variant<float>(queries, f);
    case Dtype::kFloat16:
      return with_variant<Half>(queries, f);
    default:
      return with_variant<BFloat16>(queries, f);
  }
}

}  // namespace single_query_attention
}  // namespace tokenfusion
