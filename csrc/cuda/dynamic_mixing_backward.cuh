// The kernels of dynamic_mixing's backward pass: the gradients of x, of the compressed tokens and of the generator.
#pragma once

#include "dynamic_mixing_block.cuh"

namespace tokenfusion {
namespace dynamic_mixing {

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
      wait_copies();
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
      wait_copies();
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

}  // namespace dynamic_mixing
}  // namespace tokenfusion
