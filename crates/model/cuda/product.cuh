// Matrix products: out[m][n] = Σ w[m][k] · x[n][k] over k, weights as the first operand and tokens as the second.
//
// Every output is a chain of `mma.sync` over k within a segment, and the sum of its segments in sequence, whatever the number
// of tokens, so a token's numbers do not depend on what runs beside it. Few tokens give each segment to a warp of its own: a matrix
// has more than one where its tiles alone are too few to keep a GPU's memory busy. The kernels below differ in who does what, not in
// the order of any sum.
#pragma once

#include "kv.cuh"

// Weights in bf16: a tile's pair of k-tiles is two loads.
struct Bf16 {
    static constexpr uint32_t WORDS = 2;
    DEVICE static uint32_t tile_words(uint32_t pairs) { return WORDS * pairs * LANES; }
    DEVICE static void widen(const uint4 (&words)[WORDS], uint4 &low, uint4 &high) { low = words[0], high = words[1]; }
    DEVICE static void scale(const uint4 *, uint32_t, float (&)[4]) {}
};

// Weights in FP8 (e4m3, arXiv 2209.05433), a scale a row: a pair of k-tiles is one load, and 16 scales stand behind a tile.
struct Fp8 {
    static constexpr uint32_t WORDS = 1;
    DEVICE static uint32_t tile_words(uint32_t pairs) { return pairs * LANES + 4; }
    static constexpr uint32_t FACTORS = 0x7b807b80; // 2^120, twice
    DEVICE static void widen(const uint4 (&words)[WORDS], uint4 &low, uint4 &high) {
        uint4 x = words[0];
        low = {first_pair(x.x, FACTORS), second_pair(x.x, FACTORS), first_pair(x.y, FACTORS), second_pair(x.y, FACTORS)};
        high = {first_pair(x.z, FACTORS), second_pair(x.z, FACTORS), first_pair(x.w, FACTORS), second_pair(x.w, FACTORS)};
    }
    DEVICE static void scale(const uint4 *tile, uint32_t pairs, float (&c)[4]) {
        const float *scales = reinterpret_cast<const float *>(tile + pairs * LANES);
        UNROLL for (uint32_t i = 0; i < 4; i++) c[i] = product(c[i], scales[lane() / 4 + i / 2 * 8]);
    }
};

struct Product {
    const uint4 *weights; // rows: [shard][tiles][words of a tile]
    const uint4 *x;       // [shard][token_tiles][pairs][lane]; in order for `wide`, packed else
    uint32_t tiles;       // of 16 rows
    uint32_t tokens;
    uint32_t token_tiles; // of 8 tokens, that x has room for
    uint32_t pairs;       // of k-tiles: k / 32
    uint32_t segment;     // pairs of a segment: even

    template <class W> DEVICE const uint4 *rows(uint32_t shard, uint32_t tile) const {
        return weights + (size_t(shard) * tiles + tile) * W::tile_words(pairs);
    }
    DEVICE const uint4 *columns(uint32_t shard, uint32_t token_tile) const {
        return x + (size_t(shard) * token_tiles + token_tile) * (pairs * LANES);
    }
    DEVICE uint32_t segments() const { return pairs == 0 ? 1 : (pairs + segment - 1) / segment; }
};

// Warps of a block of `few`.
constexpr uint32_t FEW_WARPS = 8;

DEVICE float4 added(float4 a, float4 b) { return {sum(a.x, b.x), sum(a.y, b.y), sum(a.z, b.z), sum(a.w, b.w)}; }

