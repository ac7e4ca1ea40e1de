// Forward and backward of dynamic_mixing. A block takes 16 rows, a row being a segment of a line, and 16 targets at a
// time. All its warps multiply the rows by the generator's weight, which they read from the L2 cache once for 16 rows;
// these logits lie in shared memory, from where each warp takes those of one row: softmax over the sources, and the
// products with its tokens. All products are made by the tensor cores. Logits and probabilities never reach memory; the
// backward kernels make them again.
//
// Numbers that move and operations, per row, with w = D / S; each kernel also reads the K of compressed and, from the
// cache, K N^2 / 16 of the weight, and generates, 2 K N^2 operations:
//   forward          reads N w of x, writes N w (once for 16 targets where a segment does not fit into shared memory);
//                    mixes, 2 N^2 w
//   grad_x           reads N w of grad_mixed, writes N w; 2 N^2 w
//   grad_compressed  reads N w of x and of grad_mixed, writes K; 2 N^2 (w + K)
//   grad_weight      per 16 targets and `share` inputs: reads N w of x and 16 w of grad_mixed; 32 N (w + share)
// In bfloat16 with N = 32, w = 24, K = 64 that is 3.2 KB of memory, 8 KB of the cache and 180 000 operations forward.
#pragma once

#include "dtype.h"
#include "dynamic_mixing.h"
#include "matrix.cuh"

namespace tokenfusion {
namespace dynamic_mixing {

typedef DynamicMixingParams Params;
typedef DynamicMixingView View;
typedef DynamicMixingKernel Kernel;

constexpr int kRows = 16;  // of a block; each has a warp
constexpr int kThreads = 32 * kRows;
constexpr int kTargets = kDynamicMixingTargets;
constexpr int kLogitPitch = kTargets + 4;  // + 4: no two lanes of a product in a bank
constexpr int kGroup = 32;                 // channels whose sums a warp has in registers
constexpr int kMaxTiles = 16;
constexpr int kInputs = 16 * kMaxTiles;  // of which a block of grad_compressed makes the gradients

// Sources of a warp's sums in registers, in tiles of 16.
TF_HOST_DEVICE constexpr int source_tiles(int tokens) { return tokens <= 32 ? 2 : 4; }
// Channels in tiles of 8, of which a block of grad_x has the gradients.
TF_HOST_DEVICE constexpr int channel_tiles(int source_tiles) { return source_tiles == 2 ? 4 : 2; }
// Inputs in tiles of 8, of which a block of grad_weight has the gradients for all sources and 16 targets.
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

// Of the channels or inputs, as many as a block's registers suffice for.
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

// What all kernels do, by a block and, in it, by the warp of a row.
template <typename T>
struct Block {
  typedef Matrix<T> M;
  static constexpr int kVector = 16 / sizeof(T);

  const Params& p;
  const Plan& plan;
  char* const memory;
  int warp, lane;

  TF_DEVICE Block(const Params& params, const Plan& plan_, char* memory_) : p(params), plan(plan_), memory(memory_) {
    warp = thread_index() / 32, lane = thread_index() % 32;
  }

  template <typename U>
  TF_DEVICE U* at(int bytes) const {
    return reinterpret_cast<U*>(memory + bytes);
  }
  // This warp's part of the shared memory.
  TF_DEVICE float* logits() const { return at<float>(plan.logits) + warp * plan.logit_pitch; }
  TF_DEVICE float* scale() const { return at<float>(plan.scale) + warp * kTargets; }
  TF_DEVICE T* tokens() const { return at<T>(plan.tokens) + warp * round_up(p.tokens, 16) * plan.pitch; }
  TF_DEVICE T* gradients() const { return at<T>(plan.gradients) + warp * kTargets * plan.pitch; }

  TF_DEVICE void block_barrier() { barrier(0, kThreads); }

  TF_DEVICE const Row& row() const { return at<Row>(plan.rows)[warp]; }

