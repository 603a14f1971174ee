// The four products of a layer, and the head: what each does with its sums. A fragment of these holds rows g and g + 8 of a
// tile and two tokens, so weights are packed with what belongs together 8 rows apart: the two halves of a rotated pair, a gate
// and its up. Then everything elementwise happens in registers and no sum is written before it is finished. What that needs besides
// the sums `prepare` reads, before there are any.
#pragma once

#include "product.cuh"

// A product whose end needs nothing but its sums.
struct Nothing {};

struct Tokens {
    const uint32_t *positions; // [token], absolute
    const uint32_t *places;    // [token], KV block · 32 + position in it
};

// A KV block holds numbers only: what is masked is multiplied by 0, which NaN and infinity would survive.
DEVICE float bounded(float x) { return smaller(larger(x, -3.3e38f), 3.3e38f); }

// Queries, keys and values of a layer. Rows of a head: tile t has pair 8t + g of the head in rows g and g + 8, for queries and
// keys; values are in order. A pair is turned by its position's angle (RoPE, arXiv 2104.09864), keys and values go to their KV
// block, queries to [token][head][dim].
struct Qkv {
    Product product;
    Tokens tokens;
    Kv kv;
    const float *turns; // [position]{cos [pairs], sin [pairs]}
    uint16_t *queries;
    uint32_t heads, kv_heads;
    uint32_t rotary_pairs; // of a head: half its dimensions, before padding

    // What is read for two tokens of a tile: their angles and places.
    struct Ready {
        float cosine[2], sine[2];
        uint32_t place[2];
    };
    DEVICE Ready prepare(uint32_t tile, uint32_t column) const {
        uint32_t pair = tile % (kv.dim / 16) * 8 + lane() / 4;
        Ready ready;
        UNROLL for (uint32_t i = 0; i < 2; i++) {
            uint32_t token = column * 8 + lane() % 4 * 2 + i, there = token < product.tokens ? token : 0;
            const float *turn = turns + size_t(constant(tokens.positions + there)) * (2 * rotary_pairs);
            turn += pair < rotary_pairs ? pair : 0;
            ready.cosine[i] = constant(turn), ready.sine[i] = constant(turn + rotary_pairs);
            ready.place[i] = constant(tokens.places + there);
        }
        return ready;
    }

    DEVICE void operator()(uint32_t, uint32_t tile, uint32_t column, const float (&c)[4], const Ready &ready) const {
        uint32_t head_tiles = kv.dim / 16, head = tile / head_tiles, t = tile % head_tiles;
        uint32_t g = lane() / 4, low = 16 * t + g, high = low + 8;
        UNROLL for (uint32_t i = 0; i < 2; i++) {
            uint32_t token = column * 8 + lane() % 4 * 2 + i;
            float a = c[i], b = c[i + 2];
            if (head < heads + kv_heads && 8 * t + g < rotary_pairs) {
                float first = sum(product_of(a, ready.cosine[i]), -product_of(b, ready.sine[i]));
                b = sum(product_of(b, ready.cosine[i]), product_of(a, ready.sine[i]));
                a = first;
            }
            if (head >= heads) {
                keep(head - heads, t, token, ready.place[i], bounded(a), bounded(b));
            } else if (token < product.tokens) {
                uint16_t *to = queries + (size_t(token) * heads + head) * kv.dim;
                to[low] = narrow(a);
                to[high] = narrow(b);
            }
        }
    }

    // Rows g and g + 8 of tile t of a key or, after all of those, a value. All lanes of a warp are in the same tile.
    DEVICE void keep(uint32_t head, uint32_t t, uint32_t token, uint32_t place, float a, float b) const {
        bool value = head >= kv_heads;
        uint32_t scale = kv.fp8 ? scale_of(larger(larger(a, -a), larger(b, -b))) : 0;
        if (token >= product.tokens) return;
        uint32_t block = place / BLOCK, at = place % BLOCK, low = 16 * t + lane() / 4;
        uint8_t *to = kv.head(block, value ? head - kv_heads : head);
        size_t first = value ? packed_at(low, at, 1) : packed_at(at, low, kv.dim / PAIR);
        size_t second = value ? packed_at(low + 8, at, 1) : packed_at(at, low + 8, kv.dim / PAIR);
        size_t numbers = value ? BLOCK * kv.dim : 0; // before these
        if (kv.fp8) {
            put_fp8(to + numbers, first, a, scale);
            put_fp8(to + numbers, second, b, scale);
            uint8_t *scales = to + 2 * BLOCK * kv.dim + numbers / SHARING;
            if (lane() / 4 == 0) scales[value ? value_scale_at(at, t) : key_scale_at(at, t)] = uint8_t(scale);
        } else {
            uint16_t *pairs = reinterpret_cast<uint16_t *>(to) + numbers;
            pairs[first] = narrow(a);
            pairs[second] = narrow(b);
        }
    }
    DEVICE static float product_of(float a, float b) { return ::product(a, b); }
};

