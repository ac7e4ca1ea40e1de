// Products of small matrices by one warp's tensor cores, in the precision of their elements: 16 x 16 times 16 x 8, from
// shared memory. Pitches are in elements, rows are aligned to 16 bytes and lie an odd number of 16 bytes apart.
#pragma once

#include "device.cuh"

namespace tokenfusion {

constexpr float kInfinity = INFINITY;

TF_DEVICE int lane_index() { return thread_index() % 32; }

template <typename T>
TF_DEVICE uint32_t load_pair(const T* p) {
  return *reinterpret_cast<const uint32_t*>(p);
}

template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T x[2];
};
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// Half and BFloat16: products are exact and are summed in float32.
template <typename T>
struct Matrix {
  static_assert(sizeof(T) == 2, "float has a form of its own");

  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[2];
  };

  // a x b; this lane has (row, column), (row, column + 1), (row + 8, column) and (row + 8, column + 1) of it, where row
  // is lane / 4 and column is 2 (lane % 4).
  struct Product {
    float x[4] = {};

    TF_DEVICE void add(const A& a, const B& b) { multiply_add<T>(x, a.x, b.x[0], b.x[1]); }
    TF_DEVICE float operator[](int i) const { return x[i]; }
  };

  // Sums over the columns of a, and of their squares.
  struct RowSums {
    float sum[4] = {}, upper[4] = {}, lower[4] = {};

    TF_DEVICE void add(const A& a) {
      constexpr uint32_t kOnes = kIsHalf ? 0x3C003C00u : 0x3F803F80u;
      multiply_add<T>(sum, a.x, kOnes, kOnes);
      multiply_add<T>(upper, a.x, a.x[0], a.x[2]);  // a a^T, whose diagonal has the squares
      multiply_add<T>(lower, a.x, a.x[1], a.x[3]);
    }

    // Those of rows lane / 4 and lane / 4 + 8, in the lanes for which holds_row_sums().
    TF_DEVICE void finish(float (&sums)[2], float (&squares)[2]) {
      const bool odd = lane_index() / 4 % 2;
      sums[0] = sum[0], sums[1] = sum[2];
      squares[0] = odd ? upper[1] : upper[0], squares[1] = odd ? lower[3] : lower[2];
    }
  };

  // 16 bytes of each of four lanes, which give the columns of a and the rows of b for kVectorSteps products, in an
  // order that is the same for both
  typedef Vector16 Vector;
  static constexpr int kVectorSteps = 2;

  static TF_DEVICE A vector_a(const Vector& upper, const Vector& lower, int step) {
    return {{upper.x[2 * step], lower.x[2 * step], upper.x[2 * step + 1], lower.x[2 * step + 1]}};
  }
  static TF_DEVICE B vector_b(const Vector& column, int step) { return {{column.x[2 * step], column.x[2 * step + 1]}}; }
  // a with number(i, k) in row lane / 4 + 8 i and column k
  template <typename Number>
  static TF_DEVICE A make_a(Number number) {
    const int column = lane_index() % 4 * 2;
    A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = column + i / 2 * 8;
      const Two<T> pair = {from_float<T>(number(i % 2, k)), from_float<T>(number(i % 2, k + 1))};
      a.x[i] = load_pair(pair.x);
    }
    return a;
  }

  static TF_DEVICE A load_a(const T* rows, int pitch) {
    const int i = lane_index();
    A a;
    load_matrices(a.x, rows + i % 16 * pitch + i / 16 * 8);
    return a;
  }
  // a, whose transpose is in memory
  static TF_DEVICE A load_a_transposed(const T* rows, int pitch) {
    const int i = lane_index();
    A a;
    load_matrices_transposed(a.x, rows + (i % 8 + i / 16 * 8) * pitch + i / 8 % 2 * 8);
    return a;
  }
  static TF_DEVICE B load_b(const T* rows, int pitch) {
    const int i = lane_index();
    B b;
    load_matrices_transposed(b.x, rows + i % 16 * pitch);
    return b;
  }
  static TF_DEVICE B load_b_transposed(const T* rows, int pitch) {
    const T* const row = rows + lane_index() / 4 * pitch + lane_index() % 4 * 2;
    return {load_pair(row), load_pair(row + 8)};
  }

  // a[m][k] -= shift[m]
  static TF_DEVICE void shift_rows(A& a, const T* shift) {
    const uint16_t* const bits = reinterpret_cast<const uint16_t*>(shift) + lane_index() / 4;
    const uint32_t upper = bits[0] * 0x10001u, lower = bits[8] * 0x10001u;
    a.x[0] = subtract_pairs<T>(a.x[0], upper), a.x[1] = subtract_pairs<T>(a.x[1], lower);
    a.x[2] = subtract_pairs<T>(a.x[2], upper), a.x[3] = subtract_pairs<T>(a.x[3], lower);
  }
  // a[m][k] -= shift[k]
  static TF_DEVICE void shift_columns(A& a, const T* shift) {
    const uint32_t left = load_pair(shift + lane_index() % 4 * 2), right = load_pair(shift + lane_index() % 4 * 2 + 8);
    a.x[0] = subtract_pairs<T>(a.x[0], left), a.x[1] = subtract_pairs<T>(a.x[1], left);
    a.x[2] = subtract_pairs<T>(a.x[2], right), a.x[3] = subtract_pairs<T>(a.x[3], right);
  }

 private:
  template <typename U, typename V>
  struct Same {
    static constexpr bool value = false;
  };
  template <typename U>
  struct Same<U, U> {
    static constexpr bool value = true;
  };
  static constexpr bool kIsHalf = Same<T, Half>::value;
};

