#include "common/vec.h"
#include "upconv.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

typedef UpconvParams Params;

template <typename T, bool add, typename A>
TF_INLINE void put(T* p, Vec<A> v, int64_t count) {
  if constexpr (add) v += load_lanes(p, count);
  store_lanes(p, v, count);
}

// A fine row is made of `scale` rows of the tile, `group` at a time, which give as many vectors. Where group == scale,
// vector i holds the values from i * lanes on of the fine row from x * scale on; elsewhere group == lanes, and vector i
// holds values of coarse pixel x + i.
template <typename A, int scale>
struct FineRow {
  static constexpr int lanes = VecOf<A>::lanes;
  static constexpr int group = scale < lanes ? scale : lanes;

  template <typename F>
  static TF_INLINE void each(int64_t width, F f) {
    for (int64_t x = 0; x < width; x += lanes)
      for (int first = 0; first < scale; first += group) f(x, first);
  }
  // f(vector, offset in the fine row, how many of its lanes are there)
  template <typename F>
  static TF_INLINE void each_vector(int64_t x, int first, int64_t width, F f) {
#pragma GCC unroll 16
    for (int i = 0; i < group; ++i) {
      if constexpr (group == scale) {
        const int64_t at = x * scale + i * lanes, count = width * scale - at;
        if (count > 0) f(i, at, count);
      } else if (x + i < width) {
        f(i, (x + i) * scale + first, lanes);
      }
    }
  }
};

template <typename T, int scale, bool add>
TF_INLINE void scatter_row(const T* tile, int64_t pitch, int64_t width, typename Accumulator<T>::type bias, T* out) {
  typedef typename Accumulator<T>::type A;
  typedef FineRow<A, scale> Row;
  Row::each(width, [&](int64_t x, int first) {
    Vec<A> v[Row::group];
#pragma GCC unroll 16
    for (int j = 0; j < Row::group; ++j) v[j] = load(tile + (first + j) * pitch + x) + bias;
    interleave<A, Row::group>(v);
    Row::each_vector(x, first, width, [&](int i, int64_t at, int64_t count) { put<T, add, A>(out + at, v[i], count); });
  });
}

template <typename T, int scale>
TF_INLINE void gather_row(const T* map, int64_t width, T* tile, int64_t pitch) {
  typedef typename Accumulator<T>::type A;
  typedef FineRow<A, scale> Row;
  Row::each(width, [&](int64_t x, int first) {
    Vec<A> v[Row::group] = {};
    Row::each_vector(x, first, width, [&](int i, int64_t at, int64_t count) { v[i] = load_lanes(map + at, count); });
    deinterleave<A, Row::group>(v);
#pragma GCC unroll 16
    for (int j = 0; j < Row::group; ++j) store_lanes(tile + (first + j) * pitch + x, v[j], width - x);
  });
}

// f(tile at (channel, i = 0, j = 0) and the row's first pixel, map at the first of its fine rows, channel)
template <typename T, typename F>
TF_INLINE void each_plane_row(const Params& p, int64_t begin, int64_t end, F f) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t channel = item / p.rows, row = item % p.rows, global = p.first_row + row;
    T* const tile = static_cast<T*>(p.tile) + channel * p.scale * p.scale * p.tile_pitch + row * p.width;
    T* const map = static_cast<T*>(p.map) + global / p.height * p.image_stride + channel * p.channel_stride +
                   global % p.height * p.scale * p.row_stride;
    f(tile, map, channel);
  }
}

template <typename T, int scale, bool add>
void scatter_planes_of(const Params& p, int64_t begin, int64_t end) {
  typedef typename Accumulator<T>::type A;
  each_plane_row<T>(p, begin, end, [&](const T* tile, T* map, int64_t channel) {
    const A bias = p.bias ? widen(static_cast<const T*>(p.bias)[channel]) : A(0);
    for (int i = 0; i < scale; ++i)
      scatter_row<T, scale, add>(tile + i * scale * p.tile_pitch, p.tile_pitch, p.width, bias, map + i * p.row_stride);
  });
}

template <typename T, int scale>
void gather_planes_of(const Params& p, int64_t begin, int64_t end) {
  each_plane_row<T>(p, begin, end, [&](T* tile, const T* map, int64_t) {
    for (int i = 0; i < scale; ++i)
      gather_row<T, scale>(map + i * p.row_stride, p.width, tile + i * scale * p.tile_pitch, p.tile_pitch);
  });
}

