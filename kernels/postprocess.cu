// Low-resolution logits -> masks at the image's size, with their areas and bounding boxes: crop of the
// padding, resize to the image, threshold or argmax over classes. Values of the image's size are
// never stored.
//
// Logits: (channels, rows.inputs, columns.inputs) float32, finite. A pixel's value is a weighted sum of
//   logits or, with `probabilities`, of their sigmoids. The Axis tables, float32, hold the weights of
//   a postprocessing: SAM's two bilinear steps as one, or one bilinear, bicubic or nearest resize.
// With `exclusive`, channel 0 is the background and channel k is class k; a pixel belongs to the channel of
//   the highest value, the first of equals, and there are channels - 1 classes. Otherwise channel k is
//   class k + 1, and a pixel belongs to a class where its value is above `threshold`.
// Output of threshold_masks: (count, height, ceil(width/32)) uint32; bit i of word j is pixel 32 j + i
//   of a row, set where the pixel belongs to the mask; bits beyond the width are 0.
// Output of label_map: (height, width) uint8: the class of the highest value, the first of equals; 0 for
//   the background. count <= 255. With `only` and `exclusive`: 1 for that class, 0 for all others.
// Tally, for both: (count, 5) uint32, 0 before: area, width - x0, height - y0, x1, y1 of each mask, or
//   of each class's pixels, with x1, y1 exclusive; all 0 for an empty one.
// Reference: `reference_masks` and `reference_labels` in postprocess.py.
//
// Entries: threshold_masks, on ceil(width/32) x ceil(height/32) x count blocks of 32 x 8 threads;
// label_map, on ceil(width/32) x ceil(height/32) x 1.
//
// Tolerance: values differ from the reference's by up to 1e-6 of the largest magnitude (order of sums;
// nvcc's fused multiply-add and expf included), so that a pixel whose value is that close to the threshold,
// or to another class's, may fall to the other side.
//
// Design. A bilinear pixel reads 3 x 3 logits at most where the network is no smaller than they are, a
// bicubic one 4 x 4, and neighbours read the same ones, so the cache does what a tile in shared memory would. A warp is 32
// pixels of a row: its ballot is the word of the mask, and gives area and box by counting bits. A
// block adds up in shared memory before it touches the tally.
#include "device.cuh"

constexpr int TILE_ROWS = 32;
constexpr int FIGURES = 5;
constexpr int MOST_CLASSES = 255;

struct Postprocess {
    const float* logits;
    Axis rows;
    Axis columns;
    int count;         // masks, or classes of a label map
    int channels;      // planes of logits
    int probabilities; // whether logits become probabilities before they are resized
    int exclusive;     // whether channels compete, channel 0 for the background
    int only;          // exclusive label_map: the class that becomes 1; 0 for all classes
    float threshold;
    unsigned* masks;       // threshold_masks
    unsigned char* labels; // label_map
    unsigned* tally;
};

__device__ inline float probability_of(float logit) {
    const float decay = expf(-fabsf(logit));
    return (logit < 0.0f ? decay : 1.0f) / (1.0f + decay);
}

__device__ inline float value_of(const Postprocess& p, int index, int x, int y) {
    const int left = p.columns.first[x], top = p.rows.first[y];
    const long long row = static_cast<long long>(index) * p.rows.inputs + top;
    const float* plane = p.logits + row * p.columns.inputs + left;
    float sum = 0.0f;
    for (int j = 0; j < p.rows.taps; ++j) {
        float line = 0.0f;
        for (int k = 0; k < p.columns.taps; ++k) {
            const float logit = plane[j * p.columns.inputs + k];
            line += weight_of<float>(p.columns, k, x) * (p.probabilities ? probability_of(logit) : logit);
        }
        sum += weight_of<float>(p.rows, j, y) * line;
    }
    return sum;
}

