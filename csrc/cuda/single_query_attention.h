// What the host side and the kernels of single_query_attention share. No torch headers here: the kernels need none.
#pragma once

#include <stdint.h>

namespace tokenfusion {

// Whole numbers of either width, or none.
struct Integers {
  const void* data;
  int32_t is_long;
};

// Strides are in elements; the innermost dimension of every tensor is contiguous. Rows are numbered with the extra
// token, where there is one, as row 0. Rows of tokens and of the extra token are aligned to 16 bytes.
struct SingleQueryAttentionParams {
  const void* query;  // [batch, queries, channels]
  int64_t query_batch_stride, query_stride;
  const void* tokens;  // [batch, length, channels], or [1, length, channels] where there are offsets
  int64_t tokens_batch_stride, tokens_stride;
  const void* extra_token;  // [batch, channels] or null
  int64_t extra_token_stride;
  Integers lengths;  // [batch]: how many of an image's tokens count
  Integers offsets;  // [batch + 1]: where each image's tokens are
  int64_t length;
  int32_t batch, channels, queries;
  int32_t query_tiles;          // of 8 queries, that a block has
  int32_t splits;               // blocks that share an image's rows
  int32_t slices, first_slice;  // as many queries as a block takes, and which of them this launch begins with
  int32_t strips, strip_channels;
  float per_channel;  // 1 / channels
  int32_t normalize;
  float eps;

  void* context;           // [batch, queries, channels], contiguous
  float* log_sum_exp;      // [batch, queries]
  float* partial_context;  // with splits > 1: [batch, splits, queries, channels], not yet divided
  float* partial_max;      // [batch, splits, queries]
  float* partial_sum;      // [batch, splits, queries]

  // Backward; context and log_sum_exp are inputs there.
  const void* grad_context;   // [batch, queries, channels], contiguous
  void* grad_query;           // contiguous, or null
  float* partial_grad_query;  // with splits > 1: [batch, splits, queries, channels]
  void* grad_tokens;          // contiguous, or null; rows that do not count are not written
  void* grad_extra_token;     // contiguous, or null
  // What the slices of earlier launches have made of the last two, where these are not float32, and whether this launch
  // adds to it and is the last.
  float *grad_tokens_so_far, *grad_extra_token_so_far;
  int32_t adds, is_last;

  // Where a block's channels are some of several strips, one launch writes the sums over each strip's, and another one
  // reads those of all strips before it does the rest.
  enum Part : int32_t { kWhole, kProducts, kRest };
  Part part;
  float* strip_products;  // [tiles of all images, slices, strips, record]; the tiles of image i, whose tokens begin
  int32_t rows_apart;     // with number n of all images', are those from (n + i rows_apart) / kTile on
  float* strip_sums;      // [batch, slices, strips, of operands]
};

// How a block is made up: `groups` groups of `warps` warps. A group takes every groups-th tile of its block's rows; a
// warp of it has `units` times 16 of the channels.
struct SingleQueryAttentionPlan {
  static constexpr int kTile = 16, kUnit = 16, kMaxQueries = 32;

  int warps, groups, units;
  int shared_parts;  // of sums that warps of a group share
  int64_t shared_bytes;

  // Tiles of 8 queries that a kernel is made for.
  static constexpr int query_tiles_for(int queries) { return queries <= 8 ? 1 : queries <= 16 ? 2 : 4; }
  // Warps of a multiprocessor, and of a block, whose registers suffice for max_units of each.
  static constexpr int max_warps(int query_tiles) { return query_tiles < 4 ? 12 : 8; }
  static constexpr int max_units(int query_tiles, int itemsize) {
    if (itemsize == 4) return query_tiles == 1 ? 6 : 4;
    return query_tiles == 1 ? 12 : query_tiles == 2 ? 8 : 6;
  }
  // A block of so many queries may have one of several strips; and, backward, only then one of several slices.
  static constexpr bool is_cut(int query_tiles) { return 8 * query_tiles == kMaxQueries; }

  // Numbers that a strip has of each tile and of its operands.
  static constexpr int operands(int query_tiles, bool backward) { return (backward ? 16 : 8) * query_tiles; }
  static constexpr int record(int query_tiles, bool backward) { return kTile * (operands(query_tiles, backward) + 4); }
  static constexpr int sums(int query_tiles, bool backward) {
    return operands(query_tiles, backward) + (backward ? 8 * query_tiles : 0);
  }

  int threads() const { return 32 * warps * groups; }
};

}  // namespace tokenfusion
