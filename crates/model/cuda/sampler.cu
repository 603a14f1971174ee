// Draws a token of each row of logits, as `src/sampler.rs` defines it, to the same id: weights are integers, whose sums are
// exact, so that no order of adding them shows, and everything else is a single rounded operation.
//
// A block a row, of as many threads as the vocabulary is large, to EACH of it, or 1,024. Bytes: logits once from memory; then
// scores and weights, 12 bytes a token, out of the second-level cache, for each digit of each place that is looked for: twice where
// nothing is filtered, six times for each of top-k, top-p and the draw by order where something is. What one multiprocessor reads
// bounds it; rows run beside each other.
#include "base.cuh"

constexpr uint32_t NONE = 0xffffffff;
constexpr uint64_t NOBODY = ~0ull;
// Digits of 8 bits, and their groups of 16.
constexpr uint32_t BINS = 256, GROUP = 16;
// Likeliest tokens that a row tells at most.
constexpr uint32_t TOPS = 20;

// What is wanted of a row.
struct Want {
    double scale;    // 1 / temperature; 0: the likeliest token
    uint64_t random; // 53 bits
    uint64_t slot;   // whose last token it becomes; NOBODY if none's
    uint32_t row;
    uint32_t edits, edit_count;
    uint32_t lowest; // token that is drawn where all scores are -∞
    uint32_t given;  // token that is scored; NONE if one is drawn
    uint32_t tops;   // likeliest tokens to tell; NONE if nothing is told
    uint32_t top_k;  // 0 for all
    float top_p, min_p;
    float repetition, frequency, presence;
};

// What becomes of one token's score. A row has at most one for each token.
struct Edit {
    uint32_t id;
    float bias;
    uint32_t times; // in the answer
    uint32_t what;  // SEEN, BANNED
};
constexpr uint32_t SEEN = 1, BANNED = 2;

// What a log probability follows from.
struct Told {
    uint64_t total; // weights of all
    float own, max;
    uint32_t rank, tops;
    uint32_t top_ids[TOPS]; // in no order
    float top_logits[TOPS];
};

struct Sampler {
    const float *logits; // [row][vocab]
    const Want *wants;
    const Edit *edits;
    float *scores;     // [want][vocab]
    uint64_t *weights; // [want][vocab]
    uint32_t *ids;     // [want]
    uint32_t *last;    // [slot]
    Told *told;        // [want]
    double one;        // the largest weight
    uint32_t vocab;
    uint32_t id_bits; // of a token's id, a multiple of 8
};

