// How the kernels of single_query_attention are cut up into blocks, and what lies in a block's shared memory.
#pragma once

#include "common/with_dtype.cuh"
#include "single_query_attention.h"

namespace tokenfusion {
namespace single_query_attention {

typedef SingleQueryAttentionParams Params;
typedef SingleQueryAttentionPlan Plan;

constexpr int kTile = Plan::kTile, kSlab = Plan::kSlab;
constexpr int kUnits = kSlab / 16;  // steps of the products over a warp's channels

TF_HOST_DEVICE int count_tiles(const Params& p) { return (p.rows + kTile - 1) / kTile; }
// The first tile of the rows that block `split` of an image takes; that of the next one ends them.
TF_HOST_DEVICE int first_tile_of(const Params& p, int split) { return int(int64_t(count_tiles(p)) * split / p.splits); }

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

// The block for these sizes, in at most `most_bytes` of shared memory where that is possible, and such that a
// multiprocessor takes two where its registers do.
template <typename T, int kQueryTiles, bool kBackward>
Plan make_plan(const Params& p, int64_t most_bytes) {
  constexpr int kWarpsEnough = 8, kStagesEnough = 4, kTwoBlocksThreads = 256;
  constexpr int64_t kTwoBlocksBytes = 100 << 10;
  constexpr int kMaxWarps = Plan::max_warps(kQueryTiles, sizeof(T));
  const int tiles = count_tiles(p) / p.splits;
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
template <typename F>
auto with_variant(Dtype dtype, int queries, F f) {
  return with_dtype(dtype, [&](auto element) {
    typedef decltype(element) T;
    switch (Plan::query_tiles_for(queries)) {
      case 1:
        return f(Variant<T, 1>());
      case 2:
        return f(Variant<T, 2>());
      default:
        return f(Variant<T, 4>());
    }
  });
}

}  // namespace single_query_attention
}  // namespace tokenfusion
