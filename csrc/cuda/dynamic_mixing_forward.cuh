// Forward of dynamic_mixing. Blocks stay on their multiprocessor, with as much of the generator in shared memory as
// there is room for, and take one tile of 16 or 32 rows after the other, a row being a segment of a line. Its logits
// are a product with the rows as M: a warp makes those of 4 targets for 16 rows and all sources, so that a lane has all
// sources of its targets and softmax stays in its registers. The exponentials go to shared memory once, in the type of
// the elements; each warp mixes the tokens of its own rows with them, which it copied there itself while the tile
// before was worked on, and sums them by one more product. What was mixed leaves by way of the tokens' place, in whole
// sectors. Logits and weights never reach memory.
//
// Numbers moved and operations, per row, with w = D / S and K = N d: reads N w of x and K of compressed, writes N w; K
// N^2 of the generator once for a block, or once for a tile where they do not fit; 2 N^2 (K + w) operations. In
// bfloat16 with N = 32, w = 24, K = 64 that is 3.2 KB of memory and 180 000 operations.
#pragma once

#include "common/mma.cuh"
#include "dynamic_mixing_forward_plan.h"

namespace tokenfusion {
namespace dynamic_mixing {

// Where a row is.
struct Place {
  int image, line, segment;

  TF_DEVICE Place(const Params& p, int row) {
    const int lines = row / p.segments;
    image = lines / p.lines, line = lines % p.lines, segment = row % p.segments;
  }

  // To the same row of the block's next tile.
  TF_DEVICE void advance(const Params& p, const ForwardPlan& plan) {
    segment += plan.step_segments, line += plan.step_lines, image += plan.step_images;
    if (segment >= p.segments) segment -= p.segments, ++line;
    if (line >= p.lines) line -= p.lines, ++image;
  }

  TF_DEVICE ForwardRow row(const Params& p, const ForwardPlan& plan) const {
    if (image >= plan.images) return {-1, -1, -1, -1};
    const auto offset = [&](const View& view, int channels) {
      return image * view.batch_stride + line * view.line_stride + segment * channels;
    };
    return {offset(p.x, plan.width), offset(p.compressed, p.reduced), offset(p.mixed, plan.width),
            (int64_t(image) * p.lines + line) * p.channels + segment * plan.width};
  }
};

template <typename T, int kSources>
struct Forward {
  typedef Matrix<T> M;
  typedef typename M::Vector Vector;
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr ForwardShape kShape{kSources};
  static constexpr int kRows = kShape.rows, kWarps = kShape.warps, kThreads = 32 * kWarps;
  static constexpr int kRowsOfWarp = kShape.rows_of_warp();
  static constexpr int kTargets = kShape.targets;  // of a group, whose logits a warp makes at once
  static constexpr int kSourcesOfLane = kSources / kShape.lanes, kPairs = kSourcesOfLane / 2;
  static constexpr int kSteps = kSources / 16;               // of products with the weights
  static constexpr int kTargetPitch = kSources + kVector;    // of the weights
  static constexpr int kMostTiles = sizeof(T) == 2 ? 3 : 1;  // of 8 channels that a warp mixes at once
  static constexpr int kWord = 4 / sizeof(T);

  const Params& p;
  const ForwardPlan& plan;
  char* const memory;
  const int warp, lane;
  int copied_row, copied_vector, copied_token;  // the first of this lane where a warp copies tokens

  TF_DEVICE Forward(const Params& params, const ForwardPlan& plan_, char* memory_)
      : p(params), plan(plan_), memory(memory_), warp(unsigned(thread_index()) / 32), lane(lane_index()) {
    const int column = lane % plan.lanes_of_token, vectors = plan.chunk / kVector;
    copied_row = column / vectors, copied_vector = column % vectors, copied_token = lane / plan.lanes_of_token;
    if (plan.rows_at_once == 1) copied_row = 0, copied_vector = column;
    if (copied_token >= plan.tokens_at_once) copied_token = kSources;  // too few lanes are left for another token
  }

