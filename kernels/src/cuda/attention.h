// Attention (arXiv:1706.03762) with an online softmax (arXiv:1805.02867). A query attends to keys at most `before`
// tokens before and `after` tokens after itself. Of `heads` heads of queries, as many share a head of keys and values as
// there are for each of `groups`; a row of the input has the heads of queries, then those of keys, then those of values.
// A block computes one head of one sequence for a fixed number of queries; each sequence has `most` blocks, as many as
// the longest needs. Sequences are sorted by length, and the longest start first, so that the last blocks to finish are
// short. Biases of queries and values may be null. A bias of keys changes nothing: it adds the same to all scores of a
// query. `distances`, `[heads, 2 * span - 1]`, may be null: a bias of scores by the distance between query and key.

#pragma once
#include "elements.h"

// The sequence that this block computes.
__device__ unsigned sequence_of_block(int most) { return gridDim.x / most - 1 - blockIdx.x / most; }

// Threads that share a query if no tensor cores are used: a thread has at most 64 elements of a head.
template <int WIDTH>
constexpr int SHARES = WIDTH > 64 ? WIDTH / 64 : 1;

// SHARES threads per query; keys and values are read TILE at a time. Of a head, a thread has every SHARES-th element.
template <int WIDTH, typename T>
__device__ void attend_by_threads(T *out, const T *qkv, const T *query_bias, const T *value_bias,
                                  const unsigned *starts, const float *distances, int most, int heads, int groups,
                                  int before, int after, int span, float scale) {
  constexpr int TILE = WIDTH > 128 ? 16 : 32, SHARE = SHARES<WIDTH>, OWN = WIDTH / SHARE;
  __shared__ float keys[TILE][WIDTH], values[TILE][WIDTH];
  unsigned place = sequence_of_block(most);
  int begin = starts[place], length = starts[place + 1] - begin;
  int queries = blockDim.x / SHARE, first = blockIdx.x % most * queries;
  // All threads of the block return, or none.
  if (first >= length) return;
  int stride = (heads + 2 * groups) * WIDTH, head = blockIdx.y * WIDTH, group = blockIdx.y / (heads / groups) * WIDTH;
  int query = first + threadIdx.x / SHARE, share = threadIdx.x % SHARE;
  bool works = query < length;
  float q[OWN], sum[OWN];
  float greatest = -INFINITY, total = 0.0f;
  for (int i = 0; i < OWN; i++) {
    int at = head + i * SHARE + share;
    q[i] = works ? float(qkv[size_t(begin + query) * stride + at]) : 0.0f;
    if (query_bias) q[i] += float(query_bias[at]);
    q[i] *= scale;
    sum[i] = 0.0f;
  }
  // The keys that any of these queries attends to.
  int from = max(first - before, 0), to = min(first + queries + after, length);
  for (int tile = from; tile < to; tile += TILE) {
    int count = min(TILE, to - tile);
    __syncthreads();
    for (int i = threadIdx.x; i < count * WIDTH; i += blockDim.x) {
      size_t row = size_t(begin + tile + i / WIDTH) * stride + heads * WIDTH + group + i % WIDTH;
      keys[i / WIDTH][i % WIDTH] = float(qkv[row]);
      values[i / WIDTH][i % WIDTH] = float(qkv[row + groups * WIDTH]);
    }
    __syncthreads();
    for (int key = 0; key < count; key++) {
      bool seen = works && tile + key + before >= query && tile + key <= query + after;
      // Threads that share a query add up its score together, in the same warp as others.
      if (SHARE == 1 && !seen) continue;
      // Four partial sums: with one, each addition would wait for the previous.
      float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int i = 0; i < OWN; i++) part[i % 4] += q[i] * keys[key][i * SHARE + share];
      float score = (part[0] + part[1]) + (part[2] + part[3]);
      for (int other = 1; other < SHARE; other *= 2) score += __shfl_xor_sync(0xffffffffu, score, other);
      if (!seen) continue;
      if (distances) score += distances[blockIdx.y * (2 * span - 1) + query - (tile + key) + span - 1];
      float above = fmaxf(greatest, score);
      float old = expf(greatest - above), now = expf(score - above);
      total = total * old + now;
      for (int i = 0; i < OWN; i++) sum[i] = sum[i] * old + now * values[key][i * SHARE + share];
      greatest = above;
    }
  }
  if (!works) return;
  for (int i = 0; i < OWN; i++) {
    int at = i * SHARE + share;
    float bias = value_bias ? float(value_bias[group + at]) : 0.0f;
    out[size_t(begin + query) * heads * WIDTH + head + at] = T(sum[i] / total + bias);
  }
}

// What a lane keeps of the softmax of two of a warp's 16 queries: rows lane / 4 and lane / 4 + 8 of the fragments.
template <int WIDTH>
struct Softmax {
  float sum[WIDTH / 8][4] = {};
  float greatest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