// Few tokens (8 · NT at most): bound by reading the weights once, each by one warp that keeps loads under way. The segments
// of a tile of rows are a warp's each, and the first of these adds up what they found.
//
// Bytes: all weights, 2 a parameter; packed tokens come out of the caches, NT / 2 bytes for each byte of weights.
template <class W, int NT, class Finish> DEVICE void few(const Product &p, const Finish &finish) {
    // Pairs of tiles of weights that a warp has under way: 8 loads of 16 bytes a lane, 4 KiB a warp.
    constexpr uint32_t AHEAD = (NT < 8 ? 8 : 4) / W::WORDS;
    uint32_t segments = p.segments(), together = segments < FEW_WARPS ? segments : FEW_WARPS;
    uint32_t tile = block().x * (FEW_WARPS / together) + warp() / together, shard = block().z;
    uint32_t first = warp() % together;
    bool works = warp() / together < FEW_WARPS / together && tile < p.tiles;
    float4 *found = reinterpret_cast<float4 *>(shared()) + thread(); // [NT][thread]
    overlap_next();
    for (uint32_t round = 0; round * together < segments; round++) {
        uint32_t segment = round * together + first;
        float sums[NT][4];
        UNROLL for (int j = 0; j < NT; j++) UNROLL for (int i = 0; i < 4; i++) sums[j][i] = 0;
        if (works && segment < segments) {
            uint32_t start = segment * p.segment;
            uint32_t end = start + p.segment < p.pairs ? start + p.segment : p.pairs;
            const uint4 *w = p.template rows<W>(shard, tile) + lane(), *x = p.columns(shard, 0) + lane();
            uint4 ahead[AHEAD][W::WORDS];
            auto load = [&](uint32_t i, uint32_t at) {
                if (at < end) UNROLL for (uint32_t word = 0; word < W::WORDS; word++)
                    ahead[i][word] = stream(w + (W::WORDS * at + word) * LANES);
            };
            UNROLL for (uint32_t i = 0; i < AHEAD; i++) load(i, start + i);
            if (round == 0) await_inputs();
            for (uint32_t at = start; at < end; at += AHEAD) {
                UNROLL for (uint32_t i = 0; i < AHEAD; i++) if (at + i < end) {
                    uint4 low, high;
                    W::widen(ahead[i], low, high);
                    UNROLL for (int j = 0; j < NT; j++) {
                        uint4 columns = x[(j * p.pairs + at + i) * LANES];
                        mma(sums[j], low, columns.x, columns.y);
                        mma(sums[j], high, columns.z, columns.w);
                    }
                    load(i, at + i + AHEAD);
                }
            }
        } else if (round == 0) {
            await_inputs();
        }
        UNROLL for (int j = 0; j < NT; j++) {
            float4 now = {sums[j][0], sums[j][1], sums[j][2], sums[j][3]};
            found[j * FEW_WARPS * LANES] = first == 0 && round > 0 ? added(found[j * FEW_WARPS * LANES], now) : now;
        }
        if (together == 1) continue;
        sync();
        if (first == 0) for (uint32_t next = 1; next < together && round * together + next < segments; next++)
            UNROLL for (int j = 0; j < NT; j++) {
                float4 *to = found + j * FEW_WARPS * LANES;
                *to = added(*to, to[next * LANES]);
            }
        sync();
    }
    if (works && first == 0) UNROLL for (int j = 0; j < NT; j++) {
        float4 total = found[j * FEW_WARPS * LANES];
        float sums[4] = {total.x, total.y, total.z, total.w};
        W::scale(p.template rows<W>(shard, tile), p.pairs, sums);
        finish(shard, tile, uint32_t(j), sums);
    }
}

// A warp's part of a block of `many`: 4 tiles of rows, 8 tiles of tokens; 128 sums a lane.
constexpr int WARP_TILES = 4, WARP_COLUMNS = 8;
// Pairs of k-tiles that are on their way from memory to the block.
constexpr int STAGES = 4;