  TF_DEVICE void run() {
    Place place(p, block_index() * kRows + lane % kRows);  // of the last row in places(), for the first warp
    for (int slot = 0; slot < 2; ++slot) find_rows(place, slot);
    fill_constants();
    block_barrier();
    copy_compressed(places(0), 0);
    if (plan.buffers == 2) copy_tokens(places(0), 0, 0, plan.width);
    int buffer = 0, slot = 0;
    for (int left = plan.tiles - block_index(); left > 0; left -= plan.blocks, buffer ^= 1) {
      const ForwardRow *const here = places(slot), *const next = places(next_slot(slot));
      finish_copies();
      block_barrier();
      find_rows(place, next_slot(next_slot(slot)));
      if (left > plan.blocks) {
        copy_compressed(next, buffer ^ 1);
        if (plan.buffers == 2) copy_tokens(next, buffer ^ 1, 0, plan.width);
      }
      if (plan.buffers == 1 && plan.chunk >= plan.width) copy_tokens(here, 0, 0, plan.width);
#pragma unroll 1
      for (int target = 0; target < p.tokens; target += plan.pass) {
        if (target > 0) block_barrier();
        generate(buffer, target);
        block_barrier();
        mix(here, plan.buffers == 2 ? buffer : 0, target);
      }
      slot = next_slot(slot);
    }
  }

 private:
  template <typename U>
  TF_DEVICE U* at(int bytes) const {
    return reinterpret_cast<U*>(memory + bytes);
  }
  TF_DEVICE ForwardRow* places(int slot) const { return at<ForwardRow>(plan.places) + slot * kRows; }
  static TF_DEVICE int next_slot(int slot) { return slot == 2 ? 0 : slot + 1; }
  TF_DEVICE T* compressed(int buffer) const { return at<T>(plan.compressed + buffer * plan.compressed_bytes); }
  TF_DEVICE int padded_tokens() const { return kSources <= 32 ? kSources : round_up(p.tokens, 16); }
  // Of this warp's rows.
  TF_DEVICE T* tokens(int buffer, int row) const {
    const int first = (warp * kRowsOfWarp + row) * padded_tokens() * plan.pitch;
    return at<T>(plan.tokens + buffer * plan.token_bytes) + first;
  }

  static TF_DEVICE void block_barrier() { barrier(0, kThreads); }
  static TF_DEVICE void finish_copies() {
    commit_copies();
    wait_copies();
  }

  // Those of the tile that `place` is in, which goes to the next.
  TF_DEVICE void find_rows(Place& place, int slot) {
    if (warp > 0) return;
    if (lane < kRows) places(slot)[lane] = place.row(p, plan);
    place.advance(p, plan);
  }

  // What a column of a product has, counted from a group's first target and a pair's source.
  static TF_DEVICE int target_of(int column) { return column / 2 / kShape.lanes; }
  static TF_DEVICE int source_of(int column) { return column / 2 % kShape.lanes * kSourcesOfLane + column % 2; }

  // Begins to copy what of the generator stays; the rest of what never changes.
  TF_DEVICE void fill_constants() {
    constexpr int kStep = 32 * kVector, kGroupsAtOnce = kWarps > kPairs ? kWarps / kPairs : 1;
    const int part = lane % 4 * kVector, chunks = plan.depth / (4 * kVector), target = target_of(lane / 4);
#pragma unroll 1
    for (int pair = warp % kPairs; pair < kPairs; pair += kWarps) {
      const int source = source_of(lane / 4) + 2 * pair;
      const T* const from = static_cast<const T*>(p.weight) + (source * p.tokens + target) * p.weight_pitch + part;
      T* const to = at<T>(plan.generator) + pair * kStep + lane * kVector;
#pragma unroll 1
      for (int group = warp / kPairs; group < plan.resident; group += kGroupsAtOnce) {
        const bool wanted = source < p.tokens && group * kTargets + target < p.tokens;
#pragma unroll 2
        for (int k = 0; k < chunks; ++k) {
          const bool there = wanted && k * 4 * kVector + part < p.weight_pitch;
          const T* const vector = from + group * kTargets * p.weight_pitch + k * 4 * kVector;
          copy_async(to + (group * chunks + k) * kPairs * kStep, there ? vector : p.weight, there);
        }
      }
    }
    constexpr int kPairsAtOnce = kThreads / 8;  // a thread has one column of them
    const int column = unsigned(thread_index()) % 8;
    float* bias = at<float>(plan.bias) + thread_index();
#pragma unroll 1
    for (int i = unsigned(thread_index()) / 8; i < divide_up(p.tokens, kTargets) * kPairs; i += kPairsAtOnce) {
      const int source = source_of(column) + i % kPairs * 2, target = i / kPairs * kTargets + target_of(column);
      const bool wanted = source < p.tokens && target < p.tokens;
      const float x = wanted ? to_float(static_cast<const T*>(p.bias)[source * p.tokens + target]) : 0;
      *bias = source < p.tokens ? x : -kInfinity;  // which has no weight
      bias += kThreads;
    }
    const int missing = plan.depth - plan.inputs;
#pragma unroll 1
    for (int i = thread_index(); i < 2 * kRows * missing; i += kThreads) {
      const int k = plan.inputs + i % missing;
      compressed(0)[i / missing * plan.input_pitch + place_of_word(k / kWord) * kWord + k % kWord] = from_float<T>(0);
    }
  }

