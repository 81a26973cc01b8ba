// The part of CUDA that kernels.cu uses, and the functions of device.h, on a CPU. The threads of a block are coroutines
// that run one after another, each up to the next barrier of its block or its warp. Slow, but exact about which writes
// a thread can see.

#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <vector>

#define __device__ inline
#define __global__
#define __launch_bounds__(...)
// Static memory is enough, because blocks run one after another.
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Index {
  unsigned x, y, z;
};

struct uint4 {
  unsigned x, y, z, w;
};

static Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {
enum State { RUNS, AT_BLOCK, AT_WARP, ENDED };
static ucontext_t scheduler;
static std::vector<ucontext_t> threads;
static std::vector<State> states;
static unsigned current;

// Returns when all threads of the block, or of the warp, have reached this barrier.
static void wait(State at) {
  unsigned self = current;
  states[self] = at;
  swapcontext(&threads[self], &scheduler);
}

// Releases the threads at a barrier if all the others have reached it too, or have ended.
static bool release(unsigned first, unsigned end, State at) {
  bool some = false;
  for (unsigned i = first; i < end; i++) {
    if (states[i] != at && states[i] != ENDED) return false;
    some = some || states[i] == at;
  }
  for (unsigned i = first; i < end; i++)
    if (states[i] == at) states[i] = RUNS;
  return some;
}

template <typename Kernel>
static void run(Index grid, unsigned block, Kernel kernel) {
  static Kernel *body;
  const size_t stack = 256 << 10;
  std::vector<char> stacks(block * stack);
  gridDim = grid;
  blockDim = {block, 1, 1};
  body = &kernel;
  for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
        threads.assign(block, ucontext_t());
        states.assign(block, RUNS);
        for (unsigned i = 0; i < block; i++) {
          getcontext(&threads[i]);
          threads[i].uc_stack.ss_sp = &stacks[i * stack];
          threads[i].uc_stack.ss_size = stack;
          threads[i].uc_link = &scheduler;
          void (*entry)() = [] {
            (*body)();
            states[current] = ENDED;
          };
          makecontext(&threads[i], entry, 0);
        }
        // Every second block runs its threads in reverse order.
        bool backwards = (blockIdx.x + blockIdx.y + blockIdx.z) % 2;
        for (bool more = true; more;) {
          for (unsigned turn = 0; turn < block; turn++) {
            current = backwards ? block - 1 - turn : turn;
            if (states[current] != RUNS) continue;
            threadIdx = {current, 0, 0};
            swapcontext(&scheduler, &threads[current]);
          }
          more = release(0, block, AT_BLOCK);
          for (unsigned warp = 0; warp < block; warp += 32) more = release(warp, warp + 32, AT_WARP) || more;
        }
        for (State state : states)
          if (state != ENDED) {
            fprintf(stderr, "deadlock: threads wait at different barriers\n");
            abort();
          }
      }
  body = nullptr;
}

// Shares a value within the warp; returns the values of all its threads.
template <typename T>
static const T *exchange(const T &mine) {
  static T shown[1024];
  shown[current] = mine;
  wait(AT_WARP);
  return shown + current / 32 * 32;
}

struct Copy {
  void *to;
  const void *from;
};
static std::vector<Copy> copies[1024];
}  // namespace host

static void __syncthreads() { host::wait(host::AT_BLOCK); }

static void __syncwarp() { host::wait(host::AT_WARP); }

static float __shfl_xor_sync(unsigned, float x, int lanes) {
  float other = host::exchange(x)[host::current % 32 ^ lanes];
  host::wait(host::AT_WARP);
  return other;
}

static int max(int a, int b) { return a > b ? a : b; }
static int min(int a, int b) { return a < b ? a : b; }

// The upper half of a float, rounded to the nearest, ties to even.
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    uint32_t all;
    memcpy(&all, &x, sizeof(all));
    bits = isnan(x) ? 0x7fff : (all + 0x7fff + (all >> 16 & 1)) >> 16;
  }
  explicit operator float() const {
    uint32_t all = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &all, sizeof(x));
    return x;
  }
};

template <typename T>
constexpr bool TENSOR_CORES = false;
template <>
constexpr bool TENSOR_CORES<__nv_bfloat16> = true;

template <typename T>
static unsigned pair(float first, float second) {
  T both[2] = {T(first), T(second)};
  unsigned bits;
  memcpy(&bits, both, sizeof(bits));
  return bits;
}

// A lane's registers for the operands of `multiply`, with the names of the PTX ISA.
template <typename T>
struct Fragments {
  T a[8], b[4];
};

template <typename T>
static void multiply(float (&sum)[4], const unsigned (&left)[4], unsigned low, unsigned high) {
  Fragments<T> mine;
  unsigned right[2] = {low, high};
  memcpy(mine.a, left, sizeof(mine.a));
  memcpy(mine.b, right, sizeof(mine.b));
  const Fragments<T> *lanes = host::exchange(mine);
  for (int i = 0; i < 4; i++) {
    unsigned lane = host::current % 32;
    // groupID and threadID_in_group give the row and the column of c[i].
    int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      // A group has a row of a and a column of b; each of its threads has pairs of adjacent k.
      int of_a = k % 2 + (row < 8 ? 0 : 2) + (k < 8 ? 0 : 4), of_b = k % 2 + (k < 8 ? 0 : 2);
      sum[i] += float(lanes[row % 8 * 4 + k % 8 / 2].a[of_a]) * float(lanes[column * 4 + k % 8 / 2].b[of_b]);
    }
  }
  host::wait(host::AT_WARP);
}

template <bool TRANSPOSED>
static void matrices(unsigned (&to)[4], const void *row) {
  const void *const *rows = host::exchange(row);
  unsigned lane = host::current % 32;
  for (int matrix = 0; matrix < 4; matrix++) {
    uint16_t both[2];
    for (unsigned i = 0; i < 2; i++) {
      unsigned at = lane / 4, across = lane % 4 * 2 + i;
      if (TRANSPOSED) at = across, across = lane / 4;
      if (uintptr_t(rows[matrix * 8 + at]) % 16) abort();
      both[i] = static_cast<const uint16_t *>(rows[matrix * 8 + at])[across];
    }
    memcpy(&to[matrix], both, sizeof(both));
  }
  host::wait(host::AT_WARP);
}

static float power_of_two(float x) { return exp2f(x); }

static float reciprocal(float x) { return 1.0f / x; }

// Every second block copies at once, so that what other threads still read is overwritten. The others copy only in
// await_pieces, so that a read without waiting gets stale memory.
static void copy_piece(void *to, const void *from) {
  if (uintptr_t(to) % 16 || uintptr_t(from) % 16) abort();
  if ((blockIdx.x + blockIdx.y) % 2)
    memcpy(to, from, 16);
  else
    host::copies[host::current].push_back({to, from});
}

static void await_pieces() {
  for (auto [to, from] : host::copies[host::current]) memcpy(to, from, 16);
  host::copies[host::current].clear();
}
