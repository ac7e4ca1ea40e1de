// How the kernels of single_query_attention are cut up into blocks, and what lies in a block's shared memory.
#pragma once

#include "common/mma.cuh"
#include "common/with_dtype.cuh"
#include "single_query_attention.h"

namespace tokenfusion {
namespace single_query_attention {

typedef SingleQueryAttentionParams Params;
typedef SingleQueryAttentionPlan Plan;

constexpr int kTile = Plan::kTile, kUnit = Plan::kUnit;

// The shared memory of a block and, in it, of one of its groups.
template <typename T, int kQueryTiles, bool kBackward>
struct Shared {
  static constexpr int kQueries = 8 * kQueryTiles;
  static constexpr int kOperands = kBackward ? 2 * kQueries : kQueries;
  static constexpr int kPieces = kBackward ? 1 : Matrix<T>::kPieces;  // more would not fit beside what else there is
  static constexpr int kPad = 16 / sizeof(T);
  static constexpr int kParts = kOperands / 8 + 2;    // products, sums and squares, shifts
  static constexpr int kBuffers = kBackward ? 1 : 2;  // two spare a barrier, one spares memory

  int pitch, result_pitch;
  int64_t group_bytes;

  T* operands;  // [kPieces, kOperands, pitch]; backward: for every 8 queries, 8 rows of grad_context, then 8 of query
  float* operand_sum;          // [warps + 1, kOperands], over a warp's channels, and over all of them
  float *delta, *log_sum_exp;  // [kQueries]
  int64_t* first_token;        // of the image, where a register would be needed

  T* tiles;                // [stages, kTile, pitch]
  float* result;           // [kQueries, result_pitch], in the place of the tiles at the end
  Four<float>* parts;      // [kBuffers, warps, kParts, 32]: what the warps of a group tell each other
  T* shift;                // [warps, kTile]
  float *maximum, *total;  // [kQueries], at the end
  float* excess;           // [kQueries], at the end

  // Lays out the memory of a block with these groups, for one group's threads; returns the size.
  TF_HOST_DEVICE int64_t layout(char* memory, const Plan& plan, int group) {
    const int channels = kUnit * plan.units * plan.warps;
    pitch = (channels + 2 * kPad - 1) / (2 * kPad) * (2 * kPad) + kPad, result_pitch = channels + 4;
    char* next = memory;
    take(next, operands, kPieces * kOperands * pitch);
    take(next, operand_sum, (plan.warps + 1) * kOperands);
    take(next, delta, kBackward ? kQueries : 0);
    take(next, log_sum_exp, kBackward ? kQueries : 0);
    take(next, first_token, kBackward);
    char* const first = next;
    layout_group(next, plan);
    group_bytes = next - first;
    next = first + group * group_bytes;
    layout_group(next, plan);
    return first - memory + plan.groups * group_bytes;
  }

  // The same array of another group.
  template <typename U>
  TF_DEVICE U* of_group(U* mine, int distance) const {
    return reinterpret_cast<U*>(reinterpret_cast<char*>(mine) + distance * group_bytes);
  }

 private:
  TF_HOST_DEVICE void layout_group(char*& next, const Plan& plan) {
    const int tile_bytes = plan.stages * kTile * pitch * int(sizeof(T)), result_bytes = kQueries * result_pitch * 4;
    tiles = reinterpret_cast<T*>(next);
    take(next, result, (tile_bytes > result_bytes ? tile_bytes : result_bytes) / 4);
    take(next, parts, plan.warps > 1 ? kBuffers * plan.warps * kParts * 32 : 0);
    take(next, shift, plan.warps * kTile);
    take(next, maximum, kBackward ? 0 : kQueries);
    take(next, total, kBackward ? 0 : kQueries);
    take(next, excess, kBackward ? kQueries : 0);
  }

  template <typename U>
  static TF_HOST_DEVICE void take(char*& next, U*& array, int count) {
    array = reinterpret_cast<U*>(next);
    next += (count * sizeof(U) + 15) / 16 * 16;
  }
};

template <typename T, int n, bool is_full>
struct Variant {
  typedef T Element;
  static constexpr int query_tiles = n;
  static constexpr bool full = is_full;
  static constexpr int max_units = Plan::max_units(n, sizeof(T), is_full);
};

// The block for these sizes, in at most `most_bytes` of shared memory where that is possible, and such that a
// multiprocessor takes three, which hide each other's latencies.
template <typename V, bool kBackward>
Plan make_plan(const Params& p, int64_t most_bytes) {
  constexpr int kWarpsEnough = 4, kStagesEnough = 4, kBlocksEnough = 3;
  constexpr int64_t kReserved = 1 << 10;  // of a multiprocessor's shared memory, by each block
  const int64_t enough = (most_bytes + kReserved) / kBlocksEnough - kReserved;
  const int units = (p.channels + kUnit - 1) / kUnit;
  const int64_t tiles = (p.length + (p.extra_token != nullptr) + kTile - 1) / kTile / p.splits;
  Plan plan;
  constexpr int kMaxUnits = V::max_units;
  plan.warps = (units + kMaxUnits - 1) / kMaxUnits;
  plan.units = (units + plan.warps - 1) / plan.warps;
  plan.groups = kWarpsEnough / plan.warps;
  if (plan.groups > tiles) plan.groups = int(tiles);
  if (plan.groups < 1) plan.groups = 1;
  plan.stages = kStagesEnough;
  for (;;) {
    Shared<typename V::Element, V::query_tiles, kBackward> shared;
    plan.shared_bytes = shared.layout(nullptr, plan, 0);
    if (plan.shared_bytes <= (plan.stages == 2 ? most_bytes : enough)) return plan;
    if (plan.stages > 2)
      --plan.stages;
    else if (plan.groups > 1)
      --plan.groups;
    else
      return plan;
  }
}

// f(Variant) for the dtype and the sizes.
template <typename T, int n, typename F>
auto with_channels(int channels, F f) {
  typedef Variant<T, n, true> Full;
  if (channels % (kUnit * Full::max_units) == 0) return f(Full());
  return f(Variant<T, n, false>());
}
template <typename F>
auto with_variant(Dtype dtype, int queries, int channels, F f) {
  return with_dtype(dtype, [&](auto element) {
    typedef decltype(element) T;
    switch (Plan::query_tiles_for(queries)) {
      case 1:
        return with_channels<T, 1>(channels, f);
      case 2:
        return with_channels<T, 2>(channels, f);
      default:
        return with_channels<T, 4>(channels, f);
    }
  });
}

}  // namespace single_query_attention
}  // namespace tokenfusion
