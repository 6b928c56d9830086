// A frame in device memory -> what the image encoder receives: rescale and window, resize, normalise,
// pad, planar.
//
// Frame: (height, width, channels) uint8, uint16, int16 or float32, channels 1 or 3 and interleaved;
//   rows `pitch` bytes apart, a multiple of the element's size, negative for a bottom-up frame. What
//   a float32 frame with NaN or infinity becomes is undefined; find_unusable says that it has some.
// Output: (3, size, size) float32 or float16; the frame's content lies at the top left, the rest is
//   0; one channel is repeated to three.
// Reference: `reference` in preprocess.py, which is what the runtime does in numpy and Pillow. Both
//   resize with the weights of the Axis tables made there: Pillow's, scikit-image's, OpenCV's,
//   torch's or SciPy's.
//
// Entries, one launch each:
//   preprocess_levels                 uint8 as it is, profiles with mean and std that Pillow resizes
//                                     (medsa, sam, finetune-sam): its integers, rounded to whole grey
//                                     levels after each axis
//   preprocess_{u8,u16,i16,f32}       through a window, all profiles with mean and std
//   resize_{levels,u8,u16,i16,f32}, then normalise
//                                     min-max profiles (medsam, litemedsam): what the resized image's
//                                     minimum is shows only when all of it is resized, so there are two
//   find_unusable                     float32 frames, before the others
// Grids: ceil(size/32) x ceil(size/32) x channels blocks of 32 x 8 threads; resize_* by the content's
// size instead of `size`.
//
// Tolerance to the reference. levels: bit for bit, except that an exact half in OpenCV's area filter
//   may round to the other grey level. Windows and float32: 2e-6 of the larger of the display range
//   and the frame's values, divided by std or by max - min; the worst of 1500 random frames was 6e-7,
//   with fused multiply-add (nvcc's default) and without. Behind a rescale the reference itself is off
//   by 2^-23 of the window's larger end, since it rounds rescaled values to float32. float16: rounded
//   from that.
//
// Design. A block makes a 32 x 32 tile of one channel. It resizes BAND rows of the frame along x into
// shared memory, adds them to the rows of the tile they belong to, and takes the next rows: shared
// memory does not grow with the reduction, every frame row is resized along x once per tile column
// and overlap of tiles, and no intermediate image is stored. Weights come from tables, so that every
// filter is the same code and none is computed twice. resize_levels adds up in double precision: its
// sums are rounded to whole levels, where an error of float32 would cost one. The three channels of a
// frame are three blocks, which meet in the cache.
#include "device.cuh"

constexpr int TILE = WARP;
constexpr int ROWS = TILE / WARPS; // of a tile, per thread
constexpr int BAND = 32;

struct Preprocess {
    const void* frame;
    long long pitch;
    int height;
    int width;
    int channels;
    int flip; // levels: 255 makes low values bright, 0 leaves them
    // others: display = clamp((value - low - remainder) * scale, least, most); low + remainder is in double
    // precision what the window and the rescale slope and intercept make of it
    float low;
    float remainder;
    float scale;
    float least;
    float most;
    int rounding; // resize_levels: TRUNCATE, HALF_EVEN or HALF_UP
    float mean[3];
    float std[3];
    Axis rows;
    Axis columns;
    int size;
    int half;           // whether the output is float16
    void* output;
    float* content;     // min-max: (channels, rows.outputs, columns.outputs)
    // 5 numbers, 0 before; min-max: ~min, max of the frame; ~min, max of its content; float32: 1 where
    // a value is NaN or infinite
    unsigned* extremes;
};

enum Rounding { TRUNCATE, HALF_EVEN, HALF_UP };

// Whole grey levels with weights of 22 fractional bits: Pillow's Resample.c.
struct FixedPoint {
    using Number = int;
    static __device__ Number start() { return 1 << 21; }
    static __device__ Number finish(Number sum) { return min(max(sum >> 22, 0), 255); }
};

template <typename T>
struct Floating {
    using Number = T;
    static __device__ Number start() { return 0; }
    static __device__ Number finish(Number sum) { return sum; }
};

// Grey levels of a uint8 frame that is shown as it is.
struct Levels {
    using Element = unsigned char;
    static __device__ int value(const Preprocess& p, Element element) { return element ^ p.flip; }
};

template <typename T>
struct Windowed {
    using Element = T;
    static __device__ float value(const Preprocess& p, Element element) {
        const float shown = (static_cast<float>(element) - p.low - p.remainder) * p.scale;
        return fminf(fmaxf(shown, p.least), p.most);
    }
};

