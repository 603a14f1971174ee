// Attention over paged keys and values, of which a warp takes a tile: the query heads that share a KV head, of one token or
// of as many as fit into 16 rows.
//
// Keys come in pieces of 32 (a KV block), in sequence, with a running maximum and sum (online softmax, arXiv 1805.02867);
// chunks of 2 pieces, cut by absolute position, begin anew and are merged in order:
//   m' = max(m, m_c)   a = 2^(m - m')   b = 2^(m_c - m')   l = fma(l, a, l_c · b)   o = fma(o, a, o_c · b)
// With many tokens a warp runs through the chunks of its tile; with few each chunk is a warp's, and `merge` does what the warp
// would have done. What a row does not see counts as the exact identity, so the bits depend on its position alone.
//
// Bytes of decode: keys and values, 4 · dim a position and KV head (in FP8 2.125 · dim), read once: a lane has 16 bytes (8) each
// of up to 16 loads under way. Operations of prefill: 4 · dim a pair of query and key.
#include "kv.cuh"

// Positions of a chunk.
constexpr uint32_t CHUNK = 64;
constexpr uint32_t ROWS = 16;
// Below every score, and a number: two of them may be subtracted.
constexpr float LEAST = -1e30f;

// Some tokens of one sequence, in sequence.
struct Tile {
    uint32_t token;  // the first one's row
    uint32_t tokens;
    uint32_t position;
    uint32_t blocks; // where the sequence's KV blocks begin in the table, less those before the first that is kept
};

struct Attend {
    const uint16_t *queries; // [token][head][dim]
    Kv kv;
    const Tile *tiles;
    const uint32_t *table;
    Activations out; // a shard for each KV head; pairs: group · dim / 32, or one more
    float *partials; // [chunk of the tile][token][head][dim + 2]: of few tokens
    float scale;     // of scores, log2(e) / √head_dim
    uint32_t tile_count, tokens;
    uint32_t kv_heads, group;
    uint32_t window; // positions that a token sees, its own included; 0 for all
    uint32_t chunks; // of a tile at most; 0 if each warp runs through its own
};

// What a warp has seen: rows g and g + 8 of the tile, dimensions 8j + 2t, 8j + 2t + 1 of each.
template <int DIM> struct Seen {
    float max[2], total[2], out[DIM / 8][4];

    DEVICE void clear() {
        max[0] = max[1] = LEAST;
        total[0] = total[1] = 0;
        UNROLL for (int j = 0; j < DIM / 8; j++) UNROLL for (int i = 0; i < 4; i++) out[j][i] = 0;
    }
};

// The merge of what was seen of chunks in sequence: m' and by what to multiply.
struct Factors {
    float now, old, fresh;

    DEVICE Factors(float max, float chunk) : now(larger(max, chunk)), old(exp2_of(max - now)), fresh(exp2_of(chunk - now)) {}
    DEVICE float merge(float x, float chunk) const { return fused(x, old, product(chunk, fresh)); }
};

DEVICE uint32_t first_seen(uint32_t position, uint32_t window) {
    return window == 0 || position + 1 < window ? 0 : position + 1 - window;
}

