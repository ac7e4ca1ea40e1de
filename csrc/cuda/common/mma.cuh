// Products of small matrices by one warp's tensor cores, in the precision of their elements: 16 x 16 times 16 x 8, from
// shared memory. Pitches are in elements, rows are aligned to 16 bytes and lie an odd number of 16 bytes apart.
#pragma once

#include "device.cuh"

namespace tokenfusion {

constexpr float kInfinity = INFINITY;

TF_DEVICE int lane_index() { return unsigned(thread_index()) % 32; }  // known to have no sign

// The sum over the four lanes of a row.
TF_DEVICE float sum_quad(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

template <typename T>
TF_DEVICE uint32_t load_pair(const T* p) {
  return *reinterpret_cast<const uint32_t*>(p);
}

template <typename T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<Half> = true;

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

  // Operands as products take them; where an element is split into several numbers they lie kPieces times in memory.
  static constexpr int kPieces = 1;
  typedef A SplitA;
  typedef B SplitB;
  static TF_DEVICE const A& split(const A& a) { return a; }
  static TF_DEVICE const B& split(const B& b) { return b; }

  // a x b; this lane has (row, column), (row, column + 1), (row + 8, column) and (row + 8, column + 1) of it, where row
  // is lane / 4 and column is 2 (lane % 4).
  struct Product {
    float x[4] = {};

    TF_DEVICE void add(const A& a, const B& b) { multiply_add<T>(x, a.x, b.x[0], b.x[1]); }
    TF_DEVICE float operator[](int i) const { return x[i]; }
  };
  typedef Product FiniteProduct;

  // Sums over the columns of a, for rows lane / 4 and lane / 4 + 8, in all four lanes of a row.
  struct RowSums {
    float x[4] = {};

    TF_DEVICE void add(const A& a) {
      constexpr uint32_t kOnes = kIsHalf<T> ? 0x3C003C00u : 0x3F803F80u;
      multiply_add<T>(x, a.x, kOnes, kOnes);
    }
    TF_DEVICE void finish(float (&sums)[2]) { sums[0] = x[0], sums[1] = x[2]; }
  };

  // The same of squares, which are on the diagonal of a a^T.
  struct RowSquares {
    float upper[4] = {}, lower[4] = {};

    TF_DEVICE void add(const A& a) {
      multiply_add<T>(upper, a.x, a.x[0], a.x[2]);
      multiply_add<T>(lower, a.x, a.x[1], a.x[3]);
    }
    TF_DEVICE void finish(float (&squares)[2]) {
      const int row = lane_index() / 4, from = 4 * row + row / 2;
      squares[0] = shuffle_from(from_column(upper[0], upper[1]), from);
      squares[1] = shuffle_from(from_column(lower[2], lower[3]), from);
    }

   private:
    static TF_DEVICE float from_column(float even, float odd) { return lane_index() / 4 % 2 ? odd : even; }
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
    const int i = lane_index();
    B b;
    load_matrices(b.x, rows + i % 8 * pitch + i / 8 % 2 * 8);
    return b;
  }
  // The same of 8 rows and of the 8 behind them.
  static TF_DEVICE void load_two_b_transposed(B& first, B& second, const T* rows, int pitch) {
    const int i = lane_index();
    uint32_t x[4];
    load_matrices(x, rows + (i % 8 + i / 16 * 8) * pitch + i / 8 % 2 * 8);
    first = {{x[0], x[1]}}, second = {{x[2], x[3]}};
  }

  // Products next to each other, [16, 8] each, as the left operand of another product, and its right operand.
  static TF_DEVICE A from_products(const float (&first)[4], const float (&second)[4]) {
    return {{pack<T>(first[0], first[1]), pack<T>(first[2], first[3]), pack<T>(second[0], second[1]),
             pack<T>(second[2], second[3])}};
  }
  // of 8 columns and of the 8 beside them
  static TF_DEVICE void load_two_b_of_products(B& first, B& second, const T* rows, int pitch) {
    const int i = lane_index();
    uint32_t x[4];
    load_matrices_transposed(x, rows + i % 16 * pitch + i / 16 * 8);
    first = {{x[0], x[1]}}, second = {{x[2], x[3]}};
  }
  // A product [16, 8], transposed, as the right operand of another, and its left operand, whose transpose is in memory.
  static TF_DEVICE B from_transposed_product(const float (&x)[4]) {
    return {{transpose_matrix(pack<T>(x[0], x[1])), transpose_matrix(pack<T>(x[2], x[3]))}};
  }
  static TF_DEVICE A load_a_for_transposed_product(const T* rows, int pitch) { return load_a_transposed(rows, pitch); }

  // sums += a b scale; scale is 1 but for Half.
  static TF_DEVICE void accumulate(float (&sums)[4], const A& a, const B& b, float scale) {
    if constexpr (kIsHalf<T>) {
      Product product;
      product.add(a, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += product[i] * scale;
    } else {
      multiply_add<T>(sums, a.x, b.x[0], b.x[1]);
    }
  }
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

  static constexpr int kPieces = 2;
  struct SplitA {
    float high[8], low[8];
  };
  struct SplitB {
    float high[4], low[4];
  };
  // Of a NaN, low is one.
  static TF_DEVICE void split(float x, float& high, float& low) {
    high = round_to_tf32(x);
    low = cut_to_tf32(x - high);
  }
  static TF_DEVICE SplitA split(const A& a) {
    SplitA s;
#pragma unroll
    for (int i = 0; i < 8; ++i) split(a.x[i], s.high[i], s.low[i]);
    return s;
  }
  static TF_DEVICE SplitB split(const B& b) {
    SplitB s;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(b.x[i], s.high[i], s.low[i]);
    return s;
  }

  struct Product {
    float x[4] = {}, small[4] = {};

    TF_DEVICE void add(const A& a, const B& b) { add(split(a), split(b)); }
    TF_DEVICE void add(const SplitA& a, const B& b) { add(a, split(b)); }
    TF_DEVICE void add(const SplitA& a, const SplitB& b) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float *const low = a.low + 4 * k, *const high = a.high + 4 * k;
        multiply_add_tf32(small, low[0], low[1], low[2], low[3], b.high[2 * k], b.high[2 * k + 1]);
        multiply_add_tf32(small, high[0], high[1], high[2], high[3], b.low[2 * k], b.low[2 * k + 1]);
        multiply_add_tf32(x, high[0], high[1], high[2], high[3], b.high[2 * k], b.high[2 * k + 1]);
      }
    }
    // an infinity has no remainder
    TF_DEVICE float operator[](int i) const { return fabsf(x[i]) < kInfinity ? x[i] + small[i] : x[i]; }
  };

