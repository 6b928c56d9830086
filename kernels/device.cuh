// What the kernels share: the axis of a separable resize, float16, floats under atomicMax.
//
// Nothing is included here, so that NVRTC needs no toolkit's headers. Compiled as host C++, the names
// of CUDA come from host/cuda_host.h, which is included before everything else.
#pragma once

#ifdef __CUDACC__
__device__ inline unsigned short half_bits(float value) { // rounded to nearest even
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

constexpr int WARP = 32;
constexpr int WARPS = 8; // of a block, which is WARP x WARPS threads: a warp works along a row
constexpr unsigned ALL_LANES = 0xffffffffu;

// One axis of a separable resize: output i is the sum over k < taps of
// weights[k * outputs + i] * input[first[i] + k].
// `first` never decreases and first[i] + taps <= inputs. Neighbouring threads read neighbouring
// weights, hence taps in the slow dimension. The type of the weights is the kernel's.
struct Axis {
    const int* first;
    const void* weights;
    int inputs;
    int outputs;
    int taps;
};

template <typename Weight>
__device__ inline Weight weight_of(const Axis& axis, int tap, int output) {
    return static_cast<const Weight*>(axis.weights)[static_cast<long long>(tap) * axis.outputs + output];
}

// A float as an unsigned number of the same order, never 0 for a finite one: zeroed memory is then a
// start for atomicMax, with `ordered` for a maximum and `~ordered` for a minimum.
__device__ inline unsigned ordered(float value) {
    const unsigned bits = __float_as_uint(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline float from_ordered(unsigned key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}
