// Operands of products as dynamic_mixing's backward kernel keeps them in shared memory, beside those of Matrix.
#pragma once

#include "common/mma.cuh"

namespace tokenfusion {
namespace dynamic_mixing {

// c [16, 8] += a [16, 8] b [8, 8], as mma.m16n8k8 has them.
template <typename T>
TF_DEVICE void multiply_add_eight(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (kIsHalf<T>)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(b));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}

template <typename T>
struct Fragments : Matrix<T> {
  typedef Matrix<T> M;
  typedef typename M::A A;
  typedef typename M::B B;
  static constexpr bool kIsFloat = sizeof(T) == 4;
  static constexpr int kVector = 16 / sizeof(T);

  // Where a lane's part of 16 rows of a begins.
  static TF_DEVICE int place_in_rows(int pitch) { return lane_index() % 16 * pitch + lane_index() / 16 * kVector; }

  // Of these rows 16 columns, or 8 and zeros.
  template <bool kHalf>
  static TF_DEVICE A load_rows(const T* place) {
    A a{};
    if constexpr (kIsFloat) {
#pragma unroll
      for (int k = 0; k < (kHalf ? 1 : 2); ++k) {
        uint32_t x[4];
        load_matrices(x, place + 8 * k);
#pragma unroll
        for (int i = 0; i < 4; ++i) a.x[4 * k + i] = as_float(x[i]);
      }
    } else if constexpr (kHalf) {
      uint32_t x[2];
      load_matrices(x, place);
      a.x[0] = x[0], a.x[1] = x[1];
    } else {
      load_matrices(a.x, place);
    }
    return a;
  }

  // Where a lane's part of two b begins, 8 rows of whose transposes follow 8 of the other's; the same columns of them.
  template <bool kHalf>
  static TF_DEVICE int place_in_transposes(int pitch) {
    const int i = lane_index();
    if (kIsFloat != kHalf) return i % 8 * pitch + (kHalf ? i / 8 * 8 * pitch : i / 8 * 4);
    return (i % 8 + i / 16 * 8) * pitch + i / 8 % 2 * kVector;
  }
  template <bool kHalf>
  static TF_DEVICE void load_two_transposed(B (&b)[2], const T* place, int pitch) {
    if constexpr (kIsFloat && !kHalf) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t x[4];
        load_matrices(x, place + 8 * j * pitch);
#pragma unroll
        for (int i = 0; i < 4; ++i) b[j].x[i] = as_float(x[i]);
      }
    } else if constexpr (kIsFloat) {
      uint32_t x[4];
      load_matrices(x, place);
#pragma unroll
      for (int j = 0; j < 2; ++j) b[j] = {as_float(x[2 * j]), as_float(x[2 * j + 1]), 0, 0};
    } else if constexpr (kHalf) {
      uint32_t x[2];
      load_matrices(x, place);
      b[0] = {{x[0], 0}}, b[1] = {{x[1], 0}};
    } else {
      uint32_t x[4];
      load_matrices(x, place);
      b[0] = {{x[0], x[1]}}, b[1] = {{x[2], x[3]}};
    }
  }

  // Where a lane's part of two b begins, of which the second is `second` elements from the first.
  static TF_DEVICE int place_in_columns(int pitch, int second) {
    const int i = lane_index();
    return kIsFloat ? i % 4 * pitch + i / 4 : i % 16 * pitch + i / 16 * second;
  }
  static TF_DEVICE void load_two(B (&b)[2], const T* place, int pitch, int second) {
    if constexpr (kIsFloat) {
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) b[j].x[i] = place[4 * i * pitch + j * second];
    } else {
      uint32_t x[4];
      load_matrices_transposed(x, place);
      b[0] = {{x[0], x[1]}}, b[1] = {{x[2], x[3]}};
    }
  }

  // A matrix whose blocks of 8 x 8 elements lie together: the transpose of a is there, `below` elements from one block
  // of its rows to the next, `beside` from one of its columns.
  static TF_DEVICE A load_a_of_blocks(const T* blocks, int below, int beside) {
    const int i = lane_index();
    A a;
    if constexpr (kIsFloat) {
      const T* const p = blocks + i % 4 * 8 + i / 4;
#pragma unroll
      for (int j = 0; j < 8; ++j) a.x[j] = p[j / 4 * below + j / 2 % 2 * 32 + j % 2 * beside];
    } else {
      load_matrices_transposed(a.x, blocks + i % 8 * 8 + i / 8 % 2 * beside + i / 16 * below);
    }
    return a;
  }
  // Of such a matrix 16 x 16 elements as two products [16, 8] have them.
  static TF_DEVICE void load_products_of_blocks(float (&x)[2][4], const T* blocks, int below, int beside) {
    const int i = lane_index();
    if constexpr (kIsFloat) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Two<T> pair =
            *reinterpret_cast<const Two<T>*>(blocks + i / 4 * 8 + i % 4 * 2 + j % 2 * below + j / 2 * beside);
        x[j / 2][j % 2 * 2] = pair.x[0], x[j / 2][j % 2 * 2 + 1] = pair.x[1];
      }
    } else {
      uint32_t m[4];
      load_matrices(m, blocks + i % 8 * 8 + i / 8 % 2 * below + i / 16 * beside);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        widen(x[j / 2][j % 2 * 2], x[j / 2][j % 2 * 2 + 1], m[j]);
      }
    }
  }

  // Two elements of 16 bits.
  static TF_DEVICE void widen(float& x, float& y, uint32_t pair) {
    if constexpr (kIsHalf<T>) {
      const Two<T> two = unpack<T>(pair);
      x = to_float(two.x[0]), y = to_float(two.x[1]);
    } else {
      x = as_float(pair << 16), y = as_float(pair & 0xFFFF0000u);
    }
  }

  // sums += a b, the sum of 16 products or of 8; in float32 the sums are rounded, which tensor cores would not do.
  template <bool kHalf = false>
  static TF_DEVICE void add(float (&sums)[4], const typename M::SplitA& a, const B& b) {
    if constexpr (kIsFloat) {
      typename M::Product product;
      product.add(a, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += product[i];
    } else if constexpr (kHalf) {
      multiply_add_eight<T>(sums, a.x[0], a.x[1], b.x[0]);
    } else {
      multiply_add<T>(sums, a.x, b.x[0], b.x[1]);
    }
  }
};

// 16 bytes of shared memory in one access: of a load in C++ the compiler may make several.
TF_DEVICE Vector16 load_shared(const void* from) {
  Vector16 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
               : "r"(shared_address(from))
               : "memory");
  return v;
}

}  // namespace dynamic_mixing
}  // namespace tokenfusion