  // Where word i of a row's compressed numbers lies: in 64 bytes, word 4 q + j of the generator, which lane q of four
  // has, meets word 4 j + q, which ldmatrix gives it.
  static TF_DEVICE int place_of_word(int i) { return (i & ~15) | (i & 3) << 2 | (i >> 2 & 3); }

  // Begins to copy the compressed numbers of a tile.
  TF_DEVICE void copy_compressed(const ForwardRow* places, int buffer) {
    constexpr int kTokens = kThreads / kRows;
    const int64_t offset = places[lane % kRows].compressed;
    const bool there = offset >= 0;
    const T* from = static_cast<const T*>(p.compressed.data) + (there ? offset : 0);
    T* const row = compressed(buffer) + lane % kRows * plan.input_pitch;
    int token = unsigned(thread_index()) / kRows;
    from += token * p.compressed.token_stride;
    if (plan.words) {
      const int words = p.reduced / kWord;
      int word = token * words;
#pragma unroll 1
      for (; token < p.tokens; token += kTokens, word += (kTokens - 1) * words) {
#pragma unroll 1
        for (int i = 0; i < words; ++i, ++word)
          copy_word_async(row + place_of_word(word) * kWord, from + i * kWord, there);
        from += kTokens * p.compressed.token_stride;
      }
    } else {
#pragma unroll 1
      for (; token < p.tokens; token += kTokens, from += kTokens * p.compressed.token_stride) {
#pragma unroll 1
        for (int i = 0; i < p.reduced; ++i) {
          const int k = token * p.reduced + i;
          row[place_of_word(k / kWord) * kWord + k % kWord] = there ? from[i] : from_float<T>(0);
        }
      }
    }
  }

  // f(vector's channel, row of the warp) for the vectors of 16 bytes that this lane has, each of every
  // tokens_at_once-th token from copied_token on.
  template <typename F>
  TF_DEVICE void for_each_vector(F f) {
#pragma unroll 1
    for (int row = copied_row; row < kRowsOfWarp; row += plan.rows_at_once)
#pragma unroll 1
      for (int channel = copied_vector * kVector; channel < plan.chunk; channel += 32 * kVector) f(channel, row);
  }

  // Begins to copy channels [first, first + channels) of the tokens of this warp's rows; zeros where none are.
  TF_DEVICE void copy_tokens(const ForwardRow* places, int buffer, int first, int channels) {
    const int64_t stride = p.x.token_stride;
    places += warp * kRowsOfWarp;
    const int tokens_at_once = plan.tokens_at_once, pitch = tokens_at_once * plan.pitch;
    const int64_t step = tokens_at_once * stride;
    const T* const x = static_cast<const T*>(p.x.data) + first;
    if (p.x.aligned) {
      for_each_vector([&](int channel, int row) {
        const int64_t of_row = places[row].x;
        const bool there = of_row >= 0 && channel < channels;
        const T* from = x + (there ? of_row + channel + copied_token * stride : 0);
        T* to = tokens(buffer, row) + copied_token * plan.pitch + channel;
#pragma unroll 1
        for (int token = copied_token; token < padded_tokens();) {
#pragma unroll
          for (int i = 0; i < 4; ++i, token += tokens_at_once, from += step, to += pitch)
            if (token < padded_tokens()) copy_async(to, from, there && token < p.tokens);
        }
      });
    } else {
      for (int row = 0; row < kRowsOfWarp; ++row) {
        const int64_t of_row = places[row].x;
        for (int i = lane; i < padded_tokens() * plan.chunk; i += 32) {
          const int token = i / plan.chunk, channel = i % plan.chunk;
          const bool there = of_row >= 0 && token < p.tokens && channel < channels;
          tokens(buffer, row)[token * plan.pitch + channel] =
              there ? x[of_row + token * stride + channel] : from_float<T>(0);
        }
      }
    }
  }

