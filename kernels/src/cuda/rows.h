// Operations on rows: each block computes a row of the result, or some columns of it.

#pragma once
#include "elements.h"

// Activations, with the numbers that number_of in mod.rs returns.
enum { NONE, GELU, GELU_TANH, RELU, SILU, TANH, SIGMOID, QUICK_GELU, RELU6, HARD_SIGMOID, HARD_SWISH };

// x between 0 and 6. NaN stays.
__device__ float to_six(float x) { return x < 0.0f ? 0.0f : x > 6.0f ? 6.0f : x; }

// 1 / (1 + e^-x) by two approximate instructions; within 1e-6.
__device__ float sigmoid(float x) { return reciprocal(1.0f + power_of_two(-1.44269504f * x)); }

// x Φ(x). The exact error function takes a third of the time of a feed-forward's up projection, so 16-bit results are
// computed as max(x, 0) - |x| Φ(-|x|), with Φ by Abramowitz and Stegun's formula 7.1.26 (within 1e-7). NaN and infinity
// do not become finite.
template <typename T>
__device__ float gelu(float x) {
  if constexpr (sizeof(T) == sizeof(float)) return 0.5f * x * (1.0f + erff(x * 0.707106781f));
  float magnitude = fabsf(x);
  float t = reciprocal(1.0f + 0.231641901f * magnitude);
  float tail = t * (0.127414796f + t * (-0.142248368f + t * (0.710706871f + t * (-0.726576014f + t * 0.530702715f))));
  return fmaxf(x, 0.0f) - magnitude * tail * power_of_two(-0.721347520f * x * x);
}

// GELU approximated with tanh: x (1 + tanh z) / 2 = x sigmoid(2 z).
template <typename T>
__device__ float gelu_tanh(float x) {
  float z = 0.797884561f * (x + 0.044715f * x * x * x);
  if constexpr (sizeof(T) == sizeof(float)) return 0.5f * x * (1.0f + tanhf(z));
  return x * sigmoid(2.0f * z);
}

template <typename T>
__device__ float silu(float x) {
  if constexpr (sizeof(T) == sizeof(float)) return x / (1.0f + expf(-x));
  return x * sigmoid(x);
}

// Applies the activation to every element of a piece of a row of T.
template <typename T, int N>
__device__ void activate(float (&x)[N], int activation) {
  switch (activation) {
    case GELU:
      for (int j = 0; j < N; j++) x[j] = gelu<T>(x[j]);
      break;
    case GELU_TANH:
      for (int j = 0; j < N; j++) x[j] = gelu_tanh<T>(x[j]);
      break;
    case RELU:
      for (int j = 0; j < N; j++) x[j] = x[j] < 0.0f ? 0.0f : x[j];
      break;
    case SILU:
      for (int j = 0; j < N; j++) x[j] = silu<T>(x[j]);
      break;
    case TANH:
      for (int j = 0; j < N; j++) x[j] = tanhf(x[j]);
      break;
    case SIGMOID:
      for (int j = 0; j < N; j++) x[j] = 1.0f / (1.0f + expf(-x[j]));
      break;
    case QUICK_GELU:
      for (int j = 0; j < N; j++) x[j] = x[j] / (1.0f + expf(-1.702f * x[j]));
      break;
    case RELU6:
      for (int j = 0; j < N; j++) x[j] = to_six(x[j]);
      break;
    case HARD_SIGMOID:
      for (int j = 0; j < N; j++) x[j] = to_six(x[j] + 3.0f) / 6.0f;
      break;
    case HARD_SWISH:
      for (int j = 0; j < N; j++) x[j] *= to_six(x[j] + 3.0f) / 6.0f;
      break;
  }
}

// The sum of x over a block of whole warps, returned in every thread.
__device__ float block_sum(float x) {
  __shared__ float warps[32];
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  // Every thread must have read the previous sum before `warps` is overwritten.
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / 32; warp++) sum += warps[warp];
  return sum;
}

// Normalises a row to mean 0 and variance 1, then scales and shifts it. Each thread has a piece of the row; threads
// past its end have zeros.
template <int N, typename T>
__device__ void normalise(T *out, float (&row)[N], const T *weight, const T *bias, float eps, int width) {
  int i = threadIdx.x * N;
  bool works = i < width;
  float sum = 0.0f;
  for (int j = 0; j < N; j++) sum += row[j];
  float mean = block_sum(sum) / width;
  float squares = 0.0f;
  for (int j = 0; j < N; j++) squares += works ? (row[j] - mean) * (row[j] - mean) : 0.0f;
  float scale = 1.0f / sqrtf(block_sum(squares) / width + eps);
  if (!works) return;
  float weights[N], shifts[N];
  load(weights, weight + i);
  load(shifts, bias + i);
  for (int j = 0; j < N; j++) row[j] = (row[j] - mean) * scale * weights[j] + shifts[j];
  store(out + i, row);
}

