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

// What a block knows of its place, where registers would be needed.
struct Place {
  int64_t first_token;  // of the image
  // Of the parts that a call is cut into:
  int strip, first_channel, channels;
  Four<float>* records;  // of the first tile's strips
  float* sums;           // of the strips
};

// The shared memory of a block and, in it, of one of its groups.
template <typename T, int kQueryTiles, bool kBackward>
struct Shared {
  static constexpr int kQueries = 8 * kQueryTiles;
  static constexpr int kOperands = kBackward ? 2 * kQueries : kQueries;
  static constexpr int kPieces = kBackward ? 1 : Matrix<T>::kPieces;  // more would not fit beside what else there is
  static constexpr int kPad = 16 / sizeof(T);
  static constexpr int kPart = 32 * kOperands / 8 + kTile / 2;  // a warp's products, then two numbers of each row
  static constexpr int kStages = 2;                             // a tile in use, and one that is on its way

  int pitch, result_pitch;
  int64_t group_bytes;

  T* operands;  // [kPieces, kOperands, pitch]; backward: for every 8 queries, 8 rows of grad_context, then 8 of query
  float* operand_sum;          // [kOperands], over the channels
  float *delta, *log_sum_exp;  // [kQueries]
  Place* place;

  T* tiles;                // [kStages, kTile, pitch]
  float* result;           // [kQueries, result_pitch], in the place of the tiles at the end
  Four<float>* parts;      // [1 + warps, kPart]: sums over the warps of a group, and what each of them adds
  float *maximum, *total;  // [kQueries], at the end
  float* excess;           // [kQueries], at the end

  // Lays out the memory of a block with these groups, for one group's threads; returns the size.
  TF_HOST_DEVICE int64_t layout(char* memory, const Plan& plan, int group) {
    const int channels = kUnit * plan.units * plan.warps;
    pitch = (channels + 2 * kPad - 1) / (2 * kPad) * (2 * kPad) + kPad, result_pitch = channels + 4;
    char* next = memory;
    take(next, operands, kPieces * kOperands * pitch);
    take(next, operand_sum, kOperands);
    take(next, delta, kBackward ? kQueries : 0);
    take(next, log_sum_exp, kBackward ? kQueries : 0);
    take(next, place, kBackward || Plan::is_cut(kQueryTiles));
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

  TF_DEVICE Four<float>* part(int i) const { return parts + i * kPart; }
  static TF_DEVICE Two<float>* rows_of(Four<float>* part) {
    return reinterpret_cast<Two<float>*>(part + 32 * kOperands / 8);
  }

 private:
  TF_HOST_DEVICE void layout_group(char*& next, const Plan& plan) {
    const int tile_bytes = kStages * kTile * pitch * int(sizeof(T)), result_bytes = kQueries * result_pitch * 4;
    tiles = reinterpret_cast<T*>(next);
    take(next, result, (tile_bytes > result_bytes ? tile_bytes : result_bytes) / 4);
    take(next, parts, plan.shared_parts * kPart);
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

template <typename T, int n>
struct Variant {
  typedef T Element;
  static constexpr int query_tiles = n;
  static constexpr int max_units = Plan::max_units(n, sizeof(T)), max_warps = Plan::max_warps(n);
  // Whether there are kernels without guards: as registers suffice for, and guards are no small part of the work.
  static constexpr bool can_be_full = n == 1 || n == 2 && !kIsHalf<T>;
};

// The block for these sizes, in at most `most_bytes` of shared memory where that is possible. A multiprocessor is to
// hold as many warps as its registers suffice for, in two blocks rather than one, which begin and end at different
// times. Where only few groups fit into its memory, they have more warps, though these do more altogether.
template <typename V, bool kBackward>
Plan make_plan(const Params& p, int64_t most_bytes) {
  constexpr int64_t kReserved = 1 << 10;  // of a multiprocessor's shared memory, by each block
  constexpr int kAside = sizeof(typename V::Element) == 4 ? 3 : 12;  // units that cost as much as the rest of a tile
  const int units = (p.strip_channels + kUnit - 1) / kUnit;
  Shared<typename V::Element, V::query_tiles, kBackward> shared;
  Plan best{};
  float least = kInfinity;
  for (int warps = (units + V::max_units - 1) / V::max_units; warps <= V::max_warps; ++warps) {
    Plan plan{warps, 1, (units + warps - 1) / warps, warps > 1 || p.strips > 1 ? 1 + warps : 0};
    if (warps > 1 && (warps - 1) * plan.units >= units) continue;  // one would have nothing to do
    const int64_t bytes = shared.layout(nullptr, plan, 0);
    for (int blocks = 2; blocks >= 1; --blocks) {
      const int64_t left = (most_bytes + kReserved) / blocks - kReserved - bytes;
      const int64_t fit = left < 0 ? 0 : left / shared.group_bytes + 1, held = V::max_warps / blocks / warps;
      const int groups = int(fit < held ? fit : held);
      const float cost = groups > 0 ? float(kAside * warps + units) / (blocks * groups * warps) : kInfinity;
      if (best.warps > 0 && cost >= least) continue;
      plan.groups = groups > 0 ? groups : 1, least = cost, best = plan;
    }
  }
  const int64_t tiles = (p.length + (p.extra_token != nullptr) + kTile - 1) / kTile / p.splits;
  if (best.groups > tiles) best.groups = tiles > 0 ? int(tiles) : 1;
  best.shared_bytes = shared.layout(nullptr, best, 0);
  return best;
}

// f(Variant) for the dtype and the number of query tiles.
template <typename F>
auto with_variant(Dtype dtype, int query_tiles, F f) {
  return with_dtype(dtype, [&](auto element) {
    typedef decltype(element) T;
    switch (query_tiles) {
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