  // The first token of this warp's row, in a tensor whose segments are `channels` wide.
  TF_DEVICE T* find(const View& view, int channels) const {
    const Row r = row();
    return static_cast<T*>(view.data) + r.image * view.batch_stride + r.line * view.line_stride + r.segment * channels;
  }

  // Takes up 16 rows; those beyond the last are zeros.
  TF_DEVICE void begin(int64_t row_tile) {
    const int64_t number = row_tile * kRows + warp, lines = number / p.segments;
    const bool there = number < p.rows;
    if (lane == 0)
      at<Row>(plan.rows)[warp] = {int(lines / p.lines), int(lines % p.lines), int(number % p.segments), there};
    warp_barrier();
    const T* const from = find(p.compressed, p.reduced);
    T* const to = at<T>(plan.compressed) + warp * plan.input_pitch;
#pragma unroll 1
    for (int k = lane; k < plan.input_pitch - kVector; k += 32)
      to[k] =
          there && k < plan.inputs ? from[k / p.reduced * p.compressed.token_stride + k % p.reduced] : from_float<T>(0);
  }

  // Begins to copy channels [first, first + channels) of `count` of this warp's tokens, from number `token` on, where
  // they are there, and zeros up to `count` tokens and to `padded` channels. `mean` [channels] is added; it may be
  // null.
  TF_DEVICE void stage(T* to, const View& view, const float* mean, int token, int count, int first, int channels,
                       int padded) {
    const T* const from = find(view, plan.width) + token * view.token_stride + first;
    const int left = row().there ? p.tokens - token : 0;
    if (view.aligned && mean == nullptr) {
#pragma unroll 1
      for (int i = lane; i < count * (padded / kVector); i += 32) {
        const int row = i / (padded / kVector), column = i % (padded / kVector) * kVector;
        const bool wanted = row < left && column < channels;
        copy_async(to + row * plan.pitch + column, wanted ? from + row * view.token_stride + column : view.data,
                   wanted);
      }
    } else if (view.aligned) {
#pragma unroll 1
      for (int i = lane; i < count * (padded / 4); i += 32) {
        const int row = i / (padded / 4), column = i % (padded / 4) * 4;
        float sum[4] = {}, added[4];
        if (row < left && column < channels) {
          load_four(sum, from + row * view.token_stride + column);
          load_four(added, mean + column);
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[j] += added[j];
        }
        store_four(to + row * plan.pitch + column, sum, 1);
      }
    } else {
#pragma unroll 1
      for (int i = lane; i < count * padded; i += 32) {
        const int row = i / padded, column = i % padded;
        float sum = 0;
        if (row < left && column < channels)
          sum = to_float(from[row * view.token_stride + column]) + (mean == nullptr ? 0 : mean[column]);
        to[row * plan.pitch + column] = from_float<T>(sum);
      }
    }
    commit_copies();
  }
  TF_DEVICE void stage_tokens(int first, int channels, int padded) {
    stage(tokens(), p.x, nullptr, 0, round_up(p.tokens, 16), first, channels, padded);
  }
  TF_DEVICE void stage_gradients(int tile, int first, int channels, int padded) {
    const Row r = row();
    const bool has_mean = p.grad_mean != nullptr && r.there;
    const float* const mean = p.grad_mean + int64_t(r.image) * p.channels + r.segment * plan.width + first;
    stage(gradients(), p.grad_mixed, has_mean ? mean : nullptr, tile * kTargets, kTargets, first, channels, padded);
  }

