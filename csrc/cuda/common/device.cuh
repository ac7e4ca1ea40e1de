// What the kernels use of a GPU: its number types, warp and block collectives, asynchronous copies and tensor cores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>

#define TF_DEVICE __device__ __forceinline__
#define TF_HOST_DEVICE __host__ __device__ __forceinline__

namespace tokenfusion {

typedef __half Half;
typedef __nv_bfloat16 BFloat16;

TF_DEVICE float to_float(float x) { return x; }
TF_DEVICE float to_float(Half x) { return __half2float(x); }
TF_DEVICE float to_float(BFloat16 x) { return __bfloat162float(x); }

template <typename T>
TF_DEVICE T from_float(float x);
template <>
TF_DEVICE float from_float(float x) {
  return x;
}
template <>
TF_DEVICE Half from_float(float x) {
  return __float2half_rn(x);
}
template <>
TF_DEVICE BFloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

// Two and four numbers next to each other, aligned as one.
template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T x[2];
};
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// Two numbers next to each other, the first in the lower half.
template <typename T>
TF_DEVICE uint32_t pack(float x, float y);
template <>
TF_DEVICE uint32_t pack<Half>(float x, float y) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(y), "f"(x));
  return d;
}
template <>
TF_DEVICE uint32_t pack<BFloat16>(float x, float y) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(y), "f"(x));
  return d;
}

template <typename T>
TF_DEVICE Two<T> unpack(uint32_t x) {
  return *reinterpret_cast<const Two<T>*>(&x);
}

TF_DEVICE int thread_index() { return threadIdx.x; }
TF_DEVICE int block_threads() { return blockDim.x; }
TF_DEVICE int block_index() { return blockIdx.x; }

// Barrier number `id` of the block, for `threads` of its threads.
TF_DEVICE void barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
TF_DEVICE void warp_barrier() { __syncwarp(); }
TF_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
TF_DEVICE float shuffle_from(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
TF_DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }

constexpr float kLog2E = 1.4426950408889634f;

// 2^x with an error of 2 ulp.
TF_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x with an error of 1 ulp.
TF_DEVICE float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

TF_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }

struct alignas(16) Vector16 {
  uint32_t x[4];
};

// The numbers in 16 bytes.
template <typename T>
TF_DEVICE void unpack_vector(float (&x)[16 / sizeof(T)], const Vector16& vector) {
  const T* const numbers = reinterpret_cast<const T*>(&vector);
#pragma unroll
  for (int i = 0; i < 16 / int(sizeof(T)); ++i) x[i] = to_float(numbers[i]);
}
template <typename T>
TF_DEVICE void load_vector(float (&x)[16 / sizeof(T)], const T* from) {
  unpack_vector<T>(x, *reinterpret_cast<const Vector16*>(from));
}

// To global memory, aligned to 16 bytes, in one access: of a store in C++ the compiler may make four.
TF_DEVICE void store_global(void* to, const Vector16& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(v.x[0]), "r"(v.x[1]),
               "r"(v.x[2]), "r"(v.x[3])
               : "memory");
}

// The nearest elements.
template <typename T>
TF_DEVICE Vector16 vector_of(const float (&x)[16 / sizeof(T)]) {
  Vector16 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2)
      v.x[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    else
      v.x[i] = __float_as_uint(x[i]);
  }
  return v;
}

TF_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// The same to shared memory.
TF_DEVICE void store_shared(void* to, const Vector16& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)), "r"(v.x[0]), "r"(v.x[1]),
               "r"(v.x[2]), "r"(v.x[3])
               : "memory");
}

// Begins to copy 16 bytes of global to shared memory; zeros where they are not wanted, and nothing is read then.
TF_DEVICE void copy_async(void* shared, const void* global, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(wanted ? 16 : 0)
               : "memory");
}
// The same of 4 bytes.
TF_DEVICE void copy_word_async(void* shared, const void* global, bool wanted) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(wanted ? 4 : 0)
               : "memory");
}
TF_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all copies that this thread has begun.
TF_DEVICE void wait_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Matrices of 8 x 8 16-bit numbers; lane i points to row i % 8 of matrix i / 8. Lane 4 r + c receives elements
// (r, 2 c) and (r, 2 c + 1) of each; transposed, (2 c, r) and (2 c + 1, r).
TF_DEVICE void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}
TF_DEVICE void load_matrices(uint32_t (&m)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(shared_address(row))
               : "memory");
}
TF_DEVICE void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}
TF_DEVICE void load_matrices_transposed(uint32_t (&m)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(shared_address(row))
               : "memory");
}

// The transpose of a matrix of 8 x 8 16-bit numbers, of which lane 4 r + c has elements (r, 2 c) and (r, 2 c + 1).
TF_DEVICE uint32_t transpose_matrix(uint32_t m) {
  uint32_t t;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(m));
  return t;
}

// c [16, 8] += a [16, 16] b [16, 8], each lane's share of the operands as PTX lays them down for mma.m16n8k16.
template <typename T>
TF_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
TF_DEVICE void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
TF_DEVICE void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c [16, 8] += a [16, 8] b [8, 8] in TF32, as mma.m16n8k8.
TF_DEVICE void multiply_add_tf32(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// x without the digits that TF32 does not have, cut off or rounded; rounded, a NaN may become a number.
TF_DEVICE float cut_to_tf32(float x) { return __uint_as_float(__float_as_uint(x) & 0xFFFFE000u); }
TF_DEVICE float round_to_tf32(float x) { return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xFFFFE000u); }

}  // namespace tokenfusion
