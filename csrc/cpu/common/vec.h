// Vectors of the instruction set that this translation unit is compiled for, by the vector extensions of GCC and
// Clang. Files that include it are compiled once per instruction set and must not include headers with inline
// functions that the linker could share between those builds.
#pragma once

#include <stdint.h>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef TOKENFUSION_ISA
#error "TOKENFUSION_ISA is set by setup.py: default, avx2 or avx512"
#endif

#define TF_CONCAT_(a, b) a##b
#define TF_CONCAT(a, b) TF_CONCAT_(a, b)
#define TOKENFUSION_ISA_NAMESPACE TF_CONCAT(isa_, TOKENFUSION_ISA)

#if defined(__AVX512F__)
#define TF_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define TF_VECTOR_BYTES 32
#else
#define TF_VECTOR_BYTES 16
#endif

#define TF_INLINE inline __attribute__((always_inline))
#define TF_NOINLINE __attribute__((noinline))

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

template <int N>
struct Constant {
  static constexpr int value = N;
};

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

// What sums of T are held in.
template <typename T>
struct Accumulator {
  typedef float type;
};
template <>
struct Accumulator<double> {
  typedef double type;
};

template <typename T>
struct VecOf;

template <>
struct VecOf<float> {
  static constexpr int lanes = TF_VECTOR_BYTES / 4;
  typedef float type __attribute__((vector_size(TF_VECTOR_BYTES)));
  typedef float memory __attribute__((vector_size(TF_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t index;
  typedef index bits __attribute__((vector_size(TF_VECTOR_BYTES)));
};

template <>
struct VecOf<double> {
  static constexpr int lanes = TF_VECTOR_BYTES / 8;
  typedef double type __attribute__((vector_size(TF_VECTOR_BYTES)));
  typedef double memory __attribute__((vector_size(TF_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t index;
  typedef index bits __attribute__((vector_size(TF_VECTOR_BYTES)));
};

template <typename T>
using Vec = typename VecOf<T>::type;

typedef uint32_t U32 __attribute__((vector_size(TF_VECTOR_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(TF_VECTOR_BYTES / 2)));
typedef uint16_t U16Memory __attribute__((vector_size(TF_VECTOR_BYTES / 2), aligned(2), may_alias));

template <typename T>
TF_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::memory*>(p);
}

TF_INLINE Vec<float> load(const bf16* p) {
  const U16 bits = *reinterpret_cast<const U16Memory*>(p);
  return (Vec<float>)(__builtin_convertvector(bits, U32) << 16);
}

TF_INLINE Vec<float> load(const f16* p) {
  const U16 half = *reinterpret_cast<const U16Memory*>(p);
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)half);
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)half);
#else
  typedef VecOf<float>::bits I32;
  const U32 bits = __builtin_convertvector(half, U32), magnitude = bits & 0x7fffu;
  const U32 normal = (magnitude << 13) + (magnitude < 0x7c00u ? U32{} + (112u << 23) : U32{} + (224u << 23));
  const Vec<float> subnormal = __builtin_convertvector((I32)magnitude, Vec<float>) * 0x1p-24f;
  return (Vec<float>)((magnitude < 0x400u ? (U32)subnormal : normal) | (bits & 0x8000u) << 16);
#endif
}

template <typename T>
TF_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::memory*>(p) = v;
}

// Round to nearest even; NaN stays NaN.
TF_INLINE void store(bf16* p, Vec<float> v) {
  const U32 bits = (U32)v;
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 chosen = v == v ? rounded : U32{} + 0x7fc0u;
  *reinterpret_cast<U16Memory*>(p) = __builtin_convertvector(chosen, U16);
}

TF_INLINE void store(f16* p, Vec<float> v) {
#if defined(__AVX512F__)
  const U16 half = (U16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  const U16 half = (U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const U32 bits = (U32)v, magnitude = bits & 0x7fffffffu;
  const U32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // a sum with 1/2, whose last place is the least of a subnormal number, is rounded as that is
  const U32 subnormal = (U32)((Vec<float>)magnitude + 0.5f) - (126u << 23);
  const U32 finite = magnitude < 0x38800000u ? subnormal : normal;
  const U32 chosen = magnitude < 0x477ff000u ? finite : U32{} + 0x7c00u;
  const U32 known = v == v ? chosen : U32{} + 0x7e00u;
  const U16 half = __builtin_convertvector(known | (bits >> 16 & 0x8000u), U16);
#endif
  *reinterpret_cast<U16Memory*>(p) = half;
}

TF_INLINE float widen(float x) { return x; }
TF_INLINE double widen(double x) { return x; }
TF_INLINE float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

TF_INLINE float widen(f16 x) {
  const f16 row[VecOf<float>::lanes] = {x};
  return load(row)[0];
}

TF_INLINE void narrow(float* p, float x) { *p = x; }
TF_INLINE void narrow(double* p, double x) { *p = x; }
TF_INLINE void narrow(bf16* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  p->bits = x == x ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : uint16_t(0x7fc0);
}

TF_INLINE void narrow(f16* p, float x) {
  f16 row[VecOf<float>::lanes];
  store(row, Vec<float>{} + x);
  *p = row[0];
}

template <typename T>
TF_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x + 0 would not be x where x is -0, and costs an addition
}

// exp(x) for x <= 0 (anything below -87 gives 0), within 2 units in the last place.
TF_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  const Vec<float> rounder = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504088896341f + rounder;
  const Vec<float> n = shifted - rounder;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  typedef VecOf<float>::bits Bits;
  const Bits exponent = ((Bits)shifted - (Bits)rounder) << 23;
  const Vec<float> scaled = (Vec<float>)((Bits)p + exponent);
  const Vec<float> result = x < -87.0f ? Vec<float>{} : scaled;
  return x == x ? result : x;
}

TF_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < VecOf<double>::lanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// Lane numbers, as constants in memory: 0, 1, 2, ... and what `shuffle` takes to halve or to rotate vectors.
template <typename T>
struct Lanes {
  static constexpr int count = VecOf<T>::lanes;
  typedef typename VecOf<T>::index Index;
  alignas(TF_VECTOR_BYTES) Index number[count];

