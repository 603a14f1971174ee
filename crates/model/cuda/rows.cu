// What is done row by row between products: embedding, sums over shards, norms, and the choice of rows.
#include "base.cuh"

// Levels of the tree of virtual shards at most.
constexpr uint32_t LEVELS = 6;

// A sum in the shape of the tree: leaf after leaf is put on a stack, and as often as told the two uppermost become one.
struct Tree {
    uint64_t merges;  // for each leaf, from the lowest bit on: a 1 for each merge after it, and a 0
    uint64_t present; // the slots that hold a leaf
    uint32_t perfect; // leaves, if they are a power of two up to 8 and fill the first slots; 0 else
};

// `leaf` tells what stands in a slot.
template <class Leaf> DEVICE float any_tree_sum(Tree tree, const Leaf &leaf) {
    float stack[LEVELS] = {};
    uint32_t depth = 0;
    for (uint32_t slot = 0; tree.present != 0; slot++, tree.present /= 2) {
        if (tree.present % 2 == 0) continue;
        float x = leaf(slot);
        // Constant places, so that the stack stays in registers.
        UNROLL for (uint32_t level = LEVELS - 1; level > 0; level--) if (depth == level && tree.merges % 2 == 1) {
            x = sum(stack[level - 1], x);
            depth--;
            tree.merges /= 2;
        }
        tree.merges /= 2;
        UNROLL for (uint32_t level = 0; level < LEVELS; level++) if (depth == level) stack[level] = x;
        depth++;
    }
    return stack[0];
}

// The same of a tree whose leaves are known: all of them are read at once.
template <uint32_t PERFECT, class Leaf> DEVICE float tree_sum(const Tree &tree, const Leaf &leaf, uint32_t first = 0) {
    if constexpr (PERFECT == 0) {
        return any_tree_sum(tree, leaf);
    } else if constexpr (PERFECT == 1) {
        return leaf(first);
    } else {
        float low = tree_sum<PERFECT / 2>(tree, leaf, first);
        return sum(low, tree_sum<PERFECT / 2>(tree, leaf, first + PERFECT / 2));
    }
}

// Behind the id of this come those of slots, whose last token is drawn by the time that it is looked up.
constexpr uint32_t DRAWN = 1u << 31;

// The rank that owns a token's row of the embedding brings it, as its first piece; what it does not own, and its other pieces,
// are zero. A block a token.
struct Embed {
    const uint16_t *rows; // [own][hidden], bf16
    const uint32_t *ids;
    const uint32_t *last; // [slot]
    float *out; // [piece][token][hidden]
    uint64_t stride; // from a piece to the next
    uint32_t pieces, first, own, hidden;
};

KERNEL(256, 1) embed(Embed a) {
    overlap_next();
    await_inputs();
    uint32_t token = block().x, id = a.ids[token];
    uint32_t row = (id < DRAWN ? id : a.last[id - DRAWN]) - a.first;
    for (uint32_t piece = 0; piece < a.pieces; piece++)
        for (uint32_t i = thread(); i < a.hidden; i += threads()) {
            float x = piece == 0 && row < a.own ? widen(a.rows[size_t(row) * a.hidden + i]) : 0.0f;
            a.out[piece * a.stride + size_t(token) * a.hidden + i] = x;
        }
}

// Calls `use` with each place, the sum of its leaves and what `beside` finds there.
template <uint32_t PERFECT, class Leaf, class Beside, class Use>
DEVICE void each_sum_of(const Tree &tree, const Dealt<uint64_t> &dealt, const Leaf &leaf, const Beside &beside, const Use &use) {
    struct Found {
        float sum, beside;
    };
    each(
        dealt,
        [&](uint64_t at) { return Found{tree_sum<PERFECT>(tree, [&](uint32_t slot) { return leaf(slot, at); }), beside(at)}; },
        [&](uint64_t at, const Found &found) { use(at, found.sum, found.beside); });
}
template <class... Rest> DEVICE void each_sum(const Tree &tree, const Dealt<uint64_t> &dealt, const Rest &...rest) {
    switch (tree.perfect) {
    case 1: return each_sum_of<1>(tree, dealt, rest...);
    case 2: return each_sum_of<2>(tree, dealt, rest...);
    case 4: return each_sum_of<4>(tree, dealt, rest...);
    case 8: return each_sum_of<8>(tree, dealt, rest...);
    default: return each_sum_of<0>(tree, dealt, rest...);
    }
}

