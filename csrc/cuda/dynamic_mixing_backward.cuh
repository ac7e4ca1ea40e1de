// The backward kernel of dynamic_mixing. A block takes up to 16 rows at a time, a row being a segment of a line:
//
// 1. Its warps share the targets: they multiply the rows by the generator and take the softmax over the sources where
//    the tensor cores leave the logits; the probabilities go to shared memory.
// 2. A warp has one row: products of its probabilities, tokens and gradients, which become the gradient of x, in the
//    place of the tokens, and those of the logits, in the place of the probabilities.
// 3. The warps share the inputs and the sums over the logits: the gradient of the compressed numbers. The logits'
//    gradients and the rows' inputs go to memory, where the host multiplies them: the gradient of the generator.
//
// The generator stays in shared memory where it fits, its bias as one more column, for an input that is 1. A row's
// logits lie in blocks of 8 targets and 8 sources, [n / 8, n / 8, 8, 8], and so do the rows of the generator.
//
// A row moves 3 N w numbers (w = D / S), N^2 logits' gradients there and back, and 3 K of the inputs; the operations
// are 6 K N^2 and 4 N^2 w. In bfloat16 with N = 32, w = 24, K = 64 that is 9.2 KB and 490 000 operations.
#pragma once

#include "dynamic_mixing_backward_plan.h"
#include "dynamic_mixing_fragments.cuh"

namespace tokenfusion {
namespace dynamic_mixing {

template <typename T, int kTiles, bool kResident>
struct Backward {
  typedef Fragments<T> F;
  typedef DynamicMixingBackward Params;
  typedef DynamicMixingView View;
  typedef BackwardRow Row;
  static constexpr bool kIsFloat = sizeof(T) == 4;
  static constexpr int kTokens = 16 * kTiles, kGroups = kTokens / 8, kLogits = kTokens * kTokens;
  static constexpr int kBlock = 64,
                       kBelow = kGroups * kBlock;  // from a block of 8 x 8 logits to those beside and below
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kAtOnce = kTiles <= 2 ? kTiles : 1;  // tiles of targets whose gradients registers hold
  static constexpr int kHeld = kIsFloat ? 1 : kAtOnce;      // the same of sources

  // What a thread has of the pieces of all rows and tokens.
  struct Share {
    int row, piece, token;  // its first; beyond all tokens where it has none
    Sweep sweep;

    TF_DEVICE Share(const Sweep& of_block, int rows) : sweep(of_block) {
      const unsigned thread = thread_index(), of_token = rows * sweep.at_once;
      token = thread / of_token, piece = thread % of_token;
      row = unsigned(piece) / unsigned(sweep.at_once), piece -= row * sweep.at_once;
      if (token >= sweep.tokens) token = kTokens;
    }
    // f(piece, token)
    template <typename Function>
    TF_DEVICE void for_each(int pieces, Function f) const {
#pragma unroll 1
      for (int i = piece; i < pieces; i += sweep.at_once)
#pragma unroll 1
        for (int t = token; t < kTokens; t += sweep.tokens) f(i, t);
    }
  };

  const Params& p;
  const BackwardPlan& plan;
  char* const memory;
  const int warp, lane;
  const Share vectors, numbers;
  int first_row, rows_here;  // of this tile, from the first of the launch on

  TF_DEVICE Backward(const Params& params, const BackwardPlan& plan_, char* memory_)
      : p(params),
        plan(plan_),
        memory(memory_),
        warp(thread_index() / 32),
        lane(lane_index()),
        vectors(plan_.vectors, plan_.rows),
        numbers(plan_.numbers, plan_.rows) {}

