// The encoder's fused operations on a GPU, one kernel each, for f32, f16 and bf16: numbers are read and
// written as they stand, everything between is f32. A row is summed in the same order whatever stands
// around it.
//
// build.rs compiles this to PTX. Without a GPU, host.h runs the same source on a CPU, a thread after the
// other up to each barrier (host.rs has the tests).

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// As many numbers as the launch says.
#define SHARED_ROW(name) extern __shared__ float name[]
#else
#include "host.h"
#endif

// As kandle's Activation.
enum { NONE, GELU, GELU_TANH, RELU, SILU, TANH };

__device__ float activate(float x, int activation) {
  switch (activation) {
    case GELU: return 0.5f * x * (1.0f + erff(x * 0.707106781f));
    case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.797884561f * (x + 0.044715f * x * x * x)));
    case RELU: return fmaxf(x, 0.0f);
    case SILU: return x / (1.0f + expf(-x));
    case TANH: return tanhf(x);
    default: return x;
  }
}

// The sum over a block of whole warps, in every thread.
__device__ float block_sum(float x) {
  __shared__ float warps[32];
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  // An earlier sum has been read by all.
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / 32; warp++) sum += warps[warp];
  return sum;
}

// A row, of which each thread holds the numbers that it wrote, to mean 0 and variance 1, then scaled and
// shifted.
template <typename T>
__device__ void normalise(T *out, const float *row, const T *weight, const T *bias, float eps, int width) {
  float sum = 0.0f;
  for (int i = threadIdx.x; i < width; i += blockDim.x) sum += row[i];
  float mean = block_sum(sum) / width;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < width; i += blockDim.x) squares += (row[i] - mean) * (row[i] - mean);
  float scale = 1.0f / sqrtf(block_sum(squares) / width + eps);
  for (int i = threadIdx.x; i < width; i += blockDim.x)
    out[i] = T((row[i] - mean) * scale * float(weight[i]) + float(bias[i]));
}

// A block a token: rows of tables, added up and normalised. Tables may be absent (null), and types.
template <typename T>
__device__ void embed(T *out, const unsigned *ids, const unsigned *positions, const unsigned *types, const T *word,
                      const T *position, const T *type, const T *weight, const T *bias, float eps, int width) {
  SHARED_ROW(row);
  size_t token = blockIdx.x;
  const T *of_word = word + size_t(ids[token]) * width;
  const T *of_position = position ? position + size_t(positions[token]) * width : nullptr;
  const T *of_type = type ? type + size_t(types ? types[token] : 0) * width : nullptr;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    float x = float(of_word[i]);
    if (of_position) x += float(of_position[i]);
    if (of_type) x += float(of_type[i]);
    row[i] = x;
  }
  normalise(out + token * width, row, weight, bias, eps, width);
}

// A block a token: x + bias + residual, either absent, normalised where there is a weight.
template <typename T>
__device__ void add_norm(T *out, const T *x, const T *added, const T *residual, const T *weight, const T *bias,
                         float eps, int width) {
  SHARED_ROW(row);
  size_t start = size_t(blockIdx.x) * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    float sum = float(x[start + i]);
    if (added) sum += float(added[i]);
    if (residual) sum += float(residual[start + i]);
    if (weight)
      row[i] = sum;
    else
      out[start + i] = T(sum);
  }
  if (weight) normalise(out + start, row, weight, bias, eps, width);
}

// A block a token: x + bias, activated. The bias may be absent.
template <typename T>
__device__ void add_activate(T *out, const T *x, const T *added, int activation, int width) {
  size_t start = size_t(blockIdx.x) * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    float sum = float(x[start + i]);
    if (added) sum += float(added[i]);
    out[start + i] = T(activate(sum, activation));
  }
}

// A block a token: of x + bias, twice as wide, one half activated (`gate`, 0 or 1) times the other.
template <typename T>
__device__ void gated(T *out, const T *x, const T *added, int activation, int gate, int width) {
  size_t start = size_t(blockIdx.x) * 2 * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    int a = gate * width + i, b = (1 - gate) * width + i;
    float first = float(x[start + a]), second = float(x[start + b]);
    if (added) first += float(added[a]), second += float(added[b]);
    out[size_t(blockIdx.x) * width + i] = T(activate(first, activation) * second);
  }
}

// A block a sequence, which stands at starts[i] to starts[i + 1]: the mean of its tokens (0), the first (1)
// or the last (2).
template <typename T>
__device__ void pool(T *out, const T *x, const unsigned *starts, int pooling, int width) {
  size_t first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    float sum = 0.0f;
    if (pooling == 1) {
      sum = float(x[first * width + i]);
    } else if (pooling == 2) {
      sum = float(x[(end - 1) * width + i]);
    } else {
      for (size_t token = first; token < end; token++) sum += float(x[token * width + i]);
      sum /= float(end - first);
    }
    out[size_t(blockIdx.x) * width + i] = T(sum);
  }
}