// One block per token, one thread per piece: the sum of rows of the tables, that of the word times `scale`, normalised if
// there is a weight. The position and type tables may be null, and so may `types`.
template <int N, typename T>
__device__ void embed(T *out, const unsigned *ids, const unsigned *positions, const unsigned *types, const T *word,
                      const T *position, const T *type, const T *weight, const T *bias, float scale, float eps,
                      int width) {
  size_t token = blockIdx.x;
  int i = threadIdx.x * N;
  float row[N] = {};
  if (i < width) {
    load(row, word + size_t(ids[token]) * width + i);
    for (int j = 0; j < N; j++) row[j] *= scale;
    if (position) add(row, position + size_t(positions[token]) * width + i);
    if (type) add(row, type + size_t(types ? types[token] : 0) * width + i);
    if (!weight) store(out + token * width + i, row);
  }
  if (weight) normalise(out + token * width, row, weight, bias, eps, width);
}

// One block per token, one thread per piece: x + added + residual, normalised if there is a weight. `added` and
// `residual` may be null.
template <int N, typename T>
__device__ void add_norm(T *out, const T *x, const T *added, const T *residual, const T *weight, const T *bias,
                         float eps, int width) {
  size_t start = size_t(blockIdx.x) * width;
  int i = threadIdx.x * N;
  float row[N] = {};
  if (i < width) {
    load(row, x + start + i);
    if (added) add(row, added + i);
    if (residual) add(row, residual + start + i);
    if (!weight) store(out + start + i, row);
  }
  if (weight) normalise(out + start, row, weight, bias, eps, width);
}

// One block per token, one thread per piece: RMSNorm (arXiv:1910.07467) of x + added, with the residual added before it,
// or after it if `after`. `added` and `residual` may be null.
template <int N, typename T>
__device__ void rms_norm(T *out, const T *x, const T *added, const T *residual, const float *weight, float eps,
                         int after, int width) {
  size_t start = size_t(blockIdx.x) * width;
  int i = threadIdx.x * N;
  bool works = i < width;
  float row[N] = {};
  if (works) {
    load(row, x + start + i);
    if (added) add(row, added + i);
    if (residual && !after) add(row, residual + start + i);
  }
  float squares = 0.0f;
  for (int j = 0; j < N; j++) squares += row[j] * row[j];
  float scale = 1.0f / sqrtf(block_sum(squares) / width + eps);
  if (!works) return;
  float weights[N];
  load_floats(weights, weight + i);
  for (int j = 0; j < N; j++) row[j] *= scale * weights[j];
  if (residual && after) add(row, residual + start + i);
  store(out + start + i, row);
}

// One block per token: x + added, activated. `added` may be null.
template <int N, typename T>
__device__ void add_activate(T *out, const T *x, const T *added, int activation, int width) {
  size_t start = size_t(blockIdx.x) * width;
  for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
    float row[N];
    load(row, x + start + i);
    if (added) add(row, added + i);
    activate<T>(row, activation);
    store(out + start + i, row);
  }
}

// One block per token. Of x + added, which is twice as wide, half `gate` (0 or 1) is activated and multiplied with the
// other. `added` may be null.
template <int N, typename T>
__device__ void gated(T *out, const T *x, const T *added, int activation, int gate, int width) {
  size_t start = size_t(blockIdx.x) * 2 * width;
  for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
    int a = gate * width + i, b = (1 - gate) * width + i;
    float row[N], second[N];
    load(row, x + start + a);
    load(second, x + start + b);
    if (added) add(row, added + a), add(second, added + b);
    activate<T>(row, activation);
    for (int j = 0; j < N; j++) row[j] *= second[j];
    store(out + size_t(blockIdx.x) * width + i, row);
  }
}

// The larger of two numbers; NaN if one of them is.
__device__ float larger(float x, float y) { return y > x || y != y ? y : x; }

// One block per sequence, whose tokens are starts[i] to starts[i + 1]: their mean (pooling 0), the first (1), the last (2),
// the maximum of each element (3), the sum over the square root of their number (4), or the mean weighted by position (5).
// The first skipped[i] tokens are left out, unless `skipped` is null. If that is all of them, the first and the last are
// as without it, and the others are 0.
template <int N, typename T>
__device__ void pool(T *out, const T *x, const unsigned *starts, const unsigned *skipped, int pooling, int width) {
  size_t begin = starts[blockIdx.x], end = starts[blockIdx.x + 1];
  size_t first = begin + (skipped ? skipped[blockIdx.x] : 0);
  bool none = first >= end;
  float skip = float(first - begin), length = float(end - begin);
  for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
    float row[N];
    load(row, x + (pooling == 2 ? end - 1 : none ? begin : first) * width + i);
    if (pooling == 0 || pooling == 4) {
      // Unrolled, so that several loads are in flight.
#pragma unroll 8
      for (size_t token = first + 1; token < end; token++) add(row, x + token * width + i);
      float divisor = pooling == 0 ? length - skip : sqrtf(length - skip);
      for (int j = 0; j < N; j++) row[j] = none ? 0.0f : row[j] / divisor;
    } else if (pooling == 3) {
      for (size_t token = first + 1; token < end; token++) {
        float other[N];
        load(other, x + token * width + i);
        for (int j = 0; j < N; j++) row[j] = larger(row[j], other[j]);
      }
      for (int j = 0; j < N; j++) row[j] = none ? 0.0f : row[j];
    } else if (pooling == 5) {
      for (int j = 0; j < N; j++) row[j] *= skip + 1.0f;
      for (size_t token = first + 1; token < end; token++) {
        float other[N], weight = float(token - begin + 1);
        load(other, x + token * width + i);
        for (int j = 0; j < N; j++) row[j] += weight * other[j];
      }
      float weights = (length * (length + 1.0f) - skip * (skip + 1.0f)) / 2.0f;
      for (int j = 0; j < N; j++) row[j] = none ? 0.0f : row[j] / weights;
    }
    store(out + size_t(blockIdx.x) * width + i, row);
  }
}

