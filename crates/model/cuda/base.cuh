// What the kernels are written in: a handful of words that mean the same on a GPU and, compiled by a host compiler, in the
// emulator. No kernel holds PTX or an intrinsic of its own.
//
// Two layouts carry all matrix products, both of fragments of `mma.sync.m16n8k16`, so that a warp reads what it multiplies
// with one coalesced load of 16 bytes a lane and nothing is shuffled:
//   rows  (weights):            [m / 16][k / 16][lane][8], a lane's 8 bf16 of a 16 x 16 tile
//   packed (activations, K, V): [n / 8][k / 32][lane][8], a lane's 4 + 4 bf16 of two 16 x 8 tiles
// Activations of many tokens are, where warpgroups multiply, in order within the same tiles: [n / 8][k / 32][n % 8][k % 32]; and
// rows of matrices, where a library multiplies.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#include "gpu.cuh"
#else
#include "emulator.hpp"
#endif

// Lanes of a warp.
constexpr uint32_t LANES = 32;
// Positions of a KV block, and keys that attention looks at together.
constexpr uint32_t BLOCK = 32;
// Inputs of a pair of k-tiles.
constexpr uint32_t PAIR = 32;

DEVICE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
DEVICE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// bf16, two to a word.
DEVICE uint32_t pair_of(float low, float high) { return uint32_t(narrow(low)) | uint32_t(narrow(high)) << 16; }

// Where input k of row n stands in the packed layout with so many pairs a row, counted in bf16.
DEVICE size_t packed_at(uint32_t n, uint32_t k, uint32_t pairs) {
    uint32_t lane = n % 8 * 4 + k % 8 / 2;
    return ((size_t(n / 8) * pairs + k / PAIR) * LANES + lane) * 8 + k % 32 / 16 * 4 + k % 16 / 8 * 2 + k % 2;
}

// How activations stand in memory.
enum class Order : uint32_t { PACKED, TILED, ROWS };

// A row for each token and shard.
struct Activations {
    uint16_t *numbers; // [shard][token_tiles][pairs] of tiles, or [token][shard][k]
    uint32_t token_tiles, pairs, shards;
    Order order;

    // Where input k of row n stands, a neighbour of the one before it if k is odd.
    DEVICE uint16_t *at(uint32_t shard, uint32_t n, uint32_t k) const {
        if (order == Order::ROWS) return numbers + (size_t(n) * shards + shard) * (pairs * PAIR) + k;
        return tile_at(shard, n, k);
    }
    // The same where they do not stand in rows.
    DEVICE uint16_t *tile_at(uint32_t shard, uint32_t n, uint32_t k) const {
        uint16_t *tiles = numbers + size_t(shard) * token_tiles * pairs * (8 * PAIR);
        if (order == Order::PACKED) return tiles + packed_at(n, k, pairs);
        return tiles + (size_t(n / 8) * pairs + k / PAIR) * (8 * PAIR) + n % 8 * PAIR + k % PAIR;
    }
    // Two neighbours, k and k + 1.
    DEVICE uint32_t *pair_at(uint32_t shard, uint32_t n, uint32_t k) const { return reinterpret_cast<uint32_t *>(at(shard, n, k)); }
};

// Places in a row of `end`, dealt to threads: `first`, and every `step`th from there.
template <class Place> struct Dealt {
    Place first, step, end;
};

// Places of a thread of which what they need is under way together.
constexpr uint32_t EACH = 4;

// Calls `use` with each place and what `load` finds there.
template <class Place, class Load, class Use> DEVICE void each(const Dealt<Place> &dealt, const Load &load, const Use &use) {
    for (Place first = dealt.first; first < dealt.end; first += EACH * dealt.step) {
        decltype(load(first)) x[EACH];
        UNROLL for (uint32_t i = 0; i < EACH; i++) {
            // Behind the end the first is read once more: a branch would wait for what is read before it.
            Place here = first + i * dealt.step;
            x[i] = load(here < dealt.end ? here : first);
        }
        UNROLL for (uint32_t i = 0; i < EACH; i++) if (first + i * dealt.step < dealt.end) use(first + i * dealt.step, x[i]);
    }
}