  // The weights of up to plan.pass targets for all rows of the tile, which are in shared memory then.
  TF_DEVICE void generate(int buffer, int first_target) {
    const int left = p.tokens - first_target, targets = left < plan.pass ? left : plan.pass;
    const int groups = divide_up(targets, kTargets);
    for (int unit = warp; unit < groups * (kRows / 16); unit += kWarps) {
      const int first_row = unit < groups ? 0 : 16, group = unit < groups ? unit : unit - groups;
      const int of_all = first_target / kTargets + group;
      const T* const rows = compressed(buffer) + first_row * plan.input_pitch;
      float logits[kPairs][4];
      begin_logits(of_all, logits);
      if (of_all < plan.resident)
        multiply<true>(of_all, rows, logits);
      else
        multiply<false>(of_all, rows, logits);
      exponentiate(logits);
      write_weights(first_row, group, logits);
    }
  }

  // With the bias; this lane has rows lane / 4 and lane / 4 + 8 of 16, and what is in columns 2 (lane % 4) and the
  // next.
  TF_DEVICE void begin_logits(int group, float (&logits)[kPairs][4]) {
    const Two<float>* const bias = at<Two<float>>(plan.bias) + group * kPairs * 4 + lane % 4;
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      const Two<float> pair = bias[n * 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[n][i] = pair.x[i % 2];
    }
  }

  // Adds the products of 16 rows with the generator.
  template <bool kResident>
  TF_DEVICE void multiply(int group, const T* rows, float (&logits)[kPairs][4]) {
    constexpr int kChunk = 4 * kVector;
    const int part = lane % 4 * kVector, source = source_of(lane / 4), target = group * kTargets + target_of(lane / 4);
    const T* from = kResident ? at<T>(plan.generator) + group * plan.depth * kTargets * kSources + lane * kVector
                              : static_cast<const T*>(p.weight) + (source * p.tokens + target) * p.weight_pitch + part;
    if (sizeof(T) == 2 && kSources <= 32 && plan.depth <= 2 * kChunk) {  // a loop would move all logits about
      multiply_chunk<kResident>(0, from, source, target, rows, logits);
      if (plan.depth > kChunk)
        multiply_chunk<kResident>(kChunk, from + (kResident ? kPairs * 8 * kChunk : kChunk), source, target, rows,
                                  logits);
      return;
    }
#pragma unroll 1
    for (int k = 0; k < plan.depth; k += kChunk) {
      multiply_chunk<kResident>(k, from, source, target, rows, logits);
      from += kResident ? kPairs * 8 * kChunk : kChunk;
    }
  }

  // The same of 64 bytes of each.
  template <bool kResident>
  TF_DEVICE void multiply_chunk(int k, const T* from, int source, int target, const T* rows,
                                float (&logits)[kPairs][4]) {
    const bool wanted = target < p.tokens && k + lane % 4 * kVector < p.weight_pitch;
    typename M::SplitA a[M::kVectorSteps];
#pragma unroll
    for (int i = 0; i < M::kVectorSteps; ++i) a[i] = M::split(M::load_a(rows + k + 16 * i, plan.input_pitch));
#pragma unroll
    for (int n = 0; n < kPairs; ++n, from += kResident ? 32 * kVector : 2 * p.tokens * p.weight_pitch) {
      Vector columns{};
      if (kResident || (wanted && source + 2 * n < p.tokens)) columns = *reinterpret_cast<const Vector*>(from);
#pragma unroll
      for (int i = 0; i < M::kVectorSteps; ++i) add(logits[n], a[i], M::vector_b(columns, i));
    }
  }