  template <typename U>
  TF_DEVICE U* at(int bytes) const {
    return reinterpret_cast<U*>(memory + bytes);
  }
  TF_DEVICE Row* rows() const { return at<Row>(plan.of_rows); }
  TF_DEVICE T* weight() const { return at<T>(plan.weight) + (kResident ? 0 : warp * 2 * kTokens * plan.weight_pitch); }
  TF_DEVICE T* logits(int row) const { return at<T>(plan.logits) + row * plan.logit_pitch; }
  TF_DEVICE T* inputs(int row) const { return at<T>(plan.inputs_at) + row * plan.input_pitch; }
  TF_DEVICE T* tokens(int bytes, int row) const { return at<T>(bytes) + row * kTokens * plan.pitch; }
  TF_DEVICE int threads() const { return 32 * plan.warps; }
  TF_DEVICE void block_barrier() const { barrier(0, threads()); }
  // A row whose numbers a product may take for those of a row that is not there.
  TF_DEVICE int clamped(int row) const { return row < plan.rows ? row : plan.rows - 1; }
  TF_DEVICE bool wants_logits() const { return p.logit_gradients != nullptr || p.grad_compressed.data != nullptr; }
  TF_DEVICE int channels_from(int first) const {
    return plan.width - first < plan.chunk ? plan.width - first : plan.chunk;
  }

  TF_DEVICE void run() {
    begin();
    for (int tile = block_index(); tile < plan.tiles; tile += plan.blocks) {
      find_rows(tile);
      block_barrier();
      fetch_inputs();
      if (plan.chunks == 1) fetch_tokens(0, true);
      block_barrier();
      generate();
      if (plan.chunks == 1) {
        wait_copies();
        block_barrier();
        for (int row = warp; row < plan.rows; row += plan.warps) differentiate(row);
        block_barrier();
        if (p.grad_x.data != nullptr) store_grad_x(0);
      } else {
        block_barrier();
        differentiate_in_chunks();
        block_barrier();
      }
      if (p.logit_gradients != nullptr) store_logit_gradients();
      if (p.grad_compressed.data != nullptr) make_grad_compressed();
      block_barrier();
    }
  }

 private:
  TF_DEVICE Share channels() const {
    const int each = threads() / plan.rows, at_once = plan.chunk < each ? plan.chunk : each;
    return Share({at_once, each / at_once}, plan.rows);
  }

  // Where the row of the generator is that makes the logit at this place of a row.
  struct Logit {
    unsigned source, target;

    TF_DEVICE Logit(unsigned place)
        : source(place / kBlock % kGroups * 8 + place % 8), target(place / kBelow * 8 + place / 8 % 8) {}
    TF_DEVICE bool is_in(unsigned tokens) const { return source < tokens && target < tokens; }
    TF_DEVICE unsigned row(unsigned tokens) const { return source * tokens + target; }
  };

  // Rows of the generator: sixteens of a row's logits, `apart` from each other, from place `first` on. A lane copies a
  // vector of every `step`th, from `row` on.
  TF_DEVICE void copy_weight(T* to, unsigned first, unsigned apart, int column, unsigned row, int step,
                             int count) const {
    const T* const from = static_cast<const T*>(p.weight) + column;
    const int tokens = column < p.weight_pitch ? p.tokens : 0;
    to += row * plan.weight_pitch;
#pragma unroll 1
    for (; row < count; row += step, to += step * plan.weight_pitch) {
      const Logit logit(first + row / 16 * apart + row % 16);
      copy_async(to, from + int64_t(logit.row(p.tokens)) * p.weight_pitch, logit.is_in(tokens));
    }
    commit_copies();
  }
  // Their bias. A source that is not there gets no weight, whatever the inputs.
  TF_DEVICE void put_bias(T* to, unsigned first, unsigned apart, unsigned row, int step, int count) const {
#pragma unroll 1
    for (; row < count; row += step) {
      const Logit logit(first + row / 16 * apart + row % 16);
      T bias = from_float<T>(logit.source < p.tokens ? 0 : -kInfinity);
      if (logit.is_in(p.tokens)) bias = static_cast<const T*>(p.bias)[logit.row(p.tokens)];
      to[row * plan.weight_pitch] = bias;
    }
  }

