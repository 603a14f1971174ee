// How the ranks of one host bring each other their pieces of a sum: each writes its own to where all have those of all, and
// then waits for theirs.
#include "base.cuh"

constexpr uint32_t RANKS_MAX = 8;
// Blocks of a launch at most: each has a signal of every rank.
constexpr uint32_t SIGNALS = 32;

// Everything that a rank has for others is in one piece of its memory, which all have mapped. `inboxes` are those of one turn: a
// rank whose signals have come from all has peers that have begun this turn, so they have read what came in the turn before;
// what it writes next must stand elsewhere than what it writes now.
//
// Bytes: each rank sends its pieces to all others, 4 · count · (ranks - 1), and waits for one trip of a signal.
struct Share {
    const uint4 *pieces;        // [count / 4]
    uint4 *inboxes[RANKS_MAX];  // of each rank, [rank][count / 4]
    uint32_t *signals[RANKS_MAX]; // of each rank, [rank][block]: turns of that block that have come
    uint32_t *turns;            // [block], of this rank alone: how many there were
    const uint32_t *over;       // on the host: not 0 once nobody waits any more
    uint64_t count;             // numbers of a rank
    uint32_t rank, ranks, blocks;
};

KERNEL(512, 1) share(Share a) {
    await_inputs();
    uint32_t turn = a.turns[block().x] + 1;
    uint64_t quads = a.count / 4;
    Dealt<uint64_t> dealt = {uint64_t(block().x) * threads() + thread(), uint64_t(a.blocks) * threads(), quads};
    each(
        dealt, [&](uint64_t at) { return a.pieces[at]; },
        [&](uint64_t at, uint4 x) {
            for (uint32_t rank = 0; rank < a.ranks; rank++) a.inboxes[rank][a.rank * quads + at] = x;
        });
    sync();
    if (thread() == 0) a.turns[block().x] = turn;
    if (thread() < a.ranks) tell(a.signals[thread()] + a.rank * SIGNALS + block().x, turn);
    sync();
    if (thread() < a.ranks) {
        const uint32_t *signal = a.signals[a.rank] + thread() * SIGNALS + block().x;
        for (uint32_t looks = 1; int32_t(told(signal) - turn) < 0; looks++) {
            if (looks % 64 == 0 && told(a.over) != 0) break;
            pause();
        }
    }
    sync();
    // Not before: what waits for this one would take the room that a rank on the same GPU needs to come this far.
    overlap_next();
}

// Rows that were cut by their width, one part at each rank, side by side. A block a row.
struct Join {
    const float *parts; // [rank][row][width]
    float *out;         // [row][starts of `ranks`]
    uint32_t starts[RANKS_MAX + 1];
    uint32_t rows, width, ranks;
};

KERNEL(256, 1) join(Join a) {
    overlap_next();
    await_inputs();
    uint32_t row = block().x;
    float *out = a.out + size_t(row) * a.starts[a.ranks];
    for (uint32_t rank = 0; rank < a.ranks; rank++) {
        const float *part = a.parts + (size_t(rank) * a.rows + row) * a.width;
        uint32_t start = a.starts[rank];
        each(
            Dealt<uint32_t>{thread(), threads(), a.starts[rank + 1] - start}, [&](uint32_t at) { return part[at]; },
            [&](uint32_t at, float x) { out[start + at] = x; });
    }
}

// Tokens that rank 0 has drawn, and brought to this one: the last ones of their slots.
struct Keep {
    const uint32_t *from, *slots; // [row]
    uint32_t *ids;                // [row]
    uint32_t *last;               // [slot]
    uint32_t count;
};

KERNEL(32, 1) keep(Keep a) {
    overlap_next();
    await_inputs();
    for (uint32_t i = thread(); i < a.count; i += threads()) a.ids[i] = a.last[a.slots[i]] = a.from[i];
}
