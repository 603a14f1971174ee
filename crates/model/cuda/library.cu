// What stands around products that a library makes (`fast`): it takes rows of matrices and gives sums, so weights are taken out of
// their fragments before, and what our own products do with sums in registers is done after.
#include "linear.cu"

// Weights of some shards, row by row, those of a shard's columns after another's.
struct Unpack {
    const uint4 *weights; // rows: [shard][tiles][words of a tile]
    uint4 *out;           // [tiles · 16][shards][pairs · 32], bf16
    uint32_t tiles, pairs, shards;
};

// Warps of a block, each of which takes two pairs of a tile of rows.
constexpr uint32_t UNPACK_WARPS = 8;

// Bytes: weights, read (2 a parameter, 1 in FP8) and written (2). A warp's rows pass through shared memory, [row][k], so that 128 bytes
// of a row are written together; rows are 16 bytes apart from where their banks would meet.
template <class W> DEVICE void unpacked(const Unpack &a) {
    constexpr uint32_t STRIDE = PAIR + 4; // words of a row
    uint32_t tile = block().x * UNPACK_WARPS + warp(), pair = 2 * block().y, shard = block().z, g = lane() / 4, t = lane() % 4;
    uint32_t *words = reinterpret_cast<uint32_t *>(shared()) + warp() * 16 * STRIDE;
    overlap_next();
    await_inputs(); // what was unpacked before has been multiplied
    if (tile < a.tiles) {
        const uint4 *from = a.weights + (size_t(shard) * a.tiles + tile) * W::tile_words(a.pairs);
        UNROLL for (uint32_t half = 0; half < 2; half++) {
            uint4 own[W::WORDS], tiles[2];
            UNROLL for (uint32_t word = 0; word < W::WORDS; word++) own[word] = stream(from + (W::WORDS * (pair + half) + word) * LANES + lane());
            W::widen(own, tiles[0], tiles[1]);
            UNROLL for (uint32_t k = 0; k < 2; k++) {
                uint32_t *to = words + g * STRIDE + half * 16 + k * 8 + t;
                to[0] = W::scaled(from, a.pairs, g, tiles[k].x);
                to[8 * STRIDE] = W::scaled(from, a.pairs, g + 8, tiles[k].y);
                to[4] = W::scaled(from, a.pairs, g, tiles[k].z);
                to[8 * STRIDE + 4] = W::scaled(from, a.pairs, g + 8, tiles[k].w);
            }
        }
    }
    sync();
    if (tile < a.tiles) UNROLL for (uint32_t i = 0; i < 4; i++) {
        uint32_t row = i * 4 + lane() / 8;
        size_t first = (size_t(tile * 16 + row) * a.shards + shard) * a.pairs + pair; // of a row, in 64 bytes
        a.out[first * 4 + lane() % 8] = reinterpret_cast<const uint4 *>(words + row * STRIDE)[lane() % 8];
    }
}

KERNEL(UNPACK_WARPS * LANES, 4) unpack(Unpack a) { unpacked<Bf16>(a); }
KERNEL(UNPACK_WARPS * LANES, 4) unpack_fp8(Unpack a) { unpacked<Fp8>(a); }

// The end of a product whose sums are there.
template <class Finish> struct Finished {
    Finish finish;
    const float *sums; // [token][tiles · 16]
};

// Warps of a block, each of which takes a tile of rows and eight tokens.
constexpr uint32_t FINISH_WARPS = 8;

// Bytes: the sums, 4 a number, and what the product ends with.
template <class Finish> DEVICE void finished(const Finished<Finish> &a) {
    const Product &p = a.finish.product;
    uint32_t tile = block().x * FINISH_WARPS + warp(), column = block().y;
    overlap_next();
    await_inputs();
    if (tile >= p.tiles) return;
    auto ready = a.finish.prepare(tile, column);
    float sums[4];
    UNROLL for (uint32_t i = 0; i < 4; i++) {
        uint32_t token = column * 8 + lane() % 4 * 2 + i % 2, row = tile * 16 + lane() / 4 + i / 2 * 8;
        sums[i] = token < p.tokens ? a.sums[size_t(token) * (p.tiles * 16) + row] : 0.0f;
    }
    a.finish(0, tile, column, sums, ready);
}

KERNEL(FINISH_WARPS * LANES, 4) qkv_finished(Finished<Qkv> a) { finished(a); }
KERNEL(FINISH_WARPS * LANES, 4) gate_up_finished(Finished<GateUp> a) { finished(a); }