  // The generator, where it stays, and of the inputs what no row changes.
  TF_DEVICE void begin() {
    for (int i = thread_index(); i < plan.rows * plan.input_pitch; i += threads())
      inputs(0)[i] = from_float<T>(i % plan.input_pitch == plan.inputs);
    if constexpr (!kResident) return;
    copy_generator();
    wait_copies();
    block_barrier();
    put_bias(weight() + plan.inputs, 0, 16, thread_index(), threads(), kLogits);
  }
  // Two lanes have a sector of a row, and a warp the rows of a block of 8 x 8 logits.
  TF_DEVICE void copy_generator() const {
    constexpr int kRows = 16;  // at once: of two targets
    for (int block = warp; block < kLogits / kBlock; block += plan.warps) {
      const int place = block * kBlock + lane / 2, first = lane % 2 * kVector;
      const Logit logit(place);
      const T* from = static_cast<const T*>(p.weight) + int64_t(logit.row(p.tokens)) * p.weight_pitch + first;
      T* to = weight() + place * plan.weight_pitch + first;
      const int targets = logit.source < p.tokens ? p.tokens - int(logit.target) : 0;
#pragma unroll 1
      for (int column = first; column < plan.columns; column += 2 * kVector) {
        const int there = column < p.weight_pitch ? targets : 0;
#pragma unroll
        for (int i = 0; i < kBlock / kRows; ++i)
          copy_async(to + kRows * i * plan.weight_pitch, from + int64_t(2 * i) * p.weight_pitch, 2 * i < there);
        from += 2 * kVector, to += 2 * kVector;
      }
    }
    commit_copies();
  }

  // What a warp needs of the generator, in shared memory: columns [column, column + 16) of `count` sixteens of rows.
  // They lie `apart` rows from each other where the generator stays, else one behind the other.
  TF_DEVICE const T* find_weight(int first, int apart, int count, int column) const {
    if constexpr (kResident) return weight() + first * plan.weight_pitch + column;
    constexpr int kPieces = 16 / kVector;
    const int piece = lane % kPieces * kVector, bias = plan.inputs - column;
    copy_weight(weight() + piece, first, apart, column + piece, lane / kPieces, 32 / kPieces, 16 * count);
    wait_copies();
    warp_barrier();
    if (bias >= 0 && bias < 16) {
      put_bias(weight() + bias, first, apart, lane, 32, 16 * count);
      warp_barrier();
    }
    return weight();
  }
  TF_DEVICE void release_weight() const {
    if constexpr (!kResident) warp_barrier();
  }

  // Takes up a tile; rows beyond the last are not there.
  TF_DEVICE void find_rows(int tile) {
    first_row = tile * plan.rows;
    const int left = p.rows - first_row;
    rows_here = left < plan.rows ? left : plan.rows;
    if (thread_index() >= rows_here) return;
    const unsigned number = p.first_row + first_row + thread_index(), line_number = number / unsigned(p.segments);
    const int image = line_number / unsigned(p.lines), line = line_number - image * p.lines;
    const int64_t channel = int64_t(number - line_number * p.segments) * plan.width;
    const auto place = [&](const View& view) { return image * view.batch_stride + line * view.line_stride + channel; };
    rows()[thread_index()] = {place(p.x), place(p.grad_mixed), place(p.grad_x), image, line};
  }
  TF_DEVICE int segment_of(const Row& row, int number) const {
    return p.first_row + first_row + number - (row.image * p.lines + row.line) * p.segments;
  }
  // The compressed numbers of a row, or their gradients.
  TF_DEVICE T* find_numbers(const View& view, int number) const {
    const Row& row = rows()[number];
    return static_cast<T*>(view.data) + row.image * view.batch_stride + row.line * view.line_stride +
           segment_of(row, number) * p.reduced;
  }

  TF_DEVICE void fetch_inputs() const {
    const bool there = numbers.row < rows_here;
    const T* const from = there ? find_numbers(p.compressed, numbers.row) : nullptr;
    T* const to = inputs(numbers.row);
    numbers.for_each(p.reduced, [&](int piece, int token) {
      if (token < p.tokens)
        to[token * p.reduced + piece] = there ? from[token * p.compressed.token_stride + piece] : from_float<T>(0);
    });
  }

