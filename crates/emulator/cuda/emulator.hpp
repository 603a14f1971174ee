// The words of the kernels on a host: a block's threads are fibers that run in turn, and everything that a warp or a block
// does together is a meeting. It shows whether a kernel is right, not how fast it is.
#pragma once

#include <math.h>
#include <sched.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define DEVICE inline
#define KERNEL(threads, blocks) static void
#define UNROLL

struct uint3 {
    uint32_t x, y, z;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulator {

constexpr uint32_t WARP = 32, THREADS_MAX = 1024, WARPS_MAX = THREADS_MAX / WARP;

// Where a warp's lanes meet.
struct Meeting {
    uint32_t arrived = 0, number = 0;
};

struct Warp {
    Meeting meeting;
    uint32_t words[2][WARP];
    uint4 a[WARP];
    uint32_t b[WARP][2];
    float (*c[WARP])[4];
};

// A block that is being run.
struct Machine {
    uint32_t threads = 0, current = 0, ended = 0, idle_turns = 0;
    uint3 block = {};
    uint8_t *shared = nullptr;
    Meeting barrier;
    Warp warps[WARPS_MAX];
    bool done[THREADS_MAX];
};

extern thread_local Machine machine;

// Lets the other threads of the block run; ends the process with a sentence if none can go on.
void yield();

// Returns when all of `count` have come; the last one does `together` first.
template <class Together> void meet(Meeting &meeting, uint32_t count, const Together &together) {
    uint32_t number = meeting.number;
    if (++meeting.arrived == count) {
        together();
        meeting.arrived = 0;
        meeting.number++;
        machine.idle_turns = 0;
        return;
    }
    while (meeting.number == number) yield();
}

// c += a · b of the 16 x 16 and 16 x 8 fragments that a warp's lanes have brought, k in sequence.
void multiply(Warp &warp);

}  // namespace emulator

DEVICE uint32_t lane() { return emulator::machine.current % emulator::WARP; }
DEVICE uint32_t warp() { return emulator::machine.current / emulator::WARP; }
DEVICE uint32_t warps() { return emulator::machine.threads / emulator::WARP; }
DEVICE uint32_t thread() { return emulator::machine.current; }
DEVICE uint32_t threads() { return emulator::machine.threads; }
DEVICE uint3 block() { return emulator::machine.block; }
DEVICE uint8_t *shared() { return emulator::machine.shared; }
DEVICE void sync() {
    emulator::meet(emulator::machine.barrier, emulator::machine.threads, [] {});
}

DEVICE void overlap_next() {}
DEVICE void await_inputs() {}

DEVICE float widen(uint16_t bits) {
    uint32_t word = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
}
// To the nearest, of two as near to the even one.
DEVICE uint16_t narrow(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    if (x != x) return 0x7fff;
    return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
// Two pairs of bf16, number by number.
DEVICE uint32_t product_of_pairs(uint32_t a, uint32_t b) {
    uint32_t low = narrow(widen(uint16_t(a)) * widen(uint16_t(b)));
    return low | uint32_t(narrow(widen(uint16_t(a >> 16)) * widen(uint16_t(b >> 16)))) << 16;
}
DEVICE float exp2_of(float x) { return exp2f(x); }
DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float product(float a, float b) { return a * b; }
DEVICE float sum(float a, float b) { return a + b; }
DEVICE float quotient(float a, float b) { return a / b; }
DEVICE float inverse_root(float x) { return 1 / sqrtf(x); }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float smaller(float a, float b) { return fminf(a, b); }

DEVICE double product(double a, double b) { return a * b; }
DEVICE double sum(double a, double b) { return a + b; }
// The upper half of a product.
DEVICE uint64_t high_product(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }
// Adds to shared memory, and tells what stood there. Fibers take turns only where they meet.
DEVICE uint64_t add_shared(uint64_t *to, uint64_t x) {
    uint64_t before = *to;
    *to += x;
    return before;
}

DEVICE uint32_t from_lane_xor(uint32_t x, uint32_t mask) {
    emulator::Warp &own = emulator::machine.warps[warp()];
    uint32_t(&words)[emulator::WARP] = own.words[own.meeting.number % 2];
    words[lane()] = x;
    emulator::meet(own.meeting, emulator::WARP, [] {});
    return words[lane() ^ mask];
}
DEVICE float from_lane_xor(float x, uint32_t mask) {
    uint32_t word;
    memcpy(&word, &x, 4);
    word = from_lane_xor(word, mask);
    memcpy(&x, &word, 4);
    return x;
}

DEVICE uint4 stream(const uint4 *from) { return *from; }
DEVICE uint32_t constant(const uint32_t *from) { return *from; }
DEVICE float constant(const float *from) { return *from; }
DEVICE void tell(uint32_t *to, uint32_t x) { __atomic_store_n(to, x, __ATOMIC_RELEASE); }
DEVICE uint32_t told(const uint32_t *from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
// Another GPU is another thread.
DEVICE void pause() { sched_yield(); }
DEVICE void copy_ahead(void *to, const void *from) { memcpy(to, from, 16); }
DEVICE void end_copies() {}
template <int BEHIND> DEVICE void await_copies() {}

DEVICE void mma(float (&c)[4], uint4 a, uint32_t b0, uint32_t b1) {
    emulator::Warp &own = emulator::machine.warps[warp()];
    own.a[lane()] = a;
    own.b[lane()][0] = b0;
    own.b[lane()][1] = b1;
    own.c[lane()] = &c;
    emulator::meet(own.meeting, emulator::WARP, [&] { emulator::multiply(own); });
}

// A warpgroup's warps multiply each for itself, at once.
#define WARPGROUPS

struct Columns {
    const uint8_t *tile;
    uint32_t half;
};
DEVICE Columns columns_at(const void *tile) { return {static_cast<const uint8_t *>(tile), 0}; }
DEVICE Columns upper_half(Columns columns) { return {columns.tile, 1}; }
DEVICE void show_copies() {}
DEVICE void begin_products() {}
DEVICE void end_products() {}
template <int BEHIND> DEVICE void await_products() {}
template <int N> DEVICE void await_products(float (&)[N][4]) {}

template <int N> DEVICE void products(float (&c)[N / 8][4], uint4 a, Columns columns) {
    uint32_t g = lane() / 4, t = lane() % 4;
    for (uint32_t j = 0; j < N / 8; j++) {
        uint32_t b[2];
        for (uint32_t i = 0; i < 2; i++)
            memcpy(b + i, columns.tile + j * 512 + g * 64 + ((2 * columns.half + i) ^ g / 2 % 4) * 16 + t * 4, 4);
        mma(c[j], a, b[0], b[1]);
    }
}