DEVICE uint64_t bits_of(double x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    return bits;
}
DEVICE double double_of(uint64_t bits) {
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

// A number or -∞, with one zero.
DEVICE float clean(float x) { return x != x ? -1.0f / 0.0f : sum(smaller(x, 3.402823466e38f), 0.0f); }

// exp(x) for x <= 0, operation by operation as in `sampler/weights.rs`.
DEVICE double exp_of(double x) {
    constexpr double COEFFICIENTS[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                                       1.0 / 5040.0,      1.0 / 720.0,      1.0 / 120.0,     1.0 / 24.0,     1.0 / 6.0,
                                       0.5,               1.0,              1.0};
    constexpr double ROUND = 6755399441055744.0 + 1023.0, LEAST_EXPONENT = -708.0;
    double clamped = x > LEAST_EXPONENT ? x : LEAST_EXPONENT;
    double biased = sum(product(clamped, 1.4426950408889634), ROUND), k = sum(biased, -ROUND);
    double r = sum(sum(clamped, -product(k, 0x1.62e42feep-1)), -product(k, 0x1.a39ef35793c76p-33));
    double polynomial = 0;
    UNROLL for (double coefficient : COEFFICIENTS) polynomial = sum(product(polynomial, r), coefficient);
    return x < LEAST_EXPONENT ? 0.0 : product(polynomial, double_of(bits_of(biased) << 52));
}

// exp((score - max) · scale) in units of which `one` is 1; what is less than `min` is 0.
DEVICE uint64_t weight_of(float score, float max, double scale, float min, double one) {
    double weight = exp_of(product(sum(double(score), -double(max)), scale));
    return weight < double(min) ? 0 : bits_of(sum(product(weight, one), 0x1p52)) & ((1ull << 52) - 1);
}

// Bits that fall as the score rises.
DEVICE uint32_t descending(float score) {
    uint32_t bits = bits_of(score);
    return bits >> 31 ? bits : ~bits & 0x7fffffff;
}

// Each token of the vocabulary by one thread: `use` gets what `load` finds of it.
template <class Load, class Use> DEVICE void each_token(uint32_t vocab, const Load &load, const Use &use) {
    each(Dealt<uint32_t>{thread(), threads(), vocab}, load, use);
}

DEVICE uint64_t *bins() { return reinterpret_cast<uint64_t *>(shared()); }
DEVICE uint64_t *groups() { return bins() + BINS; }
// What each warp has.
DEVICE uint64_t *parts() { return groups() + BINS / GROUP; }

DEVICE uint64_t from_lane_xor(uint64_t x, uint32_t mask) {
    uint64_t high = from_lane_xor(uint32_t(x >> 32), mask);
    return high << 32 | from_lane_xor(uint32_t(x), mask);
}

// What all threads of the block bring, joined in whatever order.
template <class Join> DEVICE uint64_t joined(uint64_t x, const Join &join) {
    UNROLL for (uint32_t mask = 1; mask < LANES; mask *= 2) x = join(x, from_lane_xor(x, mask));
    sync(); // what stood there before was read
    if (lane() == 0) parts()[warp()] = x;
    sync();
    x = parts()[0];
    for (uint32_t i = 1; i < warps(); i++) x = join(x, parts()[i]);
    return x;
}
DEVICE uint64_t added(uint64_t x) {
    return joined(x, [](uint64_t a, uint64_t b) { return a + b; });
}
DEVICE uint64_t least(uint64_t x) {
    return joined(x, [](uint64_t a, uint64_t b) { return a < b ? a : b; });
}

// A key of some bits, and the weight of all keys below it.
struct Reached {
    uint64_t key, before;
};

// The first key, in rising order, up to which weights add up to `target`, which all of them reach: digit by digit, the first
// within which they do.
template <class Key, class Weight>
DEVICE Reached first_to_reach(uint64_t target, uint32_t vocab, uint32_t bits, const Key &key, const Weight &weight) {
    Reached at = {0, 0};
    for (uint32_t shift = bits; shift > 0;) {
        shift -= 8;
        sync();
        for (uint32_t i = thread(); i < BINS; i += threads()) bins()[i] = 0;
        sync();
        struct Weighed {
            uint64_t weight, key;
        };
        each_token(
            vocab, [&](uint32_t i) { return Weighed{weight(i), key(i)}; },
            [&](uint32_t, const Weighed &own) {
                if (own.weight != 0 && own.key >> shift >> 8 == at.key) add_shared(bins() + (own.key >> shift) % BINS, own.weight);
            });
        sync();
        for (uint32_t group = thread(); group < BINS / GROUP; group += threads()) {
            uint64_t all = 0;
            for (uint32_t i = 0; i < GROUP; i++) all += bins()[group * GROUP + i];
            groups()[group] = all;
        }
        sync();
        uint32_t digit = 0;
        for (; digit < BINS - GROUP && at.before + groups()[digit / GROUP] < target; digit += GROUP)
            at.before += groups()[digit / GROUP];
        for (; digit < BINS - 1 && at.before + bins()[digit] < target; digit++) at.before += bins()[digit];
        at.key = at.key << 8 | digit;
    }
    return at;
}

// Scores as draws see them: bias, penalties, bans.
DEVICE void adjust(const Sampler &a, const Want &want, float *scores) {
    const float *logits = a.logits + size_t(want.row) * a.vocab;
    each_token(a.vocab, [&](uint32_t i) { return logits[i]; }, [&](uint32_t i, float x) { scores[i] = clean(x); });
    sync();
    for (uint32_t i = thread(); i < want.edit_count; i += threads()) {
        Edit edit = a.edits[want.edits + i];
        float score = clean(sum(scores[edit.id], edit.bias));
        if (edit.what & SEEN) {
            score = score > 0 ? quotient(score, want.repetition) : product(score, want.repetition);
            if (edit.times > 0) {
                score = sum(score, -product(want.frequency, float(edit.times)));
                score = sum(score, -want.presence);
            }
            score = clean(score);
        }
        scores[edit.id] = edit.what & BANNED ? -1.0f / 0.0f : score;
    }
    sync();
}

// A token in proportion to its weight. `best` is the likeliest.
DEVICE uint32_t sample(const Sampler &a, const Want &want, const float *scores, uint32_t best) {
    uint64_t *weights = a.weights + size_t(block().x) * a.vocab, own = 0;
    uint32_t mask = (1u << a.id_bits) - 1, order_bits = 32 + a.id_bits;
    auto order = [&](uint32_t i) { return uint64_t(descending(scores[i])) << a.id_bits | i; };
    auto weight = [&](uint32_t i) { return weights[i]; };
    float max = scores[best];
    each_token(
        a.vocab, [&](uint32_t i) { return scores[i]; },
        [&](uint32_t i, float score) { own += weights[i] = weight_of(score, max, want.scale, want.min_p, a.one); });
    bool cut = want.top_k > 0 && want.top_k < a.vocab;
    if (cut) {
        uint64_t last = first_to_reach(want.top_k, a.vocab, order_bits, order, [](uint32_t) { return uint64_t(1); }).key;
        own = 0;
        each_token(
            a.vocab, [&](uint32_t i) { return order(i) > last ? 0 : weights[i]; },
            [&](uint32_t i, uint64_t kept) { own += weights[i] = kept; });
    }
    uint64_t total = added(own);
    if (!cut && want.top_p >= 1.0f) {
        auto in_order = [](uint32_t i) { return uint64_t(i); };
        return uint32_t(first_to_reach(high_product(want.random << 11, total) + 1, a.vocab, a.id_bits, in_order, weight).key);
    }
    uint64_t mass = uint64_t(product(double(want.top_p), double(total)));
    mass = mass < 1 ? 1 : mass < total ? mass : total;
    Reached last = first_to_reach(mass, a.vocab, order_bits, order, weight);
    total = last.before + weights[last.key & mask]; // beyond it nothing is drawn
    return uint32_t(first_to_reach(high_product(want.random << 11, total) + 1, a.vocab, order_bits, order, weight).key) & mask;
}

// What the log probability of a token, and those of the likeliest, follow from: the logits as they are.
DEVICE void tell(const Sampler &a, const Want &want, uint32_t id, Told &told) {
    const float *logits = a.logits + size_t(want.row) * a.vocab;
    uint32_t mask = (1u << a.id_bits) - 1, tops = want.tops < a.vocab ? want.tops : a.vocab;
    auto order = [&](uint32_t i) { return uint64_t(descending(clean(logits[i]))) << a.id_bits | i; };
    uint64_t best = ~0ull, own = order(id), before = 0, weights = 0;
    each_token(a.vocab, order, [&](uint32_t, uint64_t key) {
        best = key < best ? key : best;
        before += key < own;
    });
    best = least(best);
    before = added(before);
    float max = clean(logits[best & mask]);
    each_token(
        a.vocab, [&](uint32_t i) { return logits[i]; },
        [&](uint32_t, float x) { weights += weight_of(clean(x), max, 1.0, 0.0f, a.one); });
    weights = added(weights);
    if (thread() == 0) {
        told.total = weights;
        told.own = clean(logits[id]);
        told.max = max;
        told.rank = uint32_t(before) + 1;
        told.tops = tops;
    }
    if (tops == 0) return;
    uint64_t last = first_to_reach(tops, a.vocab, 32 + a.id_bits, order, [](uint32_t) { return uint64_t(1); }).key;
    sync();
    if (thread() == 0) bins()[0] = 0;
    sync();
    each_token(a.vocab, order, [&](uint32_t i, uint64_t key) {
        if (key > last) return;
        uint64_t place = add_shared(bins(), 1);
        told.top_ids[place] = i;
        told.top_logits[place] = clean(logits[i]);
    });
}

KERNEL(1024, 1) draw(Sampler a) {
    overlap_next();
    await_inputs();
    Want want = a.wants[block().x];
    uint32_t id = want.given;
    if (id == NONE) {
        float *scores = a.scores + size_t(block().x) * a.vocab;
        adjust(a, want, scores);
        uint64_t best = ~0ull;
        each_token(
            a.vocab, [&](uint32_t i) { return uint64_t(descending(scores[i])) << a.id_bits | i; },
            [&](uint32_t, uint64_t key) { best = key < best ? key : best; });
        id = uint32_t(least(best)) & ((1u << a.id_bits) - 1);
        if (scores[id] == -1.0f / 0.0f) {
            id = want.lowest;
        } else if (want.scale != 0) {
            id = sample(a, want, scores, id);
        }
    }
    if (want.tops != NONE) tell(a, want, id, a.told[block().x]);
    if (thread() == 0) {
        a.ids[block().x] = id;
        if (want.slot != NOBODY) a.last[want.slot] = id;
    }
}