// Positions start .. end of the tile, at most a chunk, into `chunk`.
template <int DIM, class Head>
DEVICE void attend_chunk(const Attend &a, const Tile &tile, uint32_t kv_head, const uint4 (&queries)[DIM / 16], uint32_t start,
                         uint32_t end, Seen<DIM> &chunk) {
    uint32_t g = lane() / 4, t = lane() % 4;
    uint32_t last[2] = {tile.position + g / a.group, tile.position + (g + 8) / a.group};
    chunk.clear();
    for (uint32_t piece = start / BLOCK; piece * BLOCK < end; piece++) {
        Head head(a.kv.head(a.table[tile.blocks + piece], kv_head));
        float scores[4][4];
        UNROLL for (int j = 0; j < 4; j++) {
            UNROLL for (int i = 0; i < 4; i++) scores[j][i] = 0;
            UNROLL for (int pair = 0; pair < DIM / 32; pair++) {
                uint4 key = head.key(j, pair);
                mma(scores[j], queries[2 * pair], key.x, key.y);
                mma(scores[j], queries[2 * pair + 1], key.z, key.w);
            }
        }
        float now[2] = {chunk.max[0], chunk.max[1]};
        UNROLL for (int j = 0; j < 4; j++) UNROLL for (int i = 0; i < 4; i++) {
            uint32_t position = piece * BLOCK + 8 * j + 2 * t + i % 2, own = last[i / 2];
            bool seen = position <= own && (a.window == 0 || position + a.window > own);
            scores[j][i] = seen ? product(scores[j][i], a.scale) : LEAST;
            now[i / 2] = larger(now[i / 2], scores[j][i]);
        }
        UNROLL for (int r = 0; r < 2; r++) {
            now[r] = larger(now[r], from_lane_xor(now[r], 1));
            now[r] = larger(now[r], from_lane_xor(now[r], 2));
            float factor = exp2_of(chunk.max[r] - now[r]);
            chunk.total[r] = product(chunk.total[r], factor);
            UNROLL for (int j = 0; j < DIM / 8; j++) UNROLL for (int i = 2 * r; i < 2 * r + 2; i++)
                chunk.out[j][i] = product(chunk.out[j][i], factor);
            chunk.max[r] = now[r];
        }
        UNROLL for (int j = 0; j < 4; j++) UNROLL for (int i = 0; i < 4; i++) {
            float weight = scores[j][i] == LEAST ? 0.0f : exp2_of(scores[j][i] - now[i / 2]);
            chunk.total[i / 2] = sum(chunk.total[i / 2], weight);
            scores[j][i] = weight;
        }
        uint4 weights[2]; // what was a result is a first operand as it stands
        UNROLL for (int half = 0; half < 2; half++) {
            const float(&low)[4] = scores[2 * half], (&high)[4] = scores[2 * half + 1];
            weights[half] = {pair_of(low[0], low[1]), pair_of(low[2], low[3]), pair_of(high[0], high[1]), pair_of(high[2], high[3])};
        }
        UNROLL for (int j = 0; j < DIM / 8; j++) {
            uint4 value = head.value(j);
            mma(chunk.out[j], weights[0], value.x, value.y);
            mma(chunk.out[j], weights[1], value.z, value.w);
        }
    }
    UNROLL for (int r = 0; r < 2; r++) {
        chunk.total[r] = sum(chunk.total[r], from_lane_xor(chunk.total[r], 1));
        chunk.total[r] = sum(chunk.total[r], from_lane_xor(chunk.total[r], 2));
    }
}

// The head's output of one token, two dimensions that follow each other.
DEVICE void put(const Attend &a, uint32_t kv_head, uint32_t token, uint32_t head, uint32_t at, uint32_t dim, float x, float y) {
    *reinterpret_cast<uint32_t *>(a.out.tile_at(kv_head, token, head * dim + at)) = pair_of(x, y);
}

// What one chunk has of a head of a token.
DEVICE float *partial(const Attend &a, uint32_t chunk, uint32_t token, uint32_t kv_head, uint32_t head, uint32_t dim) {
    size_t row = (size_t(chunk) * a.tokens + token) * (a.kv_heads * a.group) + kv_head * a.group + head;
    return a.partials + row * (dim + 2);
}

template <int DIM, class Head> DEVICE void attend(const Attend &a) {
    uint32_t index = block().x * warps() + warp(), kv_head = block().y;
    overlap_next();
    await_inputs();
    if (index >= a.tile_count) return;
    Tile tile = a.tiles[index];
    uint32_t g = lane() / 4, t = lane() % 4, rows = tile.tokens * a.group;
    uint32_t begin = first_seen(tile.position, a.window) / BLOCK * BLOCK, end = tile.position + tile.tokens;

    uint4 queries[DIM / 16];
    auto query = [&](uint32_t row, uint32_t at) -> uint32_t {
        size_t head = size_t(tile.token + row / a.group) * (a.kv_heads * a.group) + kv_head * a.group + row % a.group;
        return row < rows ? *reinterpret_cast<const uint32_t *>(a.queries + head * DIM + at) : 0;
    };
    UNROLL for (int k = 0; k < DIM / 16; k++) {
        uint32_t at = 16 * k + 2 * t;
        queries[k] = {query(g, at), query(g + 8, at), query(g, at + 8), query(g + 8, at + 8)};
    }

    // What was merged waits in shared memory, [out][thread]: registers are for the chunk under way.
    float *merged = reinterpret_cast<float *>(shared()) + thread();
    float max[2] = {LEAST, LEAST}, total[2] = {0, 0};
    Seen<DIM> chunk;
    uint32_t first = begin / CHUNK, from = first + block().z, to = a.chunks == 0 ? (end + CHUNK - 1) / CHUNK : from + 1;
    for (uint32_t at = from; at < to && at * CHUNK < end; at++) {
        uint32_t start = at * CHUNK > begin ? at * CHUNK : begin, stop = (at + 1) * CHUNK < end ? (at + 1) * CHUNK : end;
        attend_chunk<DIM, Head>(a, tile, kv_head, queries, start, stop, chunk);
        if (a.chunks > 0) break;
        UNROLL for (int r = 0; r < 2; r++) {
            Factors factors(max[r], chunk.max[r]);
            max[r] = factors.now;
            total[r] = factors.merge(total[r], chunk.total[r]);
            UNROLL for (int j = 0; j < DIM / 8; j++) UNROLL for (int i = 2 * r; i < 2 * r + 2; i++) {
                float *out = merged + (j * 4 + i) * threads();
                *out = factors.merge(at == from ? 0.0f : *out, chunk.out[j][i]);
            }
        }
    }
    UNROLL for (int r = 0; r < 2; r++) {
        uint32_t row = g + 8 * r, token = tile.token + row / a.group, head = row % a.group;
        if (row >= rows) continue;
        if (a.chunks == 0) {
            UNROLL for (int j = 0; j < DIM / 8; j++) {
                const float *out = merged + (j * 4 + 2 * r) * threads();
                put(a, kv_head, token, head, 8 * j + 2 * t, DIM, quotient(out[0], total[r]), quotient(out[threads()], total[r]));
            }
        } else if (from * CHUNK < end) {
            float *to = partial(a, block().z, token, kv_head, head, DIM);
            UNROLL for (int j = 0; j < DIM / 8; j++) UNROLL for (int i = 0; i < 2; i++) to[8 * j + 2 * t + i] = chunk.out[j][2 * r + i];
            if (t == 0) {
                to[DIM] = chunk.max[r];
                to[DIM + 1] = chunk.total[r];
            }
        }
    }
}