  // sums += a b; in float they are rounded, which tensor cores would not do.
  static TF_DEVICE void add(float (&sums)[4], const typename M::SplitA& a, const typename M::B& b) {
    if constexpr (sizeof(T) == 2) {
      multiply_add<T>(sums, a.x, b.x[0], b.x[1]);
    } else {
      typename M::Product product;
      product.add(a, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += product[i];
    }
  }

  // exp(logits - their maximum over the sources)
  static TF_DEVICE void exponentiate(float (&logits)[kPairs][4]) {
    float maximum[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      maximum[i] = logits[0][2 * i];
#pragma unroll
      for (int n = 0; n < kPairs; ++n) maximum[i] = fmaxf(maximum[i], fmaxf(logits[n][2 * i], logits[n][2 * i + 1]));
#pragma unroll
      for (int lanes = 1; lanes < kShape.lanes; lanes *= 2)
        maximum[i] = fmaxf(maximum[i], shuffle_xor(maximum[i], lanes));
    }
    if constexpr (sizeof(T) == 2) {
      constexpr float kLarge = 1024;  // beyond, a rounded multiple of the maximum is too far from it
      if (any_lane(!(fabsf(maximum[0]) < kLarge && fabsf(maximum[1]) < kLarge))) {
#pragma unroll
        for (int n = 0; n < kPairs; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) logits[n][i] -= maximum[i / 2];
        maximum[0] = maximum[1] = 0;
      }
      const float origin[2] = {maximum[0] * kLog2E, maximum[1] * kLog2E};
#pragma unroll
      for (int n = 0; n < kPairs; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[n][i] = exp2_approximate(fmaf(logits[n][i], kLog2E, -origin[i / 2]));
    } else {
#pragma unroll
      for (int n = 0; n < kPairs; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[n][i] = expf(logits[n][i] - maximum[i / 2]);
    }
  }

  TF_DEVICE void write_weights(int first_row, int group, const float (&logits)[kPairs][4]) {
    T* const to = at<T>(plan.weights) + (first_row + lane / 4) * plan.weight_pitch +
                  (group * kTargets + target_of(lane % 4 * 2)) * kTargetPitch + source_of(lane % 4 * 2);
#pragma unroll
    for (int first = 0; first < kSourcesOfLane; first += kVector)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float x[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) x[j] = logits[(first + j) / 2][2 * i + j % 2];
        store_shared(to + 8 * i * plan.weight_pitch + first, vector_of<T>(x));
      }
  }

  // The tokens of this warp's rows for the targets of a pass.
  TF_DEVICE void mix(const ForwardRow* places, int buffer, int first_target) {
#pragma unroll 1
    for (int first = 0; first < plan.width; first += plan.chunk) {
      const int left = plan.width - first, channels = left < plan.chunk ? left : plan.chunk;
      if (plan.chunk < plan.width) copy_tokens(places, buffer, first, channels);
      if (plan.buffers == 1) {
        finish_copies();
        warp_barrier();
      }
      if (p.line_sums == nullptr)
        mix_rows<false>(places, buffer, first_target, first, channels);
      else
        mix_rows<true>(places, buffer, first_target, first, channels);
      if (plan.in_place || plan.chunk < plan.width) warp_barrier();
      if (plan.in_place) store_tokens(places, buffer);
    }
  }

  template <bool kMean>
  TF_DEVICE void mix_rows(const ForwardRow* places, int buffer, int first_target, int first, int channels) {
    places += warp * kRowsOfWarp;
#pragma unroll 1
    for (int row = 0; row < kRowsOfWarp; ++row) {
      const int64_t of_row = places[row].mixed;
      if (of_row < 0) break;
      float* const sums = kMean ? p.line_sums + places[row].line_sums + first : nullptr;
      const T* const weights = at<T>(plan.weights) + (warp * kRowsOfWarp + row) * plan.weight_pitch;
      T* const from = tokens(buffer, row);
      if (kSources > kMostTargets || !plan.in_place) {
        T* const to = static_cast<T*>(p.mixed.data) + of_row + first;
#pragma unroll 1
        for (int c = 0; c < channels; c += 8)
          mix_tiles<1, false, kMean>(weights, from + c, to + c, sums + c, first_target, channels - c);
        continue;
      }
      int c = 0;
#pragma unroll 1
      for (; channels - c > 8 * (kMostTiles - 1); c += 8 * kMostTiles)
        mix_tiles<kMostTiles, true, kMean>(weights, from + c, nullptr, sums + c, 0, channels - c);
      if constexpr (kMostTiles == 3) {
        if (channels - c > 8)
          mix_tiles<2, true, kMean>(weights, from + c, nullptr, sums + c, 0, channels - c);
        else if (channels - c > 0)
          mix_tiles<1, true, kMean>(weights, from + c, nullptr, sums + c, 0, channels - c);
      }
    }
  }

  // As many as 8 kTiles channels of a row's tokens, for the targets of a pass: in their place, where the pass has all
  // targets, or to `mixed`. `left` channels are there.
  template <int kTiles, bool kInPlace, bool kMean>
  TF_DEVICE void mix_tiles(const T* weights, T* tokens, T* mixed, float* line_sums, int first_target, int left) {
    typename M::B values[kTiles][kSteps];
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
        if ((kInPlace || 8 * n < left) && (kSteps < 4 || 16 * k < p.tokens))
          values[n][k] = M::load_b(tokens + 16 * k * plan.pitch + 8 * n, plan.pitch);
    if (kInPlace) warp_barrier();
    float of_line[kTiles][2] = {};
#pragma unroll
    for (int m = 0; m < (kSources == 16 ? 1 : 2); ++m) {
      const int target = first_target + 16 * m + lane / 4;
      if (m > 0 && (16 * m >= plan.pass || first_target + 16 * m >= p.tokens)) break;
      typename M::SplitA a[kSteps];
      typename M::RowSums row_sums;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (kSteps < 4 || 16 * k < p.tokens) {
          const typename M::A loaded = M::load_a(weights + 16 * m * kTargetPitch + 16 * k, kTargetPitch);
          row_sums.add(loaded);
          a[k] = M::split(loaded);
        }
      }
      float scale[2];
      row_sums.finish(scale);
#pragma unroll
      for (int i = 0; i < 2; ++i) scale[i] = sizeof(T) == 2 ? reciprocal_approximate(scale[i]) : 1 / scale[i];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (!kInPlace && 8 * n >= left) break;
        float sums[4] = {};
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
          if (kSteps < 4 || 16 * k < p.tokens) add(sums, a[k], values[n][k]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int to = target + 8 * i, column = 8 * n + lane % 4 * 2;
          const float pair[2] = {sums[2 * i] * scale[i], sums[2 * i + 1] * scale[i]};
          if (kInPlace)
            store_two(tokens + to * plan.pitch + column, pair[0], pair[1]);  // beyond the last token, too
          else if (to < p.tokens)
            store_pair(mixed + to * p.mixed.token_stride, column, left, pair[0], pair[1]);
          if (kMean && to < p.tokens) of_line[n][0] += pair[0], of_line[n][1] += pair[1];
        }
      }
    }
    if (kMean) add_line_sums(line_sums, of_line, left, first_target == 0);
  }