// A block a token: queries and keys of [tokens, 3 × heads × width] turned by their position, in place.
template <typename T>
__device__ void rotate(T *qkv, const unsigned *positions, const T *cosines, const T *sines, int heads, int width) {
  int half = width / 2;
  T *token = qkv + size_t(blockIdx.x) * 3 * heads * width;
  size_t at = size_t(positions[blockIdx.x]) * half;
  // Queries and keys stand one behind the other.
  for (int i = threadIdx.x; i < 2 * heads * half; i += blockDim.x) {
    T *first = token + i / half * width + i % half, *second = first + half;
    float c = float(cosines[at + i % half]), s = float(sines[at + i % half]);
    float x = float(*first), y = float(*second);
    *first = T(x * c - y * s);
    *second = T(y * c + x * s);
  }
}

// Attention (arXiv:1706.03762) with a running softmax (arXiv:1805.02867), tokens seeing others at most
// `reach` away: a block has QUERIES queries of one head of one sequence, a thread one of them, and reads keys
// and values TILE at a time. A sequence's queries past its end have no work.
#define QUERIES 64
#define TILE 32
template <typename T, int WIDTH>
__device__ void attend(T *out, const T *qkv, const unsigned *starts, int heads, int reach) {
  __shared__ float keys[TILE][WIDTH], values[TILE][WIDTH];
  int begin = starts[blockIdx.z], length = starts[blockIdx.z + 1] - begin;
  int first = blockIdx.x * QUERIES;
  // The same for all threads of the block.
  if (first >= length) return;
  int hidden = heads * WIDTH, head = blockIdx.y * WIDTH;
  int query = first + threadIdx.x;
  bool works = query < length;
  float q[WIDTH], sum[WIDTH];
  float greatest = -INFINITY, total = 0.0f;
  for (int i = 0; i < WIDTH; i++) {
    q[i] = works ? float(qkv[size_t(begin + query) * 3 * hidden + head + i]) * rsqrtf(float(WIDTH)) : 0.0f;
    sum[i] = 0.0f;
  }
  // The keys that any of these queries sees.
  int from = max(first - reach, 0), to = min(first + QUERIES + reach, length);
  for (int tile = from; tile < to; tile += TILE) {
    int count = min(TILE, to - tile);
    __syncthreads();
    for (int i = threadIdx.x; i < count * WIDTH; i += blockDim.x) {
      size_t row = size_t(begin + tile + i / WIDTH) * 3 * hidden + head + i % WIDTH;
      keys[i / WIDTH][i % WIDTH] = float(qkv[row + hidden]);
      values[i / WIDTH][i % WIDTH] = float(qkv[row + 2 * hidden]);
    }
    __syncthreads();
    if (!works) continue;
    for (int key = 0; key < count; key++) {
      if (abs(tile + key - query) > reach) continue;
      // In four strands: one would wait for itself.
      float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int i = 0; i < WIDTH; i++) part[i % 4] += q[i] * keys[key][i];
      float score = (part[0] + part[1]) + (part[2] + part[3]);
      float above = fmaxf(greatest, score);
      float old = expf(greatest - above), now = expf(score - above);
      total = total * old + now;
      for (int i = 0; i < WIDTH; i++) sum[i] = sum[i] * old + now * values[key][i];
      greatest = above;
    }
  }
  if (!works) return;
  for (int i = 0; i < WIDTH; i++) out[size_t(begin + query) * hidden + head + i] = T(sum[i] / total);
}

#define EACH(T, NAME)                                                                                                \
  extern "C" __global__ void embed_##NAME(T *out, const unsigned *ids, const unsigned *positions,                    \
                                          const unsigned *types, const T *word, const T *position, const T *type,    \
                                          const T *weight, const T *bias, float eps, int width) {                    \
    embed(out, ids, positions, types, word, position, type, weight, bias, eps, width);                               \
  }                                                                                                                  \
  extern "C" __global__ void add_norm_##NAME(T *out, const T *x, const T *added, const T *residual, const T *weight, \
                                             const T *bias, float eps, int width) {                                  \
    add_norm(out, x, added, residual, weight, bias, eps, width);                                                     \
  }                                                                                                                  \
  extern "C" __global__ void add_activate_##NAME(T *out, const T *x, const T *added, int activation, int width) {    \
    add_activate(out, x, added, activation, width);                                                                  \
  }                                                                                                                  \
  extern "C" __global__ void gated_##NAME(T *out, const T *x, const T *added, int activation, int gate, int width) { \
    gated(out, x, added, activation, gate, width);                                                                   \
  }                                                                                                                  \
  extern "C" __global__ void pool_##NAME(T *out, const T *x, const unsigned *starts, int pooling, int width) {       \
    pool(out, x, starts, pooling, width);                                                                            \
  }                                                                                                                  \
  extern "C" __global__ void rotate_##NAME(T *qkv, const unsigned *positions, const T *cosines, const T *sines,      \
                                           int heads, int width) {                                                   \
    rotate(qkv, positions, cosines, sines, heads, width);                                                            \
  }                                                                                                                  \
  extern "C" __global__ void attend_32_##NAME(T *out, const T *qkv, const unsigned *starts, int heads, int reach) {  \
    attend<T, 32>(out, qkv, starts, heads, reach);                                                                   \
  }                                                                                                                  \
  extern "C" __global__ void attend_64_##NAME(T *out, const T *qkv, const unsigned *starts, int heads, int reach) {  \
    attend<T, 64>(out, qkv, starts, heads, reach);                                                                   \
  }

EACH(float, f32)
#ifdef __CUDACC__
EACH(__half, f16)
EACH(__nv_bfloat16, bf16)
#endif
