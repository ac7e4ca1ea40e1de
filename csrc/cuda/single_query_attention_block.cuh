// Forward and backward of single_query_attention. A block takes one image's rows or, with splits, part of them, in
// tiles of 16 rows. A group of warps shares a tile, each with up to kMaxUnits * 16 of its channels, and tell each other
// their partial products through shared memory; of few channels, a group is one warp. Asynchronous copies of a warp's
// own bring its part of the next tile meanwhile, so that a warp with a tile to itself waits for no other. Scores,
// softmax and weights stay in the registers in which the tensor cores leave them. The normalised token (t - mean) rstd
// is never formed: the products take t, and the mean and rstd enter in float32 afterwards. Where a mean is so far from
// zero that this would lose digits, a number near it is taken from the row in shared memory first, and t is what is
// left: nothing is rounded more than a normalised token would be.
//
// Of more queries than a block takes, it has a slice: forward, blocks of one launch have them all, backward, one launch
// follows the other, and adds to float32 sums of the tokens' gradients. Of more channels, it has a strip: one launch
// writes the products over each strip's channels, and in another one every block sums those of all strips.
#pragma once

#include <type_traits>

#include "single_query_attention_plan.h"

namespace tokenfusion {
namespace single_query_attention {

// The sum of x, or the largest, over the lanes that have the same columns of a product.
TF_DEVICE float sum_rows(float x) {
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}
TF_DEVICE float max_rows(float x) {
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}
TF_DEVICE float sum_warp(float x) { return sum_quad(sum_rows(x)); }
TF_DEVICE float max_warp(float x) {
  x = max_rows(x);
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

// An image's tokens: those of all images in a row from `first` on, `rows` of them with the extra one.
struct Bag {
  int64_t first;
  int64_t rows;
};
TF_DEVICE int64_t integer(const Integers& integers, int i, int64_t low, int64_t high) {
  const int64_t x =
      integers.is_long ? static_cast<const int64_t*>(integers.data)[i] : static_cast<const int32_t*>(integers.data)[i];
  return x < low ? low : x > high ? high : x;
}
TF_DEVICE Bag bag(const Params& p, int image) {
  int64_t first = image * p.length, count = p.length;
  if (p.offsets.data != nullptr) {
    first = integer(p.offsets, image, 0, p.length);
    count = integer(p.offsets, image + 1, first, p.length) - first;
  }
  if (p.lengths.data != nullptr) count = integer(p.lengths, image, 0, count);
  return {first, count + (p.extra_token != nullptr)};
}

// kFull: every warp has kMaxUnits units.
template <typename T, int kQueryTiles, bool kFull, bool kBackward>
struct Kernel {
  typedef Shared<T, kQueryTiles, kBackward> Memory;
  typedef Matrix<T> M;
  static constexpr int kQueries = Memory::kQueries, kOperands = Memory::kOperands;
  static constexpr int kMaxUnits = Plan::max_units(kQueryTiles, sizeof(T));
  static constexpr int kVector = 16 / sizeof(T);  // elements of 16 bytes
  static constexpr int kProducts = kOperands / 8;
  static constexpr bool kIsFloat = sizeof(T) == 4;
  static constexpr bool kIsCut = Plan::is_cut(kQueryTiles), kHasSlices = kIsCut || !kBackward;
  static constexpr int kRecord = Plan::record(kQueryTiles, kBackward), kSums = Plan::sums(kQueryTiles, kBackward);
  static constexpr int kUnitsAtOnce =  // as registers suffice for
      kQueryTiles == 1 && !kIsFloat ? kMaxUnits
      : kIsHalf<T>                  ? 1
                                    : 2;

  const Params& p;
  const Plan& plan;
  Memory s;
  int warps, groups, group, warp, lane;  // warp is a number in the group
  int units;                             // of 16 channels each, that this warp has
  int image, split;
  int first_tile, end_tile;
  int last_tile, last_rows;                    // of the image; how many rows its last tile has
  const T *next_rows, *extra_row;              // what this lane copies next, and of the extra token
  float sums[kMaxUnits][kQueryTiles][4] = {};  // channels 16 u + lane / 4 (+ 8), queries 8 i + lane % 4 * 2 (+ 1)

  TF_DEVICE Kernel(const Params& params, const Plan& plan_, char* memory) : p(params), plan(plan_) {
    warps = plan.warps, groups = plan.groups;
    lane = lane_index(), group = unsigned(thread_index()) / 32 / unsigned(warps);
    warp = thread_index() / 32 - group * warps;
    s.layout(memory, plan, group);
    unsigned block = block_index();
    const int slice = kHasSlices ? take(block, p.slices) : 0, strip = kIsCut ? take(block, p.strips) : 0;
    image = block / unsigned(p.splits), split = block - image * p.splits;
    const Bag rows = bag(p, image);
    const int64_t tiles = (rows.rows + kTile - 1) / kTile;
    first_tile = int(split == 0 ? 0 : tiles * split / p.splits) + group;
    end_tile = int(split + 1 == p.splits ? tiles : tiles * (split + 1) / p.splits);
    last_tile = int(tiles) - 1, last_rows = int(rows.rows - int64_t(last_tile) * kTile);
    const int64_t first_row = (p.offsets.data == nullptr ? 0 : rows.first) - (p.extra_token != nullptr);
    if ((kBackward || kIsCut) && thread_index() == 0) s.place->first_token = rows.first;
    if constexpr (kIsCut) {
      if (thread_index() == 0) take_place(slice, strip);
      block_barrier();
    }
    units = units_of_this_warp();
    const int channel = first_of_strip() + first_channel() + lane % 8 * kVector;
    next_rows = static_cast<const T*>(p.tokens) + image * p.tokens_batch_stride + channel +
                (first_row + int64_t(first_tile) * kTile + lane / 8) * p.tokens_stride;
    extra_row = static_cast<const T*>(p.extra_token) + image * p.extra_token_stride + channel;
  }

  // The last digit of a number, which loses it.
  static TF_DEVICE int take(unsigned& number, int base) {
    const unsigned whole = number / unsigned(base), digit = number - whole * base;
    number = whole;
    return digit;
  }
  TF_DEVICE void take_place(int slice, int strip) {
    Place& place = *s.place;
    place.strip = strip, place.first_channel = strip * p.strip_channels;
    place.channels = channels_of(strip);
    const int64_t first_tile = (place.first_token + int64_t(image) * p.rows_apart) / kTile;
    const int64_t first_record = (first_tile * p.slices + slice) * p.strips;
    place.records = reinterpret_cast<Four<float>*>(p.strip_products + first_record * kRecord);
    place.sums = p.strip_sums + (int64_t(image) * p.slices + slice) * p.strips * kSums;
  }
  TF_DEVICE int channels_of(int strip) const {
    const int left = p.channels - strip * p.strip_channels;
    return left < p.strip_channels ? left : p.strip_channels;
  }
  TF_DEVICE int channels() const { return kIsCut ? s.place->channels : p.channels; }  // of this block
  TF_DEVICE int strip() const { return kIsCut ? s.place->strip : 0; }
  TF_DEVICE int first_of_strip() const { return kIsCut ? s.place->first_channel : 0; }
  TF_DEVICE int first_query() const {
    return kHasSlices ? (p.first_slice + unsigned(block_index()) % unsigned(p.slices)) * kQueries : 0;
  }
  TF_DEVICE const T* first_query_row() const {
    return static_cast<const T*>(p.query) + image * p.query_batch_stride + first_query() * p.query_stride;
  }
  TF_DEVICE int queries() const {
    const int left = p.queries - first_query();
    return kHasSlices && left > kQueries ? kQueries : left;
  }
  TF_DEVICE bool is(Params::Part part) const { return kIsCut && p.part == part; }

  // Of the strip's.
  TF_DEVICE int first_channel() const { return warp * plan.units * kUnit; }
  TF_DEVICE int units_of_this_warp() const {
    if constexpr (kFull) return kMaxUnits;
    const int left = channels() / kUnit - warp * plan.units;
    return left < plan.units ? left : plan.units;
  }
  TF_DEVICE bool has(int unit) const { return kFull || unit < units; }
  TF_DEVICE bool has_rows() const { return last_tile >= 0; }
  TF_DEVICE int rows_of(int tile) const { return tile == last_tile ? last_rows : kTile; }
  TF_DEVICE void group_barrier() { warps == 1 ? warp_barrier() : barrier(1 + group, 32 * warps); }
  TF_DEVICE void block_barrier() { barrier(0, 32 * warps * groups); }
  TF_DEVICE int64_t query_row(int q) const { return int64_t(image) * p.queries + first_query() + q; }
  TF_DEVICE int64_t partial_row(int q) const {
    return (int64_t(image) * p.splits + split) * p.queries + first_query() + q;
  }
  TF_DEVICE T* slab(int stage) const { return s.tiles + stage * kTile * s.pitch + first_channel(); }

  // Of rows of this warp's channels, lanes copy 16 bytes each, eight of them side by side: whether this lane has any
  // `k` channels on from where it begins.
  TF_DEVICE bool copies(int k) const {
    return kFull && k / kUnit + 8 * kVector / kUnit <= kMaxUnits || lane % 8 * kVector + k < kUnit * units;
  }

  // Begins to copy this warp's part of a tile, the next of this group; rows beyond the last are zeros.
  TF_DEVICE void fetch(int tile, int stage) {
    if (tile < end_tile) {
      const int left = rows_of(tile) - lane / 8;
      T* const to = slab(stage) + lane / 8 * s.pitch + lane % 8 * kVector;
#pragma unroll
      for (int i = 0; i < kTile; i += 4) {
        const bool is_extra = i == 0 && lane < 8 && tile == 0 && p.extra_token != nullptr;
        const T* const source = is_extra ? extra_row : next_rows + i * p.tokens_stride;
#pragma unroll
        for (int k = 0; k < kMaxUnits * kUnit; k += 8 * kVector)
          if (copies(k)) copy_async(to + i * s.pitch + k, source + k, i < left);
      }
      next_rows += groups * kTile * p.tokens_stride;
    }
    commit_copies();
  }

  // What a strip, or all, have of the operands: their sums, and what is to become s.delta.
  TF_DEVICE float* sums_of_strip(int number) const { return s.place->sums + number * kSums; }
  TF_DEVICE bool writes_sums() const { return is(Params::kProducts) && split == 0; }
  TF_DEVICE void sum_over_strips(float* to, int first, int count) const {
    for (int i = thread_index(); i < count; i += block_threads()) {
      float sum = 0;
      for (int n = 0; n < p.strips; ++n) sum += sums_of_strip(n)[first + i];
      to[i] = sum;
    }
  }

  // Copies rows [queries, channels] to s.operands, zeros where there are none, and takes their sums. Of every
  // 8 * interleave rows of s.operands it fills 8, from `first` on.
  TF_DEVICE void fill_operands(const void* from_rows, int64_t stride, int first, int interleave) {
    for (int q = group * warps + warp; q < kQueries; q += warps * groups) {
      const int row = q / 8 * 8 * interleave + first + q % 8;
      const T* const from = static_cast<const T*>(from_rows) + q * stride + first_of_strip();
      float sum = 0;
#pragma unroll 1
      for (int c = kVector * lane; c < channels(); c += 32 * kVector) {
        Vector16 vector = {};
        if (q < queries()) vector = *reinterpret_cast<const Vector16*>(from + c);
        float x[kVector];
        unpack_vector<T>(x, vector);
#pragma unroll
        for (int k = 0; k < kVector; ++k) sum += x[k];
        T* const to = s.operands + row * s.pitch + c;
        if constexpr (Memory::kPieces == 2) {
          Four<float> high, low;
#pragma unroll
          for (int k = 0; k < kVector; ++k) M::split(x[k], high.x[k], low.x[k]);
          *reinterpret_cast<Four<float>*>(to) = high;
          *reinterpret_cast<Four<float>*>(to + kOperands * s.pitch) = low;
        } else {
          *reinterpret_cast<Vector16*>(to) = vector;
        }
      }
      sum = sum_warp(sum);
      if (lane == 0 && !is(Params::kRest)) s.operand_sum[row] = sum;
      if (lane == 0 && writes_sums()) sums_of_strip(strip())[row] = sum;
    }
  }

  // Rows lane / 4 and lane / 4 + 8 of a tile: n = (t - mean) rstd; rstd is 0 where there is no row.
  struct Rows {
    bool there[2];
    float mean[2] = {}, rstd[2], deviation[2];
  };

  // Sums over channels, of the same rows: of t, of its square, and of its products with the operands;
  // products[i][2 j + e] is that of row lane / 4 + 8 j and operand 8 i + lane % 4 * 2 + e.
  struct Totals {
    float t[2], square[2], products[kProducts][4];
    float shift[2] = {};  // what was taken from all elements; of several strips, that of this one less the first's
  };

  // Of this warp's channels.
  TF_DEVICE void multiply(const T* slab, Totals& totals) const {
    typename M::RowSums row_sums;
    typename M::RowSquares row_squares;
    typename std::conditional<kBackward, typename M::FiniteProduct, typename M::Product>::type products[kProducts];
#pragma unroll(kUnitsAtOnce)
    for (int u = 0; u < kMaxUnits; ++u) {
      if (has(u)) {
        const typename M::A a = M::load_a(slab + kUnit * u, s.pitch);
        row_sums.add(a);
        row_squares.add(a);
        const typename M::SplitA split_a = M::split(a);
        typename M::SplitB operands[kProducts];
        load_operands(operands, s.operands + first_channel() + kUnit * u);
#pragma unroll
        for (int i = 0; i < kProducts; ++i) products[i].add(split_a, operands[i]);
      }
    }
    row_sums.finish(totals.t);
    row_squares.finish(totals.square);
#pragma unroll
    for (int i = 0; i < kProducts; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) totals.products[i][k] = products[i][k];
  }
  TF_DEVICE void load_operands(typename M::SplitB (&b)[kProducts], const T* rows) const {
    constexpr int kAtOnce = !kIsFloat && kProducts % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < kProducts; i += kAtOnce) {
      const T* const from = rows + 8 * i * s.pitch;
      if constexpr (kAtOnce == 2) {
        M::load_two_b_transposed(b[i], b[i + 1], from, s.pitch);
      } else if constexpr (Memory::kPieces == 2) {
        b[i] = M::load_split_b_transposed(from, kOperands * s.pitch, s.pitch);
      } else {
        b[i] = M::split(M::load_b_transposed(from, s.pitch));
      }
    }
  }

  // Over the warps of a group: each thread sums some places of all parts, so that all warps get the same.
  TF_DEVICE void sum_over_warps(Totals& totals) {
    if (warps == 1) return;
    Four<float>* const mine = s.part(1 + warp);
    Two<float>* const my_rows = s.rows_of(mine);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const float* const x = totals.products[i];
      mine[32 * i + lane] = {x[0], x[1], x[2], x[3]};
    }
    if (lane % 4 == 0) {
#pragma unroll
      for (int j = 0; j < 2; ++j) my_rows[lane / 4 + 8 * j] = {totals.t[j], totals.square[j]};
    }
    group_barrier();
    for (int i = 32 * warp + lane; i < Memory::kPart; i += 32 * warps) {
      Four<float> sum = s.part(1)[i];
#pragma unroll 1
      for (int w = 1; w < warps; ++w) {
        const Four<float> summand = s.part(1 + w)[i];
#pragma unroll
        for (int k = 0; k < 4; ++k) sum.x[k] += summand.x[k];
      }
      s.part(0)[i] = sum;
    }
    group_barrier();
    read_products(totals, s.part(0));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Two<float> of_row = s.rows_of(s.part(0))[lane / 4 + 8 * j];
      totals.t[j] = of_row.x[0], totals.square[j] = of_row.x[1];
    }
  }

