// How the kernels of dynamic_mixing are cut up into blocks, and what lies in a block's shared memory.
#pragma once

#include "common/with_dtype.cuh"
#include "dynamic_mixing.h"

namespace tokenfusion {
namespace dynamic_mixing {

typedef DynamicMixingParams Params;
typedef DynamicMixingView View;
typedef DynamicMixingKernel Kernel;

constexpr int kRows = 16;  // rows of a block; each has a warp
constexpr int kThreads = 32 * kRows;
constexpr int kTargets = kDynamicMixingTargets;
constexpr int kLogitPitch = kTargets + 4;  // + 4: no two lanes of a product in a bank
constexpr int kGroup = 32;                 // channels whose sums a warp has in registers
constexpr int kMaxTiles = 16;
constexpr int kInputs = 16 * kMaxTiles;  // inputs whose gradients a block of grad_compressed makes

// Tiles of 16 sources whose sums a warp has in registers.
TF_HOST_DEVICE constexpr int source_tiles(int tokens) { return tokens <= 32 ? 2 : 4; }
// Tiles of 8 channels whose gradients a block of grad_x has.
TF_HOST_DEVICE constexpr int channel_tiles(int source_tiles) { return source_tiles == 2 ? 4 : 2; }
// Tiles of 8 inputs for which a block of grad_weight has the gradients, for all sources and 16 targets.
TF_HOST_DEVICE constexpr int input_tiles(int source_tiles, int itemsize) {
  return source_tiles == 4 ? 1 : itemsize == 4 ? 2 : 4;
}

TF_HOST_DEVICE constexpr int divide_up(int x, int unit) { return (x + unit - 1) / unit; }
TF_HOST_DEVICE int round_up(int x, int unit) { return divide_up(x, unit) * unit; }
TF_HOST_DEVICE int target_tiles(const Params& p) { return divide_up(p.tokens, kTargets); }
TF_HOST_DEVICE int padded_sources(const Params& p) { return round_up(p.tokens, 2); }
TF_HOST_DEVICE int64_t row_tiles(const Params& p) { return (p.rows + kRows - 1) / kRows; }

// Where a row is. In shared memory, so that it takes no registers.
struct alignas(16) Row {
  int image, line, segment, there;
};

// How a kernel is cut up, and the shared memory of a block: where its arrays begin, in bytes, and their pitches, in
// elements.
struct Plan {
  int width, inputs;  // channels of a segment, numbers that generate its logits
  int share, shares;  // how many of the channels or inputs a block makes gradients of, and blocks that share them
  int64_t blocks;
  int chunk;  // channels of a segment that are in shared memory together

  int logit_pitch, input_pitch, pitch;
  int rows;        // Row [kRows]
  int logits;      // float [kRows, logit_pitch]: [sources, kLogitPitch]
  int scale;       // float [kRows, kTargets]: 1 / the sum of a target's exponentials
  int compressed;  // [kRows, input_pitch]
  int tokens;      // [kRows, sources rounded up to 16, pitch]
  int partial;     // float [kMaxTiles, 16, kRows + 1], in the place of the tokens at the end
  int gradients;   // [kRows, kTargets, pitch]
  int shared_bytes;

  void layout(const Params& p, Kernel kernel, int itemsize) {
    const int unit = 16 / itemsize;
    logit_pitch = round_up(padded_sources(p) * kLogitPitch, 16) + 4;
    input_pitch = round_up(inputs, 4 * unit) + unit;
    pitch = chunk + (chunk / unit % 2 == 0 ? unit : 0);  // rows lie an odd number of 16 bytes apart
    const int token_bytes = kernel == Kernel::kGradX ? 0 : kRows * round_up(p.tokens, 16) * pitch * itemsize;
    const int partial_bytes = kernel == Kernel::kGradCompressed ? kMaxTiles * 16 * (kRows + 1) * 4 : 0;
    shared_bytes = 0;
    rows = take(kRows * sizeof(Row));
    logits = take(kRows * logit_pitch * 4);
    scale = take(kRows * kTargets * 4);
    compressed = take(kRows * input_pitch * itemsize);
    tokens = partial = take(token_bytes > partial_bytes ? token_bytes : partial_bytes);
    gradients = take(kernel == Kernel::kForward ? 0 : kRows * kTargets * pitch * itemsize);
  }

 private:
  int take(int bytes) {
    const int first = shared_bytes;
    shared_bytes += round_up(bytes, 16);
    return first;
  }
};

// As many of the channels or inputs as a block's registers suffice for.
inline int share_of(const Params& p, Kernel kernel, int itemsize) {
  switch (kernel) {
    case Kernel::kForward:
      return p.channels / p.segments;
    case Kernel::kGradX:
      return 8 * channel_tiles(source_tiles(p.tokens));
    case Kernel::kGradCompressed:
      return kInputs;
    default:
      return 8 * input_tiles(source_tiles(p.tokens), itemsize);
  }
}

// With as many channels in shared memory as there are, or as fit into `most_bytes`; the least where nothing fits.
inline Plan make_plan(const Params& p, Kernel kernel, int itemsize, int64_t most_bytes) {
  Plan plan;
  plan.width = p.channels / p.segments, plan.inputs = p.tokens * p.reduced;
  plan.share = share_of(p, kernel, itemsize);
  plan.shares =
      divide_up(kernel == Kernel::kForward || kernel == Kernel::kGradX ? plan.width : plan.inputs, plan.share);
  plan.blocks = plan.shares * (kernel == Kernel::kGradWeight ? int64_t(p.splits) * target_tiles(p) : row_tiles(p));
  const int unit = kernel == Kernel::kForward ? 8 : 16;
  const int most = kernel == Kernel::kForward ? plan.width : kernel == Kernel::kGradX ? plan.share : kGroup;
  plan.chunk = round_up(plan.width < most ? plan.width : most, unit);
  for (;; plan.chunk -= unit) {
    plan.layout(p, kernel, itemsize);
    if (plan.shared_bytes <= most_bytes || plan.chunk == unit || kernel == Kernel::kGradX) return plan;
  }
}

template <typename T, int n>
struct Variant {
  typedef T Element;
  static constexpr int source_tiles = n;
};

// f(Variant) for the dtype and the number of tokens.
template <typename F>
auto with_variant(Dtype dtype, int tokens, F f) {
  return with_dtype(dtype, [&](auto element) {
    typedef decltype(element) T;
    return source_tiles(tokens) == 2 ? f(Variant<T, 2>()) : f(Variant<T, 4>());
  });
}

}  // namespace dynamic_mixing
}  // namespace tokenfusion