  // Stores two neighbouring channels; the second may be beyond `end`.
  TF_DEVICE void store_pair(T* to, int channel, int end, float first, float second) {
    if (plan.width % 2 == 0) {
      if (channel < end) store_two(to + channel, first, second);
    } else {
      if (channel < end) to[channel] = from_float<T>(first);
      if (channel + 1 < end) to[channel + 1] = from_float<T>(second);
    }
  }

  template <int kTiles>
  TF_DEVICE void add_line_sums(float* sums, const float (&of_line)[kTiles][2], int left, bool is_first) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float sum = of_line[n][j];
        sum += shuffle_xor(sum, 4), sum += shuffle_xor(sum, 8), sum += shuffle_xor(sum, 16);
        const int column = 8 * n + lane % 4 * 2 + j;
        if (lane < 4 && column < left) sums[column] = is_first ? sum : sums[column] + sum;
      }
  }

  // Of this warp's rows, from the tokens' place.
  TF_DEVICE void store_tokens(const ForwardRow* places, int buffer) {
    const int tokens_at_once = plan.tokens_at_once, pitch = tokens_at_once * plan.pitch;
    const int64_t stride = p.mixed.token_stride, step = tokens_at_once * stride;
    for_each_vector([&](int channel, int row) {
      const int64_t of_row = places[warp * kRowsOfWarp + row].mixed;
      if (of_row < 0 || channel >= plan.width) return;
      T* to = static_cast<T*>(p.mixed.data) + of_row + channel + copied_token * stride;
      const T* from = tokens(buffer, row) + copied_token * plan.pitch + channel;
#pragma unroll 1
      for (int token = copied_token; token < p.tokens;) {
#pragma unroll
        for (int i = 0; i < 4; ++i, token += tokens_at_once, from += pitch, to += step)
          if (token < p.tokens) store_global(to, *reinterpret_cast<const Vector16*>(from));
      }
    });
  }
};

}  // namespace dynamic_mixing
}  // namespace tokenfusion