  TF_DEVICE void read_products(Totals& totals, const Four<float>* from) const {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const Four<float> products = from[32 * i + lane];
#pragma unroll
      for (int k = 0; k < 4; ++k) totals.products[i][k] = products.x[k];
    }
  }

  // Takes numbers near the means from rows whose mean is so far from zero that their products would lose digits;
  // returns whether there are any.
  TF_DEVICE bool shift_rows(T* slab, Totals& totals) const {
    constexpr float kNear = kIsFloat ? 0.25f : 16;  // by the variance
    const float per_channel = kIsCut ? 1.0f / channels() : p.per_channel;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float mean = totals.t[j] * per_channel, square = totals.square[j] - totals.t[j] * mean;
      bool far = !(mean * mean <= kNear * (square * per_channel));  // or squares overflow
      if (kIsHalf<T>) far = far && square < 4e9f;                   // else an element less the shift could be infinite
      totals.shift[j] = far ? to_float(from_float<T>(mean)) : 0;
    }
    if (!any_lane(totals.shift[0] != 0 || totals.shift[1] != 0)) return false;
    warp_barrier();  // all lanes have read the tile
    subtract(slab, totals.shift);
    return true;
  }

  TF_DEVICE void subtract(T* slab, const float (&shift)[2]) const {
#pragma unroll 1
    for (int c = lane % 4 * 2; c < kUnit * units; c += 8) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Two<T>* const pair = reinterpret_cast<Two<T>*>(slab + (lane / 4 + 8 * j) * s.pitch + c);
        store_two(pair->x, to_float(pair->x[0]) - shift[j], to_float(pair->x[1]) - shift[j]);
      }
    }
    warp_barrier();
  }

  static TF_DEVICE float exponential(float x) { return kIsFloat ? expf(x) : exp2_approximate(x * kLog2E); }

  // What a strip has of a tile: Totals::products as lanes have them, then of each row t, square and shift.
  TF_DEVICE Four<float>* record(int tile, int number) const {
    return s.place->records + (int64_t(tile) * p.slices * p.strips + number) * (kRecord / 4);
  }
  TF_DEVICE void write_record(int tile, const Totals& totals) const {
    if (warp != 0) return;
    Four<float>* const to = record(tile, strip());
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const float* const x = totals.products[i];
      to[32 * i + lane] = {x[0], x[1], x[2], x[3]};
    }
    if (lane % 4 != 0) return;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      to[32 * kProducts + lane / 4 + 8 * j] = {totals.t[j], totals.square[j], totals.shift[j], 0};
  }
  // Of all strips, as if each had taken the first one's shift from its elements, so that all blocks get the same; this
  // strip's elements are less its own, as they were.
  TF_DEVICE void sum_records(int tile, T* slab, Totals& totals) {
    const int of_row = 32 * kProducts + lane / 4;
    float shift[2];  // the first strip's
#pragma unroll
    for (int j = 0; j < 2; ++j) totals.t[j] = totals.square[j] = 0, shift[j] = record(tile, 0)[of_row + 8 * j].x[2];
    Four<float>* const sums = s.part(tile / groups % 2);  // the other one may still be read
#pragma unroll 1
    for (int i = warp; i < kProducts; i += warps) sums[32 * i + lane] = {};
#pragma unroll 1
    for (int n = 0; n < p.strips; ++n) {
      const Four<float>* const from = record(tile, n);
      const float count = channels_of(n);
      float more[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Four<float> row = from[of_row + 8 * j];
        more[j] = row.x[2] - shift[j];
        totals.t[j] += row.x[0] + count * more[j];
        totals.square[j] += row.x[1] + more[j] * (2 * row.x[0] + count * more[j]);
      }
#pragma unroll 1
      for (int i = warp; i < kProducts; i += warps) {
        const Four<float> summand = from[32 * i + lane];
        const float* const operand_sum = sums_of_strip(n) + 8 * i + lane % 4 * 2;
        Four<float> sum = sums[32 * i + lane];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          sum.x[k] += summand.x[k];
          if (more[k / 2] != 0) sum.x[k] += more[k / 2] * operand_sum[k % 2];
        }
        sums[32 * i + lane] = sum;
      }
    }
    group_barrier();
    read_products(totals, sums);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float own = record(tile, strip())[of_row + 8 * j].x[2];
      totals.shift[j] = own - shift[j], shift[j] = own;
    }
    if (any_lane(shift[0] != 0 || shift[1] != 0)) subtract(slab, shift);
  }

  // The products of a tile's normalised rows with the operands, in the order of Totals.
  TF_DEVICE Rows multiply_normalized(int tile, T* slab, float (&score)[kProducts][4]) {
    Rows r;
    Totals totals;
    if (is(Params::kRest)) {
      sum_records(tile, slab, totals);
    } else {
      for (bool first = true;; first = false) {
        multiply(slab, totals);
        sum_over_warps(totals);
        if (!p.normalize || !first || !shift_rows(slab, totals)) break;
      }
      if (is(Params::kProducts)) {
        write_record(tile, totals);
        return r;
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      r.there[j] = lane / 4 + 8 * j < rows_of(tile);
      float square_deviation = 1;
      if (p.normalize) {
        r.mean[j] = totals.t[j] * p.per_channel;
        float square = totals.square[j];
        if (!kIsCut || square < kInfinity) square -= totals.t[j] * r.mean[j];  // else both may be infinite
        square_deviation = (square < 0 ? 0 : square) * p.per_channel + p.eps;
      }
      float rstd = rsqrtf(square_deviation);
      if (kIsFloat && rstd > 0) rstd += rstd * (0.5f - 0.5f * square_deviation * rstd * rstd);
      r.rstd[j] = r.there[j] ? rstd : 0;
      r.deviation[j] = r.rstd[j] > 0 ? square_deviation * rstd : 0;
    }
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const float* const operand_sum = s.operand_sum + 8 * i + lane % 4 * 2;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        score[i][k] = totals.products[i][k];
        if (p.normalize) score[i][k] -= r.mean[k / 2] * operand_sum[k % 2];
        score[i][k] *= r.rstd[k / 2];
      }
    }
    if (is(Params::kRest)) r.mean[0] -= totals.shift[0], r.mean[1] -= totals.shift[1];
    return r;
  }

  // Rounds to elements of T and returns what they are to be multiplied by: float16 has too few exponents for rstd.
  static TF_DEVICE float round_to_elements(float (&x)[kQueryTiles][4]) {
    float scale = 1;
    if constexpr (kIsHalf<T>) {
      float largest = 1e-30f;
#pragma unroll
      for (int i = 0; i < kQueryTiles; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) largest = fmaxf(largest, fabsf(x[i][k]));
      scale = max_warp(largest) / 32768;
    }
    const float per_scale = 1 / scale;
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i)
#pragma unroll
      for (int k = 0; k < 4; k += 2) round_two<T>(x[i][k], x[i][k + 1], x[i][k] * per_scale, x[i][k + 1] * per_scale);
    return scale;
  }

  // Accumulates tile^T weights.
  TF_DEVICE void accumulate(const T* slab, const typename M::B (&weights)[kQueryTiles], float scale) {
    typename M::SplitB split_weights[kQueryTiles];
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) split_weights[i] = M::split(weights[i]);
#pragma unroll
    for (int u = 0; u < kMaxUnits; ++u) {
      if (has(u)) {
        const typename M::SplitA a = M::split(M::load_a_for_transposed_product(slab + kUnit * u, s.pitch));
#pragma unroll
        for (int i = 0; i < kQueryTiles; ++i) M::accumulate(sums[u][i], a, split_weights[i], scale);
      }
    }
  }

  // Numbers of queries 8 i + lane % 4 * 2 (+ 1), of which each lane has its rows' share.
  static TF_DEVICE void sum_all_rows(float (&x)[kQueryTiles][2]) {
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) x[i][0] = sum_rows(x[i][0]), x[i][1] = sum_rows(x[i][1]);
  }
  TF_DEVICE void write_queries(float* to, const float (&x)[kQueryTiles][2]) const {
    if (lane >= 4) return;
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) to[8 * i + 2 * lane] = x[i][0], to[8 * i + 2 * lane + 1] = x[i][1];
  }

  // Without what comes of the mean, which is a number a query.
  TF_DEVICE void write_result(float (&correction)[kQueryTiles][2]) {
    sum_all_rows(correction);
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) {
#pragma unroll
      for (int u = 0; u < kMaxUnits; ++u) {
        if (has(u)) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            s.result[(8 * i + lane % 4 * 2 + j % 2) * s.result_pitch + first_channel() + kUnit * u + lane / 4 +
                     j / 2 * 8] = sums[u][i][j] - correction[i][j % 2];
        }
      }
    }
  }

  // The frame of both directions: begin(), which fills in the block's operands; the steps of every tile; finish(), with
  // the results of all groups in shared memory.
  template <typename Direction>
  TF_DEVICE void run(Direction& direction) {
    fetch(first_tile, 0);
    direction.begin();
    block_barrier();
    int stage = 0;
    for (int tile = first_tile; tile < end_tile; tile += groups) {
      wait_copies();
      warp_barrier();
      fetch(tile + groups, stage ^ 1);
      direction.step(tile, slab(stage));
      stage ^= 1;
    }
    wait_copies();
    if (is(Params::kProducts)) return;
    group_barrier();
    direction.write_results();
    block_barrier();
    direction.finish();
  }
};

}  // namespace single_query_attention
}  // namespace tokenfusion
