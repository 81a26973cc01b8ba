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

// Elements that a thread reads and writes at a time: 16 bytes, or one element if rows are not a multiple of that.
template <typename T>
constexpr int PIECE = 16 / sizeof(T);

// The type of one memory access of BYTES bytes.
template <int BYTES>
struct Access;
template <>
struct Access<2> {
  typedef unsigned short Type;
};
template <>
struct Access<4> {
  typedef unsigned Type;
};
template <>
struct Access<16> {
  typedef uint4 Type;
};

template <int N, typename T>
__device__ void load(float (&to)[N], const T *from) {
  auto access = *reinterpret_cast<const typename Access<N * sizeof(T)>::Type *>(from);
  T numbers[N];
  memcpy(numbers, &access, sizeof(numbers));
  for (int j = 0; j < N; j++) to[j] = float(numbers[j]);
}

// Like load, but adds to `to`.
template <int N, typename T>
__device__ void add(float (&to)[N], const T *from) {
  float numbers[N];
  load(numbers, from);
  for (int j = 0; j < N; j++) to[j] += numbers[j];
}

template <int N, typename T>
__device__ void store(T *to, const float (&from)[N]) {
  T numbers[N];
  for (int j = 0; j < N; j++) numbers[j] = T(from[j]);
  typename Access<N * sizeof(T)>::Type access;
  memcpy(&access, numbers, sizeof(numbers));
  *reinterpret_cast<decltype(access) *>(to) = access;
}

// Activations, with the numbers that number_of in mod.rs returns.
enum { NONE, GELU, GELU_TANH, RELU, SILU, TANH, SIGMOID };

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

// One block per token, one thread per piece: the sum of rows of the tables, normalised. The position and type tables
// may be null, and so may `types`.
template <int N, typename T>
__device__ void embed(T *out, const unsigned *ids, const unsigned *positions, const unsigned *types, const T *word,
                      const T *position, const T *type, const T *weight, const T *bias, float eps, int width) {
  size_t token = blockIdx.x;
  int i = threadIdx.x * N;
  float row[N] = {};
  if (i < width) {
    load(row, word + size_t(ids[token]) * width + i);
    if (position) add(row, position + size_t(positions[token]) * width + i);
    if (type) add(row, type + size_t(types ? types[token] : 0) * width + i);
  }
  normalise(out + token * width, row, weight, bias, eps, width);
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

// One block per sequence, whose tokens are starts[i] to starts[i + 1]: their mean (pooling 0), the first (1), the last (2),
// the maximum of each element (3), the sum over the square root of their number (4), or the mean weighted by position (5).
template <int N, typename T>
__device__ void pool(T *out, const T *x, const unsigned *starts, int pooling, int width) {
  size_t first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
  for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
    float row[N];
    load(row, x + (pooling == 2 ? end - 1 : first) * width + i);
    if (pooling == 0 || pooling == 4) {
      // Unrolled, so that several loads are in flight.
#pragma unroll 8
      for (size_t token = first + 1; token < end; token++) add(row, x + token * width + i);
      float divisor = pooling == 0 ? float(end - first) : sqrtf(float(end - first));
      for (int j = 0; j < N; j++) row[j] /= divisor;
    } else if (pooling == 3 || pooling == 5) {
      for (size_t token = first + 1; token < end; token++) {
        float other[N], weight = float(token - first + 1);
        load(other, x + token * width + i);
        for (int j = 0; j < N; j++) {
          if (pooling == 5)
            row[j] += weight * other[j];
          else if (other[j] > row[j] || other[j] != other[j])
            row[j] = other[j];
        }
      }
      float length = float(end - first);
      if (pooling == 5)
        for (int j = 0; j < N; j++) row[j] /= length * (length + 1.0f) / 2.0f;
    }
    store(out + size_t(blockIdx.x) * width + i, row);
  }
}

// One block per token: adds the bias, which may be null, to the queries and keys of [tokens, 3 × heads × width] and
// rotates them by their position, in place.
template <typename T>
__device__ void rotate(T *qkv, const T *bias, const unsigned *positions, const T *cosines, const T *sines, int heads,
                       int width) {
  int half = width / 2;
  T *token = qkv + size_t(blockIdx.x) * 3 * heads * width;
  size_t at = size_t(positions[blockIdx.x]) * half;
  // Keys follow the queries in memory, so that one loop covers both.
  for (int i = threadIdx.x; i < 2 * heads * half; i += blockDim.x) {
    int first = i / half * width + i % half, second = first + half;
    float c = float(cosines[at + i % half]), s = float(sines[at + i % half]);
    float x = float(token[first]), y = float(token[second]);
    if (bias) x += float(bias[first]), y += float(bias[second]);
    token[first] = T(x * c - y * s);
    token[second] = T(y * c + x * s);
  }
}