template <class Source>
__device__ const typename Source::Element* row_of(const Preprocess& p, int row) {
    const char* start = static_cast<const char*>(p.frame) + row * p.pitch;
    return reinterpret_cast<const typename Source::Element*>(start);
}

// Column x of a row of the frame, resized along x.
template <class Source, class Arithmetic>
__device__ typename Arithmetic::Number along_x(const Preprocess& p, int row, int x, int channel) {
    using Number = typename Arithmetic::Number;
    const int first = p.columns.first[x];
    const auto* elements = row_of<Source>(p, row) + first * p.channels + channel;
    Number sum = Arithmetic::start();
    for (int k = 0; k < p.columns.taps; ++k)
        sum += weight_of<Number>(p.columns, k, x) *
               static_cast<Number>(Source::value(p, elements[k * p.channels]));
    return Arithmetic::finish(sum);
}

// The thread's pixels of the block's tile, ROWS of them, WARPS rows apart. Pixels beyond the content
// are left unsaid.
template <class Source, class Arithmetic>
__device__ void resize_tile(const Preprocess& p, typename Arithmetic::Number (&band)[BAND][TILE],
                            typename Arithmetic::Number (&pixels)[ROWS]) {
    using Number = typename Arithmetic::Number;
    const int left = blockIdx.x * TILE, top = blockIdx.y * TILE, x = left + threadIdx.x;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) pixels[i] = Arithmetic::start();
    if (left >= p.columns.outputs || top >= p.rows.outputs) return; // all padding
    const int last = min(top + TILE, p.rows.outputs) - 1;
    const int end = p.rows.first[last] + p.rows.taps;
    for (int low = p.rows.first[top]; low < end; low += BAND) {
        const int high = min(low + BAND, end);
        for (int row = low + threadIdx.y; row < high && x < p.columns.outputs; row += WARPS)
            band[row - low][threadIdx.x] = along_x<Source, Arithmetic>(p, row, x, blockIdx.z);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int y = top + threadIdx.y + i * WARPS;
            if (x >= p.columns.outputs || y > last) break;
            const int first = p.rows.first[y];
            for (int k = max(low - first, 0); k < min(high - first, p.rows.taps); ++k)
                pixels[i] += weight_of<Number>(p.rows, k, y) * band[first + k - low][threadIdx.x];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) pixels[i] = Arithmetic::finish(pixels[i]);
}

// A pixel of the output, in the plane of its channel, or in all three for the only channel.
__device__ inline void store_pixel(const Preprocess& p, int x, int y, const float (&planes)[3]) {
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) {
        if (p.channels == 3 && plane != static_cast<int>(blockIdx.z)) continue;
        const long long at = (static_cast<long long>(plane) * p.size + y) * p.size + x;
        if (p.half)
            static_cast<unsigned short*>(p.output)[at] = half_bits(planes[plane]);
        else
            static_cast<float*>(p.output)[at] = planes[plane];
    }
}

template <class Source, class Arithmetic>
__device__ void preprocess(const Preprocess& p, typename Arithmetic::Number (&band)[BAND][TILE]) {
    typename Arithmetic::Number pixels[ROWS];
    resize_tile<Source, Arithmetic>(p, band, pixels);
    const int x = blockIdx.x * TILE + threadIdx.x;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int y = blockIdx.y * TILE + threadIdx.y + i * WARPS;
        if (x >= p.size || y >= p.size) break;
        const bool inside = x < p.columns.outputs && y < p.rows.outputs;
        float planes[3];
        for (int c = 0; c < 3; ++c)
            planes[c] = inside ? (static_cast<float>(pixels[i]) - p.mean[c]) / p.std[c] : 0.0f;
        store_pixel(p, x, y, planes);
    }
}

// Smallest and largest of a warp's values -> extremes[0] and extremes[1].
__device__ inline void add_extremes(unsigned* extremes, unsigned smallest, unsigned largest) {
    for (int distance = WARP / 2; distance; distance /= 2) {
        smallest = max(smallest, __shfl_xor_sync(ALL_LANES, smallest, distance));
        largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
    }
    if (threadIdx.x == 0) {
        atomicMax(extremes, smallest);
        atomicMax(extremes + 1, largest);
    }
}