// f(Constant<scale>) for the scales that there are.
template <int scale = 2, typename F>
TF_INLINE void for_scale(int64_t wanted, F f) {
  if (wanted == scale) return f(Constant<scale>());
  if constexpr (scale < 32) for_scale<2 * scale>(wanted, f);
}

template <typename T>
void scatter_planes(const Params& p, int64_t begin, int64_t end) {
  for_scale(p.scale, [&](auto scale) {
    p.add ? scatter_planes_of<T, scale.value, true>(p, begin, end)
          : scatter_planes_of<T, scale.value, false>(p, begin, end);
  });
}

template <typename T>
void gather_planes(const Params& p, int64_t begin, int64_t end) {
  for_scale(p.scale, [&](auto scale) { gather_planes_of<T, scale.value>(p, begin, end); });
}

// f(run in the tile, run in the map), in the order of the map
template <typename T, typename F>
TF_INLINE void each_run(const Params& p, int64_t begin, int64_t end, F f) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t global = p.first_row + row;
    T* const tile = static_cast<T*>(p.tile) + row * p.width * p.tile_pitch;
    T* const map = static_cast<T*>(p.map) + global / p.height * p.image_stride;
    for (int64_t i = 0; i < p.offsets; ++i) {
      T* fine = map + (global % p.height * p.scale + p.first_offset + i) * p.row_stride;
      for (int64_t x = 0; x < p.width; ++x)
        for (int64_t j = 0; j < p.runs; ++j, fine += p.run_stride)
          f(tile + x * p.tile_pitch + (i * p.runs + j) * p.channels, fine);
    }
  }
}

template <typename T, bool has_bias, bool add>
void scatter_pixels_of(const Params& p, int64_t begin, int64_t end) {
  typedef typename Accumulator<T>::type A;
  const T* const bias = static_cast<const T*>(p.bias);
  each_run<T>(p, begin, end, [&](const T* tile, T* map) {
    for (int64_t c = 0; c < p.channels; c += VecOf<A>::lanes) {
      const int64_t count = p.channels - c;
      Vec<A> v = load_lanes(tile + c, count);
      if constexpr (has_bias) v += load_lanes(bias + c, count);
      put<T, add, A>(map + c, v, count);
    }
  });
}

template <typename T>
void scatter_pixels(const Params& p, int64_t begin, int64_t end) {
  if (p.add)
    p.bias ? scatter_pixels_of<T, true, true>(p, begin, end) : scatter_pixels_of<T, false, true>(p, begin, end);
  else
    p.bias ? scatter_pixels_of<T, true, false>(p, begin, end) : scatter_pixels_of<T, false, false>(p, begin, end);
}

template <typename T>
void gather_pixels(const Params& p, int64_t begin, int64_t end) {
  each_run<T>(p, begin, end, [&](T* tile, const T* map) { __builtin_memcpy(tile, map, p.channels * sizeof(T)); });
}

template <typename T>
void transpose(const void* in_, int64_t rows, int64_t columns, void* out_, int64_t pitch) {
  typedef typename Accumulator<T>::type A;
  constexpr int lanes = VecOf<A>::lanes;
  const T* const in = static_cast<const T*>(in_);
  T* const out = static_cast<T*>(out_);
  for (int64_t c = 0; c < columns; c += lanes)
    for (int64_t r = 0; r < rows; r += lanes) {
      Vec<A> v[lanes] = {};
      for (int i = 0; i < lanes; ++i)
        if (r + i < rows) v[i] = load_lanes(in + (r + i) * columns + c, columns - c);
      interleave<A, lanes>(v);
      for (int i = 0; i < lanes; ++i)
        if (c + i < columns) store_lanes(out + (c + i) * pitch + r, v[i], rows - r);
    }
}

template <typename T>
constexpr UpconvKernels::ForDtype for_dtype() {
  return {scatter_planes<T>, gather_planes<T>, scatter_pixels<T>, gather_pixels<T>, transpose<T>};
}

}  // namespace

const UpconvKernels upconv = {for_dtype<float>(), for_dtype<bf16>(), for_dtype<double>()};

}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
