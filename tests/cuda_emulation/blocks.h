// Blocks of a kernel, one after the other, for the files here that run an operator's kernels.
#pragma once

#include "emulated_device.h"

namespace tokenfusion {
namespace emulation {

// block() is what each thread of each block runs.
template <typename Block>
void run_blocks(int64_t blocks, int threads, const Options& options, Block block) {
  for (int64_t i = 0; i < blocks; ++i) run_block(int(options.backwards ? blocks - 1 - i : i), threads, options, block);
}

// The same for block(memory), where a block has this much shared memory, which is NaN at first.
template <typename Block>
void run_blocks(int64_t blocks, int threads, int64_t shared_bytes, const Options& options, Block block) {
  constexpr int64_t kGuard = 256;
  std::vector<Vector16> memory((shared_bytes + kGuard) / 16);
  char* const bytes = reinterpret_cast<char*>(memory.data());
  run_blocks(blocks, threads, options, [&] {
    if (thread_index() == (options.backwards ? threads - 1 : 0)) memset(bytes, 0xFF, memory.size() * 16);
    block(bytes);
  });
  for (size_t i = shared_bytes; i < memory.size() * 16; ++i)
    if (bytes[i] != char(0xFF)) fail("a write beyond the shared memory");
}

}  // namespace emulation
}  // namespace tokenfusion
