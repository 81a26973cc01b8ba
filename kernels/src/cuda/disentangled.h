// Attention with DeBERTa's terms by distance (arXiv:2006.03654, section 3.1): a score is
// scale * (query · key + query · position_keys[row] + key · position_queries[row]), where `rows` has the row of each
// distance `query - key` from -(longest - 1) to longest - 1. The tables, `[heads, 2 * span, WIDTH]`, may be null. All
// heads have their own keys; biases are already added to queries, keys and values. See attention.h for the rest.

#pragma once
#include "attention.h"

// The rows of the tables for some distances, which lie within a sequence of `length` tokens, or are clamped to it: a
// distance outside of it belongs to no score.
struct Distances {
  const unsigned *rows;
  int longest, length;
  __device__ unsigned row(int distance) const {
    return rows[min(max(distance, 1 - length), length - 1) + longest - 1];
  }
};

// One thread per query. Keys, values and the tables' rows for the distances of 64 queries are read TILE keys at a time.
template <int WIDTH, typename T>
__device__ void attend_apart_by_threads(T *out, const T *qkv, const unsigned *starts, const T *position_keys,
                                        const T *position_queries, const unsigned *rows, int most, int heads, int before,
                                        int after, int longest, int span, float scale) {
  constexpr int TILE = 8, QUERIES = 64;
  __shared__ float keys[TILE][WIDTH], values[TILE][WIDTH];
  // One more element per row: threads that read neighbouring rows read different banks.
  __shared__ float of_keys[QUERIES + TILE][WIDTH + 1], of_queries[QUERIES + TILE][WIDTH + 1];
  unsigned place = sequence_of_block(most);
  int begin = starts[place], length = starts[place + 1] - begin;
  int first = blockIdx.x % most * QUERIES;
  if (first >= length) return;
  int hidden = heads * WIDTH, head = blockIdx.y * WIDTH;
  size_t table = size_t(blockIdx.y) * 2 * span * WIDTH;
  Distances distances = {rows, longest, length};
  int query = first + threadIdx.x;
  bool works = query < length;
  float q[WIDTH], sum[WIDTH];
  float greatest = -INFINITY, total = 0.0f;
  for (int i = 0; i < WIDTH; i++) {
    q[i] = works ? float(qkv[size_t(begin + query) * 3 * hidden + head + i]) : 0.0f;
    sum[i] = 0.0f;
  }
  int from = max(first - before, 0), to = min(first + QUERIES + after, length);
  for (int tile = from; tile < to; tile += TILE) {
    int count = min(TILE, to - tile);
    // The distance of the first query to the tile's last key.
    int low = first - (tile + TILE - 1);
    __syncthreads();
    for (int i = threadIdx.x; i < count * WIDTH; i += blockDim.x) {
      size_t row = size_t(begin + tile + i / WIDTH) * 3 * hidden + head + i % WIDTH;
      keys[i / WIDTH][i % WIDTH] = float(qkv[row + hidden]);
      values[i / WIDTH][i % WIDTH] = float(qkv[row + 2 * hidden]);
    }
    for (int i = threadIdx.x; i < (QUERIES + TILE - 1) * WIDTH; i += blockDim.x) {
      size_t row = table + size_t(distances.row(low + i / WIDTH)) * WIDTH + i % WIDTH;
      if (position_keys) of_keys[i / WIDTH][i % WIDTH] = float(position_keys[row]);
      if (position_queries) of_queries[i / WIDTH][i % WIDTH] = float(position_queries[row]);
    }
    __syncthreads();
    if (!works) continue;
    for (int key = 0; key < count; key++) {
      if (tile + key + before < query || tile + key > query + after) continue;
      int at = query - (tile + key) - low;
      float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int i = 0; i < WIDTH; i++) {
        part[i % 2] += q[i] * (position_keys ? keys[key][i] + of_keys[at][i] : keys[key][i]);
        if (position_queries) part[2 + i % 2] += keys[key][i] * of_queries[at][i];
      }
      float score = scale * ((part[0] + part[1]) + (part[2] + part[3]));
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

// One warp per 16 queries, with tensor cores; keys and values are read 16 at a time. A warp's 16 queries have 31
// distances to 16 keys: it multiplies queries, and then keys, with the tables' rows for these, and takes the element of
// each pair's distance from shared memory. Blocks of up to 64 queries keep the rows of all their distances in a ring: the
// next tile's keys are 16 further on, so that only 16 rows are new.
template <int WIDTH, typename T>
__device__ void attend_apart_by_warps(T *out, const T *qkv, const unsigned *starts, const T *position_keys,
                                      const T *position_queries, const unsigned *rows, int most, int heads, int before,
                                      int after, int longest, int span, float scale) {
  constexpr int TILE = 16, WARPS = 4, PIECES = WIDTH / PIECE<T>, STRIDE = WIDTH + PIECE<T>;
  // The rows of a tile, 16 × WARPS + TILE - 1, and those that the next one adds.
  constexpr int RING = 16 * WARPS + 2 * TILE;
  // Of the products; neighbouring diagonals begin in different banks.
  constexpr int ACROSS = 2 * TILE + 7;
  __shared__ __align__(16) T keys[2][TILE][STRIDE], values[2][TILE][STRIDE];
  __shared__ __align__(16) T of_keys[RING][STRIDE], of_queries[RING][STRIDE];
  __shared__ float all_terms[WARPS][16][ACROSS];
  unsigned place = sequence_of_block(most);
  int begin = starts[place], length = starts[place + 1] - begin;
  int queries = blockDim.x / 2, first = blockIdx.x % most * queries;
  if (first >= length) return;
  int hidden = heads * WIDTH, head = blockIdx.y * WIDTH, stride = 3 * hidden;
  const T *sequence = qkv + size_t(begin) * stride + head;
  size_t table = size_t(blockIdx.y) * 2 * span * WIDTH;
  Distances distances = {rows, longest, length};
  int lane = threadIdx.x % 32;
  int from = max(first - before, 0), to = min(first + queries + after, length);
  // Where the row of a distance is in the ring.
  auto slot = [&](int distance) { return unsigned(distance + RING * 65536) % RING; };
  // Copies the rows of `count` distances from `low` on.
  auto fetch_rows = [&](int low, int count) {
    int piece = threadIdx.x % PIECES * PIECE<T>;
    for (int i = threadIdx.x / PIECES; i < count; i += blockDim.x / PIECES) {
      unsigned at = slot(low + i);
      size_t row = table + size_t(distances.row(low + i)) * WIDTH + piece;
      if (position_keys) copy_piece(&of_keys[at][piece], position_keys + row);
      if (position_queries) copy_piece(&of_queries[at][piece], position_queries + row);
    }
  };
  // The smallest distance of the block's queries to the keys of a tile.
  auto lowest = [&](int tile) { return first - (tile + TILE - 1); };
  fetch<WIDTH, TILE>(keys[0], values[0], sequence + hidden, stride, hidden, from, to);
  fetch_rows(lowest(from), queries + TILE - 1);
  int own = first + int(threadIdx.x) / 32 * 16, column = lane % 4 * 2;
  bool works = own < length;
  float(&terms)[16][ACROSS] = all_terms[threadIdx.x / 32];
  unsigned q[WIDTH / 16][4];
  load_queries<WIDTH>(q, sequence, stride, own, length, static_cast<const T *>(nullptr));
  Softmax<WIDTH> softmax;
  // Writes products, [16, 32], to shared memory. `left` has queries or keys.
  auto multiply_rows = [&](const unsigned(&left)[WIDTH / 16][4], T(*ring)[STRIDE], int low) {
    for (int n = 0; n < 2 * TILE / 8; n++) {
      float product[4] = {};
      products<WIDTH>(product, left, ring[slot(low + n * 8 + lane % 8)]);
      for (int i = 0; i < 4; i++) terms[lane / 4 + i / 2 * 8][n * 8 + column + i % 2] = product[i];
    }
  };
  for (int tile = from, stage = 0; tile < to; tile += TILE, stage ^= 1) {
    await_pieces();
    // Every thread's pieces have arrived, and no thread reads the other stage or the rows of the last tile any more.
    __syncthreads();
    if (tile + TILE < to) {
      fetch<WIDTH, TILE>(keys[stage ^ 1], values[stage ^ 1], sequence + hidden, stride, hidden, tile + TILE, to);
      fetch_rows(lowest(tile + TILE), TILE);
    }
    // All threads of the warp continue, or none.
    if (!works) continue;
    float score[TILE / 8][4] = {};
    for (int n = 0; n < TILE / 8; n++) products<WIDTH>(score[n], q, keys[stage][n * 8 + lane % 8]);
    // The distance of the warp's first query to the tile's last key.
    int low = own - (tile + TILE - 1);
    if (position_keys) {
      multiply_rows(q, of_keys, low);
      __syncwarp();
      for (int n = 0; n < TILE / 8; n++)
        for (int i = 0; i < 4; i++) {
          int query = lane / 4 + i / 2 * 8, key = n * 8 + column + i % 2;
          score[n][i] += terms[query][query - key + TILE - 1];
        }
      __syncwarp();
    }
    if (position_queries) {
      unsigned k[WIDTH / 16][4];
      for (int i = 0; i < WIDTH / 16; i++) matrices<false>(k[i], &keys[stage][lane % 16][i * 16 + lane / 16 * 8]);
      multiply_rows(k, of_queries, low);
      __syncwarp();
      for (int n = 0; n < TILE / 8; n++)
        for (int i = 0; i < 4; i++) {
          int query = lane / 4 + i / 2 * 8, key = n * 8 + column + i % 2;
          score[n][i] += terms[key][query - key + TILE - 1];
        }
      __syncwarp();
    }
    if (tile + TILE > to || tile + TILE - 1 - own > after || own + 15 - tile > before)
      for (int n = 0; n < TILE / 8; n++)
        for (int i = 0; i < 4; i++) {
          int key = tile + n * 8 + column + i % 2, query = own + lane / 4 + i / 2 * 8;
          if (key >= to || key + before < query || key > query + after) score[n][i] = -INFINITY;
        }
    softmax.template weigh<TILE>(score, 1.44269504f * scale);
    softmax.template accumulate<TILE>(score, values[stage]);
  }
  if (!works) return;
  softmax.finish(out + size_t(begin + own) * hidden + head, hidden, length - own, static_cast<const T *>(nullptr));
}

template <int WIDTH, typename T>
__device__ void attend_apart(T *out, const T *qkv, const unsigned *starts, const T *position_keys,
                             const T *position_queries, const unsigned *rows, int most, int heads, int before, int after,
                             int longest, int span, float scale) {
  if constexpr (TENSOR_CORES<T>)
    attend_apart_by_warps<WIDTH>(out, qkv, starts, position_keys, position_queries, rows, most, heads, before, after,
                                 longest, span, scale);
  else
    attend_apart_by_threads<WIDTH>(out, qkv, starts, position_keys, position_queries, rows, most, heads, before, after,
                                   longest, span, scale);
}