// One node of the tree: of a rank's shards, or of all ranks' pieces. A block for every 1,024 numbers, or fewer blocks that go on.
struct Piece {
    const float *leaves; // [slot][count]
    float *out;          // [count]
    uint64_t stride;     // from a slot to the next
    uint64_t count;
    uint32_t blocks;
    Tree tree;
};

KERNEL(256, 1) piece(Piece a) {
    overlap_next();
    await_inputs();
    Dealt<uint64_t> dealt = {uint64_t(block().x) * threads() + thread(), uint64_t(a.blocks) * threads(), a.count};
    each_sum(
        a.tree, dealt, [&](uint32_t slot, uint64_t at) { return a.leaves[slot * a.stride + at]; }, [](uint64_t) { return 0.0f; },
        [&](uint64_t at, float x, float) { a.out[at] = x; });
}

// hidden += the sum over all leaves; out = hidden · weight / rms(hidden) (RMSNorm, arXiv 1910.07467), packed for the next
// product. A block a token, of as many threads as the row is wide, to EACH of it, or 1,024: how the squares are summed depends on
// the width alone.
//
// Bytes: the leaves and the residual stream, 4 · (leaves + 2) a number; of one token they are all under way at once.
struct AddNorm {
    const float *leaves; // [slot][token][hidden]
    float *residual;     // [token][hidden]
    const float *weight;
    Activations out;
    float *plain;     // [token][hidden], as `out` before it was rounded; null unless somebody wants to see it
    uint64_t stride;
    uint32_t hidden;
    uint32_t starts; // 1: the residual stream begins here
    float eps;
    Tree tree;
};

DEVICE float sum_of_lanes(float x) {
    UNROLL for (uint32_t mask = 1; mask < LANES; mask *= 2) x = sum(x, from_lane_xor(x, mask));
    return x;
}

KERNEL(1024, 1) add_norm(AddNorm a) {
    float *squares = reinterpret_cast<float *>(shared()), *weight = squares + LANES, *hidden = weight + a.hidden;
    size_t row = size_t(block().x) * a.hidden;
    overlap_next();
    _Pragma("unroll 4") for (uint32_t i = thread(); i < a.hidden; i += threads()) weight[i] = a.weight[i];
    await_inputs();
    float own = 0;
    each_sum(
        a.tree, Dealt<uint64_t>{thread(), threads(), a.hidden},
        [&](uint32_t slot, uint64_t i) { return a.leaves[slot * a.stride + row + i]; },
        [&](uint64_t i) { return a.starts ? 0.0f : a.residual[row + i]; },
        [&](uint64_t i, float x, float before) {
            if (!a.starts) x = sum(before, x);
            a.residual[row + i] = hidden[i] = x;
            own = fused(x, x, own);
        });
    own = sum_of_lanes(own);
    if (lane() == 0) squares[warp()] = own;
    sync();
    float scale = inverse_root(sum(quotient(sum_of_lanes(lane() < warps() ? squares[lane()] : 0.0f), float(a.hidden)), a.eps));
    auto normed = [&](uint32_t i) { return i < a.hidden ? product(product(hidden[i], scale), weight[i]) : 0.0f; };
    for (uint32_t i = 2 * thread(); i < a.out.pairs * PAIR; i += 2 * threads()) {
        float low = normed(i), high = normed(i + 1);
        *a.out.pair_at(0, block().x, i) = pair_of(low, high);
        if (a.plain == nullptr) continue;
        if (i < a.hidden) a.plain[row + i] = low;
        if (i + 1 < a.hidden) a.plain[row + i + 1] = high;
    }
}

// Some rows of activations side by side: those whose logits are wanted, or all in another order. A block a row.
struct Pick {
    Activations from, to;
    const uint32_t *wanted; // null for all
};

KERNEL(256, 1) pick(Pick a) {
    overlap_next();
    await_inputs();
    uint32_t row = a.wanted == nullptr ? block().x : a.wanted[block().x], words = a.to.pairs * 16;
    for (uint32_t shard = 0; shard < a.to.shards; shard++)
        for (uint32_t i = thread(); i < words; i += threads()) *a.to.pair_at(shard, block().x, 2 * i) = *a.from.pair_at(shard, row, 2 * i);
}