  // sums += a b^T for 16 rows of a and the block's 16 rows of b: `upper` and `lower` are rows lane / 4 and lane / 4 + 8
  // of a in memory, null for zeros, b [kRows, pitch] is in shared memory. The depth is a multiple of 16 bytes; b has
  // zeros up to four times that. What comes next is read while this is multiplied.
  TF_DEVICE void multiply(const T* upper, const T* lower, int depth, const T* b, int pitch, float (&sums)[2][4]) {
    typedef typename M::Vector Vector;
    const auto load = [&](const T* row, int k) {
      return row != nullptr && k < depth ? *reinterpret_cast<const Vector*>(row + k) : Vector{};
    };
    int k = lane % 4 * kVector;
    Vector above = load(upper, k), below = load(lower, k);
#pragma unroll 1
    for (int step = 0; step < depth; step += 4 * kVector) {
      const Vector next_above = load(upper, k + 4 * kVector), next_below = load(lower, k + 4 * kVector);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const Vector column = *reinterpret_cast<const Vector*>(b + (8 * t + lane / 4) * pitch + k);
        typename M::Product product;
#pragma unroll
        for (int i = 0; i < M::kVectorSteps; ++i) product.add(M::vector_a(above, below, i), M::vector_b(column, i));
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[t][i] += product[i];
      }
      above = next_above, below = next_below, k += 4 * kVector;
    }
  }

  // Logits of 16 targets for all rows; a warp takes every 16th source.
  TF_DEVICE void generate(int tile) {
    const int target = tile * kTargets + lane / 4;
    for (int source = warp; source < p.tokens; source += kRows) {
      const int first = source * p.tokens + target;
      const bool wanted[2] = {target < p.tokens, target + 8 < p.tokens};
      const T* const weight = static_cast<const T*>(p.weight) + int64_t(first) * p.weight_pitch;
      float sums[2][4] = {};
      multiply(wanted[0] ? weight : nullptr, wanted[1] ? weight + 8 * p.weight_pitch : nullptr, p.weight_pitch,
               at<T>(plan.compressed), plan.input_pitch, sums);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float bias = wanted[i] ? to_float(static_cast<const T*>(p.bias)[first + 8 * i]) : 0;
        float* const to =
            at<float>(plan.logits) + lane % 4 * 2 * plan.logit_pitch + source * kLogitPitch + lane / 4 + 8 * i;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          to[8 * t * plan.logit_pitch] = sums[t][2 * i] + bias;
          to[(8 * t + 1) * plan.logit_pitch] = sums[t][2 * i + 1] + bias;
        }
      }
    }
  }

  // Turns the logits of this warp's row into exponentials, whose sum over the sources goes to scale(). Half of the
  // sources each for two lanes a target.
  TF_DEVICE void weigh() {
    float* const column = logits() + lane % kTargets;
    float maximum = -kInfinity, sum = 0;
    for (int i = lane / kTargets; i < p.tokens; i += 2) maximum = fmaxf(maximum, column[i * kLogitPitch]);
    maximum = fmaxf(maximum, shuffle_xor(maximum, kTargets));
    for (int i = lane / kTargets; i < p.tokens; i += 2)
      sum += column[i * kLogitPitch] = expf(column[i * kLogitPitch] - maximum);
    sum += shuffle_xor(sum, kTargets);
    if (lane < kTargets) scale()[lane] = 1 / sum;
    warp_barrier();
  }

  // By the block, for 16 targets: exponentials and their sums, as weigh() leaves them. Copies under way go on.
  TF_DEVICE void make_weights(int tile) {
    block_barrier();
    generate(tile);
    block_barrier();
    weigh();
  }

  // Sums over the lanes that differ in lane / 4.
  static TF_DEVICE float sum_columns(float x) {
    x += shuffle_xor(x, 4), x += shuffle_xor(x, 8);
    return x + shuffle_xor(x, 16);
  }

  // Stores two channels of a token next to each other, the second of which may be beyond `end`.
  TF_DEVICE void store_pair(T* to, int channel, int end, float first, float second) {
    if (plan.width % 2 == 0) {
      if (channel < end) store_two(to + channel, first, second);
    } else {
      if (channel < end) to[channel] = from_float<T>(first);
      if (channel + 1 < end) to[channel + 1] = from_float<T>(second);
    }
  }
};

