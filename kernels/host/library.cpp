// The kernels as a shared library, for callers that hold entries and parameters as addresses.
#include "../postprocess.cu"
#include "../preprocess.cu"

// 0, or 1 for threads left waiting for each other. grid and block: x, y, z.
template <typename Parameters>
int launch(void (*entry)(Parameters), const Parameters* p, const unsigned* grid, const unsigned* block,
           unsigned seed) {
    return host::launch(entry, *p, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, seed);
}

extern "C" {

int launch_preprocess(void (*entry)(Preprocess), const Preprocess* p, const unsigned* grid,
                      const unsigned* block, unsigned seed) {
    return launch(entry, p, grid, block, seed);
}

int launch_postprocess(void (*entry)(Postprocess), const Postprocess* p, const unsigned* grid,
                       const unsigned* block, unsigned seed) {
    return launch(entry, p, grid, block, seed);
}

extern const unsigned long long size_of_preprocess = sizeof(Preprocess);
extern const unsigned long long size_of_postprocess = sizeof(Postprocess);
}
