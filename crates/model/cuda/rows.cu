// What is done row by row between products: embedding, sums over shards, norms, and the choice of rows.
#include "base.cuh"

// Levels of the tree of virtual shards at most.
constexpr uint32_t LEVELS = 6;

// A sum in the shape of the tree: leaf after leaf is put on a stack, and as often as told the two uppermost become one.
struct Tree {
    uint64_t merges;  // for each leaf, from the lowest bit on: a 1 for each merge after it, and a 0
    uint64_t present; // the slots that hold a leaf
};

// `leaf` tells what stands in a slot.
template <class Leaf> DEVICE float tree_sum(Tree tree, const Leaf &leaf) {
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

// The rank that owns a token's row of the embedding brings it, as its first piece; what it does not own, and its other pieces,
// are zero. A block a token.
struct Embed {
    const uint16_t *rows; // [own][hidden], bf16
    const uint32_t *ids;
    float *out; // [piece][token][hidden]
    uint64_t stride; // from a piece to the next
    uint32_t pieces, first, own, hidden;
};

KERNEL(256, 1) embed(Embed a) {
    overlap_next();
    await_inputs();
    uint32_t token = block().x, row = a.ids[token] - a.first;
    for (uint32_t piece = 0; piece < a.pieces; piece++)
        for (uint32_t i = thread(); i < a.hidden; i += threads()) {
            float x = piece == 0 && row < a.own ? widen(a.rows[size_t(row) * a.hidden + i]) : 0.0f;
            a.out[piece * a.stride + size_t(token) * a.hidden + i] = x;
        }
}

// One node of the tree: of a rank's shards, or of all ranks' pieces. A block for every 256 numbers, or fewer blocks that go on.
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
    for (uint64_t at = uint64_t(block().x) * threads() + thread(); at < a.count; at += uint64_t(a.blocks) * threads())
        a.out[at] = tree_sum(a.tree, [&](uint32_t slot) { return a.leaves[slot * a.stride + at]; });
}

// hidden += the sum over all leaves; out = hidden · weight / rms(hidden) (RMSNorm, arXiv 1910.07467), packed for the next
// product. A block of 256 threads a token: each sums the squares of every 256th element, and the block's sums are halved onto
// each other.
struct AddNorm {
    const float *leaves; // [slot][token][hidden]
    float *residual;     // [token][hidden]
    const float *weight;
    uint16_t *out;    // packed
    float *plain;     // [token][hidden], as `out` before it was rounded; null unless somebody wants to see it
    uint64_t stride;
    uint32_t hidden, pairs;
    uint32_t starts; // 1: the residual stream begins here
    float eps;
    Tree tree;
};

KERNEL(256, 1) add_norm(AddNorm a) {
    overlap_next();
    await_inputs();
    float *squares = reinterpret_cast<float *>(shared());
    size_t row = size_t(block().x) * a.hidden;
    float own = 0;
    for (uint32_t i = thread(); i < a.hidden; i += threads()) {
        float x = tree_sum(a.tree, [&](uint32_t slot) { return a.leaves[slot * a.stride + row + i]; });
        if (!a.starts) x = sum(a.residual[row + i], x);
        a.residual[row + i] = x;
        own = fused(x, x, own);
    }
    squares[thread()] = own;
    for (uint32_t half = 128; half > 0; half /= 2) {
        sync();
        if (thread() < half) squares[thread()] = sum(squares[thread()], squares[thread() + half]);
    }
    sync();
    float scale = inverse_root(sum(quotient(squares[0], float(a.hidden)), a.eps));
    for (uint32_t i = thread(); i < a.pairs * PAIR; i += threads()) {
        float x = i < a.hidden ? product(product(a.residual[row + i], scale), a.weight[i]) : 0.0f;
        a.out[packed_at(block().x, i, a.pairs)] = narrow(x);
        if (a.plain != nullptr && i < a.hidden) a.plain[row + i] = x;
    }
}

// Some rows of packed activations side by side: those whose logits are wanted. A block a row, of which each pair has 16 words.
struct Pick {
    const uint32_t *from, *wanted; // from: packed, in words
    uint32_t *to;
    uint32_t pairs;
};

KERNEL(256, 1) pick(Pick a) {
    overlap_next();
    await_inputs();
    uint32_t row = a.wanted[block().x];
    for (uint32_t i = thread(); i < a.pairs * 16; i += threads())
        a.to[packed_at(block().x, 2 * i, a.pairs) / 2] = a.from[packed_at(row, 2 * i, a.pairs) / 2];
}
