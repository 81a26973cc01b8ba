// Instructions that kernels.cu needs and CUDA C++ does not have, such as those of tensor cores. The PTX ISA, "Matrix
// Fragments for mma.m16n8k16" and "ldmatrix", defines which lane holds which elements of a matrix.

#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "the kernels need a GPU of compute capability 8.0 or more (CUDA_COMPUTE_CAP=80)"
#endif

// Whether tensor cores multiply matrices of T.
template <typename T>
constexpr bool TENSOR_CORES = false;
template <>
constexpr bool TENSOR_CORES<__half> = true;
template <>
constexpr bool TENSOR_CORES<__nv_bfloat16> = true;

// Two elements in 32 bits, the first in the low half.
template <typename T>
__device__ unsigned pair(float first, float second);
template <>
__device__ unsigned pair<__half>(float first, float second) {
  __half2 both = __floats2half2_rn(first, second);
  return *reinterpret_cast<unsigned *>(&both);
}
template <>
__device__ unsigned pair<__nv_bfloat16>(float first, float second) {
  __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<unsigned *>(&both);
}

// sum += left × right, matrices of [16, 8], [16, 16] and [16, 8], of which every lane of a warp has its fragments.
template <typename T>
__device__ void multiply(float (&sum)[4], const unsigned (&left)[4], unsigned right_low, unsigned right_high);
#define MULTIPLY(T, NAME)                                                                                            \
  template <>                                                                                                        \
  __device__ void multiply<T>(float (&sum)[4], const unsigned (&left)[4], unsigned low, unsigned high) {             \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
        "{%0, %1, %2, %3};"                                                                                          \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                     \
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(low), "r"(high));                              \
  }
MULTIPLY(__half, "f16")
MULTIPLY(__nv_bfloat16, "bf16")

__device__ unsigned shared_address(const void *at) { return unsigned(__cvta_generic_to_shared(at)); }

// Loads four [8, 8] matrices of 16-bit elements from shared memory. Lane i gives the address of row i % 8 of matrix
// i / 8. Each lane gets its fragment of every matrix, transposed if TRANSPOSED, laid out as for a right matrix.
template <bool TRANSPOSED>
__device__ void matrices(unsigned (&to)[4], const void *row) {
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// 2^x, accurate but for the last bits; subnormal results are zero.
__device__ float power_of_two(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

// 1 / x, accurate but for the last bit.
__device__ float reciprocal(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

// Starts to copy 16 bytes from global to shared memory.
__device__ void copy_piece(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// Waits for all copies that this thread has started.
__device__ void await_pieces() { asm volatile("cp.async.wait_all;" ::: "memory"); }
