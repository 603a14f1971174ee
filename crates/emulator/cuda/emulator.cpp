// Runs the kernels' own source on the host. See emulator.hpp.
#include "emulator.hpp"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "kernels.cu"

namespace emulator {

thread_local Machine machine;

// Bytes of a fiber's stack.
constexpr size_t STACK = 128 << 10;

// The fibers of an operating-system thread, kept from block to block: each waits where it began until it has a kernel to run.
struct Fibers {
    jmp_buf at[THREADS_MAX], caller;
    bool begun[THREADS_MAX];
    void (*kernel)(const void *);
    const void *arguments;
    ucontext_t start;
    alignas(4096) uint8_t stacks[THREADS_MAX][STACK];
};
static thread_local Fibers *fibers;

static pthread_key_t key;
static pthread_once_t key_made = PTHREAD_ONCE_INIT;

static void unmap(void *memory) { munmap(memory, sizeof(Fibers)); }

// Gives the calling thread fibers, until it ends. Their pages are there when they are used.
static bool have_fibers() {
    if (fibers != nullptr) return true;
    pthread_once(&key_made, [] { pthread_key_create(&key, unmap); });
    void *memory = mmap(nullptr, sizeof(Fibers), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    pthread_setspecific(key, memory);
    fibers = static_cast<Fibers *>(memory);
    return true;
}

// Runs the next thread that has not ended, from `current` on.
[[noreturn]] static void resume() {
    do machine.current = (machine.current + 1) % machine.threads;
    while (machine.done[machine.current]);
    _longjmp(fibers->at[machine.current], 1);
}

void yield() {
    // A thread that meets, ends or begins sets this back: if all have had their turn, nobody can.
    if (++machine.idle_turns > 2 * machine.threads) {
        fprintf(stderr, "emulator: the threads of a block wait for each other: not all of them came to a barrier\n");
        abort();
    }
    if (_setjmp(fibers->at[machine.current]) == 0) resume();
}

static void fiber() {
    fibers->begun[machine.current] = true;
    // For now only this place is remembered.
    if (_setjmp(fibers->at[machine.current]) == 0) _longjmp(fibers->caller, 1);
    for (;;) {
        fibers->kernel(fibers->arguments);
        machine.done[machine.current] = true;
        machine.idle_turns = 0;
        if (++machine.ended == machine.threads) {
            if (_setjmp(fibers->at[machine.current]) == 0) _longjmp(fibers->caller, 1);
        } else if (_setjmp(fibers->at[machine.current]) == 0) {
            resume();
        }
    }
}

static void run_block() {
    machine.ended = 0;
    machine.idle_turns = 0;
    for (machine.current = 0; machine.current < machine.threads; machine.current++) {
        machine.done[machine.current] = false;
        if (fibers->begun[machine.current]) continue;
        getcontext(&fibers->start);
        fibers->start.uc_stack.ss_sp = fibers->stacks[machine.current];
        fibers->start.uc_stack.ss_size = STACK;
        fibers->start.uc_link = nullptr;
        makecontext(&fibers->start, fiber, 0);
        if (_setjmp(fibers->caller) == 0) setcontext(&fibers->start);
    }
    machine.current = machine.threads - 1;
    if (_setjmp(fibers->caller) == 0) resume();
}

void multiply(Warp &warp) {
    float a[16][16], b[16][8];
    for (uint32_t lane = 0; lane < WARP; lane++) {
        uint32_t g = lane / 4, t = lane % 4;
        const uint32_t words[4] = {warp.a[lane].x, warp.a[lane].y, warp.a[lane].z, warp.a[lane].w};
        for (uint32_t i = 0; i < 2; i++) {
            for (uint32_t word = 0; word < 4; word++)
                a[g + word % 2 * 8][2 * t + i + word / 2 * 8] = widen(uint16_t(words[word] >> 16 * i));
            for (uint32_t word = 0; word < 2; word++) b[2 * t + i + word * 8][g] = widen(uint16_t(warp.b[lane][word] >> 16 * i));
        }
    }
    for (uint32_t row = 0; row < 16; row++) {
        float sums[8];
        for (uint32_t column = 0; column < 8; column++)
            sums[column] = (*warp.c[row % 8 * 4 + column / 2])[row / 8 * 2 + column % 2];
        for (uint32_t k = 0; k < 16; k++)
            for (uint32_t column = 0; column < 8; column++) sums[column] += a[row][k] * b[k][column];
        for (uint32_t column = 0; column < 8; column++)
            (*warp.c[row % 8 * 4 + column / 2])[row / 8 * 2 + column % 2] = sums[column];
    }
}

struct Entry {
    const char *name;
    void (*run)(const void *);
    size_t bytes;
};

template <class Arguments, void (*kernel)(Arguments)> constexpr Entry entry(const char *name) {
    return {name, [](const void *arguments) { kernel(*static_cast<const Arguments *>(arguments)); }, sizeof(Arguments)};
}

#define ENTRY(Arguments, name) entry<Arguments, name>(#name)
#define ENTRIES(Arguments, name, N)                                                                               \
    ENTRY(Arguments, name##_few_1), ENTRY(Arguments, name##_few_2), ENTRY(Arguments, name##_few_4),               \
        ENTRY(Arguments, name##_few_8), ENTRY(Arguments, name##_many_1x4), ENTRY(Arguments, name##_many_4x2),     \
        ENTRY(Arguments, name##_wide_64), ENTRY(Arguments, name##_wide_##N)

static const Entry ENTRIES[] = {
    ENTRIES(Qkv, qkv, 128),
    ENTRIES(GateUp, gate_up, 256),
    ENTRIES(Plain, plain, 128),
    ENTRIES(Qkv, qkv_fp8, 128),
    ENTRIES(GateUp, gate_up_fp8, 256),
    ENTRIES(Plain, plain_fp8, 128),
    ENTRY(Unpack, unpack),
    ENTRY(Unpack, unpack_fp8),
    ENTRY(Finished<Qkv>, qkv_finished),
    ENTRY(Finished<GateUp>, gate_up_finished),
    ENTRY(Attend, attend_32),
    ENTRY(Attend, attend_64),
    ENTRY(Attend, attend_96),
    ENTRY(Attend, attend_128),
    ENTRY(Attend, attend_32_fp8),
    ENTRY(Attend, attend_64_fp8),
    ENTRY(Attend, attend_96_fp8),
    ENTRY(Attend, attend_128_fp8),
    ENTRY(Attend, merge_32),
    ENTRY(Attend, merge_64),
    ENTRY(Attend, merge_96),
    ENTRY(Attend, merge_128),
    ENTRY(Embed, embed),
    ENTRY(Piece, piece),
    ENTRY(AddNorm, add_norm),
    ENTRY(Pick, pick),
    ENTRY(Share, share),
    ENTRY(Join, join),
    ENTRY(Keep, keep),
    ENTRY(Sampler, draw),
    ENTRY(Bound, read_all),
    ENTRY(Bound, copy_all),
};

}  // namespace emulator

// Runs a kernel over a grid of blocks. Returns 0, or 1 if there is no such kernel, 2 if its arguments have another size, 3 if a
// block has too many threads or not whole warps, 4 if there is no memory for fibers.
extern "C" int galerne_emulate(const char *name, const uint32_t grid[3], uint32_t threads, size_t shared_bytes,
                               const void *arguments, size_t argument_bytes) {
    using namespace emulator;
    const Entry *entry = nullptr;
    for (const Entry &each : ENTRIES)
        if (strcmp(each.name, name) == 0) entry = &each;
    if (entry == nullptr) return 1;
    if (entry->bytes != argument_bytes) return 2;
    if (threads == 0 || threads > THREADS_MAX || threads % WARP != 0) return 3;
    if (!have_fibers()) return 4;
    machine.threads = threads;
    fibers->kernel = entry->run;
    fibers->arguments = arguments;
    uint8_t *shared = static_cast<uint8_t *>(aligned_alloc(128, (shared_bytes + 255) / 128 * 128));
    machine.shared = shared;
    for (uint32_t z = 0; z < grid[2]; z++)
        for (uint32_t y = 0; y < grid[1]; y++)
            for (uint32_t x = 0; x < grid[0]; x++) {
                machine.block = {x, y, z};
                memset(shared, 0xff, shared_bytes); // what nobody wrote is no number
                run_block();
            }
    free(shared);
    return 0;
}
