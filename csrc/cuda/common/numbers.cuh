// Numbers that lie next to each other in global memory, aligned as one, and move in one access.
#pragma once

#include "device.cuh"

namespace tokenfusion {

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  typedef uint16_t type;
};
template <>
struct BitsOf<4> {
  typedef uint32_t type;
};
template <>
struct BitsOf<8> {
  typedef uint64_t type;
};
template <>
struct BitsOf<16> {
  typedef Vector16 type;
};

template <typename T, int N>
struct Numbers {
  typedef typename BitsOf<N * sizeof(T)>::type Bits;

  Bits bits;

  static TF_DEVICE Numbers load(const T* from) { return {*reinterpret_cast<const Bits*>(from)}; }
  static TF_DEVICE Numbers rounded(const float (&x)[N]) {
    Numbers n;
    if constexpr (sizeof(T) == 2 && N > 1) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) reinterpret_cast<uint32_t*>(&n.bits)[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) n[i] = from_float<T>(x[i]);
    }
    return n;
  }
  TF_DEVICE void store(T* to) const {
    if constexpr (sizeof(Bits) == sizeof(Vector16))
      store_global(to, bits);
    else
      put(to);
  }

  // In as many accesses as the compiler makes of it.
  TF_DEVICE void put(T* to) const { *reinterpret_cast<Bits*>(to) = bits; }

  TF_DEVICE T& operator[](int i) { return reinterpret_cast<T*>(&bits)[i]; }
  TF_DEVICE const T& operator[](int i) const { return reinterpret_cast<const T*>(&bits)[i]; }
};

}  // namespace tokenfusion