// Many tokens: bound by multiplication. A block of WM x WN warps takes 64 · WM rows and 64 · WN tokens; a pair of k-tiles
// comes into shared memory once for all of them, STAGES ahead, and stands there as it stood in global memory, so that
// fragments are read without bank conflicts. Sums over the segments before wait in shared memory.
//
// Operations: a warp reads 16 fragments, 8 KiB, for 64 products of 16 x 8 x 16, twice what shared memory would bound.
template <class W, int WM, int WN, class Finish> DEVICE void many(const Product &p, const Finish &finish) {
    constexpr uint32_t THREADS = WM * WN * LANES, ROWS = WM * WARP_TILES, COLUMNS = WN * WARP_COLUMNS;
    constexpr uint32_t WORDS = W::WORDS * ROWS * LANES, STAGE = WORDS + COLUMNS * LANES; // in 16 bytes
    uint4 *stages = reinterpret_cast<uint4 *>(shared());
    float *totals = reinterpret_cast<float *>(stages + STAGES * STAGE) + thread(); // [sum][thread]
    uint32_t shard = block().z, first_tile = block().y * ROWS, first_column = block().x * COLUMNS;

    auto copy_rows = [&](uint32_t pair) {
        uint4 *to = stages + pair % STAGES * STAGE;
        for (uint32_t i = thread(); i < WORDS; i += THREADS) {
            uint32_t tile = first_tile + i / (W::WORDS * LANES), at = i % (W::WORDS * LANES);
            copy_ahead(to + i, p.template rows<W>(shard, tile < p.tiles ? tile : p.tiles - 1) + pair * (W::WORDS * LANES) + at);
        }
    };
    auto copy_columns = [&](uint32_t pair) {
        uint4 *to = stages + pair % STAGES * STAGE + WORDS;
        for (uint32_t i = thread(); i < COLUMNS * LANES; i += THREADS) {
            uint32_t column = first_column + i / LANES;
            copy_ahead(to + i,
                       p.columns(shard, column < p.token_tiles ? column : p.token_tiles - 1) + pair * LANES + i % LANES);
        }
    };

    overlap_next();
    UNROLL for (uint32_t pair = 0; pair < STAGES - 1; pair++) if (pair < p.pairs) copy_rows(pair);
    await_inputs();
    UNROLL for (uint32_t pair = 0; pair < STAGES - 1; pair++) {
        if (pair < p.pairs) copy_columns(pair);
        end_copies(); // the first group holds all rows copied so far, too
    }

    float sums[WARP_TILES][WARP_COLUMNS][4];
    UNROLL for (int a = 0; a < WARP_TILES; a++) UNROLL for (int b = 0; b < WARP_COLUMNS; b++) UNROLL for (int i = 0; i < 4; i++)
        sums[a][b][i] = 0;
    uint32_t own_tile = warp() % WM * WARP_TILES, own_column = warp() / WM * WARP_COLUMNS;
    for (uint32_t pair = 0; pair < p.pairs; pair++) {
        if (pair % p.segment == 0 && pair > 0) {
            UNROLL for (int a = 0; a < WARP_TILES; a++) UNROLL for (int b = 0; b < WARP_COLUMNS; b++)
                UNROLL for (int i = 0; i < 4; i++) {
                    float *total = totals + ((a * WARP_COLUMNS + b) * 4 + i) * THREADS;
                    *total = pair == p.segment ? sums[a][b][i] : sum(*total, sums[a][b][i]);
                    sums[a][b][i] = 0;
                }
        }
        await_copies<STAGES - 2>();
        sync();
        if (pair + STAGES - 1 < p.pairs) {
            copy_rows(pair + STAGES - 1);
            copy_columns(pair + STAGES - 1);
        }
        end_copies();
        const uint4 *rows = stages + pair % STAGES * STAGE + lane(), *columns = rows + WORDS;
        uint4 x[WARP_COLUMNS];
        UNROLL for (int b = 0; b < WARP_COLUMNS; b++) x[b] = columns[(own_column + b) * LANES];
        UNROLL for (int a = 0; a < WARP_TILES; a++) {
            uint4 words[W::WORDS], low, high;
            UNROLL for (uint32_t word = 0; word < W::WORDS; word++) words[word] = rows[(W::WORDS * (own_tile + a) + word) * LANES];
            W::widen(words, low, high);
            UNROLL for (int b = 0; b < WARP_COLUMNS; b++) {
                mma(sums[a][b], low, x[b].x, x[b].y);
                mma(sums[a][b], high, x[b].z, x[b].w);
            }
        }
    }
    await_copies<0>();
    bool cut = p.pairs > p.segment;
    UNROLL for (int a = 0; a < WARP_TILES; a++) UNROLL for (int b = 0; b < WARP_COLUMNS; b++) {
        UNROLL for (int i = 0; i < 4; i++) if (cut)
            sums[a][b][i] = sum(totals[((a * WARP_COLUMNS + b) * 4 + i) * THREADS], sums[a][b][i]);
        uint32_t tile = first_tile + own_tile + a, column = first_column + own_column + b;
        if (tile >= p.tiles || column * 8 >= p.tokens) continue;
        W::scale(p.template rows<W>(shard, tile), p.pairs, sums[a][b]);
        finish(shard, tile, column, sums[a][b]);
    }
}

#if defined(WARPGROUPS)
// Tiles of rows of a block of `wide`: one for each of its warps.
constexpr uint32_t WIDE_WARPS = 8;
// Pairs of k-tiles that are in shared memory, of which two are being multiplied.
constexpr uint32_t WIDE_STAGES = 8;