// Merges the chunks of one row: a warp each, two dimensions that follow each other a lane and round. What AHEAD chunks have is read
// together, then merged one after the other.
template <int DIM> DEVICE void merge(const Attend &a) {
    constexpr uint32_t AHEAD = 8, ROUNDS = (DIM + 2 * LANES - 1) / (2 * LANES);
    uint32_t kv_head = block().y;
    Tile tile = a.tiles[block().x];
    overlap_next();
    await_inputs();
    uint32_t begin = first_seen(tile.position, a.window) / CHUNK, end = (tile.position + tile.tokens + CHUNK - 1) / CHUNK;
    for (uint32_t row = warp(); row < tile.tokens * a.group; row += warps()) {
        uint32_t token = tile.token + row / a.group, head = row % a.group;
        float max = LEAST, total = 0, out[ROUNDS][2] = {};
        for (uint32_t first = 0; first < end - begin; first += AHEAD) {
            float maxima[AHEAD], totals[AHEAD], outs[AHEAD][ROUNDS][2];
            UNROLL for (uint32_t chunk = 0; chunk < AHEAD; chunk++) if (first + chunk < end - begin) {
                const float *from = partial(a, first + chunk, token, kv_head, head, DIM);
                maxima[chunk] = from[DIM], totals[chunk] = from[DIM + 1];
                UNROLL for (uint32_t round = 0; round < ROUNDS; round++) {
                    uint32_t at = 2 * (round * LANES + lane());
                    UNROLL for (uint32_t i = 0; i < 2; i++) outs[chunk][round][i] = at < DIM ? from[at + i] : 0.0f;
                }
            }
            UNROLL for (uint32_t chunk = 0; chunk < AHEAD; chunk++) if (first + chunk < end - begin) {
                Factors factors(max, maxima[chunk]);
                max = factors.now;
                total = factors.merge(total, totals[chunk]);
                UNROLL for (uint32_t round = 0; round < ROUNDS; round++) UNROLL for (uint32_t i = 0; i < 2; i++)
                    out[round][i] = factors.merge(out[round][i], outs[chunk][round][i]);
            }
        }
        UNROLL for (uint32_t round = 0; round < ROUNDS; round++) {
            uint32_t at = 2 * (round * LANES + lane());
            if (at < DIM) put(a, kv_head, token, head, at, DIM, quotient(out[round][0], total), quotient(out[round][1], total));
        }
    }
}

KERNEL(4 * LANES, 1) attend_32(Attend a) { attend<32, Bf16Head<32>>(a); }
KERNEL(4 * LANES, 1) attend_64(Attend a) { attend<64, Bf16Head<64>>(a); }
KERNEL(4 * LANES, 1) attend_96(Attend a) { attend<96, Bf16Head<96>>(a); }
KERNEL(4 * LANES, 1) attend_128(Attend a) { attend<128, Bf16Head<128>>(a); }
KERNEL(4 * LANES, 1) attend_32_fp8(Attend a) { attend<32, Fp8Head<32>>(a); }
KERNEL(4 * LANES, 1) attend_64_fp8(Attend a) { attend<64, Fp8Head<64>>(a); }
KERNEL(4 * LANES, 1) attend_96_fp8(Attend a) { attend<96, Fp8Head<96>>(a); }
KERNEL(4 * LANES, 1) attend_128_fp8(Attend a) { attend<128, Fp8Head<128>>(a); }
KERNEL(4 * LANES, 1) merge_32(Attend a) { merge<32>(a); }
KERNEL(4 * LANES, 1) merge_64(Attend a) { merge<64>(a); }
KERNEL(4 * LANES, 1) merge_96(Attend a) { merge<96>(a); }
KERNEL(4 * LANES, 1) merge_128(Attend a) { merge<128>(a); }