template <typename T>
struct Forward : Block<T> {
  typedef Block<T> Base;
  typedef typename Base::M M;
  using Base::lane, Base::p, Base::plan, Base::Base;

  TF_DEVICE void run() {
    this->begin(block_index());
    for (int tile = 0; tile < target_tiles(p); ++tile) {
      for (int first = 0; first < plan.width; first += plan.chunk) {
        const int left = plan.width - first < plan.chunk ? plan.width - first : plan.chunk;
        if (tile == 0 || plan.chunk < plan.width) this->stage_tokens(first, left, plan.chunk);
        if (first == 0) this->make_weights(tile);
        wait_copies(0);
        warp_barrier();
        for (int c = 0; c < left; c += kGroup) mix(tile, first + c, c, left);
        warp_barrier();
      }
    }
  }

 private:
  // Channels [first, first + kGroup) of a segment, but for those beyond `end`, of 16 targets; the tokens' begin at
  // `column` in shared memory.
  TF_DEVICE void mix(int tile, int first, int column, int end) {
    float sums[kGroup / 8][4] = {};
    const T* const tokens = this->tokens() + column;
    const float* const logits = this->logits();
#pragma unroll 1
    for (int k = 0; k < p.tokens; k += 16) {
      const typename M::A weights = M::make_a([&](int i, int source) {
        return k + source < p.tokens ? logits[(k + source) * kLogitPitch + lane / 4 + 8 * i] : 0;
      });
#pragma unroll
      for (int n = 0; n < kGroup / 8; ++n) {
        if (column + 8 * n < end) {
          typename M::Product product;
          product.add(weights, M::load_b(tokens + k * plan.pitch + 8 * n, plan.pitch));
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[n][i] += product[i];
        }
      }
    }
    if (!this->row().there) return;
    end += first - column;
    T* const mixed = this->find(p.mixed, plan.width);
    const Row r = this->row();
    float* const line_sums = p.line_sums + (int64_t(r.image) * p.lines + r.line) * p.channels + r.segment * plan.width;
#pragma unroll
    for (int n = 0; n < kGroup / 8; ++n) {
      const int channel = first + 8 * n + lane % 4 * 2;
      float of_line[2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int target = lane / 4 + 8 * i;
        if (tile * kTargets + target < p.tokens) {
          const float scale = this->scale()[target];
          const float pair[2] = {sums[n][2 * i] * scale, sums[n][2 * i + 1] * scale};
          this->store_pair(mixed + (tile * kTargets + target) * p.mixed.token_stride, channel, end, pair[0], pair[1]);
          of_line[0] += pair[0], of_line[1] += pair[1];
        }
      }
      if (p.line_sums != nullptr) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float sum = Base::sum_columns(of_line[j]);
          if (lane < 4 && channel + j < end) line_sums[channel + j] = tile == 0 ? sum : line_sums[channel + j] + sum;
        }
      }
    }
  }
};

template <typename T, int kSourceTiles>
struct GradX : Block<T> {
  typedef Block<T> Base;
  typedef typename Base::M M;
  using Base::lane, Base::p, Base::plan, Base::Base;
  static constexpr int kTiles = channel_tiles(kSourceTiles);