// Attention (arXiv:1706.03762) with an online softmax (arXiv:1805.02867). A query attends to keys at most `before`
// tokens before and `after` tokens after itself. A block computes one head of one sequence for a fixed number of
// queries; each sequence has `most` blocks, as many as the longest needs. Sequences are sorted by length, and the
// longest start first, so that the last blocks to finish are short. Biases of queries and values may be null. A bias of
// keys changes nothing: it adds the same to all scores of a query. `distances`, `[heads, 2 * span - 1]`, may be null: a
// bias of scores by the distance between query and key.

// The sequence that this block computes.
__device__ unsigned sequence_of_block(int most) { return gridDim.x / most - 1 - blockIdx.x / most; }

// One thread per query; keys and values are read 32 at a time.
template <int WIDTH, typename T>
__device__ void attend_by_threads(T *out, const T *qkv, const T *query_bias, const T *value_bias,
                                  const unsigned *starts, const float *distances, int most, int heads, int before,
                                  int after, int span) {
  constexpr int TILE = 32;
  __shared__ float keys[TILE][WIDTH], values[TILE][WIDTH];
  unsigned place = sequence_of_block(most);
  int begin = starts[place], length = starts[place + 1] - begin;
  int queries = blockDim.x, first = blockIdx.x % most * queries;
  // All threads of the block return, or none.
  if (first >= length) return;
  int hidden = heads * WIDTH, head = blockIdx.y * WIDTH;
  int query = first + threadIdx.x;
  bool works = query < length;
  float q[WIDTH], sum[WIDTH];
  float greatest = -INFINITY, total = 0.0f;
  for (int i = 0; i < WIDTH; i++) {
    q[i] = works ? float(qkv[size_t(begin + query) * 3 * hidden + head + i]) : 0.0f;
    if (query_bias) q[i] += float(query_bias[head + i]);
    q[i] /= sqrtf(float(WIDTH));
    sum[i] = 0.0f;
  }
  // The keys that any of these queries attends to.
  int from = max(first - before, 0), to = min(first + queries + after, length);
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
      if (tile + key + before < query || tile + key > query + after) continue;
      // Four partial sums: with one, each addition would wait for the previous.
      float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int i = 0; i < WIDTH; i++) part[i % 4] += q[i] * keys[key][i];
      float score = (part[0] + part[1]) + (part[2] + part[3]);
      if (distances) score += distances[blockIdx.y * (2 * span - 1) + query - (tile + key) + span - 1];
      float above = fmaxf(greatest, score);
      float old = expf(greatest - above), now = expf(score - above);
      total = total * old + now;
      for (int i = 0; i < WIDTH; i++) sum[i] = sum[i] * old + now * values[key][i];
      greatest = above;
    }
  }
  if (!works) return;
  for (int i = 0; i < WIDTH; i++) {
    float bias = value_bias ? float(value_bias[head + i]) : 0.0f;
    out[size_t(begin + query) * hidden + head + i] = T(sum[i] / total + bias);
  }
}

