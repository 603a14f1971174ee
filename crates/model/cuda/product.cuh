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
    DEVICE static uint32_t scaled(const uint4 *, uint32_t, uint32_t, uint32_t word) { return word; }
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
        UNROLL for (uint32_t i = 0; i < 4; i++) c[i] = product(c[i], scales(tile, pairs)[lane() / 4 + i / 2 * 8]);
    }
    // Two weights of a row of the tile, rounded to bf16.
    DEVICE static uint32_t scaled(const uint4 *tile, uint32_t pairs, uint32_t row, uint32_t word) {
        float scale = scales(tile, pairs)[row];
        return pair_of(product(::widen(uint16_t(word)), scale), product(::widen(uint16_t(word >> 16)), scale));
    }
    DEVICE static const float *scales(const uint4 *tile, uint32_t pairs) { return reinterpret_cast<const float *>(tile + pairs * LANES); }
};

struct Product {
    const uint4 *weights; // rows: [shard][tiles][words of a tile]
    const uint4 *x;       // [shard][token_tiles][pairs][lane]; in order for `wide`, packed else
    uint32_t tiles;       // of 16 rows
    uint32_t tokens;
    uint32_t token_tiles; // of 8 tokens, that x has room for
    uint32_t pairs;       // of k-tiles: k / 32, an even number
    uint32_t segment;     // pairs of a segment: a multiple of 4
    uint32_t together;    // shards that a block sums, where it can: 1, 2 or 4

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
    // Pairs of tiles of weights that a warp has under way: 16 loads of 16 bytes a lane, 8 KiB a warp, if registers have the room.
    constexpr uint32_t AHEAD = (NT < 2 ? 16 : NT < 8 ? 8 : 4) / W::WORDS;
    uint32_t segments = p.segments(), together = segments < FEW_WARPS ? segments : FEW_WARPS;
    uint32_t tile = block().x * (FEW_WARPS / together) + warp() / together, shard = block().z;
    uint32_t first = warp() % together;
    bool works = warp() / together < FEW_WARPS / together && tile < p.tiles;
    float4 *found = reinterpret_cast<float4 *>(shared()) + thread(); // [NT][thread]
    overlap_next();
    constexpr int READY = NT < 4 ? NT : 0; // what registers have room for
    decltype(finish.prepare(0u, 0u)) ready[READY + 1];
    UNROLL for (int j = 0; j < READY; j++) ready[j] = finish.prepare(tile, uint32_t(j));
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
        finish(shard, tile, uint32_t(j), sums, j < READY ? ready[j] : finish.prepare(tile, uint32_t(j)));
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
        finish(shard, tile, column, sums[a][b], finish.prepare(tile, column));
    }
}

#if defined(WARPGROUPS)
// Tiles of rows of a block of `wide`: one for each of its warps.
constexpr uint32_t WIDE_WARPS = 8;
// Pairs of k-tiles of a stage.
constexpr uint32_t WIDE_PAIRS = 2;

// What becomes of a block's sums: they are an output's, or those of its segments in sequence, or those of up to four shards, which
// are leaves of one node of the tree.
enum class Fold { NONE, SEGMENTS, SHARDS };

// Finishes what a warp has of all tokens; what eight columns need is read together.
template <int COLUMNS, class Finish>
DEVICE void finish_columns(const Product &p, const Finish &finish, uint32_t tile, uint32_t first_column, const float (&sums)[COLUMNS][4]) {
    constexpr uint32_t TOGETHER = 8;
    UNROLL for (uint32_t first = 0; first < COLUMNS; first += TOGETHER) {
        decltype(finish.prepare(0u, 0u)) ready[TOGETHER];
        UNROLL for (uint32_t j = 0; j < TOGETHER; j++) ready[j] = finish.prepare(tile, first_column + first + j);
        UNROLL for (uint32_t j = 0; j < TOGETHER; j++)
            if ((first_column + first + j) * 8 < p.tokens) finish(block().z, tile, first_column + first + j, sums[first + j], ready[j]);
    }
}

