// Loads and stores of several elements at a time.

#pragma once

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

// Like load, for N floats, which may be more than one access has.
template <int N>
__device__ void load_floats(float (&to)[N], const float *from) {
  constexpr int EACH = N < 4 ? N : 4;
  for (int i = 0; i < N; i += EACH) {
    float some[EACH];
    load(some, from + i);
    for (int j = 0; j < EACH; j++) to[i + j] = some[j];
  }
}

template <int N, typename T>
__device__ void store(T *to, const float (&from)[N]) {
  T numbers[N];
  for (int j = 0; j < N; j++) numbers[j] = T(from[j]);
  typename Access<N * sizeof(T)>::Type access;
  memcpy(&access, numbers, sizeof(numbers));
  *reinterpret_cast<decltype(access) *>(to) = access;
}

// Like store, for N floats, which may be more than one access has.
template <int N>
__device__ void store_floats(float *to, const float (&from)[N]) {
  constexpr int EACH = N < 4 ? N : 4;
  for (int i = 0; i < N; i += EACH) {
    float some[EACH];
    for (int j = 0; j < EACH; j++) some[j] = from[i + j];
    store(to + i, some);
  }
}