// The class of the highest value, the first of equals; 0 for the background.
__device__ inline int class_of(const Postprocess& p, int x, int y) {
    float highest = p.exclusive ? value_of(p, 0, x, y) : p.threshold;
    int best = 0;
    for (int index = p.exclusive; index < p.channels; ++index) {
        const float value = value_of(p, index, x, y);
        if (value > highest) {
            highest = value;
            best = p.exclusive ? index : index + 1;
        }
    }
    return best;
}

__device__ inline bool belongs(const Postprocess& p, int mask, int x, int y) {
    return p.exclusive ? class_of(p, x, y) == mask + 1 : value_of(p, mask, x, y) > p.threshold;
}

// Adds 32 pixels of row y, from x = `left`, to a mask's figures.
__device__ inline void add_word(const Postprocess& p, unsigned* figures, unsigned word, int left, int y) {
    atomicAdd(&figures[0], static_cast<unsigned>(__popc(word)));
    atomicMax(&figures[1], static_cast<unsigned>(p.columns.outputs - (left + __ffs(word) - 1)));
    atomicMax(&figures[2], static_cast<unsigned>(p.rows.outputs - y));
    atomicMax(&figures[3], static_cast<unsigned>(left + WARP - __clz(word)));
    atomicMax(&figures[4], static_cast<unsigned>(y + 1));
}

__device__ inline void clear(unsigned* figures, int length) {
    for (int i = threadIdx.y * WARP + threadIdx.x; i < length; i += WARP * WARPS) figures[i] = 0;
    __syncthreads();
}

__device__ inline void add_block(unsigned* tally, const unsigned* figures, int length) {
    __syncthreads();
    for (int i = threadIdx.y * WARP + threadIdx.x; i < length; i += WARP * WARPS) {
        if (!figures[i]) continue;
        if (i % FIGURES == 0)
            atomicAdd(&tally[i], figures[i]);
        else
            atomicMax(&tally[i], figures[i]);
    }
}

extern "C" __global__ void threshold_masks(const Postprocess p) {
    __shared__ unsigned figures[FIGURES];
    const int left = blockIdx.x * WARP, x = left + threadIdx.x;
    const int top = blockIdx.y * TILE_ROWS, end = min(top + TILE_ROWS, p.rows.outputs);
    clear(figures, FIGURES);
    for (int y = top + threadIdx.y; y < end; y += WARPS) {
        const bool inside = x < p.columns.outputs && belongs(p, blockIdx.z, x, y);
        const unsigned word = __ballot_sync(ALL_LANES, inside);
        if (threadIdx.x == 0) {
            const long long row = static_cast<long long>(blockIdx.z) * p.rows.outputs + y;
            p.masks[row * gridDim.x + blockIdx.x] = word;
            if (word) add_word(p, figures, word, left, y);
        }
    }
    add_block(p.tally + blockIdx.z * FIGURES, figures, FIGURES);
}

extern "C" __global__ void label_map(const Postprocess p) {
    __shared__ unsigned figures[MOST_CLASSES * FIGURES];
    const int left = blockIdx.x * WARP, x = left + threadIdx.x;
    const int top = blockIdx.y * TILE_ROWS, end = min(top + TILE_ROWS, p.rows.outputs);
    clear(figures, p.count * FIGURES);
    for (int y = top + threadIdx.y; y < end; y += WARPS) {
        int label = 0;
        if (x < p.columns.outputs) {
            label = class_of(p, x, y);
            if (p.only) label = label == p.only;
            p.labels[static_cast<long long>(y) * p.columns.outputs + x] = static_cast<unsigned char>(label);
        }
        // one round for each label that the warp holds
        for (unsigned unseen = __ballot_sync(ALL_LANES, label); unseen;) {
            const int first = __shfl_sync(ALL_LANES, label, __ffs(unseen) - 1);
            const unsigned word = __ballot_sync(ALL_LANES, label == first);
            if (threadIdx.x == 0) add_word(p, figures + (first - 1) * FIGURES, word, left, y);
            unseen &= ~word;
        }
    }
    add_block(p.tally, figures, p.count * FIGURES);
}
