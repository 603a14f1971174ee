// The words of base.cuh on a GPU.
#pragma once

#include <cuda_bf16.h>

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define UNROLL _Pragma("unroll")

DEVICE uint32_t lane() { return threadIdx.x % 32; }
DEVICE uint32_t warp() { return threadIdx.x / 32; }
DEVICE uint32_t warps() { return blockDim.x / 32; }
DEVICE uint32_t thread() { return threadIdx.x; }
DEVICE uint32_t threads() { return blockDim.x; }
DEVICE uint3 block() { return blockIdx; }

// The dynamic shared memory of the block.
DEVICE uint8_t *shared() {
    extern __shared__ __align__(128) uint8_t memory[];
    return memory;
}
DEVICE void sync() { __syncthreads(); }

// The next kernel of the stream may start, and this one may read what kernels before it wrote. What does not depend on
// them, above all weights, is read in between: a kernel's first loads hide behind the end of the one before.
DEVICE void overlap_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void await_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE float widen(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
DEVICE uint16_t narrow(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
// Two pairs of bf16, number by number.
DEVICE uint32_t product_of_pairs(uint32_t a, uint32_t b) {
    __nv_bfloat162 x, y;
    memcpy(&x, &a, 4);
    memcpy(&y, &b, 4);
    x = __hmul2(x, y);
    memcpy(&a, &x, 4);
    return a;
}
DEVICE float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
DEVICE float sum(float a, float b) { return __fadd_rn(a, b); }
DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float inverse_root(float x) { return __frsqrt_rn(x); }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float smaller(float a, float b) { return fminf(a, b); }

DEVICE double product(double a, double b) { return __dmul_rn(a, b); }
DEVICE double sum(double a, double b) { return __dadd_rn(a, b); }
// The upper half of a product.
DEVICE uint64_t high_product(uint64_t a, uint64_t b) { return __umul64hi(a, b); }
// Adds to shared memory beside others, and tells what stood there.
DEVICE uint64_t add_shared(uint64_t *to, uint64_t x) {
    return atomicAdd(reinterpret_cast<unsigned long long *>(to), static_cast<unsigned long long>(x));
}

DEVICE float from_lane_xor(float x, uint32_t mask) { return __shfl_xor_sync(0xffffffff, x, mask); }
DEVICE uint32_t from_lane_xor(uint32_t x, uint32_t mask) { return __shfl_xor_sync(0xffffffff, x, mask); }
DEVICE bool all_lanes(bool holds) { return __all_sync(0xffffffff, holds); }

// Read once, by nobody else: it need not stay in the first-level cache.
DEVICE uint4 stream(const uint4 *from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}

// 16 bytes from global to shared memory, behind the caller's back until `await_copies` of all but the last `behind` groups.
DEVICE void copy_ahead(void *to, const void *from) {
    uint32_t address = uint32_t(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int BEHIND> DEVICE void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(BEHIND) : "memory"); }

// c += a · b: a is 16 x 16 bf16, b is 16 x 8 bf16, c is 16 x 8 f32, spread over the warp as PTX's mma.m16n8k16 has it: with
// g = lane / 4 and t = lane % 4, c holds rows g, g, g + 8, g + 8 of columns 2t, 2t + 1, 2t, 2t + 1.
DEVICE void mma(float (&c)[4], uint4 a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