  // In half of the registers; NaN for infinities.
  struct FiniteProduct {
    float x[4] = {};

    TF_DEVICE void add(const SplitA& a, const B& b) { add(a, split(b)); }
    TF_DEVICE void add(const SplitA& a, const SplitB& b) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float *const low = a.low + 4 * k, *const high = a.high + 4 * k;
        multiply_add_tf32(x, low[0], low[1], low[2], low[3], b.high[2 * k], b.high[2 * k + 1]);
        multiply_add_tf32(x, high[0], high[1], high[2], high[3], b.low[2 * k], b.low[2 * k + 1]);
        multiply_add_tf32(x, high[0], high[1], high[2], high[3], b.high[2 * k], b.high[2 * k + 1]);
      }
    }
    TF_DEVICE float operator[](int i) const { return x[i]; }
  };

  struct RowSums {
    float x[2] = {};

    TF_DEVICE void add(const A& a) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i % 2] += a.x[i];
    }
    TF_DEVICE void finish(float (&sums)[2]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[i] = sum_quad(x[i]);
    }
  };
  struct RowSquares {
    float x[2] = {};

    TF_DEVICE void add(const A& a) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i % 2] += a.x[i] * a.x[i];
    }
    TF_DEVICE void finish(float (&squares)[2]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) squares[i] = sum_quad(x[i]);
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
    const int i = lane_index();
    A a;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t x[4];
      load_matrices(x, rows + i % 16 * pitch + i / 16 * 4 + 8 * k);
