// Forward and backward of dynamic_mixing. A block takes 16 rows, a row being a segment of a line, and 16 targets at a
// time. All its warps multiply the rows by the generator's weight, which they read from the L2 cache once for 16 rows;
// these logits lie in shared memory, from where each warp takes those of one row: softmax over the sources, and the
// products with its tokens. All products are made by the tensor cores. Logits and probabilities never reach memory; the
// backward kernels make them again.
//
// Numbers moved and operations, per row, with w = D / S; each kernel also reads the K of compressed and, from the
// cache, K N^2 / 16 of the weight, and generates, 2 K N^2 operations:
//   forward          reads N w of x, writes N w (once for 16 targets where a segment does not fit into shared memory);
//                    mixes, 2 N^2 w
//   grad_x           reads N w of grad_mixed, writes N w; 2 N^2 w
//   grad_compressed  reads N w of x and of grad_mixed, writes K; 2 N^2 (w + K)
//   grad_weight      per 16 targets and `share` inputs: reads N w of x and 16 w of grad_mixed; 32 N (w + share)
// In bfloat16 with N = 32, w = 24, K = 64 that is 3.2 KB of memory, 8 KB of the cache and 180 000 operations forward.
#pragma once

#include "common/mma.cuh"
#include "dynamic_mixing_plan.h"

namespace tokenfusion {
namespace dynamic_mixing {

// What all kernels share: the work of a block and, in it, of each row's warp.
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

  // Turns the logits of this warp's row into exponentials, the inverse of whose sum over the sources goes to scale().
  // Two lanes share a target, with half of the sources each.
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

  // Stores two neighbouring channels of a token; the second may be beyond `end`.
  TF_DEVICE void store_pair(T* to, int channel, int end, float first, float second) {
    if (plan.width % 2 == 0) {
      if (channel < end) store_two(to + channel, first, second);
    } else {
      if (channel < end) to[channel] = from_float<T>(first);
      if (channel + 1 < end) to[channel + 1] = from_float<T>(second);
    }
  }
};

}  // namespace dynamic_mixing
}  // namespace tokenfusion