// Many tokens where warpgroups multiply: N a block, by 128 rows. Weights come through shared memory as they stood in global memory,
// so that a warp has its fragments by one load; tokens are read from there by the tensor cores themselves. Products of a pair of
// k-tiles run while the fragments of the next are read and a later pair is asked for.
//
// Operations: a block reads 64 · (128 + N) bytes for each pair's 8192 · N operations. Neighbouring blocks have the same rows, so that
// weights come from memory once. Where there are segments (`CUT`), those before wait in registers.
template <class W, int N, bool CUT, class Finish> DEVICE void wide(const Product &p, const Finish &finish) {
    constexpr uint32_t THREADS = WIDE_WARPS * LANES, COLUMNS = N / 8;
    constexpr uint32_t WORDS = W::WORDS * WIDE_WARPS * LANES, STAGE = WORDS + COLUMNS * LANES; // in 16 bytes
    constexpr uint32_t ROW_COPIES = WORDS / THREADS, COLUMN_COPIES = COLUMNS / WIDE_WARPS;
    uint4 *stages = reinterpret_cast<uint4 *>(shared());
    uint32_t shard = block().z, first_tile = block().y * WIDE_WARPS, first_column = block().x * COLUMNS;

    const uint4 *rows[ROW_COPIES], *columns[COLUMN_COPIES];
    UNROLL for (uint32_t i = 0; i < ROW_COPIES; i++) {
        uint32_t at = thread() + i * THREADS, tile = first_tile + at / (W::WORDS * LANES);
        rows[i] = p.template rows<W>(shard, tile < p.tiles ? tile : p.tiles - 1) + at % (W::WORDS * LANES);
    }
    UNROLL for (uint32_t i = 0; i < COLUMN_COPIES; i++) {
        uint32_t column = first_column + warp() + i * WIDE_WARPS;
        columns[i] = p.columns(shard, column < p.token_tiles ? column : p.token_tiles - 1) + lane();
    }
    auto copy_rows = [&](uint32_t pair) {
        uint4 *to = stages + pair % WIDE_STAGES * STAGE + thread();
        UNROLL for (uint32_t i = 0; i < ROW_COPIES; i++) copy_ahead(to + i * THREADS, rows[i] + pair * (W::WORDS * LANES));
    };
    auto copy_columns = [&](uint32_t pair) {
        // Sixteens of bytes change places as `columns_at` wants it.
        uint4 *to = stages + pair % WIDE_STAGES * STAGE + WORDS + warp() * LANES + (lane() ^ lane() / 8 % 4);
        UNROLL for (uint32_t i = 0; i < COLUMN_COPIES; i++) copy_ahead(to + i * THREADS, columns[i] + pair * LANES);
    };

    constexpr uint32_t AHEAD = WIDE_STAGES - 2;
    overlap_next();
    UNROLL for (uint32_t pair = 0; pair < AHEAD; pair++) if (pair < p.pairs) copy_rows(pair);
    await_inputs();
    UNROLL for (uint32_t pair = 0; pair < AHEAD; pair++) {
        if (pair < p.pairs) copy_columns(pair);
        end_copies(); // the first group holds all rows copied so far, too
    }

    float sums[COLUMNS][4], totals[CUT ? COLUMNS : 1][4];
    UNROLL for (uint32_t j = 0; j < COLUMNS; j++) UNROLL for (uint32_t i = 0; i < 4; i++) sums[j][i] = 0;
    // Fragments are read by products that run until the next pair's have begun.
    uint4 fragments[2][2];
    auto multiply = [&](uint32_t pair, uint4(&own)[2]) {
        await_copies<AHEAD - 1>();
        show_copies();
        await_products<1>(); // those of the pair before the last: their stage is free
        sync();
        const uint4 *stage = stages + pair % WIDE_STAGES * STAGE;
        uint4 words[W::WORDS];
        UNROLL for (uint32_t word = 0; word < W::WORDS; word++) words[word] = stage[(W::WORDS * warp() + word) * LANES + lane()];
        W::widen(words, own[0], own[1]);
        Columns tokens = columns_at(stage + WORDS);
        begin_products();
        products<N>(sums, own[0], tokens);
        products<N>(sums, own[1], upper_half(tokens));
        end_products();
        if (pair + AHEAD < p.pairs) {
            copy_rows(pair + AHEAD);
            copy_columns(pair + AHEAD);
        }
        end_copies();
    };
    auto begin_segment = [&](uint32_t pair) {
        if constexpr (CUT) if (pair % p.segment == 0 && pair > 0) {
            await_products(sums);
            UNROLL for (uint32_t j = 0; j < COLUMNS; j++) UNROLL for (uint32_t i = 0; i < 4; i++) {
                totals[j][i] = pair == p.segment ? sums[j][i] : sum(totals[j][i], sums[j][i]);
                sums[j][i] = 0;
            }
        }
    };
    uint32_t pair = 0;
    for (; pair + 2 <= p.pairs; pair += 2) {
        begin_segment(pair);
        multiply(pair, fragments[0]);
        multiply(pair + 1, fragments[1]);
    }
    if (pair < p.pairs) {
        begin_segment(pair);
        multiply(pair, fragments[0]);
    }
    await_products(sums);
    if constexpr (CUT) if (p.pairs > p.segment)
        UNROLL for (uint32_t j = 0; j < COLUMNS; j++) UNROLL for (uint32_t i = 0; i < 4; i++) sums[j][i] = sum(totals[j][i], sums[j][i]);
    await_copies<0>();
    uint32_t tile = first_tile + warp();
    UNROLL for (uint32_t j = 0; j < COLUMNS; j++) {
        if (tile >= p.tiles || (first_column + j) * 8 >= p.tokens) continue;
        W::scale(p.template rows<W>(shard, tile), p.pairs, sums[j]);
        finish(shard, tile, first_column + j, sums[j]);
    }
}
#endif