#pragma unroll
      for (int j = 0; j < 4; ++j) a.x[4 * k + j] = as_float(x[j]);
    }
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
    const int i = lane_index();
    uint32_t x[4];
    load_matrices(x, rows + i % 8 * pitch + i / 8 * 4);
    return {as_float(x[0]), as_float(x[1]), as_float(x[2]), as_float(x[3])};
  }
  // b whose pieces lie `distance` from each other
  static TF_DEVICE SplitB load_split_b_transposed(const float* rows, int distance, int pitch) {
    const B high = load_b_transposed(rows, pitch), low = load_b_transposed(rows + distance, pitch);
    return {{high.x[0], high.x[1], high.x[2], high.x[3]}, {low.x[0], low.x[1], low.x[2], low.x[3]}};
  }

  // A lane's two columns of a product are columns lane % 4 and lane % 4 + 4 of the operand: any order does.
  static TF_DEVICE A from_products(const float (&first)[4], const float (&second)[4]) {
    return {{first[0], first[2], first[1], first[3], second[0], second[2], second[1], second[3]}};
  }
  static TF_DEVICE void load_two_b_of_products(B& first, B& second, const float* rows, int pitch) {
    const float* const p = rows + lane_index() % 4 * 2 * pitch + lane_index() / 4;
    first = {p[0], p[pitch], p[8 * pitch], p[9 * pitch]};
    second = {p[8], p[pitch + 8], p[8 * pitch + 8], p[9 * pitch + 8]};
  }
  // Rows 2 c and 2 c + 1 of eight are rows c and c + 4 of the operand, so that loads have no bank in common.
  static TF_DEVICE B from_transposed_product(const float (&x)[4]) {
    const int lane = lane_index();
    B b;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // row 2 (lane % 4) + i % 2 + i / 2 * 8 of this lane's column lane / 4
      const int from = 4 * (lane % 4 * 2 + i % 2) + lane / 8;
      const float even = shuffle_from(x[i / 2 * 2], from), odd = shuffle_from(x[i / 2 * 2 + 1], from);
      b.x[i] = lane / 4 % 2 ? odd : even;
    }
    return b;
  }
  static TF_DEVICE A load_a_for_transposed_product(const float* rows, int pitch) {
    const float* const p = rows + lane_index() % 4 * 2 * pitch + lane_index() / 4;
    A a;
#pragma unroll
    for (int i = 0; i < 8; ++i) a.x[i] = p[(i / 2 % 2 + i / 4 * 8) * pitch + i % 2 * 8];
    return a;
  }

  // sums += a b; the sums are rounded, which tensor cores would not do. Elements are finite.
  static TF_DEVICE void accumulate(float (&sums)[4], const SplitA& a, const SplitB& b, float) {
    FiniteProduct product;
    product.add(a, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += product[i];
  }
};

// The elements nearest to two numbers.
template <typename T>
TF_DEVICE void round_two(float& nearest_x, float& nearest_y, float x, float y) {
  const Two<T> two = unpack<T>(pack<T>(x, y));
  nearest_x = to_float(two.x[0]), nearest_y = to_float(two.x[1]);
}
template <>
TF_DEVICE void round_two<float>(float& nearest_x, float& nearest_y, float x, float y) {
  nearest_x = x, nearest_y = y;
}

// Two numbers next to each other, aligned as one.
template <typename T>
TF_DEVICE void store_two(T* to, float x, float y) {
  *reinterpret_cast<uint32_t*>(to) = pack<T>(x, y);
}
template <>
TF_DEVICE void store_two(float* to, float x, float y) {
  *reinterpret_cast<Two<float>*>(to) = {x, y};
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

}  // namespace tokenfusion
