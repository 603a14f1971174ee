// Matrix products: out[m][n] = Σ w[m][k] · x[n][k] over k, weights as the first operand and tokens as the second.
//
// Every output is a chain of `mma.sync` over k within a segment, and the sum of its segments in sequence, whatever the number
// of tokens, so a token's numbers do not depend on what runs beside it. The two kernels below differ in who does what, not in
// the order of any sum.
#pragma once

#include "base.cuh"

struct Product {
    const uint4 *weights; // rows: [shard][tiles][2 · pairs][lane]
    const uint4 *x;       // packed: [shard][token_tiles][pairs][lane]
    uint32_t tiles;       // of 16 rows
    uint32_t tokens;
    uint32_t token_tiles; // of 8 tokens, that x has room for
    uint32_t pairs;       // of k-tiles: k / 32

    DEVICE const uint4 *rows(uint32_t shard, uint32_t tile) const {
        return weights + (size_t(shard) * tiles + tile) * (2 * pairs * LANES);
    }
    DEVICE const uint4 *columns(uint32_t shard, uint32_t token_tile) const {
        return x + (size_t(shard) * token_tiles + token_tile) * (pairs * LANES);
    }
    DEVICE uint32_t segments() const { return pairs == 0 ? 1 : (pairs + SEGMENT_PAIRS - 1) / SEGMENT_PAIRS; }
};

// Warps of a block of `few`.
constexpr uint32_t FEW_WARPS = 8;

DEVICE float4 added(float4 a, float4 b) { return {sum(a.x, b.x), sum(a.y, b.y), sum(a.z, b.z), sum(a.w, b.w)}; }

// Few tokens (8 · NT at most): bound by reading the weights once, each by one warp that keeps loads under way. The segments
// of a tile of rows are a warp's each, and the first of these adds up what they found.
//
// Bytes: all weights, 2 a parameter; packed tokens come out of the caches, NT / 2 bytes for each byte of weights.
template <int NT, class Finish> DEVICE void few(const Product &p, const Finish &finish) {
    // Pairs of tiles of weights that a warp has under way: 2 · 4 loads of 16 bytes a lane, 4 KiB a warp.
    constexpr uint32_t AHEAD = NT < 8 ? 4 : 2;
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
            uint32_t start = segment * SEGMENT_PAIRS;
            uint32_t end = start + SEGMENT_PAIRS < p.pairs ? start + SEGMENT_PAIRS : p.pairs;
            const uint4 *w = p.rows(shard, tile) + lane(), *x = p.columns(shard, 0) + lane();
            uint4 ahead[AHEAD][2];
            auto load = [&](uint32_t i, uint32_t at) {
                if (at >= end) return;
                ahead[i][0] = stream(w + (2 * at) * LANES);
                ahead[i][1] = stream(w + (2 * at + 1) * LANES);
            };
            UNROLL for (uint32_t i = 0; i < AHEAD; i++) load(i, start + i);
            if (round == 0) await_inputs();
            for (uint32_t at = start; at < end; at += AHEAD) {
                UNROLL for (uint32_t i = 0; i < AHEAD; i++) if (at + i < end) {
                    UNROLL for (int j = 0; j < NT; j++) {
                        uint4 columns = x[(j * p.pairs + at + i) * LANES];
                        mma(sums[j], ahead[i][0], columns.x, columns.y);
                        mma(sums[j], ahead[i][1], columns.z, columns.w);
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
        const float sums[4] = {total.x, total.y, total.z, total.w};
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
template <int WM, int WN, class Finish> DEVICE void many(const Product &p, const Finish &finish) {
    constexpr uint32_t THREADS = WM * WN * LANES, ROWS = WM * WARP_TILES, COLUMNS = WN * WARP_COLUMNS;
    constexpr uint32_t STAGE = (2 * ROWS + COLUMNS) * LANES; // in 16 bytes
    uint4 *stages = reinterpret_cast<uint4 *>(shared());
    float *totals = reinterpret_cast<float *>(stages + STAGES * STAGE) + thread(); // [sum][thread]
    uint32_t shard = block().z, first_tile = block().x * ROWS, first_column = block().y * COLUMNS;

    auto copy_rows = [&](uint32_t pair) {
        uint4 *to = stages + pair % STAGES * STAGE;
        for (uint32_t i = thread(); i < 2 * ROWS * LANES; i += THREADS) {
            uint32_t tile = first_tile + i / (2 * LANES);
            copy_ahead(to + i, p.rows(shard, tile < p.tiles ? tile : p.tiles - 1) + pair * (2 * LANES) + i % (2 * LANES));
        }
    };
    auto copy_columns = [&](uint32_t pair) {
        uint4 *to = stages + pair % STAGES * STAGE + 2 * ROWS * LANES;
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
        if (pair % SEGMENT_PAIRS == 0 && pair > 0) {
            UNROLL for (int a = 0; a < WARP_TILES; a++) UNROLL for (int b = 0; b < WARP_COLUMNS; b++)
                UNROLL for (int i = 0; i < 4; i++) {
                    float *total = totals + ((a * WARP_COLUMNS + b) * 4 + i) * THREADS;
                    *total = pair == SEGMENT_PAIRS ? sums[a][b][i] : sum(*total, sums[a][b][i]);
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
        const uint4 *rows = stages + pair % STAGES * STAGE + lane(), *columns = rows + 2 * ROWS * LANES;
        uint4 x[WARP_COLUMNS];
        UNROLL for (int b = 0; b < WARP_COLUMNS; b++) x[b] = columns[(own_column + b) * LANES];
        UNROLL for (int a = 0; a < WARP_TILES; a++) {
            uint4 low = rows[(2 * (own_tile + a)) * LANES], high = rows[(2 * (own_tile + a) + 1) * LANES];
            UNROLL for (int b = 0; b < WARP_COLUMNS; b++) {
                mma(sums[a][b], low, x[b].x, x[b].y);
                mma(sums[a][b], high, x[b].z, x[b].w);
            }
        }
    }
    await_copies<0>();
    bool cut = p.pairs > SEGMENT_PAIRS;
    UNROLL for (int a = 0; a < WARP_TILES; a++) UNROLL for (int b = 0; b < WARP_COLUMNS; b++) {
        UNROLL for (int i = 0; i < 4; i++) if (cut)
            sums[a][b][i] = sum(totals[((a * WARP_COLUMNS + b) * 4 + i) * THREADS], sums[a][b][i]);
        uint32_t tile = first_tile + own_tile + a, column = first_column + own_column + b;
        if (tile < p.tiles && column * 8 < p.tokens) finish(shard, tile, column, sums[a][b]);
    }
}

template <int WM, int WN> constexpr uint32_t many_shared_bytes() {
    return STAGES * (2 * WM * WARP_TILES + WN * WARP_COLUMNS) * LANES * 16 + WARP_TILES * WARP_COLUMNS * 4 * WM * WN * LANES * 4;
}
