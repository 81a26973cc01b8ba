// The encoder's fused operations on a GPU, one kernel each, for f32, f16 and bf16: elements are read and written in
// that type, everything in between is f32. A row is summed in the same order whatever the other rows are.
//
// build.rs compiles this to PTX. tests/host.h runs the same source on a CPU, one thread after another up to each
// barrier, for the tests in tests/mod.rs.

#ifdef __CUDACC__
#include "device.h"
#else
#include "tests/host.h"
#endif
#include "attention.h"
#include "disentangled.h"
#include "rows.h"

// Runs an operation on rows, in pieces of 16 bytes if rows are a multiple of that.
#define BY_ROW(T, OPERATION, ...)                  \
  if (width % PIECE<T> == 0)                       \
    OPERATION<PIECE<T>>(__VA_ARGS__, width);       \
  else                                             \
    OPERATION<1>(__VA_ARGS__, width)

// Maximum threads of an attention block, for sequences of any length and for short ones, if tensor cores are used.
constexpr int ATTENTION_THREADS = 128, SHORT_ATTENTION_THREADS = 64;

// Maximum threads of an attention block of any kind.
template <typename T, int WIDTH, int THREADS>
constexpr int MOST_THREADS = TENSOR_CORES<T> ? THREADS : 64 * SHARES<WIDTH>;

// Defines the kernel NAME for blocks of at most THREADS threads, of which BLOCKS must fit on a multiprocessor, if tensor
// cores are used.
#define ATTEND(T, NAME, WIDTH, TILE, THREADS, BLOCKS)                                                                \
  extern "C" __global__ void __launch_bounds__((MOST_THREADS<T, WIDTH, THREADS>), TENSOR_CORES<T> ? BLOCKS : 1)      \
      NAME(T *out, const T *qkv, const T *query_bias, const T *value_bias, const unsigned *starts,                   \
           const float *distances, int most, int heads, int groups, int before, int after, int span, float scale) {  \
    attend<WIDTH, TILE>(out, qkv, query_bias, value_bias, starts, distances, most, heads, groups, before, after,     \
                        span, scale);                                                                                \
  }

#define ATTEND_APART(T, NAME, WIDTH, BLOCKS)                                                                         \
  extern "C" __global__ void __launch_bounds__((MOST_THREADS<T, WIDTH, ATTENTION_THREADS>),                          \
                                               TENSOR_CORES<T> ? BLOCKS : 1)                                         \
      NAME(T *out, const T *qkv, const unsigned *starts, const T *position_keys, const T *position_queries,          \
           const unsigned *rows, int most, int heads, int before, int after, int longest, int span, float scale) {   \
    attend_apart<WIDTH>(out, qkv, starts, position_keys, position_queries, rows, most, heads, before, after,         \
                        longest, span, scale);                                                                       \
  }

#define EACH(T, NAME)                                                                                                \
  extern "C" __global__ void embed_##NAME(T *out, const unsigned *ids, const unsigned *positions,                    \
                                          const unsigned *types, const T *word, const T *position, const T *type,    \
                                          const T *weight, const T *bias, float scale, float eps, int width) {       \
    BY_ROW(T, embed, out, ids, positions, types, word, position, type, weight, bias, scale, eps);                    \
  }                                                                                                                  \
  extern "C" __global__ void add_norm_##NAME(T *out, const T *x, const T *added, const T *residual, const T *weight, \
                                             const T *bias, float eps, int width) {                                  \
    BY_ROW(T, add_norm, out, x, added, residual, weight, bias, eps);                                                 \
  }                                                                                                                  \
  extern "C" __global__ void rms_norm_##NAME(T *out, const T *x, const T *added, const T *residual,                  \
                                             const float *weight, float eps, int after, int width) {                 \
    BY_ROW(T, rms_norm, out, x, added, residual, weight, eps, after);                                                \
  }                                                                                                                  \
  extern "C" __global__ void add_activate_##NAME(T *out, const T *x, const T *added, int activation, int width) {    \
    BY_ROW(T, add_activate, out, x, added, activation);                                                              \
  }                                                                                                                  \
  extern "C" __global__ void gated_##NAME(T *out, const T *x, const T *added, int activation, int gate, int width) { \
    BY_ROW(T, gated, out, x, added, activation, gate);                                                               \
  }                                                                                                                  \
  extern "C" __global__ void pool_##NAME(T *out, const T *x, const unsigned *starts, const unsigned *skipped,        \
                                         int pooling, int width) {                                                   \
    BY_ROW(T, pool, out, x, starts, skipped, pooling);                                                               \
  }                                                                                                                  \
  extern "C" __global__ void reduce_##NAME(float *out, const T *logits, const unsigned *starts, int first,           \
                                           int count, int place, int kind, int width) {                              \
    BY_ROW(T, reduce, out, logits, starts, first, count, place, kind);                                               \
  }                                                                                                                  \
  extern "C" __global__ void rotate_##NAME(T *rows, const T *bias, const unsigned *positions, const T *cosines,      \
                                           const T *sines, int heads, int stride, int width) {                       \
    rotate(rows, bias, positions, cosines, sines, heads, stride, width);                                             \
  }                                                                                                                  \
  extern "C" __global__ void norm_heads_##NAME(T *rows, const T *bias, const float *of_queries,                      \
                                               const float *of_keys, const unsigned *positions, const T *cosines,    \
                                               const T *sines, int queries, int heads, int stride, float eps,        \
                                               int width) {                                                          \
    norm_heads(rows, bias, of_queries, of_keys, positions, cosines, sines, queries, heads, stride, eps, width);      \
  }                                                                                                                  \
  ATTEND(T, attend_32_##NAME, 32, 64, ATTENTION_THREADS, 4)                                                          \
  ATTEND(T, attend_64_##NAME, 64, 64, ATTENTION_THREADS, 4)                                                          \
  ATTEND(T, attend_128_##NAME, 128, 32, ATTENTION_THREADS, 3)                                                        \
  ATTEND(T, attend_256_##NAME, 256, 16, ATTENTION_THREADS, 2)                                                        \
  ATTEND_APART(T, attend_apart_32_##NAME, 32, 4)                                                                     \
  ATTEND_APART(T, attend_apart_64_##NAME, 64, 4)

// For short sequences, on tensor cores.
#define SHORT(T, NAME)                                                                                               \
  ATTEND(T, attend_short_32_##NAME, 32, 32, SHORT_ATTENTION_THREADS, 14)                                             \
  ATTEND(T, attend_short_64_##NAME, 64, 32, SHORT_ATTENTION_THREADS, 10)

EACH(float, f32)
EACH(__nv_bfloat16, bf16)
SHORT(__nv_bfloat16, bf16)
#ifdef __CUDACC__
EACH(__half, f16)
SHORT(__half, f16)
#endif
