// The four products of a layer, and the head: what each does with its sums. A fragment of these holds rows g and g + 8 of a
// tile and two tokens, so weights are packed with what belongs together 8 rows apart: the two halves of a rotated pair, a gate
// and its up. Then everything elementwise happens in registers and no sum is written before it is finished.
#include "product.cuh"

struct Tokens {
    const uint32_t *positions; // [token], absolute
    const uint32_t *places;    // [token], KV block · 32 + position in it
};

// One layer's keys and values: blocks of [KV head]{K: packed [32 keys][dim], V: packed [dim][32 keys]}, bf16.
struct Kv {
    uint16_t *data;
    uint64_t stride; // bf16 from one block to the next
    uint32_t dim;    // padded

    DEVICE uint16_t *keys(uint32_t block, uint32_t head) const { return data + block * stride + size_t(head) * (2 * BLOCK * dim); }
    DEVICE uint16_t *values(uint32_t block, uint32_t head) const { return keys(block, head) + BLOCK * dim; }
};

// A KV block holds numbers only: what is masked is multiplied by 0, which NaN and infinity would survive.
DEVICE uint16_t bounded(float x) { return narrow(smaller(larger(x, -3.3e38f), 3.3e38f)); }

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

    DEVICE void operator()(uint32_t, uint32_t tile, uint32_t column, const float (&c)[4]) const {
        uint32_t head_tiles = kv.dim / 16, head = tile / head_tiles, t = tile % head_tiles;
        uint32_t g = lane() / 4, low = 16 * t + g, high = low + 8;
        UNROLL for (uint32_t i = 0; i < 2; i++) {
            uint32_t token = column * 8 + lane() % 4 * 2 + i;
            if (token >= product.tokens) continue;
            float a = c[i], b = c[i + 2];
            uint32_t pair = 8 * t + g;
            if (head < heads + kv_heads && pair < rotary_pairs) {
                const float *turn = turns + size_t(tokens.positions[token]) * (2 * rotary_pairs) + pair;
                float cosine = turn[0], sine = turn[rotary_pairs];
                float first = sum(product_of(a, cosine), -product_of(b, sine));
                b = sum(product_of(b, cosine), product_of(a, sine));
                a = first;
            }
            if (head < heads) {
                uint16_t *to = queries + (size_t(token) * heads + head) * kv.dim;
                to[low] = narrow(a);
                to[high] = narrow(b);
                continue;
            }
            uint32_t block = tokens.places[token] / BLOCK, at = tokens.places[token] % BLOCK;
            if (head < heads + kv_heads) {
                uint16_t *keys = kv.keys(block, head - heads);
                keys[packed_at(at, low, kv.dim / PAIR)] = bounded(a);
                keys[packed_at(at, high, kv.dim / PAIR)] = bounded(b);
            } else {
                uint16_t *values = kv.values(block, head - heads - kv_heads);
                values[packed_at(low, at, 1)] = bounded(a);
                values[packed_at(high, at, 1)] = bounded(b);
            }
        }
    }
    DEVICE static float product_of(float a, float b) { return ::product(a, b); }
};

// Gate and up: row g of a tile is a gate, row g + 8 its up. out = silu(gate) · up, packed, for each shard.
struct GateUp {
    Product product;
    uint16_t *out; // packed: [shard][token_tiles][out_pairs]
    uint32_t out_pairs;

    DEVICE void operator()(uint32_t, uint32_t tile, uint32_t column, const float (&c)[4]) const {
        uint32_t shard_tiles = out_pairs * (PAIR / 8), shard = tile / shard_tiles;
        uint32_t k = tile % shard_tiles * 8 + lane() / 4;
        uint16_t *to = out + size_t(shard) * product.token_tiles * out_pairs * (LANES * 8);
        UNROLL for (uint32_t i = 0; i < 2; i++) {
            float gate = c[i], up = c[i + 2], below = sum(1.0f, exp2_of(gate * -1.44269504f));
            to[packed_at(column * 8 + lane() % 4 * 2 + i, k, out_pairs)] = narrow(::product(quotient(gate, below), up));
        }
    }
};

// Sums as they are, in f32: [shard][token][width].
struct Plain {
    Product product;
    float *out;
    uint32_t width;

    DEVICE void operator()(uint32_t shard, uint32_t tile, uint32_t column, const float (&c)[4]) const {
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

LINEAR(qkv, Bf16, Qkv)
LINEAR(gate_up, Bf16, GateUp)
LINEAR(plain, Bf16, Plain)
LINEAR(qkv_fp8, Fp8, Qkv)
LINEAR(gate_up_fp8, Fp8, GateUp)
LINEAR(plain_fp8, Fp8, Plain)
