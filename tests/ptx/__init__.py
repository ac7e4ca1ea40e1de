"""Runs PTX on a CPU, for tests: what a GPU would do, and an error where a GPU would be free to do anything.

`launch.launch` runs a kernel that `parse.parse` has read on tensors that a `memory.Memory` allows. Seen as errors:

- accesses outside of a tensor, of shared, local or parameter memory, and misaligned ones; stores to read-only tensors;
- values from shared or local memory that nothing has written (poison), once an address, a predicate or a value stored
  to global memory depends on them; merely loading them, as vector loads of padding do, is none (poison.py);
- races in shared memory, in whatever order the warps run, between warps and between lanes of one warp (races.py);
- asynchronous copies and products that are read, overwritten or reused before they are waited for, and what the
  asynchronous proxy reads without fence.proxy.async or, of registers, without wgmma.fence;
- collectives without all threads that take part in them, wrong membermasks, barriers and mbarriers that never complete;
- instructions, types and modifiers that are not known: before anything runs.

With late=True an asynchronous operation happens when it is waited for; bulk copies only when all threads wait.

What is not modelled:

- Time, caches, memory banks, register pressure, limits of a launch. Cache hints and prefetches do nothing.
- Other blocks: of one batch they run side by side but share only global memory, in which no races are seen; a block
  that waits for another by spinning never ends. A cluster is one block; multicast, remote shared memory and cluster
  barriers between blocks are not known.
- Registers that are read before they are written: they are zeros.
- Partial membermasks of bar.warp.sync order the memory accesses of the whole warp, and an mbarrier arrival of one lane
  releases what its warp has done: races there may be missed. Of several writers of one value only the last counts.
- Atomic operations take threads in ascending order, and are not looked at for races.
- Sums inside mma and wgmma are exact and rounded once; hardware's are not, in ways that are not documented.
- cp.async counts as part of the generic proxy, whose writes a wgmma may read after a barrier: as libraries rely on.
- Quiet NaN payloads, exceptions, debugging, textures, surfaces, calls of functions, and 128-bit registers.
"""