// Gate and up: row g of a tile is a gate, row g + 8 its up. out = silu(gate) · up, for each shard.
struct GateUp {
    Product product;
    Activations out;

    DEVICE Nothing prepare(uint32_t, uint32_t) const { return {}; }
    DEVICE void operator()(uint32_t, uint32_t tile, uint32_t column, const float (&c)[4], Nothing) const {
        uint32_t shard_tiles = out.pairs * (PAIR / 8), shard = tile / shard_tiles;
        uint32_t k = tile % shard_tiles * 8 + lane() / 4;
        UNROLL for (uint32_t i = 0; i < 2; i++) {
            float gate = c[i], up = c[i + 2], below = sum(1.0f, exp2_of(gate * -1.44269504f));
            *out.at(shard, column * 8 + lane() % 4 * 2 + i, k) = narrow(::product(quotient(gate, below), up));
        }
    }
};

// Sums as they are, in f32: [shards that were summed][token][width].
struct Plain {
    Product product;
    float *out;
    uint32_t width;

    DEVICE Nothing prepare(uint32_t, uint32_t) const { return {}; }
    DEVICE void operator()(uint32_t shard, uint32_t tile, uint32_t column, const float (&c)[4], Nothing) const {
        UNROLL for (uint32_t i = 0; i < 4; i++) {
            uint32_t token = column * 8 + lane() % 4 * 2 + i % 2, row = tile * 16 + lane() / 4 + i / 2 * 8;
            if (token < product.tokens && row < width) out[(size_t(shard) * product.tokens + token) * width + row] = c[i];
        }
    }
};

#define LINEAR(name, W, Finish)                                                                  \
    KERNEL(FEW_WARPS * LANES, 2) name##_few_1(Finish a) { few<W, 1>(a.product, a); }             \
    KERNEL(FEW_WARPS * LANES, 2) name##_few_2(Finish a) { few<W, 2>(a.product, a); }             \
    KERNEL(FEW_WARPS * LANES, 2) name##_few_4(Finish a) { few<W, 4>(a.product, a); }             \
    KERNEL(FEW_WARPS * LANES, 2) name##_few_8(Finish a) { few<W, 8>(a.product, a); }             \
    KERNEL(4 * LANES, 1) name##_many_1x4(Finish a) { many<W, 1, 4>(a.product, a); }              \
    KERNEL(8 * LANES, 1) name##_many_4x2(Finish a) { many<W, 4, 2>(a.product, a); }

#if defined(WARPGROUPS)
#define WIDE(name, W, Finish, blocks, N, STAGES, FOLD)                                           \
    KERNEL(WIDE_WARPS * LANES, blocks) name(Finish a) { wide<W, N, STAGES, Fold::FOLD>(a.product, a); }
#define WIDES(W, suffix)                                                                         \
    WIDE(qkv##suffix##_wide_64, W, Qkv, 1, 64, 4, SEGMENTS)                                      \
    WIDE(qkv##suffix##_wide_128, W, Qkv, 1, 128, 6, SEGMENTS)                                    \
    WIDE(gate_up##suffix##_wide_64, W, GateUp, 2, 64, 4, NONE)                                   \
    WIDE(gate_up##suffix##_wide_256, W, GateUp, 1, 256, 4, NONE)                                 \
    WIDE(plain##suffix##_wide_64, W, Plain, 2, 64, 4, NONE)                                      \
    WIDE(plain##suffix##_wide_128, W, Plain, 1, 128, 5, SHARDS)

WIDES(Bf16, )
WIDES(Fp8, _fp8)
#endif

LINEAR(qkv, Bf16, Qkv)
LINEAR(gate_up, Bf16, GateUp)
LINEAR(plain, Bf16, Plain)
LINEAR(qkv_fp8, Fp8, Qkv)
LINEAR(gate_up_fp8, Fp8, GateUp)
LINEAR(plain_fp8, Fp8, Plain)