  static constexpr Lanes iota() { return rotated(0); }
  static constexpr Lanes rotated(int by) {
    Lanes lanes{};
    for (int i = 0; i < count; ++i) lanes.number[i] = (i + by) % count;
    return lanes;
  }
  // The first (offset 0) or second (offset width / 2) halves of the groups of `width` lanes of two vectors.
  static constexpr Lanes halves(int width, int offset) {
    Lanes lanes{};
    for (int i = 0; i < count; ++i) lanes.number[i] = i / (width / 2) * width + i % (width / 2) + offset;
    return lanes;
  }

  TF_INLINE typename VecOf<T>::bits load() const { return *reinterpret_cast<const typename VecOf<T>::bits*>(number); }
};

// The lanes of (a, b), 2 * lanes of them, that index names.
template <typename T>
TF_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, const Lanes<T>& lanes) {
#if defined(__clang__)
  Vec<T> result;
  for (int i = 0; i < Lanes<T>::count; ++i)
    result[i] = lanes.number[i] < Lanes<T>::count ? a[lanes.number[i]] : b[lanes.number[i] - Lanes<T>::count];
  return result;
#else
  return __builtin_shuffle(a, b, lanes.load());
#endif
}

// v with the lanes from count on set to zero.
template <typename T>
TF_INLINE Vec<T> first_lanes(Vec<T> v, int64_t count) {
  static constexpr Lanes<T> iota = Lanes<T>::iota();
  if (count >= Lanes<T>::count) return v;
  return iota.load() < typename Lanes<T>::Index(count) ? v : Vec<T>{};
}

template <typename T>
TF_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <typename T, int by = VecOf<T>::lanes / 2>
TF_INLINE T max_lane(Vec<T> v) {
  if constexpr (by == 0) {
    return v[0];
  } else {
    static constexpr Lanes<T> rotated = Lanes<T>::rotated(by);
    return max_lane<T, by / 2>(max<T>(v, shuffle<T>(v, v, rotated)));
  }
}

template <typename T, int by = VecOf<T>::lanes / 2>
TF_INLINE T sum_lanes(Vec<T> v) {
  if constexpr (by == 0) {
    return v[0];
  } else {
    static constexpr Lanes<T> rotated = Lanes<T>::rotated(by);
    return sum_lanes<T, by / 2>(v + shuffle<T>(v, v, rotated));
  }
}

// Lane i of the result is the sum of all lanes of v[i]; v is used as working space.
template <typename T, int width = VecOf<T>::lanes>
TF_INLINE Vec<T> sum_each(Vec<T> (&v)[VecOf<T>::lanes]) {
  if constexpr (width == 1) {
    return v[0];
  } else {
    static constexpr Lanes<T> low = Lanes<T>::halves(width, 0), high = Lanes<T>::halves(width, width / 2);
#pragma GCC unroll 8
    for (int i = 0; i < width / 2; ++i)
      v[i] = shuffle<T>(v[2 * i], v[2 * i + 1], low) + shuffle<T>(v[2 * i], v[2 * i + 1], high);
    return sum_each<T, width / 2>(v);
  }
}

