// How the forward kernel of dynamic_mixing is cut up into blocks, and what lies in a block's shared memory.
#pragma once

#include "dynamic_mixing_plan.h"

namespace tokenfusion {
namespace dynamic_mixing {

constexpr int kMostTargets = 32;  // of a pass

// Sources of a kernel's logits, those beyond the tokens included.
TF_HOST_DEVICE constexpr int forward_sources(int tokens) { return tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64; }

// What a kernel for so many sources has: a warp makes the logits of `targets` targets for 16 rows and all sources at
// once, and `lanes` lanes share those of a target; few targets keep all warps busy with more rows.
struct ForwardShape {
  int sources, rows, warps, lanes, targets;

  TF_HOST_DEVICE constexpr explicit ForwardShape(int sources_)
      : sources(sources_), rows(sources == 16 ? 32 : 16), warps(8), lanes(sources / 16), targets(4 / lanes) {}
  TF_HOST_DEVICE constexpr int threads() const { return 32 * warps; }
  TF_HOST_DEVICE constexpr int rows_of_warp() const { return rows / warps; }
  // Blocks that a multiprocessor has registers for.
  TF_HOST_DEVICE constexpr int blocks(int itemsize) const { return sources == 16 && itemsize == 2 ? 2 : 1; }
};

// Where the first token of a row is, in elements from the beginning of each view; below zero for rows beyond the last.
struct alignas(16) ForwardRow {
  int64_t x, compressed, mixed, line_sums;
};

// The blocks stay and take one tile of rows after the other. Pitches are in
// elements, arrays begin at so many bytes.
struct ForwardPlan {
  int width, chunk;  // channels of a segment; those in shared memory together, rounded up to 8
  int pass;          // targets whose weights are in shared memory together
  int buffers;       // for tokens; with two, those of the next tile are copied meanwhile
  int resident;      // groups of targets whose part of the generator stays in shared memory
  bool in_place;     // mixed tokens go to memory by way of the tokens' place
  bool words;        // compressed numbers are copied 4 bytes at a time
  int blocks, tiles;
  int images, step_images, step_lines, step_segments;   // of the batch, and from a tile of a block to its next
  int rows_at_once, lanes_of_token, tokens_at_once;     // of a warp that copies tokens
  int inputs, depth, input_pitch, weight_pitch, pitch;  // depth: inputs rounded up to 64 bytes
  int places;                                           // ForwardRow [3, rows]
  int bias;                                             // float [groups, sources / 2 lanes, 8]
  int compressed, compressed_bytes;                     // [2, rows, input_pitch]
  int weights;                                          // [rows, weight_pitch]: [pass, sources + 16 bytes]
  int tokens, token_bytes;                              // [buffers, rows, tokens rounded up to 16, pitch]
  int generator;  // [resident, depth / 64 bytes, sources / 2 lanes, 32 threads, 16 bytes]
  int shared_bytes;

  void layout(const Params& p, int itemsize) {
    const ForwardShape shape(forward_sources(p.tokens));
    const int sources = shape.sources, rows = shape.rows, unit = 16 / itemsize;
    depth = round_up(inputs, 4 * unit);
    input_pitch = depth + unit;                          // rows that are read together meet in no bank:
    weight_pitch = pass * (sources + unit) + 4 * unit;   // they lie an odd number of 16 bytes apart, those of weights
    pitch = chunk + (chunk / unit % 2 == 0 ? unit : 0);  // are written as 4 targets of two rows
    compressed_bytes = rows * input_pitch * itemsize;
    token_bytes = rows * round_up(p.tokens, 16) * pitch * itemsize;
    shared_bytes = 0;
    places = take(3 * rows * sizeof(ForwardRow));
    bias = take(round_up(p.tokens, shape.targets) * sources * 4);
    compressed = take(2 * compressed_bytes);
    weights = take(rows * weight_pitch * itemsize);
    tokens = take(buffers * token_bytes);
    generator = shared_bytes;
  }