// What a block of `wide` multiplies, on its way into shared memory: stage after stage of a shard's rows and tokens, then those of the
// next shard.
template <class W, int N> struct Supply {
    static constexpr uint32_t THREADS = WIDE_WARPS * LANES, COLUMNS = N / 8;
    static constexpr uint32_t WORDS = W::WORDS * WIDE_WARPS * LANES; // of a pair's rows, in 16 bytes
    static constexpr uint32_t HALF = WORDS + COLUMNS * LANES, STAGE = WIDE_PAIRS * HALF;
    static constexpr uint32_t ROW_COPIES = WORDS / THREADS, COLUMN_COPIES = COLUMNS / WIDE_WARPS;
    const Product &p;
    const uint4 *rows[ROW_COPIES], *columns[COLUMN_COPIES];
    uint4 *to_rows, *to_columns;
    uint32_t copied = 0, shards; // pairs of this shard; shards that are left

    DEVICE Supply(const Product &p, uint32_t shard, uint32_t shards, uint32_t first_tile, uint32_t first_column)
        : p(p), shards(p.pairs == 0 ? 0 : shards) {
        UNROLL for (uint32_t i = 0; i < ROW_COPIES; i++) {
            uint32_t at = thread() + i * THREADS, own = first_tile + at / (W::WORDS * LANES);
            rows[i] = p.template rows<W>(shard, own < p.tiles ? own : p.tiles - 1) + at % (W::WORDS * LANES);
        }
        UNROLL for (uint32_t i = 0; i < COLUMN_COPIES; i++) {
            uint32_t column = first_column + warp() + i * WIDE_WARPS;
            columns[i] = p.columns(shard, column < p.token_tiles ? column : p.token_tiles - 1) + lane();
        }
        to_rows = reinterpret_cast<uint4 *>(shared()) + thread();
        // Sixteens of bytes change places as `columns_at` wants it.
        to_columns = reinterpret_cast<uint4 *>(shared()) + WORDS + warp() * LANES + (lane() ^ lane() / 8 % 4);
    }

    DEVICE void copy_rows(uint32_t stage, bool last) {
        UNROLL for (uint32_t i = 0; i < ROW_COPIES; i++) {
            UNROLL for (uint32_t half = 0; half < WIDE_PAIRS; half++)
                copy_ahead(to_rows + stage * STAGE + half * HALF + i * THREADS, rows[i] + half * (W::WORDS * LANES));
            rows[i] += WIDE_PAIRS * W::WORDS * LANES;
            if (last) rows[i] += size_t(p.tiles) * W::tile_words(p.pairs) - p.pairs * (W::WORDS * LANES);
        }
    }
    DEVICE void copy_columns(uint32_t stage, bool last) {
        UNROLL for (uint32_t i = 0; i < COLUMN_COPIES; i++) {
            UNROLL for (uint32_t half = 0; half < WIDE_PAIRS; half++)
                copy_ahead(to_columns + stage * STAGE + half * HALF + i * THREADS, columns[i] + half * LANES);
            columns[i] += WIDE_PAIRS * LANES;
            if (last) columns[i] += size_t(p.token_tiles - 1) * (p.pairs * LANES);
        }
    }
    // Goes on by a stage, into which `use` copies.
    template <class Use> DEVICE void next(const Use &use) {
        if (shards == 0) return;
        copied += WIDE_PAIRS;
        bool last = copied == p.pairs;
        use(last);
        if (last) copied = 0, shards--;
    }
    DEVICE void copy(uint32_t stage) {
        next([&](bool last) { copy_rows(stage, last), copy_columns(stage, last); });
    }
    // Rows are there before there are inputs.
    template <uint32_t AHEAD> DEVICE void begin() {
        uint32_t all = shards;
        UNROLL for (uint32_t stage = 0; stage < AHEAD; stage++) next([&](bool last) { copy_rows(stage, last); });
        await_inputs();
        copied = 0, shards = all;
        UNROLL for (uint32_t stage = 0; stage < AHEAD; stage++) {
            next([&](bool last) { copy_columns(stage, last); });
            end_copies(); // the first group holds all rows copied so far, too
        }
    }
};

// What a warp adds up, and what it has folded.
template <int COLUMNS, Fold FOLD> struct Sums {
    float now[COLUMNS][4] = {}, folded[FOLD == Fold::NONE ? 1 : COLUMNS][4] = {};

    template <class Use> DEVICE static void each(const Use &use) {
        UNROLL for (int j = 0; j < COLUMNS; j++) UNROLL for (int i = 0; i < 4; i++) use(j, i);
    }
    // A segment is there; not the last.
    DEVICE void fold_segment(bool first) {
        await_products(now);
        each([&](int j, int i) {
            folded[j][i] = first ? now[j][i] : sum(folded[j][i], now[j][i]);
            now[j][i] = 0;
        });
    }
    // One of up to four shards is there. The sum of the first two waits in shared memory, [sum][thread].
    DEVICE void fold_shard(uint32_t index, uint32_t together, float *waiting) {
        each([&](int j, int i) {
            float *of_two = waiting + (j * 4 + i) * threads();
            folded[j][i] = index % 2 == 0 ? now[j][i] : sum(folded[j][i], now[j][i]);
            if (index == 1 && together > 2) *of_two = folded[j][i];
            if (index == 3) folded[j][i] = sum(*of_two, folded[j][i]);
            now[j][i] = 0;
        });
    }
};

