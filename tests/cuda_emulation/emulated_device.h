// A GPU's block on a CPU, for tests: each of its threads is a fiber, and every name of csrc/cuda/common/device.cuh is
// here with the same meaning. Fibers change over at collectives only, in an order that the test chooses, so that a
// missing barrier shows in the results; asynchronous copies happen as early or as late as they may.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#define TF_DEVICE inline
#define TF_HOST_DEVICE inline

namespace tokenfusion {
namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulated GPU: %s\n", what);
  abort();
}

struct Options {
  bool backwards;       // the last thread runs first
  bool one_warp_ahead;  // a warp runs as far as it can before the next
  bool late_copies;     // asynchronous copies happen when they are waited for
};

struct Copy {
  void* to;
  const void* from;
  bool wanted;

  void run() const {
    if (wanted)
      memcpy(to, from, 16);
    else
      memset(to, 0, 16);
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::vector<std::vector<Copy>> copies{1};  // groups of copies under way, the last of which is open
};

// What the lanes of a warp bring to a collective and take away from it.
struct Exchange {
  int arrived = 0, left = 0;
  const char* name = nullptr;
  const void* in[32];
  void* out[32];
};

struct Barrier {
  int arrived = 0, generation = 0, threads = 0;
};

struct Block {
  Options options;
  int threads, current = 0;
  int index;
  std::vector<Fiber> fibers;
  std::vector<Exchange> warps;
  Barrier barriers[16];
  ucontext_t main;
  std::function<void()> body;
  int64_t idle = 0;  // turns since something last moved on
};

inline Block* block = nullptr;

inline void run_fiber() {
  block->body();
  block->fibers[block->current].done = true;
  swapcontext(&block->fibers[block->current].context, &block->main);
}

inline void pause() { swapcontext(&block->fibers[block->current].context, &block->main); }

template <typename Condition>
void wait_until(Condition condition) {
  while (!condition()) {
    if (++block->idle > 1000 * int64_t(block->threads)) fail("deadlock: threads wait at different places");
    pause();
  }
  block->idle = 0;
}

// All 32 lanes bring `in`; the last to arrive runs compute(in, out) over arrays of 32 pointers.
template <typename In, typename Out, typename Compute>
void collective(const char* name, const In& in, Out& out, Compute compute) {
  Exchange& e = block->warps[block->current / 32];
  const int lane = block->current % 32;
  wait_until([&] { return e.left == 0; });
  if (e.arrived == 0) e.name = name;
  if (strcmp(e.name, name) != 0) fail("the lanes of a warp disagree about what comes next");
  e.in[lane] = &in, e.out[lane] = &out;
  if (++e.arrived == 32) {
    const In* ins[32];
    Out* outs[32];
    for (int i = 0; i < 32; ++i) ins[i] = static_cast<const In*>(e.in[i]), outs[i] = static_cast<Out*>(e.out[i]);
    compute(ins, outs);
    e.arrived = 0, e.left = 32;
  }
  wait_until([&] { return e.left > 0; });
  --e.left;
}

// Runs one block of a kernel.
inline void run_block(int index, int threads, const Options& options, std::function<void()> body) {
  Block b;
  b.options = options, b.threads = threads, b.index = index, b.body = std::move(body);
  b.fibers.resize(threads), b.warps.resize(threads / 32);
  block = &b;
  constexpr size_t kStack = 64 << 10;
  for (Fiber& fiber : b.fibers) {
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &b.main;
    makecontext(&fiber.context, run_fiber, 0);
  }
  const auto turn = [&](int thread) {
    if (b.fibers[thread].done) return;
    b.current = thread;
    swapcontext(&b.main, &b.fibers[thread].context);
  };
  const auto alive = [&](int first, int count) {
    for (int i = first; i < first + count; ++i)
      if (!b.fibers[i].done) return true;
    return false;
  };
  const int all_warps = threads / 32;
  while (alive(0, threads)) {
    for (int i = 0; i < all_warps; ++i) {
      const int warp = options.backwards ? all_warps - 1 - i : i;
      for (bool again = true; again;) {
        const int64_t before = b.idle;
        for (int j = 0; j < 32; ++j) turn(32 * warp + (options.backwards ? 31 - j : j));
        again = options.one_warp_ahead && b.idle < before + 32 && alive(32 * warp, 32);
      }
    }
  }
  for (const Exchange& e : b.warps)
    if (e.arrived != 0 || e.left != 0) fail("a warp ended inside a collective");
  block = nullptr;
}

}  // namespace emulation