  // Replaces the scores of COLUMNS keys by their weights. `scale` includes log2(e), so that weights are powers of two.
  template <int COLUMNS>
  __device__ void weigh(float (&score)[COLUMNS / 8][4], float scale) {
    for (int half = 0; half < 2; half++) {
      float above = greatest[half];
      for (int n = 0; n < COLUMNS / 8; n++) above = fmaxf(above, fmaxf(score[n][half * 2], score[n][half * 2 + 1]));
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
      for (int n = 0; n < COLUMNS / 8; n++)
        for (int i = 0; i < 2; i++) {
          float &x = score[n][half * 2 + i];
          x = power_of_two(x * scale - base);
          total[half] += x;
        }
    }
  }

  // Adds the values of COLUMNS keys, rows of shared memory, by their weights.
  template <int COLUMNS, typename T, int STRIDE>
  __device__ void accumulate(const float (&weight)[COLUMNS / 8][4], T (*values)[STRIDE]) {
    int lane = threadIdx.x % 32;
    // A lane's fragments of two tiles of scores are laid out as its fragment of a left matrix.
    for (int k = 0; k < COLUMNS / 16; k++) {
      const float *left = weight[2 * k], *right = weight[2 * k + 1];
      unsigned weights[4] = {pair<T>(left[0], left[1]), pair<T>(left[2], left[3]), pair<T>(right[0], right[1]),
                             pair<T>(right[2], right[3])};
      for (int n = 0; n < WIDTH / 16; n++) {
        unsigned value[4];
        matrices<true>(value, &values[k * 16 + lane % 16][n * 16 + lane / 16 * 8]);
        multiply<T>(sum[2 * n], weights, value[0], value[1]);
        multiply<T>(sum[2 * n + 1], weights, value[2], value[3]);
      }
    }
  }

  // Writes a warp's rows, of which `count` exist, to `out`, which is the first query's; rows are `stride` apart. `bias`
  // may be null.
  template <typename T>
  __device__ void finish(T *out, size_t stride, int count, const T *bias) {
    int lane = threadIdx.x % 32, column = lane % 4 * 2;
    for (int half = 0; half < 2; half++) {
      float all = total[half];
      all += __shfl_xor_sync(0xffffffffu, all, 1);
      all += __shfl_xor_sync(0xffffffffu, all, 2);
      int row = lane / 4 + half * 8;
      if (row >= count) continue;
      float factor = 1.0f / all;
      for (int n = 0; n < WIDTH / 8; n++) {
        float x[2] = {sum[n][half * 2] * factor, sum[n][half * 2 + 1] * factor};
        if (bias) add(x, bias + column + n * 8);
        store(out + row * stride + column + n * 8, x);
      }
    }
  }
};

// A warp's queries as fragments of left matrices: rows from `first`; rows past the end repeat the last. `bias` may be
// null.
template <int WIDTH, typename T>
__device__ void load_queries(unsigned (&to)[WIDTH / 16][4], const T *sequence, int stride, int first, int length,
                             const T *bias) {
  int lane = threadIdx.x % 32, column = lane % 4 * 2;
  for (int half = 0; half < 2; half++) {
    const T *query = sequence + size_t(min(first + lane / 4 + half * 8, length - 1)) * stride + column;
    for (int k = 0; k < WIDTH / 8; k++) {
      float x[2];
      load(x, query + k * 8);
      if (bias) add(x, bias + column + k * 8);
      to[k / 2][k % 2 * 2 + half] = pair<T>(x[0], x[1]);
    }
  }
}

// The products of a warp's queries with eight rows of shared memory, of which the calling lane gives row lane % 8.
template <int WIDTH, typename T>
__device__ void products(float (&to)[4], const unsigned (&left)[WIDTH / 16][4], const T *row) {
  int lane = threadIdx.x % 32;
  for (int k = 0; k < WIDTH / 16; k += 2) {
    unsigned right[4];
    matrices<false>(right, row + k * 16 + lane / 8 * 8);
    multiply<T>(to, left[k], right[0], right[1]);
    multiply<T>(to, left[k + 1], right[2], right[3]);
  }
}

// Copies keys and values from `first`, TILE of them, to shared memory, a part by each thread of the block. Rows past
// `end` repeat the last before it: the memory behind it belongs to another sequence and may be NaN. `keys` has those of
// the sequence, `stride` elements apart; values are `apart` elements behind their keys.
template <int WIDTH, int TILE, typename T, int STRIDE>
__device__ void fetch(T (*to_keys)[STRIDE], T (*to_values)[STRIDE], const T *keys, int stride, int apart, int first,
                      int end) {
  constexpr int PIECES = WIDTH / PIECE<T>;
  int key = threadIdx.x / PIECES, piece = threadIdx.x % PIECES * PIECE<T>, step = blockDim.x / PIECES;
  const T *source = keys + (first + key) * stride + piece, *last = keys + (end - 1) * stride + piece;
  for (; key < TILE; key += step, source += step * stride) {
    const T *row = source < last ? source : last;
    copy_piece(&to_keys[key][piece], row);
    copy_piece(&to_values[key][piece], row + apart);
  }
}