 private:
  int take(int bytes) {
    const int first = shared_bytes;
    shared_bytes += round_up(bytes, 16);
    return first;
  }
};

// Whether a row's compressed numbers of a token are whole words that begin at multiples of 4 bytes.
inline bool has_words(const Params& p, int itemsize) {
  const View& v = p.compressed;
  const int64_t bytes = reinterpret_cast<uintptr_t>(v.data) | v.batch_stride * itemsize | v.line_stride * itemsize |
                        v.token_stride * itemsize | p.reduced * itemsize;
  return bytes % 4 == 0;
}

// The roomiest layout that fits into `most_bytes`; the least where none does.
inline void choose_layout(ForwardPlan& plan, const Params& p, int itemsize, int64_t most_bytes) {
  const int channels = round_up(plan.width, 8), targets = p.tokens <= 16 ? 16 : kMostTargets;
  const auto fits = [&](int pass, int buffers, int chunk) {
    plan.pass = pass, plan.buffers = buffers, plan.chunk = chunk;
    plan.layout(p, itemsize);
    return plan.shared_bytes <= most_bytes;
  };
  if (fits(targets, 2, channels) || fits(targets, 1, channels)) return;
  for (int chunk = channels; !fits(16, 1, chunk) && chunk > 8;) chunk -= 8;
}

inline ForwardPlan make_forward_plan(const Params& p, int itemsize, int64_t most_bytes, int multiprocessors) {
  ForwardPlan plan{};
  const ForwardShape shape(forward_sources(p.tokens));
  const int rows = shape.rows;
  plan.width = p.channels / p.segments, plan.inputs = p.tokens * p.reduced;
  choose_layout(plan, p, itemsize, most_bytes);
  const int groups = divide_up(p.tokens, shape.targets);
  const int group_bytes = shape.sources * shape.targets * plan.depth * itemsize;
  const int64_t room = (most_bytes - plan.shared_bytes) / group_bytes;
  plan.resident = room < 0 ? 0 : room < groups ? int(room) : groups;
  plan.shared_bytes += plan.resident * group_bytes;
  plan.in_place = p.mixed.aligned && plan.chunk >= plan.width && plan.pass >= p.tokens;
  plan.words = has_words(p, itemsize);

  constexpr int kReserved = 1024;  // of the shared memory of a block, by the driver
  const int fitting = int((most_bytes + kReserved) / (plan.shared_bytes + kReserved));
  const int blocks = shape.blocks(itemsize);
  plan.tiles = int((p.rows + rows - 1) / rows);
  plan.blocks = multiprocessors * (fitting < 1 ? 1 : fitting < blocks ? fitting : blocks);
  if (plan.blocks > plan.tiles) plan.blocks = plan.tiles;
  const int64_t step = int64_t(plan.blocks) * rows, lines = step / p.segments;
  plan.images = int(p.rows / p.segments / p.lines);
  plan.step_images = int(lines / p.lines), plan.step_lines = int(lines % p.lines);
  plan.step_segments = int(step % p.segments);

  const int vectors = plan.chunk * itemsize / 16, rows_of_warp = shape.rows_of_warp();
  plan.rows_at_once = rows_of_warp * vectors <= 32 ? rows_of_warp : 1;
  plan.lanes_of_token = plan.rows_at_once * vectors < 32 ? plan.rows_at_once * vectors : 32;
  plan.tokens_at_once = 32 / plan.lanes_of_token;
  return plan;
}

// f(T(), sources as a constant) for the dtype and the number of tokens.
template <typename F>
auto with_sources(Dtype dtype, int tokens, F f) {
  return with_dtype(dtype, [&](auto element) {
    typedef decltype(element) T;
    switch (forward_sources(tokens)) {
      case 16:
        return f(T(), std::integral_constant<int, 16>());
      case 32:
        return f(T(), std::integral_constant<int, 32>());
      default:
        return f(T(), std::integral_constant<int, 64>());
    }
  });
}

}  // namespace dynamic_mixing
}  // namespace tokenfusion