  TF_DEVICE void run() {
    const int first = block_index() % plan.shares * plan.share;
    const int channels = plan.width - first < plan.share ? plan.width - first : plan.share;
    float sums[kSourceTiles][kTiles][4] = {};
    this->begin(block_index() / plan.shares);
    for (int tile = 0; tile < target_tiles(p); ++tile) {
      this->stage_gradients(tile, first, channels, round_up(channels, 8));
      this->make_weights(tile);
      wait_copies(0);
      warp_barrier();
      add(tile, channels, sums);
      warp_barrier();
    }
    if (!this->row().there) return;
    T* const to = this->find(p.grad_x, plan.width);
#pragma unroll
    for (int m = 0; m < kSourceTiles; ++m)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int source = 16 * m + lane / 4 + 8 * i;
          if (source < p.tokens)
            this->store_pair(to + source * p.grad_x.token_stride, first + 8 * n + lane % 4 * 2, first + channels,
                             sums[m][n][2 * i], sums[m][n][2 * i + 1]);
        }
  }

 private:
  TF_DEVICE void add(int tile, int channels, float (&sums)[kSourceTiles][kTiles][4]) {
    const int targets = p.tokens - tile * kTargets;
    const float *const logits = this->logits(), *const scale = this->scale();
#pragma unroll
    for (int m = 0; m < kSourceTiles; ++m) {
      if (16 * m < p.tokens) {
        const int source = 16 * m + lane / 4;
        const typename M::A weights = M::make_a([&](int i, int target) {
          const bool wanted = source + 8 * i < p.tokens && target < targets;
          return wanted ? logits[(source + 8 * i) * kLogitPitch + target] * scale[target] : 0;
        });
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          if (8 * n < channels) {
            typename M::Product product;
            product.add(weights, M::load_b(this->gradients() + 8 * n, plan.pitch));
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] += product[i];
          }
        }
      }
    }
  }
};

// What the gradients of the compressed numbers and of the generator share: those of the logits.
template <typename T, int kSourceTiles>
struct LogitGradients : Block<T> {
  typedef Block<T> Base;
  typedef typename Base::M M;
  using Base::lane, Base::p, Base::plan, Base::Base;

  TF_DEVICE T* logit_gradients() const { return this->template at<T>(plan.logits); }
  TF_DEVICE int gradient_pitch() const { return plan.logit_pitch * 4 / int(sizeof(T)); }

  // Gradients of the logits of this warp's row, [padded sources, kTargets], in the place of the logits. `has_tokens`
  // says whether the first tokens are in shared memory already.
  TF_DEVICE void differentiate(int tile, bool has_tokens) {
    stage(tile, 0, has_tokens);
    this->make_weights(tile);
    float slope[kSourceTiles][2][4] = {};  // gradients of the weights
    for (int first = 0; first < plan.width; first += plan.chunk) {
      if (first > 0) stage(tile, first, false);
      wait_copies(0);
      warp_barrier();
      for (int c = 0; c < plan.chunk; c += 16) add_slope(c, slope);
      warp_barrier();
    }
    const float *const logits = this->logits(), *const scale = this->scale();
    float delta[2][2] = {};
    for_each([&](int m, int n, int i, int j, int source, int target, bool inside) {
      const float weight = inside ? logits[source * kLogitPitch + target] * scale[target] : 0;
      float& x = slope[m][n][2 * i + j];
      if (inside) delta[n][j] += weight * x;
    });
#pragma unroll
    for (int i = 0; i < 4; ++i) delta[i / 2][i % 2] = Base::sum_columns(delta[i / 2][i % 2]);
    for_each([&](int m, int n, int i, int j, int source, int target, bool inside) {
      const float weight = inside ? logits[source * kLogitPitch + target] * scale[target] : 0;
      float& x = slope[m][n][2 * i + j];
      x = inside && target < p.tokens - tile * kTargets ? weight * (x - delta[n][j]) : 0;
    });
    warp_barrier();
    T* const to = reinterpret_cast<T*>(this->logits());
#pragma unroll
    for (int m = 0; m < kSourceTiles; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int source = 16 * m + lane / 4 + 8 * i;
          if (source < padded_sources(p))
            store_two(to + source * kTargets + 8 * n + lane % 4 * 2, slope[m][n][2 * i], slope[m][n][2 * i + 1]);
        }
  }

 private:
  TF_DEVICE void stage(int tile, int first, bool has_tokens) {
    const int left = plan.width - first < plan.chunk ? plan.width - first : plan.chunk;
    if (!has_tokens || plan.chunk < plan.width) this->stage_tokens(first, left, plan.chunk);
    this->stage_gradients(tile, first, left, plan.chunk);
  }

