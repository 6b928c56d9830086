// CUDA's names for a host C++ compiler: the kernels' sources compile unchanged and run without a GPU.
//
// Compile with `-include cuda_host.h -ffp-contract=off`. A block's threads are fibers: each runs until
// it waits (`__syncthreads`, a warp intrinsic) or ends, and goes on when all that it waits for have
// come. They run in an order drawn from a seed, and shared memory holds rubbish when a block begins, so
// that what a kernel may not rely on shows. Blocks run one after another. Refused, as `launch` says:
// threads of a block waiting at different places, a warp intrinsic without all 32 lanes.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
// Gathered in a section of their own, whose ends the linker names.
#define __shared__ static __attribute__((section("block_memory")))

using std::max;
using std::min;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

extern "C" char __start_block_memory[], __stop_block_memory[];

namespace host {

constexpr int LANES = 32;
constexpr std::size_t STACK = 1 << 16;

enum Outcome { FINISHED, DIVERGED };

enum class State { READY, AT_BARRIER, AT_WARP, ENDED };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    dim3 index;
    State state;
    int site;                // line of what it waits at
    std::uint32_t given;     // to a warp intrinsic
    std::uint32_t* gathered; // of the 32 lanes, where the intrinsic wants them
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline Fiber* current;
inline void (*body)(const void*);
inline const void* argument;

inline void wait(State state, int site) {
    current->state = state;
    current->site = site;
    swapcontext(&current->context, &scheduler);
}

inline void barrier(int site) { wait(State::AT_BARRIER, site); }

// What the 32 lanes give, in their order.
struct Warp {
    std::uint32_t lanes[LANES];
};

template <unsigned MASK>
Warp gather(std::uint32_t given, int site) {
    static_assert(MASK == 0xffffffff, "only intrinsics of all lanes are known");
    Warp all;
    current->given = given;
    current->gathered = all.lanes;
    wait(State::AT_WARP, site);
    return all;
}

template <unsigned MASK>
unsigned ballot(bool predicate, int site) {
    const Warp all = gather<MASK>(predicate, site);
    unsigned word = 0;
    for (int lane = 0; lane < LANES; ++lane) word |= all.lanes[lane] << lane;
    return word;
}

template <unsigned MASK, typename T>
T shuffle(T value, int lane, int site) {
    static_assert(sizeof(T) == 4, "32-bit values only");
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = gather<MASK>(bits, site).lanes[lane % LANES];
    std::memcpy(&value, &bits, 4);
    return value;
}

inline int lane() { return static_cast<int>(current - fibers.data()) % LANES; }

inline void run_fiber() {
    body(argument);
    current->state = State::ENDED;
    swapcontext(&current->context, &scheduler);
}

inline void start(Fiber& fiber) {
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    fiber.state = State::READY;
}

// Whether fibers first…last wait alike and may go on; ended ones count where `ended_too`.
inline bool together(State state, std::size_t first, std::size_t last, bool ended_too) {
    const Fiber* one = nullptr;
    for (std::size_t i = first; i < last; ++i) {
        if (ended_too && fibers[i].state == State::ENDED) continue;
        if (fibers[i].state != state || (one && fibers[i].site != one->site)) return false;
        one = &fibers[i];
    }
    return one != nullptr;
}

inline bool release_warps() {
    bool any = false;
    for (std::size_t first = 0; first < fibers.size(); first += LANES) {
        if (first + LANES > fibers.size()) break; // an incomplete warp cannot meet
        if (!together(State::AT_WARP, first, first + LANES, false)) continue;
        for (std::size_t i = first; i < first + LANES; ++i) {
            for (int lane = 0; lane < LANES; ++lane) fibers[i].gathered[lane] = fibers[first + lane].given;
            fibers[i].state = State::READY;
        }
        any = true;
    }
    return any;
}

inline bool release_barrier() {
    if (!together(State::AT_BARRIER, 0, fibers.size(), true)) return false;
    for (Fiber& fiber : fibers)
        if (fiber.state == State::AT_BARRIER) fiber.state = State::READY;
    return true;
}

__attribute__((no_sanitize("address"))) inline void spoil_block_memory() {
    for (volatile char* at = __start_block_memory; at < __stop_block_memory; ++at) *at = '\xa5';
}

inline Outcome run_block(const std::vector<std::size_t>& order) {
    spoil_block_memory();
    for (Fiber& fiber : fibers) start(fiber);
    do {
        for (std::size_t i : order) {
            if (fibers[i].state != State::READY) continue;
            current = &fibers[i];
            threadIdx = current->index;
            swapcontext(&scheduler, &current->context);
        }
    } while (release_warps() || release_barrier());
    const auto ended = [](const Fiber& fiber) { return fiber.state == State::ENDED; };
    return std::all_of(fibers.begin(), fibers.end(), ended) ? FINISHED : DIVERGED;
}

// Runs a kernel over a grid. DIVERGED: threads were left waiting for each other; nothing after that
// block ran.
template <typename Parameters>
Outcome launch(void (*entry)(Parameters), const Parameters& parameters, dim3 grid, dim3 block,
               unsigned seed) {
    struct Call {
        void (*entry)(Parameters);
        const Parameters* parameters;
    } const call{entry, &parameters};
    body = [](const void* given) {
        const Call& call = *static_cast<const Call*>(given);
        call.entry(*call.parameters);
    };
    argument = &call;
    gridDim = grid;
    blockDim = block;
    fibers.resize(block.x * block.y * block.z);
    std::vector<std::size_t> order(fibers.size());
    for (std::size_t i = 0; i < fibers.size(); ++i) {
        order[i] = i;
        fibers[i].index = {static_cast<unsigned>(i % block.x), static_cast<unsigned>(i / block.x % block.y),
                           static_cast<unsigned>(i / block.x / block.y)};
    }
    std::mt19937 random(seed);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                std::shuffle(order.begin(), order.end(), random);
                if (run_block(order) != FINISHED) return DIVERGED;
            }
    return FINISHED;
}

} // namespace host

#define __syncthreads() host::barrier(__LINE__)
#define __ballot_sync(MASK, PREDICATE) host::ballot<MASK>((PREDICATE) != 0, __LINE__)
#define __shfl_sync(MASK, VALUE, LANE) host::shuffle<MASK>(VALUE, LANE, __LINE__)
#define __shfl_xor_sync(MASK, VALUE, DISTANCE) host::shuffle<MASK>(VALUE, host::lane() ^ (DISTANCE), __LINE__)

inline unsigned atomicAdd(unsigned* at, unsigned value) {
    const unsigned before = *at;
    *at += value;
    return before;
}

inline unsigned atomicMax(unsigned* at, unsigned value) {
    const unsigned before = *at;
    *at = max(*at, value);
    return before;
}

inline int __popc(unsigned word) { return __builtin_popcount(word); }

inline int __ffs(unsigned word) { return __builtin_ffs(static_cast<int>(word)); }

inline int __clz(unsigned word) { return word ? __builtin_clz(word) : 32; }

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline unsigned short half_bits(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