// Lanes first, first + step, ... of two vectors; and those of their halves taken in turn.
template <typename A>
struct Shuffles {
  static constexpr int count = VecOf<A>::lanes;

  static constexpr Lanes<A> every_other(int first) {
    Lanes<A> lanes{};
    for (int i = 0; i < count; ++i) lanes.number[i] = 2 * i + first;
    return lanes;
  }
  static constexpr Lanes<A> in_turn(int first) {
    Lanes<A> lanes{};
    for (int i = 0; i < count; ++i) lanes.number[i] = first + i / 2 + i % 2 * count;
    return lanes;
  }
};

// n rows -> one sequence that takes from the rows in turn; with as many rows as lanes, a transposition.
template <typename A, int n>
TF_INLINE void interleave(Vec<A> (&v)[n]) {
  if constexpr (n > 1) {
    static constexpr Lanes<A> low = Shuffles<A>::in_turn(0), high = Shuffles<A>::in_turn(Lanes<A>::count / 2);
    Vec<A> even[n / 2], odd[n / 2];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) even[i] = v[2 * i], odd[i] = v[2 * i + 1];
    interleave<A, n / 2>(even);
    interleave<A, n / 2>(odd);
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      v[2 * i] = shuffle<A>(even[i], odd[i], low);
      v[2 * i + 1] = shuffle<A>(even[i], odd[i], high);
    }
  }
}

// The inverse of interleave.
template <typename A, int n>
TF_INLINE void deinterleave(Vec<A> (&v)[n]) {
  if constexpr (n > 1) {
    static constexpr Lanes<A> first = Shuffles<A>::every_other(0), second = Shuffles<A>::every_other(1);
    Vec<A> even[n / 2], odd[n / 2];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      even[i] = shuffle<A>(v[2 * i], v[2 * i + 1], first);
      odd[i] = shuffle<A>(v[2 * i], v[2 * i + 1], second);
    }
    deinterleave<A, n / 2>(even);
    deinterleave<A, n / 2>(odd);
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) v[2 * i] = even[i], v[2 * i + 1] = odd[i];
  }
}

TF_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// f(channel, how many lanes of its vector are in the row) over the vectors of a row.
template <typename A, typename F>
TF_INLINE void each_vector(int64_t channels, F f) {
  constexpr int lanes = VecOf<A>::lanes;
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) f(c, lanes);
  if (c < channels) f(c, channels - c);
}

// load and store of the end of a row, of `count` lanes, fewer than a vector has; beyond them nothing is read or
// written.
#if defined(__AVX512F__)
TF_INLINE uint32_t first_bits(int64_t count) { return count > 0 ? (1u << count) - 1 : 0; }

template <typename T, typename A>
TF_INLINE Vec<A> load_end(const T* p, int64_t count) {
  const uint32_t mask = first_bits(count);
  T row[VecOf<A>::lanes];
  if constexpr (sizeof(T) == 2) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm256_maskz_loadu_epi16(mask, p));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_storeu_si512(row, _mm512_maskz_loadu_epi32(mask, p));
  } else {
    _mm512_storeu_si512(row, _mm512_maskz_loadu_epi64(mask, p));
  }
  return load(row);
}

template <typename T, typename A>
TF_INLINE void store_end(T* p, Vec<A> v, int64_t count) {
  const uint32_t mask = first_bits(count);
  T row[VecOf<A>::lanes];
  store(row, v);
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(p, mask, _mm512_loadu_si512(row));
  } else {
    _mm512_mask_storeu_epi64(p, mask, _mm512_loadu_si512(row));
  }
}
#else
template <typename T, typename A>
TF_INLINE Vec<A> load_end(const T* p, int64_t count) {
  Vec<A> v{};
  for (int i = 0; i < VecOf<A>::lanes; ++i)
    if (i < count) v[i] = widen(p[i]);
  return v;
}

template <typename T, typename A>
TF_INLINE void store_end(T* p, Vec<A> v, int64_t count) {
  for (int i = 0; i < VecOf<A>::lanes; ++i)
    if (i < count) narrow(p + i, v[i]);
}
#endif

// The first `count` lanes; beyond them nothing is read or written.
template <typename T, typename A = typename Accumulator<T>::type>
TF_INLINE Vec<A> load_lanes(const T* p, int64_t count) {
  return count >= VecOf<A>::lanes ? load(p) : load_end<T, A>(p, count);
}

template <typename T, typename A = typename Accumulator<T>::type>
TF_INLINE void store_lanes(T* p, Vec<A> v, int64_t count) {
  count >= VecOf<A>::lanes ? store(p, v) : store_end<T, A>(p, v, count);
}

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
