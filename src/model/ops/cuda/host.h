// CUDA's language on a CPU, as much of it as kernels.cu uses: the threads of a block are coroutines that
// run one after the other, each up to the next barrier or shuffle. Slow, and exact about who may see what.

#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <vector>

#define __device__ static
#define __global__
// Of a block; blocks run one after the other.
#define __shared__ static
#define SHARED_ROW(name) static float name[4096]

struct Index {
  unsigned x, y, z;
};

static Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {
static ucontext_t scheduler;
static std::vector<ucontext_t> threads;
static std::vector<float> exchanged;
static unsigned current;

static void wait() {
  unsigned self = current;
  swapcontext(&threads[self], &scheduler);
}

template <typename Kernel>
static void run(Index grid, unsigned block, Kernel kernel) {
  static Kernel *body;
  static std::vector<bool> ended;
  const size_t stack = 256 << 10;
  std::vector<char> stacks(block * stack);
  gridDim = grid;
  blockDim = {block, 1, 1};
  body = &kernel;
  exchanged.resize(block);
  for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
        threads.assign(block, ucontext_t());
        ended.assign(block, false);
        for (unsigned i = 0; i < block; i++) {
          getcontext(&threads[i]);
          threads[i].uc_stack.ss_sp = &stacks[i * stack];
          threads[i].uc_stack.ss_size = stack;
          threads[i].uc_link = &scheduler;
          void (*entry)() = [] {
            (*body)();
            ended[current] = true;
          };
          makecontext(&threads[i], entry, 0);
        }
        // A round takes every thread to its next barrier; in every second block the last thread goes first.
        bool backwards = (blockIdx.x + blockIdx.y + blockIdx.z) % 2;
        for (bool more = true; more;) {
          more = false;
          for (unsigned turn = 0; turn < block; turn++) {
            current = backwards ? block - 1 - turn : turn;
            if (ended[current]) continue;
            threadIdx = {current, 0, 0};
            swapcontext(&scheduler, &threads[current]);
            more = more || !ended[current];
          }
        }
      }
}
}  // namespace host

static void __syncthreads() { host::wait(); }

static float __shfl_xor_sync(unsigned, float x, int lanes) {
  unsigned self = host::current;
  host::exchanged[self] = x;
  host::wait();
  float other = host::exchanged[self ^ lanes];
  host::wait();
  return other;
}

static float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static int max(int a, int b) { return a > b ? a : b; }
static int min(int a, int b) { return a < b ? a : b; }