struct Half {
  _Float16 x;
};
struct BFloat16 {
  uint16_t x;
};

inline float to_float(float x) { return x; }
inline float to_float(Half x) { return float(x.x); }
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.x) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

template <typename T>
T from_float(float x);
template <>
inline float from_float(float x) {
  return x;
}
template <>
inline Half from_float(float x) {
  return {_Float16(x)};
}
template <>
inline BFloat16 from_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

template <typename T>
T unpack(uint32_t pair, int i) {
  T x;
  memcpy(&x, reinterpret_cast<const char*>(&pair) + 2 * i, 2);
  return x;
}

template <typename T>
uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  uint32_t d;
  for (int i = 0; i < 2; ++i) {
    const T x = from_float<T>(to_float(unpack<T>(a, i)) - to_float(unpack<T>(b, i)));
    memcpy(reinterpret_cast<char*>(&d) + 2 * i, &x, 2);
  }
  return d;
}

inline int thread_index() { return emulation::block->current; }
inline int block_threads() { return emulation::block->threads; }
inline int block_index() { return emulation::block->index; }

inline void barrier(int id, int threads) {
  emulation::Barrier& b = emulation::block->barriers[id];
  if (b.arrived == 0) b.threads = threads;
  if (b.threads != threads) emulation::fail("threads disagree about the size of a barrier");
  const int generation = b.generation;
  if (++b.arrived == threads) b.arrived = 0, ++b.generation;
  emulation::wait_until([&] { return b.generation != generation; });
}

inline void warp_barrier() {
  int nothing = 0;
  emulation::collective("warp barrier", nothing, nothing, [](const int**, int**) {});
}

inline float shuffle_xor(float x, int mask) {
  float y;
  emulation::collective("shuffle", x, y, [mask](const float** in, float** out) {
    for (int i = 0; i < 32; ++i) *out[i] = *in[i ^ mask];
  });
  return y;
}

struct alignas(16) Vector16 {
  uint32_t x[4];
};

inline void check_alignment(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) emulation::fail("an address is not aligned");
}

inline void copy_async(void* shared, const void* global, bool wanted) {
  check_alignment(shared, 16), check_alignment(global, 16);
  emulation::Block& b = *emulation::block;
  const emulation::Copy copy{shared, global, wanted};
  if (b.options.late_copies)
    b.fibers[b.current].copies.back().push_back(copy);
  else
    copy.run();
}
inline void commit_copies() {
  emulation::Block& b = *emulation::block;
  b.fibers[b.current].copies.emplace_back();
}
inline void wait_copies(int pending) {
  auto& groups = emulation::block->fibers[emulation::block->current].copies;
  while (int(groups.size()) - 1 > pending) {
    for (const emulation::Copy& copy : groups.front()) copy.run();
    groups.erase(groups.begin());
  }
}