// One warp per 16 queries, with tensor cores (arXiv:2307.08691): scores and accumulators stay in registers. Keys and
// values are read TILE at a time into shared memory, the next tile while the current one is processed.
template <int WIDTH, int TILE, typename T>
__device__ void attend_by_warps(T *out, const T *qkv, const T *query_bias, const T *value_bias, const unsigned *starts,
                                const float *distances, int most, int heads, int before, int after, int span) {
  constexpr int PIECES = WIDTH / PIECE<T>;
  // Rows are padded by 16 bytes, so that the same piece of eight rows lies in different banks of shared memory.
  constexpr int STRIDE = WIDTH + PIECE<T>;
  __shared__ __align__(16) T keys[2][TILE][STRIDE], values[2][TILE][STRIDE];
  unsigned place = sequence_of_block(most);
  int begin = starts[place], length = starts[place + 1] - begin;
  int queries = blockDim.x / 2, first = blockIdx.x % most * queries;
  if (first >= length) return;
  int hidden = heads * WIDTH, head = blockIdx.y * WIDTH, stride = 3 * hidden;
  const T *sequence = qkv + size_t(begin) * stride + head;
  int lane = threadIdx.x % 32;
  int from = max(first - before, 0), to = min(first + queries + after, length);
  // Rows past the last repeat the last: the memory behind it belongs to another sequence and may be NaN.
  auto fetch = [&](int tile, int stage) {
    int key = threadIdx.x / PIECES, piece = threadIdx.x % PIECES * PIECE<T>, step = blockDim.x / PIECES;
    const T *source = sequence + (tile + key) * stride + piece, *last = sequence + (to - 1) * stride + piece;
    for (; key < TILE; key += step, source += step * stride) {
      const T *row = source < last ? source : last;
      copy_piece(&keys[stage][key][piece], row + hidden);
      copy_piece(&values[stage][key][piece], row + 2 * hidden);
    }
  };
  fetch(from, 0);
  // `own` is the warp's first query. A lane's fragment has two columns of two rows; rows past the end repeat the last.
  int own = first + int(threadIdx.x) / 32 * 16, row = own + lane / 4, column = lane % 4 * 2;
  bool works = own < length;
  unsigned q[WIDTH / 16][4];
  for (int half = 0; half < 2; half++) {
    const T *query = sequence + min(row + half * 8, length - 1) * stride + column;
    for (int k = 0; k < WIDTH / 8; k++) {
      float x[2];
      load(x, query + k * 8);
      if (query_bias) add(x, query_bias + head + column + k * 8);
      q[k / 2][k % 2 * 2 + half] = pair<T>(x[0], x[1]);
    }
  }
  float sum[WIDTH / 8][4] = {};
  float greatest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  // Includes log2(e), so that weights are powers of two.
  float scale = 1.44269504f / sqrtf(float(WIDTH));
  for (int tile = from, stage = 0; tile < to; tile += TILE, stage ^= 1) {
    await_pieces();
    // Every thread's pieces have arrived, and no thread reads the other stage any more.
    __syncthreads();
    if (tile + TILE < to) fetch(tile + TILE, stage ^ 1);
    // All threads of the warp continue, or none.
    if (!works) continue;
    float score[TILE / 8][4] = {};
    for (int n = 0; n < TILE / 8; n++)
      for (int k = 0; k < WIDTH / 16; k += 2) {
        unsigned key[4];
        matrices<false>(key, &keys[stage][n * 8 + lane % 8][k * 16 + lane / 8 * 8]);
        multiply<T>(score[n], q[k], key[0], key[1]);
        multiply<T>(score[n], q[k + 1], key[2], key[3]);
      }
    // Scores are scaled below, the bias is not.
    if (distances)
      for (int n = 0; n < TILE / 8; n++)
        for (int i = 0; i < 4; i++) {
          int key = tile + n * 8 + column + i % 2, query = row + i / 2 * 8;
          if (key < to && query < length)
            score[n][i] += distances[blockIdx.y * (2 * span - 1) + query - key + span - 1] * sqrtf(float(WIDTH));
        }
    // Masks scores, unless every query of the warp attends to every key of the tile.
    if (tile + TILE > to || tile + TILE - 1 - own > after || own + 15 - tile > before)
      for (int n = 0; n < TILE / 8; n++)
        for (int i = 0; i < 4; i++) {
          int key = tile + n * 8 + column + i % 2, query = row + i / 2 * 8;
          if (key >= to || key + before < query || key > query + after) score[n][i] = -INFINITY;
        }
    for (int half = 0; half < 2; half++) {
      float above = greatest[half];
      for (int n = 0; n < TILE / 8; n++) above = fmaxf(above, fmaxf(score[n][half * 2], score[n][half * 2 + 1]));
      // A row is spread over four lanes.
      above = fmaxf(above, __shfl_xor_sync(0xffffffffu, above, 1));
      above = fmaxf(above, __shfl_xor_sync(0xffffffffu, above, 2));
      // If all keys so far are masked, the maximum is -inf and must not be subtracted.
      float base = above == -INFINITY ? 0.0f : above * scale;
      float old = power_of_two(greatest[half] * scale - base);
      greatest[half] = above;
      total[half] *= old;
      for (int n = 0; n < WIDTH / 8; n++)
        for (int i = 0; i < 2; i++) sum[n][half * 2 + i] *= old;
      for (int n = 0; n < TILE / 8; n++)
        for (int i = 0; i < 2; i++) {
          float &x = score[n][half * 2 + i];
          x = power_of_two(x * scale - base);
          total[half] += x;
        }
    }
    // A lane's fragments of two tiles of scores are laid out as its fragment of a left matrix.
    for (int k = 0; k < TILE / 16; k++) {
      float *left = score[2 * k], *right = score[2 * k + 1];
      unsigned weights[4] = {pair<T>(left[0], left[1]), pair<T>(left[2], left[3]), pair<T>(right[0], right[1]),
                             pair<T>(right[2], right[3])};
      for (int n = 0; n < WIDTH / 16; n++) {
        unsigned value[4];
        matrices<true>(value, &values[stage][k * 16 + lane % 16][n * 16 + lane / 16 * 8]);
        multiply<T>(sum[2 * n], weights, value[0], value[1]);
        multiply<T>(sum[2 * n + 1], weights, value[2], value[3]);
      }
    }
  }
  if (!works) return;
  for (int half = 0; half < 2; half++) {
    float all = total[half];
    all += __shfl_xor_sync(0xffffffffu, all, 1);
    all += __shfl_xor_sync(0xffffffffu, all, 2);
    int query = row + half * 8;
    if (query >= length) continue;
    float factor = 1.0f / all;
    T *to_row = out + size_t(begin + query) * hidden + head + column;
    for (int n = 0; n < WIDTH / 8; n++) {
      float x[2] = {sum[n][half * 2] * factor, sum[n][half * 2 + 1] * factor};
      if (value_bias) add(x, value_bias + head + column + n * 8);
      store(to_row + n * 8, x);
    }
  }
}

