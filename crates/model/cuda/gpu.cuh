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

// What no kernel writes while this one runs; it is read where it stands, so that several are under way together.
DEVICE uint32_t constant(const uint32_t *from) {
    uint32_t x;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}
DEVICE float constant(const float *from) {
    float x;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(from));
    return x;
}

// Tells another GPU, or this one, that everything stands in memory which this block wrote before its last `sync`.
DEVICE void tell(uint32_t *to, uint32_t x) { asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory"); }
// What was told last; what stood in memory then is read behind it.
DEVICE uint32_t told(const uint32_t *from) {
    uint32_t x;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}
// Between two looks at what another GPU is to tell.
DEVICE void pause() {}

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

// Products by warpgroups: four warps, of which each multiplies 16 rows, like `mma`, with the same tokens. What they come to has
// the bits of `mma` (seen: benches/results/2026-11-28-h100.md); it is there after `await_products`.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WARPGROUPS

// 16 inputs of tokens in shared memory, of which eight take 512 bytes, 64 each, the sixteens of bytes of row n at (i ^ n / 2) % 4:
// PTX's matrix descriptor for a swizzle of 64 bytes. `tile` is a multiple of 512.
using Columns = uint64_t;
DEVICE Columns columns_at(const void *tile) {
    uint64_t address = uint32_t(__cvta_generic_to_shared(tile));
    return address >> 4 | uint64_t(1) << 16 | uint64_t(512 >> 4) << 32 | uint64_t(2) << 62;
}
// The 16 inputs behind the first.
DEVICE Columns upper_half(Columns columns) { return columns + (32 >> 4); }

// Copies that have arrived may be multiplied, after a `sync`.
DEVICE void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All products but the last `behind` groups have read what they multiply.
template <int BEHIND> DEVICE void await_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(BEHIND) : "memory"); }
// All of them are added up in `c`.
template <int N> DEVICE void await_products(float (&c)[N][4]) {
    await_products<0>();
    UNROLL for (int j = 0; j < N; j++) UNROLL for (int i = 0; i < 4; i++) asm volatile("" : "+f"(c[j][i])::"memory");
}

#define FOUR(c) "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
template <int N> DEVICE void products(float (&c)[N / 8][4], uint4 a, Columns b);
template <> DEVICE void products<64>(float (&c)[8][4], uint4 a, Columns b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                 : FOUR(c[0]), FOUR(c[1]), FOUR(c[2]), FOUR(c[3]), FOUR(c[4]), FOUR(c[5]), FOUR(c[6]), FOUR(c[7])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b));
}
template <> DEVICE void products<128>(float (&c)[16][4], uint4 a, Columns b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                 : FOUR(c[0]), FOUR(c[1]), FOUR(c[2]), FOUR(c[3]), FOUR(c[4]), FOUR(c[5]), FOUR(c[6]), FOUR(c[7]),
                   FOUR(c[8]), FOUR(c[9]), FOUR(c[10]), FOUR(c[11]), FOUR(c[12]), FOUR(c[13]), FOUR(c[14]), FOUR(c[15])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b));
}
template <> DEVICE void products<256>(float (&c)[32][4], uint4 a, Columns b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
                 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 0;"
                 : FOUR(c[0]), FOUR(c[1]), FOUR(c[2]), FOUR(c[3]), FOUR(c[4]), FOUR(c[5]), FOUR(c[6]), FOUR(c[7]),
                   FOUR(c[8]), FOUR(c[9]), FOUR(c[10]), FOUR(c[11]), FOUR(c[12]), FOUR(c[13]), FOUR(c[14]), FOUR(c[15]),
                   FOUR(c[16]), FOUR(c[17]), FOUR(c[18]), FOUR(c[19]), FOUR(c[20]), FOUR(c[21]), FOUR(c[22]), FOUR(c[23]),
                   FOUR(c[24]), FOUR(c[25]), FOUR(c[26]), FOUR(c[27]), FOUR(c[28]), FOUR(c[29]), FOUR(c[30]), FOUR(c[31])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b));
}
#undef FOUR
#endif