// float: each number is the sum of two of TF32, and the product of the two smaller ones is left out.
template <>
struct Matrix<float> {
  struct A {
    float x[8];  // of columns 0 to 7, then 8 to 15, as mma.m16n8k8 has them
  };
  struct B {
    float x[4];
  };

  struct Product {
    float x[4] = {}, small[4] = {};

    TF_DEVICE void add(const A& a, const B& b) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) split(a.x[4 * k + i], a_high[i], a_low[i]);
#pragma unroll
        for (int i = 0; i < 2; ++i) split(b.x[2 * k + i], b_high[i], b_low[i]);
        multiply_add_tf32(small, a_low[0], a_low[1], a_low[2], a_low[3], b_high[0], b_high[1]);
        multiply_add_tf32(small, a_high[0], a_high[1], a_high[2], a_high[3], b_low[0], b_low[1]);
        multiply_add_tf32(x, a_high[0], a_high[1], a_high[2], a_high[3], b_high[0], b_high[1]);
      }
    }
    // an infinity has no remainder
    TF_DEVICE float operator[](int i) const { return fabsf(small[i]) < kInfinity ? x[i] + small[i] : x[i]; }

   private:
    static TF_DEVICE void split(float x, float& high, float& low) {
      high = to_tf32(x);
      low = to_tf32(x - high);
    }
  };

  struct RowSums {
    float sum[2] = {}, square[2] = {};

    TF_DEVICE void add(const A& a) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sum[i % 2] += a.x[i];
        square[i % 2] += a.x[i] * a.x[i];
      }
    }
    TF_DEVICE void finish(float (&sums)[2], float (&squares)[2]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sums[i] = sum[i] + shuffle_xor(sum[i], 1), sums[i] += shuffle_xor(sums[i], 2);
        squares[i] = square[i] + shuffle_xor(square[i], 1), squares[i] += shuffle_xor(squares[i], 2);
      }
    }
  };

  typedef Four<float> Vector;
  static constexpr int kVectorSteps = 1;

  static TF_DEVICE A vector_a(const Vector& upper, const Vector& lower, int) {
    A a;
#pragma unroll
    for (int i = 0; i < 8; ++i) a.x[i] = (i % 2 == 0 ? upper : lower).x[i / 2];
    return a;
  }
  static TF_DEVICE B vector_b(const Vector& column, int) {
    return {column.x[0], column.x[1], column.x[2], column.x[3]};
  }
  template <typename Number>
  static TF_DEVICE A make_a(Number number) {
    A a;
#pragma unroll
    for (int i = 0; i < 8; ++i) a.x[i] = number(i % 2, lane_index() % 4 + i / 2 * 4);
    return a;
  }

  static TF_DEVICE A load_a(const float* rows, int pitch) {
    const int row = lane_index() / 4, column = lane_index() % 4;
    A a;
#pragma unroll
    for (int i = 0; i < 8; ++i) a.x[i] = rows[(row + i % 2 * 8) * pitch + column + i / 2 * 4];
    return a;
  }
  static TF_DEVICE A load_a_transposed(const float* rows, int pitch) {
    const int row = lane_index() / 4, column = lane_index() % 4;
    A a;
#pragma unroll
    for (int i = 0; i < 8; ++i) a.x[i] = rows[(column + i / 2 * 4) * pitch + row + i % 2 * 8];
    return a;
  }
  static TF_DEVICE B load_b(const float* rows, int pitch) {
    const float* const p = rows + lane_index() % 4 * pitch + lane_index() / 4;
    return {p[0], p[4 * pitch], p[8 * pitch], p[12 * pitch]};
  }
  static TF_DEVICE B load_b_transposed(const float* rows, int pitch) {
    const float* const p = rows + lane_index() / 4 * pitch + lane_index() % 4;
    return {p[0], p[4], p[8], p[12]};
  }

  static TF_DEVICE void shift_rows(A& a, const float* shift) {
    const int row = lane_index() / 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) a.x[i] -= shift[row + i % 2 * 8];
  }
  static TF_DEVICE void shift_columns(A& a, const float* shift) {
    const int column = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) a.x[i] -= shift[column + i / 2 * 4];
  }
};

// Two numbers next to each other, aligned as one.
template <typename T>
TF_DEVICE void store_two(T* to, float x, float y) {
  *reinterpret_cast<Two<T>*>(to) = {from_float<T>(x), from_float<T>(y)};
}

// Four numbers next to each other, aligned as one.
template <typename T>
TF_DEVICE void load_four(float (&x)[4], const T* from) {
  const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = to_float(four.x[i]);
}
template <typename T>
TF_DEVICE void store_four(T* to, const float (&x)[4], float scale) {
  Four<T> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four.x[i] = from_float<T>(x[i] * scale);
  *reinterpret_cast<Four<T>*>(to) = four;
}

TF_DEVICE bool holds_row_sums() { return lane_index() % 4 == lane_index() / 8; }

}  // namespace tokenfusion