  TF_DEVICE void add_slope(int channel, float (&slope)[kSourceTiles][2][4]) {
    typename M::B gradients[2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
      gradients[n] = M::load_b_transposed(this->gradients() + 8 * n * plan.pitch + channel, plan.pitch);
#pragma unroll
    for (int m = 0; m < kSourceTiles; ++m) {
      if (16 * m < p.tokens) {
        const typename M::A tokens = M::load_a(this->tokens() + 16 * m * plan.pitch + channel, plan.pitch);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          typename M::Product product;
          product.add(tokens, gradients[n]);
#pragma unroll
          for (int i = 0; i < 4; ++i) slope[m][n][i] += product[i];
        }
      }
    }
  }

  // f(m, n, i, j, source, target, whether the source is there) for the places of the sums that this lane has.
  template <typename F>
  TF_DEVICE void for_each(F f) {
#pragma unroll
    for (int m = 0; m < kSourceTiles; ++m) {
      if (16 * m < p.tokens) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int source = 16 * m + lane / 4 + i / 2 * 8;
            f(m, n, i / 2, i % 2, source, 8 * n + lane % 4 * 2 + i % 2, source < p.tokens);
          }
      }
    }
  }
};

// The warps share the inputs and, where these are few, the depth of the product with the weight.
template <typename T, int kSourceTiles>
struct GradCompressed : LogitGradients<T, kSourceTiles> {
  typedef LogitGradients<T, kSourceTiles> Base;
  using Base::lane, Base::p, Base::plan, Base::warp, Base::Base;

  TF_DEVICE void run() {
    constexpr int kStep = 4 * Base::kVector;
    const int first = block_index() % plan.shares * plan.share;
    const int here = plan.inputs - first < plan.share ? plan.inputs - first : plan.share;
    const int tiles = divide_up(here, 16), depth = padded_sources(p) * kTargets, steps = divide_up(depth, kStep);
    const int parts = kRows / tiles < steps ? kRows / tiles : steps;
    const int part = warp / tiles, input = warp % tiles * 16 + lane / 4;
    const int begin = steps * part / parts * kStep, end = steps * (part + 1) / parts * kStep;
    const int64_t pitch = int64_t(target_tiles(p)) * depth;
    const T* const columns = static_cast<const T*>(p.weight_columns) + (first + input) * pitch + begin;
    float sums[2][4] = {};
    this->begin(block_index() / plan.shares);
    for (int tile = 0; tile < target_tiles(p); ++tile) {
      this->differentiate(tile, tile > 0);
      this->block_barrier();
      if (part < parts) {
        const T* const from = columns + tile * depth;
        this->multiply(input < here ? from : nullptr, input + 8 < here ? from + 8 * pitch : nullptr, end - begin,
                       this->logit_gradients() + begin, this->gradient_pitch(), sums);
      }
    }
    if (part < parts) write_partial(sums);
    this->block_barrier();
    if (!this->row().there) return;
    T* const to = this->find(p.grad_compressed, p.reduced);
#pragma unroll 1
    for (int k = lane; k < here; k += 32) {
      float sum = 0;
      for (int i = 0; i < parts; ++i) sum += *partial(i * tiles + k / 16, k % 16, warp);
      const int at = first + k;
      to[at / p.reduced * p.grad_compressed.token_stride + at % p.reduced] = from_float<T>(sum);
    }
  }

 private:
  TF_DEVICE float* partial(int tile, int input, int row) const {
    return this->template at<float>(plan.partial) + (tile * 16 + input) * (kRows + 1) + row;
  }
  TF_DEVICE void write_partial(const float (&sums)[2][4]) {
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) *partial(warp, lane / 4 + i / 2 * 8, 8 * t + lane % 4 * 2 + i % 2) = sums[t][i];
  }
};