template <int WIDTH, int TILE, typename T>
__device__ void attend(T *out, const T *qkv, const T *query_bias, const T *value_bias, const unsigned *starts,
                       const float *distances, int most, int heads, int before, int after, int span) {
  if constexpr (TENSOR_CORES<T>)
    attend_by_warps<WIDTH, TILE>(out, qkv, query_bias, value_bias, starts, distances, most, heads, before, after,
                                 span);
  else
    attend_by_threads<WIDTH>(out, qkv, query_bias, value_bias, starts, distances, most, heads, before, after, span);
}

// Runs an operation on rows, in pieces of 16 bytes if rows are a multiple of that.
#define BY_ROW(T, OPERATION, ...)                  \
  if (width % PIECE<T> == 0)                       \
    OPERATION<PIECE<T>>(__VA_ARGS__, width);       \
  else                                             \
    OPERATION<1>(__VA_ARGS__, width)

// Maximum threads of an attention block, for sequences of any length and for short ones.
constexpr int ATTENTION_THREADS = 128, SHORT_ATTENTION_THREADS = 64;

// Defines the kernel NAME for blocks of at most THREADS threads, of which BLOCKS must fit on a multiprocessor.
#define ATTEND(T, NAME, WIDTH, TILE, THREADS, BLOCKS)                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, TENSOR_CORES<T> ? BLOCKS : 1)                                \
      NAME(T *out, const T *qkv, const T *query_bias, const T *value_bias, const unsigned *starts,                   \
           const float *distances, int most, int heads, int before, int after, int span) {                           \
    attend<WIDTH, TILE>(out, qkv, query_bias, value_bias, starts, distances, most, heads, before, after, span);      \
  }

#define EACH(T, NAME)                                                                                                \
  extern "C" __global__ void embed_##NAME(T *out, const unsigned *ids, const unsigned *positions,                    \
                                          const unsigned *types, const T *word, const T *position, const T *type,    \
                                          const T *weight, const T *bias, float eps, int width) {                    \
    BY_ROW(T, embed, out, ids, positions, types, word, position, type, weight, bias, eps);                           \
  }                                                                                                                  \
  extern "C" __global__ void add_norm_##NAME(T *out, const T *x, const T *added, const T *residual, const T *weight, \
                                             const T *bias, float eps, int width) {                                  \
    BY_ROW(T, add_norm, out, x, added, residual, weight, bias, eps);                                                 \
  }                                                                                                                  \
  extern "C" __global__ void add_activate_##NAME(T *out, const T *x, const T *added, int activation, int width) {    \
    BY_ROW(T, add_activate, out, x, added, activation);                                                              \
  }                                                                                                                  \
  extern "C" __global__ void gated_##NAME(T *out, const T *x, const T *added, int activation, int gate, int width) { \
    BY_ROW(T, gated, out, x, added, activation, gate);                                                               \
  }                                                                                                                  \
  extern "C" __global__ void pool_##NAME(T *out, const T *x, const unsigned *starts, int pooling, int width) {       \
    BY_ROW(T, pool, out, x, starts, pooling);                                                                        \
  }                                                                                                                  \
  extern "C" __global__ void rotate_##NAME(T *qkv, const T *bias, const unsigned *positions, const T *cosines,       \
                                           const T *sines, int heads, int width) {                                   \
    rotate(qkv, bias, positions, cosines, sines, heads, width);                                                      \
  }                                                                                                                  \
  ATTEND(T, attend_32_##NAME, 32, 64, ATTENTION_THREADS, 4)                                                          \
  ATTEND(T, attend_64_##NAME, 64, 64, ATTENTION_THREADS, 4)                                                          \
  ATTEND(T, attend_short_32_##NAME, 32, 32, SHORT_ATTENTION_THREADS, 14)                                             \
  ATTEND(T, attend_short_64_##NAME, 64, 32, SHORT_ATTENTION_THREADS, 10)                                             

EACH(float, f32)
#ifdef __CUDACC__
EACH(__half, f16)
#endif
EACH(__nv_bfloat16, bf16)