namespace emulation {

template <int count, bool transposed>
void load_matrices(const char* name, uint32_t (&m)[count], const void* row) {
  struct Out {
    uint32_t (*m)[count];
  } out{&m};
  if (block->current % 32 < 8 * count) check_alignment(row, 16);
  collective(name, row, out, [](const void* const** in, Out** out) {
    for (int matrix = 0; matrix < count; ++matrix) {
      uint16_t x[8][8];
      for (int r = 0; r < 8; ++r) memcpy(x[r], *in[8 * matrix + r], 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int r = lane / 4, c = lane % 4 * 2;
        const uint16_t pair[2] = {transposed ? x[c][r] : x[r][c], transposed ? x[c + 1][r] : x[r][c + 1]};
        memcpy(&(*out[lane]->m)[matrix], pair, 4);
      }
    }
  });
}

// A tensor core's sum: exact products and c, each cut off two bits below the largest one's 24, then the sum at 24.
inline float sum_of_products(float c, const float* a, const float* b, int count) {
  double terms[17] = {c}, largest = fabs(double(c)), sum = 0;
  for (int i = 0; i < count; ++i) {
    terms[i + 1] = double(a[i]) * b[i];
    largest = std::max(largest, fabs(terms[i + 1]));
  }
  for (int i = 0; i <= count; ++i)
    if (!(fabs(terms[i]) < INFINITY)) {
      for (int j = 0; j <= count; ++j) sum += terms[j];
      return float(sum);
    }
  if (largest == 0) return 0;
  const double unit = ldexp(1, ilogb(largest) - 25);
  for (int i = 0; i <= count; ++i) sum += trunc(terms[i] / unit) * unit;
  if (sum == 0) return 0;
  const double last = ldexp(1, std::max(ilogb(sum), -126) - 23);
  return float(trunc(sum / last) * last);
}

template <int depth>
struct Operands {
  float a[2][depth / 4], b[depth / 4];  // rows lane / 4 and lane / 4 + 8; columns as column_of says
  float (*c)[4];
};

// c [16, 8] += a [16, depth] b [depth, 8]; place(lane % 4, i) is the column of a lane's i-th number.
template <int depth, typename Place>
void multiply_add(const char* name, const Operands<depth>& mine, Place place) {
  Operands<depth> out = mine;
  collective(name, mine, out, [place](const Operands<depth>** in, Operands<depth>** out) {
    float a[16][depth], b[8][depth];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < depth / 4; ++i) {
        const int k = place(lane % 4, i);
        a[lane / 4][k] = in[lane]->a[0][i], a[lane / 4 + 8][k] = in[lane]->a[1][i], b[lane / 4][k] = in[lane]->b[i];
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j) {
        float& c = (*out[lane]->c)[j];
        c = sum_of_products(c, a[lane / 4 + j / 2 * 8], b[lane % 4 * 2 + j % 2], depth);
      }
  });
}

}  // namespace emulation

inline void load_matrices(uint32_t (&m)[4], const void* row) {
  emulation::load_matrices<4, false>("load matrices", m, row);
}
inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  emulation::load_matrices<4, true>("load four transposed", m, row);
}
inline void load_matrices_transposed(uint32_t (&m)[2], const void* row) {
  emulation::load_matrices<2, true>("load two transposed", m, row);
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::Operands<16> mine;
  const uint32_t b[2] = {b0, b1};
  for (int i = 0; i < 4; ++i) {
    mine.a[0][i] = to_float(unpack<T>(a[i / 2 * 2], i % 2)),
    mine.a[1][i] = to_float(unpack<T>(a[i / 2 * 2 + 1], i % 2));
    mine.b[i] = to_float(unpack<T>(b[i / 2], i % 2));
  }
  mine.c = &c;
  emulation::multiply_add<16>("m16n8k16", mine, [](int t, int i) { return i / 2 * 8 + 2 * t + i % 2; });
}

inline float to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (fabsf(x) < INFINITY) bits = (bits + 0x1000) & 0xFFFFE000u;
  memcpy(&x, &bits, 4);
  return x;
}

inline void multiply_add_tf32(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  for (float x : {a0, a1, a2, a3, b0, b1}) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x == x && (bits & 0x1FFF) != 0) emulation::fail("an operand is not of TF32");
  }
  const emulation::Operands<8> mine{{{a0, a2}, {a1, a3}}, {b0, b1}, &c};
  emulation::multiply_add<8>("m16n8k8", mine, [](int t, int i) { return t + 4 * i; });
}

}  // namespace tokenfusion