// Extremes of the frame's rows that fall to this warp, of all warps of the grid.
template <class Source>
__device__ void frame_extremes(const Preprocess& p) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int warps = gridDim.x * gridDim.y * gridDim.z * WARPS;
    unsigned smallest = 0, largest = 0;
    for (int row = block * WARPS + threadIdx.y; row < p.height; row += warps) {
        const auto* elements = row_of<Source>(p, row);
        for (int i = threadIdx.x; i < p.width * p.channels; i += WARP) {
            const unsigned key = ordered(static_cast<float>(Source::value(p, elements[i])));
            smallest = max(smallest, ~key);
            largest = max(largest, key);
        }
    }
    add_extremes(p.extremes, smallest, largest);
}

// Whether a value of the frame is NaN or infinite -> extremes[4].
extern "C" __global__ void find_unusable(const Preprocess p) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int warps = gridDim.x * gridDim.y * gridDim.z * WARPS;
    unsigned found = 0;
    for (int row = block * WARPS + threadIdx.y; row < p.height; row += warps) {
        const float* elements = row_of<Windowed<float>>(p, row);
        for (int i = threadIdx.x; i < p.width * p.channels; i += WARP)
            found |= elements[i] - elements[i] != 0.0f;
    }
    if (found) atomicMax(p.extremes + 4, found);
}

__device__ inline float rounded(const Preprocess&, float value) { return value; }

__device__ inline float rounded(const Preprocess& p, double level) {
    if (p.rounding == HALF_EVEN) return static_cast<float>(rint(level));
    // 1e-9: round-off must not cost a flat region a grey level
    return static_cast<float>(floor(level + (p.rounding == HALF_UP ? 0.5 : 1e-9)));
}

template <class Source, class Arithmetic>
__device__ void resize(const Preprocess& p, typename Arithmetic::Number (&band)[BAND][TILE]) {
    typename Arithmetic::Number pixels[ROWS];
    frame_extremes<Source>(p);
    resize_tile<Source, Arithmetic>(p, band, pixels);
    const int x = blockIdx.x * TILE + threadIdx.x;
    unsigned smallest = 0, largest = 0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int y = blockIdx.y * TILE + threadIdx.y + i * WARPS;
        if (x >= p.columns.outputs || y >= p.rows.outputs) break;
        const float value = rounded(p, pixels[i]);
        const long long row = static_cast<long long>(blockIdx.z) * p.rows.outputs + y;
        p.content[row * p.columns.outputs + x] = value;
        smallest = max(smallest, ~ordered(value));
        largest = max(largest, ordered(value));
    }
    add_extremes(p.extremes + 2, smallest, largest);
}

// A cubic filter overshoots: content is cut to the frame's extremes, which moves its own likewise.
extern "C" __global__ void normalise(const Preprocess p) {
    const float least = from_ordered(~p.extremes[0]), most = from_ordered(p.extremes[1]);
    const float low = fminf(fmaxf(from_ordered(~p.extremes[2]), least), most);
    const float high = fminf(fmaxf(from_ordered(p.extremes[3]), least), most);
    const int x = blockIdx.x * TILE + threadIdx.x;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int y = blockIdx.y * TILE + threadIdx.y + i * WARPS;
        if (x >= p.size || y >= p.size) break;
        float value = 0.0f;
        if (x < p.columns.outputs && y < p.rows.outputs) {
            const long long row = static_cast<long long>(blockIdx.z) * p.rows.outputs + y;
            const float pixel = fminf(fmaxf(p.content[row * p.columns.outputs + x], least), most);
            value = (pixel - low) / fmaxf(high - low, 1e-8f);
        }
        const float planes[3] = {value, value, value};
        store_pixel(p, x, y, planes);
    }
}

#define ENTRIES(NAME, SOURCE, PREPROCESS_IN, RESIZE_IN)               \
    extern "C" __global__ void preprocess_##NAME(const Preprocess p) { \
        __shared__ PREPROCESS_IN::Number band[BAND][TILE];             \
        preprocess<SOURCE, PREPROCESS_IN>(p, band);                    \
    }                                                                  \
    extern "C" __global__ void resize_##NAME(const Preprocess p) {     \
        __shared__ RESIZE_IN::Number band[BAND][TILE];                 \
        resize<SOURCE, RESIZE_IN>(p, band);                            \
    }

ENTRIES(levels, Levels, FixedPoint, Floating<double>)
ENTRIES(u8, Windowed<unsigned char>, Floating<float>, Floating<float>)
ENTRIES(u16, Windowed<unsigned short>, Floating<float>, Floating<float>)
ENTRIES(i16, Windowed<short>, Floating<float>, Floating<float>)
ENTRIES(f32, Windowed<float>, Floating<float>, Floating<float>)
