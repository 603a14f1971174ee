// Keys and values in memory: blocks of 32 positions, which hold all layers; of a layer, for each KV head, keys packed
// [32 keys][dim] and values packed [dim][32 keys].
//
// In FP8 (e4m3) they stand in the same order, eight bytes a lane, and 16 numbers share a power of two: those of a tile of the
// product that computes them, which one warp has in its registers, and of one token, so that no other token shows. A power of
// two makes what is read a bf16 again by one exact product. Scales stand behind the values, in the order in which lanes need
// them.
#pragma once

#include "base.cuh"

// Numbers that share a scale.
constexpr uint32_t SHARING = 16;

struct Kv {
    uint8_t *data;   // this layer's
    uint64_t stride; // bytes from one block to the next
    uint32_t dim;    // padded
    uint32_t fp8;

    DEVICE uint8_t *head(uint32_t block, uint32_t head) const {
        uint32_t bytes = fp8 ? 2 * BLOCK * dim + 2 * BLOCK * dim / SHARING : 4 * BLOCK * dim;
        return data + block * stride + size_t(head) * bytes;
    }
};

// Four e4m3 become two pairs of bf16 by their bits: shifted, an exponent is 120 too small, which a factor mends that is a power
// of two: the product is exact. Bytes 1 and 3 are the first pair, 0 and 2 the second.
DEVICE uint32_t first_pair(uint32_t bytes, uint32_t factors) {
    return product_of_pairs((bytes & 0x80008000) | (bytes & 0x7f007f00) >> 4, factors);
}
DEVICE uint32_t second_pair(uint32_t bytes, uint32_t factors) { return first_pair(bytes << 8, factors); }

// The nearest e4m3 (arXiv 2209.05433), of two as near the even one; what is larger than all is the largest.
DEVICE uint8_t e4m3_of(float x) {
    uint32_t sign = bits_of(x) >> 24 & 0x80;
    float magnitude = smaller(larger(x, -x), 448.0f);
    uint32_t bits = bits_of(magnitude), normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - 120 * 8;
    // A step of the subnormal numbers is one of the numbers from 2^14 on.
    uint32_t subnormal = bits_of(sum(magnitude, 16384.0f)) - bits_of(16384.0f);
    return uint8_t(sign | (magnitude < 0.015625f ? subnormal : normal));
}

// What 16 numbers share, of which this lane has some, and lanes 4, 8, 16 from it the others: the exponent of a bf16 that is 2^120
// times the least power of two with which the largest of them fits into e4m3. From 57,344 on they do not fit.
DEVICE uint32_t scale_of(float largest) {
    UNROLL for (uint32_t mask = 4; mask < LANES; mask *= 2) largest = larger(largest, from_lane_xor(largest, mask));
    // 448 is 7/8 of 2^9.
    int32_t exponent = int32_t(bits_of(product(largest, 8.0f / 7.0f)) >> 23) - 127 - 8;
    exponent = exponent < -119 ? -119 : exponent > 7 ? 7 : exponent;
    return uint32_t(exponent + 120 + 127);
}

// Writes number `at` of the packed layout, with what it shares.
DEVICE void put_fp8(uint8_t *numbers, size_t at, float x, uint32_t scale) {
    uint32_t i = at % 8;
    numbers[at / 8 * 8 + i / 4 * 4 + (1 - i / 2 % 2) + i % 2 * 2] = e4m3_of(product(x, float_of((374 - scale) << 23)));
}

// Where the scale of a tile of 16 dimensions of a key stands, and of a value.
DEVICE uint32_t key_scale_at(uint32_t key, uint32_t tile) { return ((tile / 2 * 8 + key % 8) * 4 + key / 8) * 2 + tile % 2; }
DEVICE uint32_t value_scale_at(uint32_t key, uint32_t tile) {
    return tile * BLOCK + key % 8 / 2 * 8 + key / 16 * 4 + key % 16 / 8 * 2 + key % 2;
}

// What a lane reads of a head's block: fragments of bf16.
template <int DIM> struct Bf16Head {
    const uint4 *keys, *values;

    DEVICE Bf16Head(const uint8_t *head) : keys(reinterpret_cast<const uint4 *>(head) + lane()), values(keys + BLOCK * DIM / 8) {}
    // Keys 8j .. 8j + 8, dimensions of a pair of k-tiles.
    DEVICE uint4 key(int j, int pair) const { return keys[(j * (DIM / 32) + pair) * LANES]; }
    // Dimensions 8j .. 8j + 8 of all values.
    DEVICE uint4 value(int j) const { return values[j * LANES]; }
};

template <int DIM> struct Fp8Head {
    const uint2 *keys, *values, *key_scales, *value_scales;

    DEVICE Fp8Head(const uint8_t *head)
        : keys(reinterpret_cast<const uint2 *>(head) + lane()), values(keys + BLOCK * DIM / 8),
          key_scales(reinterpret_cast<const uint2 *>(head + 2 * BLOCK * DIM) + lane() / 4),
          value_scales(reinterpret_cast<const uint2 *>(head + 2 * BLOCK * DIM + BLOCK * DIM / SHARING) + lane() % 4) {}
    DEVICE uint4 key(int j, int pair) const {
        uint2 bytes = keys[(j * (DIM / 32) + pair) * LANES], scales = key_scales[pair * 8];
        uint32_t own = (j < 2 ? scales.x : scales.y) >> 16 * (j % 2), low = (own & 0xff) * 0x800080, high = (own >> 8 & 0xff) * 0x800080;
        return {first_pair(bytes.x, low), second_pair(bytes.x, low), first_pair(bytes.y, high), second_pair(bytes.y, high)};
    }
    DEVICE uint4 value(int j) const {
        uint2 bytes = values[j * LANES], scales = value_scales[j / 2 * 4];
        auto factors = [](uint32_t own) { return (own & 0xff) << 7 | (own & 0xff00) << 15; };
        return {first_pair(bytes.x, factors(scales.x)), second_pair(bytes.x, factors(scales.x >> 16)),
                first_pair(bytes.y, factors(scales.y)), second_pair(bytes.y, factors(scales.y >> 16))};
    }
};