// Many tokens where warpgroups multiply: N a block, by 128 rows. Weights come through shared memory as they stood in global memory,
// so that a warp has its fragments by one load; tokens are read from there by the tensor cores themselves. Products of a stage run
// while the fragments of the next are read and a later one is asked for.
//
// Operations: a block reads 64 · (128 + N) bytes for each pair's 8192 · N operations. Neighbouring blocks have the same rows, so that
// weights come from memory once. Seen on an H200, of 720 TFLOP/s of the vendor's library: 640 with N = 256, 300 to 460 with 128.
template <class W, int N, int STAGES, Fold FOLD, class Finish> DEVICE void wide(const Product &p, const Finish &finish) {
    constexpr uint32_t COLUMNS = N / 8, AHEAD = STAGES - 2;
    using From = Supply<W, N>;
    uint32_t together = FOLD == Fold::SHARDS ? p.together : 1, shard = block().z * together;
    uint32_t first_tile = block().y * WIDE_WARPS, first_column = block().x * COLUMNS, tile = first_tile + warp();
    From supply(p, shard, together, first_tile, first_column);
    overlap_next();
    supply.template begin<AHEAD>();

    Sums<COLUMNS, FOLD> sums;
    // Fragments are read by products that run until the next stage's have begun.
    uint4 fragments[2][WIDE_PAIRS][2];
    uint32_t now = 0, later = AHEAD; // stages
    auto multiply = [&](uint4(&own)[WIDE_PAIRS][2]) {
        await_copies<AHEAD - 1>();
        show_copies();
        await_products<1>(); // those of the stage before the last: it is free
        sync();
        const uint4 *stage = reinterpret_cast<uint4 *>(shared()) + now * From::STAGE;
        UNROLL for (uint32_t half = 0; half < WIDE_PAIRS; half++) {
            uint4 words[W::WORDS];
            UNROLL for (uint32_t word = 0; word < W::WORDS; word++)
                words[word] = stage[half * From::HALF + (W::WORDS * warp() + word) * LANES + lane()];
            W::widen(words, own[half][0], own[half][1]);
        }
        begin_products();
        UNROLL for (uint32_t half = 0; half < WIDE_PAIRS; half++) {
            Columns tokens = columns_at(stage + half * From::HALF + From::WORDS);
            products<N>(sums.now, own[half][0], tokens);
            products<N>(sums.now, own[half][1], upper_half(tokens));
        }
        end_products();
        supply.copy(later);
        end_copies();
        now = now + 1 == STAGES ? 0 : now + 1;
        later = later + 1 == STAGES ? 0 : later + 1;
    };
    auto begin_segment = [&](uint32_t pair) {
        if constexpr (FOLD == Fold::SEGMENTS) if (pair > 0 && pair < p.pairs && pair % p.segment == 0) sums.fold_segment(pair == p.segment);
    };
    for (uint32_t index = 0; index < together; index++) {
        uint32_t pair = 0;
        for (; pair + 2 * WIDE_PAIRS <= p.pairs; pair += 2 * WIDE_PAIRS) {
            begin_segment(pair);
            multiply(fragments[0]);
            multiply(fragments[1]);
        }
        begin_segment(pair);
        if (pair < p.pairs) multiply(fragments[0]);
        await_products(sums.now);
        const uint4 *own = p.template rows<W>(shard + index, tile < p.tiles ? tile : p.tiles - 1);
        if constexpr (FOLD == Fold::SEGMENTS) if (p.pairs > p.segment)
            sums.each([&](int j, int i) { sums.now[j][i] = sum(sums.folded[j][i], sums.now[j][i]); });
        UNROLL for (uint32_t j = 0; j < COLUMNS; j++) W::scale(own, p.pairs, sums.now[j]);
        float *waiting = reinterpret_cast<float *>(shared()) + STAGES * From::STAGE * 4 + thread();
        if constexpr (FOLD == Fold::SHARDS) sums.fold_shard(index, together, waiting);
    }
    await_copies<0>();
    if (tile >= p.tiles) return;
    if constexpr (FOLD == Fold::SHARDS) finish_columns<COLUMNS>(p, finish, tile, first_column, sums.folded);
    else finish_columns<COLUMNS>(p, finish, tile, first_column, sums.now);
}
#endif