// Reduces the logits of the tokens `first` to `first + count` of the token axis to a row per sequence, from sequence
// `place` on: blockIdx.y is the sequence, and each thread has a piece of the columns. `kind` 0: the largest logit of each
// column, or 0; 1: the sum of log(1 + x) of those above 0; 2: of log(1 + log(1 + x)). If a sequence began before `first`,
// what the row has counts too.
template <int N, typename T>
__device__ void reduce(float *out, const T *logits, const unsigned *starts, int first, int count, int place, int kind,
                       int width) {
  int sequence = place + blockIdx.y, column = (blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (column >= width) return;
  int begin = starts[sequence], end = min(int(starts[sequence + 1]), first + count);
  float row[N] = {};
  if (begin < first) load_floats(row, out + size_t(sequence) * width + column);
#pragma unroll 4
  for (int token = max(begin, first); token < end; token++) {
    float x[N];
    load(x, logits + size_t(token - first) * width + column);
    for (int j = 0; j < N; j++) {
      if (kind == 0)
        row[j] = larger(row[j], x[j]);
      else if (!(x[j] <= 0.0f))
        row[j] += kind == 1 ? log1pf(x[j]) : log1pf(log1pf(x[j]));
    }
  }
  store_floats(out + size_t(sequence) * width + column, row);
}

// One block per token: adds the bias, which may be null, to the first `heads` heads of a row, which has `stride` elements,
// and rotates them by their position, in place.
template <typename T>
__device__ void rotate(T *rows, const T *bias, const unsigned *positions, const T *cosines, const T *sines, int heads,
                       int stride, int width) {
  int half = width / 2;
  T *token = rows + size_t(blockIdx.x) * stride;
  size_t at = size_t(positions[blockIdx.x]) * half;
  for (int i = threadIdx.x; i < heads * half; i += blockDim.x) {
    int first = i / half * width + i % half, second = first + half;
    float c = float(cosines[at + i % half]), s = float(sines[at + i % half]);
    float x = float(token[first]), y = float(token[second]);
    if (bias) x += float(bias[first]), y += float(bias[second]);
    token[first] = T(x * c - y * s);
    token[second] = T(y * c + x * s);
  }
}

// One block of whole warps per token, one warp per head: like `rotate`, with RMSNorm of each head before it. The first
// `queries` heads have the weight of queries, the others that of keys. Without rotation, the tables are null. `width` is
// at most 256.
template <typename T>
__device__ void norm_heads(T *rows, const T *bias, const float *of_queries, const float *of_keys,
                           const unsigned *positions, const T *cosines, const T *sines, int queries, int heads,
                           int stride, float eps, int width) {
  constexpr int MOST = 4;
  int half = width / 2, lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < heads; head += blockDim.x / 32) {
    T *token = rows + size_t(blockIdx.x) * stride + head * width;
    const float *weight = head < queries ? of_queries : of_keys;
    // A lane has the elements that are rotated together.
    float x[MOST], y[MOST], squares = 0.0f;
    for (int k = 0; k < MOST; k++) {
      int i = k * 32 + lane;
      x[k] = y[k] = 0.0f;
      if (i >= half) continue;
      x[k] = float(token[i]), y[k] = float(token[i + half]);
      if (bias) x[k] += float(bias[head * width + i]), y[k] += float(bias[head * width + i + half]);
      squares += x[k] * x[k] + y[k] * y[k];
    }
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
    float scale = 1.0f / sqrtf(squares / width + eps);
    for (int k = 0; k < MOST; k++) {
      int i = k * 32 + lane;
      if (i >= half) continue;
      float a = x[k] * scale * weight[i], b = y[k] * scale * weight[i + half], c = 1.0f, s = 0.0f;
      if (cosines) {
        size_t at = size_t(positions[blockIdx.x]) * half + i;
        c = float(cosines[at]), s = float(sines[at]);
      }
      token[i] = T(a * c - b * s);
      token[i + half] = T(b * c + a * s);
    }
  }
}