  // Begins to copy channels from `first` on of all rows, and zeros where there are none.
  TF_DEVICE void fetch_tokens(int first, bool with_x) const {
    with_x = with_x && wants_logits();
    if (with_x && p.x.aligned && is_copied(p.grad_mixed, p.grad_mean)) {
      copy_both(first);
    } else {
      if (with_x) fetch(plan.x, p.x, &Row::x, first, nullptr);
      fetch(plan.grad_mixed, p.grad_mixed, &Row::grad_mixed, first, p.grad_mean);
    }
    commit_copies();
  }
  static TF_DEVICE bool is_copied(const View& view, const float* mean) { return view.aligned && mean == nullptr; }

  TF_DEVICE void copy_both(int first) const {
    const bool there = vectors.row < rows_here;
    const Row& row = rows()[there ? vectors.row : 0];
    const int count = there ? channels_from(first) : 0, step = vectors.sweep.tokens, pitch = step * plan.pitch;
    const int64_t stride = step * p.x.token_stride, grad_stride = step * p.grad_mixed.token_stride;
#pragma unroll 1
    for (int i = vectors.piece * kVector; i < plan.chunk; i += vectors.sweep.at_once * kVector) {
      const int tokens = i < count ? p.tokens : 0, to = vectors.token * plan.pitch + i;
      const T* from = start(p.x) + row.x + first + i;
      const T* grad = start(p.grad_mixed) + row.grad_mixed + first + i;
      T* x_to = this->tokens(plan.x, vectors.row) + to;
      T* grad_to = this->tokens(plan.grad_mixed, vectors.row) + to;
#pragma unroll 1
      for (int token = vectors.token; token < kTokens; token += step) {
        copy_async(x_to, from, token < tokens);
        copy_async(grad_to, grad, token < tokens);
        x_to += pitch, grad_to += pitch, from += stride, grad += grad_stride;
      }
    }
  }
  TF_DEVICE const T* start(const View& view) const {
    return static_cast<const T*>(view.data) + vectors.token * view.token_stride;
  }

  TF_DEVICE void fetch(int place, const View& view, int64_t Row::* offset, int first, const float* mean) const {
    const Share share = view.aligned ? vectors : channels();
    const bool there = share.row < rows_here;
    const Row& row = rows()[there ? share.row : 0];
    const T* const from = static_cast<const T*>(view.data) + row.*offset + first;
    T* const to = tokens(place, share.row);
    const int count = there ? channels_from(first) : 0;
    if (mean != nullptr)
      mean += int64_t(row.image) * p.channels + segment_of(row, there ? share.row : 0) * plan.width + first;
    if (is_copied(view, mean)) {
      share.for_each(plan.chunk / kVector, [&](int piece, int token) {
        copy_async(to + token * plan.pitch + piece * kVector, from + token * view.token_stride + piece * kVector,
                   token < p.tokens && piece * kVector < count);
      });
    } else if (view.aligned) {
      share.for_each(plan.chunk / kVector, [&](int piece, int token) {
#pragma unroll
        for (int channel = piece * kVector; channel < (piece + 1) * kVector; channel += 4) {
          float x[4] = {}, added[4];
          if (token < p.tokens && channel < count) {
            load_four(x, from + token * view.token_stride + channel);
            load_four(added, mean + channel);
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] += added[i];
          }
          store_four(to + token * plan.pitch + channel, x, 1);
        }
      });
    } else {
      share.for_each(plan.chunk, [&](int channel, int token) {
        float x = 0;
        if (token < p.tokens && channel < count)
          x = to_float(from[token * view.token_stride + channel]) + (mean == nullptr ? 0 : mean[channel]);
        to[token * plan.pitch + channel] = from_float<T>(x);
      });
    }
  }