// A block has 16 targets and some of the inputs, and adds up a part of the rows.
template <typename T, int kSourceTiles>
struct GradWeight : LogitGradients<T, kSourceTiles> {
  typedef LogitGradients<T, kSourceTiles> Base;
  typedef typename Base::M M;
  using Base::lane, Base::p, Base::plan, Base::warp, Base::Base;
  static constexpr int kInputTiles = input_tiles(kSourceTiles, sizeof(T));
  static constexpr int kBiases = divide_up(16 * kSourceTiles * kTargets, kThreads);

  TF_DEVICE void run() {
    const int tile = block_index() % target_tiles(p), share = block_index() / target_tiles(p);
    const int first = share % plan.shares * plan.share, split = share / plan.shares;
    const int here = plan.inputs - first < plan.share ? plan.inputs - first : plan.share;
    float sums[kSourceTiles][kInputTiles][4] = {}, of_bias[kBiases] = {};
    const int64_t end = row_tiles(p) * (split + 1) / p.splits;
    for (int64_t row_tile = row_tiles(p) * split / p.splits; row_tile < end; ++row_tile) {
      this->begin(row_tile);
      this->differentiate(tile, false);
      this->block_barrier();
      add(first, here, sums);
      if (first == 0) add_bias(of_bias);
      this->block_barrier();
    }
    write(tile, split, first, here, sums);
    if (first == 0) write_bias(tile, split, of_bias);
  }

 private:
  TF_DEVICE void add(int first, int here, float (&sums)[kSourceTiles][kInputTiles][4]) {
#pragma unroll
    for (int m = 0; m < kSourceTiles; ++m) {
      const int source = warp + kRows * m;
      if (source < p.tokens) {
        const typename M::A gradients =
            M::load_a_transposed(this->logit_gradients() + source * kTargets, this->gradient_pitch());
#pragma unroll
        for (int n = 0; n < kInputTiles; ++n) {
          if (8 * n < here) {
            typename M::Product product;
            product.add(gradients, M::load_b(this->template at<T>(plan.compressed) + first + 8 * n, plan.input_pitch));
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] += product[i];
          }
        }
      }
    }
  }

  TF_DEVICE void add_bias(float (&sums)[kBiases]) {
#pragma unroll
    for (int u = 0; u < kBiases; ++u) {
      const int at = thread_index() + u * kThreads;
      if (at < p.tokens * kTargets)
#pragma unroll 4
        for (int row = 0; row < kRows; ++row)
          sums[u] += to_float(this->logit_gradients()[row * this->gradient_pitch() + at]);
    }
  }

  TF_DEVICE int64_t output(int split, int source, int target) const {
    return (int64_t(split) * p.tokens + source) * p.tokens + target;
  }

  TF_DEVICE void write(int tile, int split, int first, int here, const float (&sums)[kSourceTiles][kInputTiles][4]) {
#pragma unroll
    for (int m = 0; m < kSourceTiles; ++m)
#pragma unroll
      for (int n = 0; n < kInputTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int source = warp + kRows * m, target = tile * kTargets + lane / 4 + i / 2 * 8;
          const int input = 8 * n + lane % 4 * 2 + i % 2;
          if (source < p.tokens && target < p.tokens && input < here)
            p.grad_weight[output(split, source, target) * plan.inputs + first + input] = sums[m][n][i];
        }
  }

  TF_DEVICE void write_bias(int tile, int split, const float (&sums)[kBiases]) {
#pragma unroll
    for (int u = 0; u < kBiases; ++u) {
      const int at = thread_index() + u * kThreads, target = tile * kTargets + at % kTargets;
      if (at < p.tokens * kTargets && target < p.tokens) p.grad_bias[output(split, at / kTargets, target)] = sums[u];
    }
  }
};

// f(T()) for the dtype.
template <typename F>
auto with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float());
    case Dtype::kFloat16:
      return f(Half());
    default:
      return f(BFloat16());
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
