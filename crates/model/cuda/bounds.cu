// What a GPU's memory gives at most: no kernel of a forward pass runs these, shares of a bound are measured against them.
#include "base.cuh"

// Vectors of 16 bytes, dealt to threads in turn. Each thread leaves the bits that it has read combined, so that they are read.
struct Bound {
    const uint4 *from;
    uint4 *to; // of a copy [count]; else [blocks · threads]
    uint64_t count;
    uint32_t blocks;
};

template <class Use> DEVICE void each_vector(const Bound &a, const Use &use) {
    // Loads of a thread under way.
    constexpr uint32_t AHEAD = 8;
    uint64_t all = uint64_t(a.blocks) * threads(), at = uint64_t(block().x) * threads() + thread();
    for (; at + (AHEAD - 1) * all < a.count; at += AHEAD * all) {
        uint4 x[AHEAD];
        UNROLL for (uint32_t i = 0; i < AHEAD; i++) x[i] = stream(a.from + at + i * all);
        UNROLL for (uint32_t i = 0; i < AHEAD; i++) use(at + i * all, x[i]);
    }
    for (; at < a.count; at += all) use(at, stream(a.from + at));
}

KERNEL(256, 2) read_all(Bound a) {
    overlap_next();
    await_inputs();
    uint4 seen = {0, 0, 0, 0};
    each_vector(a, [&](uint64_t, uint4 x) { seen = {seen.x ^ x.x, seen.y ^ x.y, seen.z ^ x.z, seen.w ^ x.w}; });
    a.to[size_t(block().x) * threads() + thread()] = seen;
}

KERNEL(256, 2) copy_all(Bound a) {
    overlap_next();
    await_inputs();
    each_vector(a, [&](uint64_t at, uint4 x) { a.to[at] = x; });
}