  // e^x by e^shift or, of elements of 16 bits, by 2^shift, whose error all that is summed shares.
  static TF_DEVICE float exponential(float x, float shift) {
    if constexpr (kIsFloat)
      return expf(x - shift);
    else
      return exp2_approximate(fmaf(x, kLog2E, -shift));
  }
  static constexpr float kFar = 1 << 20;  // where that error could be of any size

  static TF_DEVICE float inverse(float x) {
    if constexpr (kIsFloat)
      return 1 / x;
    else
      return reciprocal_approximate(x);
  }
  static TF_DEVICE float max_quad(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
  }

  // Probabilities of all rows; a warp has two targets at a time.
  TF_DEVICE void generate() {
    for (int pair = warp; pair < kTokens / 2; pair += plan.warps) {
      const int first = pair / 4 * kBelow + pair % 4 * 16;  // in a row's logits
      float sums[kGroups][2][4] = {};                       // of 8 sources, a target, and two rows
      multiply_inputs(first, sums);
      float maximum[2][2];
      bool far = false;
      for_each_column([&](int t, int i) {
        maximum[t][i] = -kInfinity;
        for_each_logit([&](int g, int e) { maximum[t][i] = fmaxf(maximum[t][i], sums[g][t][2 * i + e]); });
        maximum[t][i] = max_quad(maximum[t][i]);
        far = far || !(fabsf(maximum[t][i]) < kFar);
      });
      if (!kIsFloat && any_lane(far)) {
        for_each_column([&](int t, int i) {
          for_each_logit([&](int g, int e) { sums[g][t][2 * i + e] -= maximum[t][i]; });
          maximum[t][i] = 0;
        });
      }
      for_each_column([&](int t, int i) {
        const float shift = maximum[t][i] * (kIsFloat ? 1 : kLog2E);
        float sum = 0;
        for_each_logit([&](int g, int e) {
          float& x = sums[g][t][2 * i + e];
          x = exponential(x, shift), sum += x;
        });
        const float scale = inverse(sum_quad(sum));
        const int row = lane / 4 + 8 * i;
        if (row >= plan.rows) return;
        T* const to = logits(row) + first + 8 * t + lane % 4 * 2;
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
          store_two(to + kBlock * g, sums[g][t][2 * i] * scale, sums[g][t][2 * i + 1] * scale);
      });
    }
  }
  template <typename Function>
  static TF_DEVICE void for_each_column(Function f) {
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) f(t, i);
  }
  template <typename Function>
  static TF_DEVICE void for_each_logit(Function f) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int e = 0; e < 2; ++e) f(g, e);
  }
  TF_DEVICE void multiply_inputs(int first, float (&sums)[kGroups][2][4]) const {
    const T* const row = inputs(clamped(lane % 16)) + F::place_in_rows(0);
    int k = 0;
#pragma unroll 1
    for (; k + 8 < plan.columns; k += 16) {
      add_logits<false>(row + k, find_weight(first, kBlock, kGroups, k), sums);
      release_weight();
    }
    if (k < plan.columns) {
      add_logits<true>(row + k, find_weight(first, kBlock, kGroups, k), sums);
      release_weight();
    }
  }
  template <bool kHalf>
  TF_DEVICE void add_logits(const T* row, const T* rows, float (&sums)[kGroups][2][4]) const {
    const int apart = (kResident ? kBlock : 16) * plan.weight_pitch;
    rows += F::template place_in_transposes<kHalf>(plan.weight_pitch);
    const auto a = F::split(F::template load_rows<kHalf>(row));
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      typename F::B b[2];
      F::template load_two_transposed<kHalf>(b, rows + g * apart, plan.weight_pitch);
#pragma unroll
      for (int t = 0; t < 2; ++t) F::template add<kHalf>(sums[g][t], a, b[t]);
      if constexpr (kIsFloat && kTiles > 2) warp_barrier();  // or all are loaded at once, for which registers are few
    }
  }

  typedef float Slope[kAtOnce][kGroups][4];  // gradients of probabilities: of tiles of 16 targets, and of 8 sources

  // A row, whose tokens are all in shared memory, by a warp.
  TF_DEVICE void differentiate(int row) {
    constexpr bool kInPlace = kTiles == kAtOnce;  // of the tokens, which are no longer needed
    if (!kInPlace && p.grad_x.data != nullptr) make_grad_x(row, plan.chunk);
#pragma unroll 1
    for (int m = 0; m < kTiles; m += kAtOnce) {
      Slope slope = {};
      if (wants_logits()) {
        add_slope(row, m, plan.chunk, slope);
        warp_barrier();
      }
      if (kInPlace && m == 0 && p.grad_x.data != nullptr) make_grad_x(row, plan.chunk);
      if (wants_logits()) {
        if (m == 0) warp_barrier();
        finish(row, m, slope);
      }
    }
  }
  // The same of all rows where channels come one chunk after the other; each row has its warp.
  TF_DEVICE void differentiate_in_chunks() {
    const int row = clamped(warp);
    if (p.grad_x.data != nullptr) {
#pragma unroll 1
      for (int first = 0; first < plan.width; first += plan.chunk) {
        fetch_tokens(first, false);
        wait_copies();
        block_barrier();
        if (warp < plan.rows) make_grad_x(row, plan.chunk);
        block_barrier();
        store_grad_x(first);
        block_barrier();
      }
    }
    if (!wants_logits()) return;
#pragma unroll 1
    for (int m = 0; m < kTiles; m += kAtOnce) {
      Slope slope = {};
#pragma unroll 1
      for (int first = 0; first < plan.width; first += plan.chunk) {
        fetch_tokens(first, true);
        wait_copies();
        block_barrier();
        if (warp < plan.rows) add_slope(row, m, plan.chunk, slope);
        block_barrier();
      }
      if (warp < plan.rows) finish(row, m, slope);
    }
  }

  TF_DEVICE void add_slope(int row, int m, int channels, Slope& slope) const {
    const T* const x = tokens(plan.x, row);
    const T* const grad = tokens(plan.grad_mixed, row) + 16 * m * plan.pitch + F::place_in_rows(plan.pitch);
    int c = 0;
#pragma unroll 1
    for (; c + 8 < channels; c += 16) add_slope<false>(x + c, grad + c, slope);
    if (c < channels) add_slope<true>(x + c, grad + c, slope);
  }
  template <bool kHalf>
  TF_DEVICE void add_slope(const T* x, const T* grad, Slope& slope) const {
    x += F::template place_in_transposes<kHalf>(plan.pitch);
    typename F::SplitA a[kAtOnce];
#pragma unroll
    for (int m = 0; m < kAtOnce; ++m) a[m] = F::split(F::template load_rows<kHalf>(grad + 16 * m * plan.pitch));
#pragma unroll
    for (int g = 0; g < kGroups; g += 2) {
      typename F::B b[2];
      F::template load_two_transposed<kHalf>(b, x + 8 * g * plan.pitch, plan.pitch);
#pragma unroll
      for (int m = 0; m < kAtOnce; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j) F::template add<kHalf>(slope[m][g + j], a[m], b[j]);
    }
  }

  // From the gradients of probabilities to those of logits, in the place of the probabilities.
  TF_DEVICE void finish(int row, int first, const Slope& slope) const {
#pragma unroll
    for (int m = 0; m < kAtOnce; ++m) {
      T* const blocks = logits(row) + (first + m) * 2 * kBelow;
      float weights[kTiles][2][4], delta[2] = {};
#pragma unroll
      for (int g = 0; g < kTiles; ++g) {
        F::load_products_of_blocks(weights[g], blocks + 2 * g * kBlock, kBelow, kBlock);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) delta[i / 2] += weights[g][j][i] * slope[m][2 * g + j][i];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) delta[i] = sum_quad(delta[i]);
      warp_barrier();
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* const weight = weights[g / 2][g % 2] + 2 * i;
          const float* const of_weight = slope[m][g] + 2 * i;
          store_two(blocks + i * kBelow + g * kBlock + lane * 2, weight[0] * (of_weight[0] - delta[i]),
                    weight[1] * (of_weight[1] - delta[i]));
        }
    }
  }

  // Channels of the gradient of x, 16 at a time.
  TF_DEVICE void make_grad_x(int row, int channels) const {
    const T *const weights = logits(row), *const grad = tokens(plan.grad_mixed, row);
    T* const to = tokens(plan.grad_x, row) + lane / 4 * plan.pitch + lane % 4 * 2;
    const int place = F::place_in_columns(plan.pitch, 8), place_of_one = F::place_in_columns(plan.pitch, 0);
#pragma unroll 1
    for (int m = 0; m < kTiles; m += kHeld) {
      typename F::A a[kHeld][kTiles];
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
#pragma unroll
        for (int k = 0; k < kTiles; ++k)
          a[i][k] = F::load_a_of_blocks(weights + k * 2 * kBelow + (m + i) * 2 * kBlock, kBelow, kBlock);
      int c = 0;
#pragma unroll 1
      for (; c + 8 < channels; c += 16) add_grad_x<2>(a, grad + c + place, to + 16 * m * plan.pitch + c);
      if (c < channels) add_grad_x<1>(a, grad + c + place_of_one, to + 16 * m * plan.pitch + c);
    }
  }
  template <int kCount>
  TF_DEVICE void add_grad_x(const typename F::A (&a)[kHeld][kTiles], const T* grad, T* to) const {
    float sums[kHeld][2][4] = {};
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      typename F::B b[2];
      F::load_two(b, grad + 16 * k * plan.pitch, plan.pitch, 8 * (kCount - 1));
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const auto split = F::split(a[i][k]);
#pragma unroll
        for (int j = 0; j < kCount; ++j) F::add(sums[i][j], split, b[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
#pragma unroll
      for (int j = 0; j < kCount; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          store_two(to + (16 * i + 8 * half) * plan.pitch + 8 * j, sums[i][j][2 * half], sums[i][j][2 * half + 1]);
  }

  TF_DEVICE void store_grad_x(int first) const {
    const View& view = p.grad_x;
    const Share share = view.aligned ? vectors : channels();
    if (share.row >= rows_here) return;
    T* const to = static_cast<T*>(view.data) + rows()[share.row].grad_x + first;
    const T* const from = tokens(plan.grad_x, share.row);
    const int count = channels_from(first), step = share.sweep.tokens, pitch = step * plan.pitch;
    const int64_t stride = step * view.token_stride;
    if (view.aligned) {
#pragma unroll 1
      for (int i = share.piece * kVector; i < count; i += share.sweep.at_once * kVector) {
        T* target = to + share.token * view.token_stride + i;
        const T* source = from + share.token * plan.pitch + i;
#pragma unroll 1
        for (int token = share.token; token < p.tokens; token += step, target += stride, source += pitch)
          store_global(target, load_shared(source));
      }
    } else {
      share.for_each(count, [&](int channel, int token) {
        if (token < p.tokens) to[token * view.token_stride + channel] = from[token * plan.pitch + channel];
      });
    }
  }

  TF_DEVICE void store_logit_gradients() const {
    for (int row = warp; row < rows_here; row += plan.warps) {
      const int64_t number = first_row + row;
      T* const to = static_cast<T*>(p.logit_gradients) + number * kLogits + lane * kVector;
      const T* const from = logits(row) + lane * kVector;
#pragma unroll 4
      for (int i = 0; i < kLogits; i += 32 * kVector) store_global(to + i, load_shared(from + i));
      T* const to_inputs = static_cast<T*>(p.rows_of_inputs) + number * plan.columns;
      for (int i = lane * kVector; i < plan.columns; i += 32 * kVector)
        store_global(to_inputs + i, load_shared(inputs(row) + i));
    }
  }

  // Warps have 16 inputs each and, where these are few, a part of the sums.
  TF_DEVICE void make_grad_compressed() const {
    const int part = unsigned(warp) / unsigned(plan.pairs_at_once), mine = warp - part * plan.pairs_at_once;
    Four<float>* const partial = at<Four<float>>(plan.partial);
#pragma unroll 1
    for (int first = 0; first < plan.pairs; first += plan.pairs_at_once) {
      const bool has = part < plan.parts && first + mine < plan.pairs;
      float sums[2][4] = {};
      if (has) multiply_logits(first + mine, part, sums);
      block_barrier();
      if (has)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          partial[(2 * warp + j) * 32 + lane] = {sums[j][0], sums[j][1], sums[j][2], sums[j][3]};
      block_barrier();
      for (int tile = warp; tile < 2 * plan.pairs_at_once; tile += plan.warps) {
        Four<float> sum = partial[tile * 32 + lane];
        for (int i = 1; i < plan.parts; ++i) {
          const Four<float> summand = partial[(2 * i * plan.pairs_at_once + tile) * 32 + lane];
#pragma unroll
          for (int j = 0; j < 4; ++j) sum.x[j] += summand.x[j];
        }
        store_grad_compressed(16 * first + 8 * tile + lane % 4 * 2, sum.x);
      }
    }
  }
  // Of two inputs, and rows lane / 4 and lane / 4 + 8.
  TF_DEVICE void store_grad_compressed(int input, const float (&x)[4]) const {
    const View& view = p.grad_compressed;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 + 8 * i;
      if (row >= rows_here) continue;
      T* const to = find_numbers(view, row);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = (input + j) * plan.per_reduced >> 16;
        if (input + j < plan.inputs)
          to[token * view.token_stride + input + j - token * p.reduced] = from_float<T>(x[2 * i + j]);
      }
    }
  }
  // A part of the sums for 16 inputs.
  TF_DEVICE void multiply_logits(int pair, int part, float (&sums)[2][4]) const {
    constexpr int kSteps = kLogits / 16, kAtOnce = kResident ? kSteps : kGroups;  // that find_weight is asked for
    const int end = kSteps * (part + 1) / plan.parts, column = 16 * pair;
    const int second = kResident && column + 8 >= plan.columns ? 0 : 8, pitch = plan.weight_pitch;
    const int place = F::place_in_columns(pitch, second);
    const T* const row = logits(clamped(lane % 16)) + F::place_in_rows(0);
#pragma unroll 1
    for (int step = kSteps * part / plan.parts; step < end; step += kAtOnce) {
      const int count = end - step < kAtOnce ? end - step : kAtOnce;
      const T* rows = find_weight(16 * step, 16, count, column) + place;
      const T* grads = row + 16 * step;
#pragma unroll 4
      for (int i = 0; i < count; ++i, rows += 16 * pitch) {
        const auto a = F::split(F::template load_rows<false>(grads + 16 * i));
        typename F::B b[2];
        F::load_two(b, rows, pitch, second);
#pragma unroll
        for (int j = 0; j < 2; ++j) F::add(sums[j], a, b[j]);
      }
      release_weight();
    }
  }
};

// The gradients of the generator, of a product whose rows are in the order of a row's logits.
template <typename T>
TF_DEVICE void make_generator(const DynamicMixingGenerator& p, int number) {
  const int logit = number / (p.inputs + 1), input = number % (p.inputs + 1);
  const int source = logit / p.tokens, target = logit % p.tokens;
  if (source >= p.tokens) return;
  const int place = ((target / 8 * (p.padded_tokens / 8) + source / 8) * 8 + target % 8) * 8 + source % 8;
  const T x = from_float<T>(p.product[place * p.columns + input]);
  if (input < p.inputs) {
    if (p.grad_weight != nullptr) static_cast<T*>(p.grad_weight)[logit * p.inputs + input] = x;
  } else if (p.grad_bias != nullptr) {
    static_cast<T*>(p.grad_bias)[logit] = x;
  }
}

}  // namespace dynamic_mixing
}  // namespace tokenfusion