// One warp per 16 queries, with tensor cores (arXiv:2307.08691): scores and accumulators stay in registers. Keys and
// values are read TILE at a time into shared memory, the next tile while the current one is processed.
template <int WIDTH, int TILE, typename T>
__device__ void attend_by_warps(T *out, const T *qkv, const T *query_bias, const T *value_bias, const unsigned *starts,
                                const float *distances, int most, int heads, int groups, int before, int after,
                                int span, float scale) {
  // Rows are padded by 16 bytes, so that the same piece of eight rows lies in different banks of shared memory.
  constexpr int STRIDE = WIDTH + PIECE<T>;
  __shared__ __align__(16) T keys[2][TILE][STRIDE], values[2][TILE][STRIDE];
  unsigned place = sequence_of_block(most);
  int begin = starts[place], length = starts[place + 1] - begin;
  int queries = blockDim.x / 2, first = blockIdx.x % most * queries;
  if (first >= length) return;
  int stride = (heads + 2 * groups) * WIDTH, head = blockIdx.y * WIDTH, group = blockIdx.y / (heads / groups) * WIDTH;
  const T *sequence = qkv + size_t(begin) * stride, *all_keys = sequence + heads * WIDTH + group;
  int lane = threadIdx.x % 32;
  int from = max(first - before, 0), to = min(first + queries + after, length);
  fetch<WIDTH, TILE>(keys[0], values[0], all_keys, stride, groups * WIDTH, from, to);
  // `own` is the warp's first query. A lane's fragment has two columns of two rows.
  int own = first + int(threadIdx.x) / 32 * 16, row = own + lane / 4, column = lane % 4 * 2;
  bool works = own < length;
  unsigned q[WIDTH / 16][4];
  load_queries<WIDTH>(q, sequence + head, stride, own, length, query_bias ? query_bias + head : nullptr);
  Softmax<WIDTH> softmax;
  for (int tile = from, stage = 0; tile < to; tile += TILE, stage ^= 1) {
    await_pieces();
    // Every thread's pieces have arrived, and no thread reads the other stage any more.
    __syncthreads();
    if (tile + TILE < to)
      fetch<WIDTH, TILE>(keys[stage ^ 1], values[stage ^ 1], all_keys, stride, groups * WIDTH, tile + TILE, to);
    // All threads of the warp continue, or none. A warp may see none of the tile's keys.
    if (!works || tile > own + 15 + after || tile + TILE - 1 + before < own) continue;
    float score[TILE / 8][4] = {};
    for (int n = 0; n < TILE / 8; n++) products<WIDTH>(score[n], q, keys[stage][n * 8 + lane % 8]);
    // With a bias, scores are scaled here, otherwise together with the weights.
    if (distances)
      for (int n = 0; n < TILE / 8; n++)
        for (int i = 0; i < 4; i++) {
          int key = tile + n * 8 + column + i % 2, query = row + i / 2 * 8;
          score[n][i] *= scale;
          if (key < to && query < length)
            score[n][i] += distances[blockIdx.y * (2 * span - 1) + query - key + span - 1];
        }
    // Masks scores, unless every query of the warp attends to every key of the tile.
    if (tile + TILE > to || tile + TILE - 1 - own > after || own + 15 - tile > before)
      for (int n = 0; n < TILE / 8; n++)
        for (int i = 0; i < 4; i++) {
          int key = tile + n * 8 + column + i % 2, query = row + i / 2 * 8;
          if (key >= to || key + before < query || key > query + after) score[n][i] = -INFINITY;
        }
    softmax.template weigh<TILE>(score, distances ? 1.44269504f : 1.44269504f * scale);
    softmax.template accumulate<TILE>(score, values[stage]);
  }
  if (!works) return;
  softmax.finish(out + size_t(begin + own) * heads * WIDTH + head, size_t(heads) * WIDTH, length - own,
                 value_bias ? value_bias + group : nullptr);
}

template <int WIDTH, int TILE, typename T>
__device__ void attend(T *out, const T *qkv, const T *query_bias, const T *value_bias, const unsigned *starts,
                       const float *distances, int most, int heads, int groups, int before, int after, int span,
                       float scale) {
  if constexpr (TENSOR_CORES<T>)
    attend_by_warps<WIDTH, TILE>(out, qkv, query_bias, value_bias, starts, distances, most, heads, groups, before,
                                 after, span, scale);
  else
    attend_by_threads<WIDTH>(out, qkv, query_bias, value_bias, starts, distances, most, heads, groups, before, after,
                             span, scale);
}
