"""The host shim itself: fibers, barriers and warps behave as a GPU's; sanitizers find nothing."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cuda_on_host import ROUNDED, SOURCES, address, compile_host, load

PROBES = """
struct Probe { unsigned* out; const unsigned* in; };

// With a barrier this reverses a block's numbers; without, it reads what is not there yet.
extern "C" __global__ void reversed(Probe p) {
    __shared__ unsigned numbers[64];
    numbers[threadIdx.x] = p.in[threadIdx.x];
    __syncthreads();
    p.out[threadIdx.x] = numbers[63 - threadIdx.x];
}
extern "C" __global__ void reversed_too_early(Probe p) {
    __shared__ unsigned numbers[64];
    numbers[threadIdx.x] = p.in[threadIdx.x];
    p.out[threadIdx.x] = numbers[63 - threadIdx.x];
}
extern "C" __global__ void never_written(Probe p) {
    __shared__ unsigned number;
    p.out[threadIdx.x] = number;
    number = 0;
}
extern "C" __global__ void two_barriers(Probe p) {
    if (p.in[threadIdx.x] % 2)
        __syncthreads();
    else
        __syncthreads();
}
extern "C" __global__ void barrier_after_some_ended(Probe p) {
    if (threadIdx.x % 2) return;
    __syncthreads();
    p.out[threadIdx.x] = 1;
}
extern "C" __global__ void half_a_warp(Probe p) {
    if (threadIdx.x % 2) p.out[threadIdx.x] = __ballot_sync(0xffffffffu, true);
}
extern "C" __global__ void warp(Probe p) {
    const unsigned value = p.in[threadIdx.x];
    const unsigned word = __ballot_sync(0xffffffffu, value % 2);
    const unsigned third = __shfl_sync(0xffffffffu, value, 3);
    const unsigned neighbour = __shfl_xor_sync(0xffffffffu, value, 1);
    unsigned* out = p.out + 6 * threadIdx.x;
    out[0] = word;
    out[1] = third;
    out[2] = neighbour;
    out[3] = __popc(word);
    out[4] = __ffs(word);
    out[5] = __clz(word);
}
extern "C" __global__ void indices(Probe p) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    p.out[block * threads + thread] = 1000 * block + thread;
}
extern "C" __global__ void halves(Probe p) {
    p.out[threadIdx.x] = half_bits(__uint_as_float(p.in[threadIdx.x]));
}
extern "C" int launch(void (*entry)(Probe), Probe* p, dim3* grid, dim3* block, unsigned seed) {
    return host::launch(entry, *p, *grid, *block, seed);
}
"""

FINISHED, DIVERGED = 0, 1
SEEDS = range(20)


class Probe(ctypes.Structure):
    _fields_ = (("out", ctypes.c_uint64), ("input", ctypes.c_uint64))


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = tmp_path_factory.mktemp("probes") / "probes.cpp"
    source.write_text(PROBES)
    return load(source, *ROUNDED)


def run(probes, entry, numbers, outputs, *, grid=(1, 1, 1), block=(64, 1, 1), seed=0):
    """(outcome, what the kernel wrote)"""
    out = np.full(outputs, 7, np.uint32)
    values = np.ascontiguousarray(numbers, np.uint32)
    triple = ctypes.c_uint * 3
    outcome = probes.launch(
        ctypes.cast(getattr(probes, entry), ctypes.c_void_p),
        ctypes.byref(Probe(address(out), address(values))),
        ctypes.byref(triple(*grid)),
        ctypes.byref(triple(*block)),
        ctypes.c_uint(seed),
    )
    return outcome, out


def test_shared_memory_needs_its_barrier(probes) -> None:
    numbers = np.arange(64) + 100
    for seed in SEEDS:
        outcome, out = run(probes, "reversed", numbers, 64, seed=seed)
        assert outcome == FINISHED
        np.testing.assert_array_equal(out, numbers[::-1])
        _, early = run(probes, "reversed_too_early", numbers, 64, seed=seed)
        assert (early != numbers[::-1]).any()


def test_shared_memory_begins_as_rubbish_in_every_block(probes) -> None:
    _, out = run(probes, "never_written", [0], 1, grid=(3, 1, 1), block=(1, 1, 1))
    assert out[0] == 0xA5A5A5A5


def test_threads_left_waiting_are_told_of(probes) -> None:
    odd = np.arange(64)
    assert run(probes, "two_barriers", odd, 1)[0] == DIVERGED
    assert run(probes, "two_barriers", odd * 2, 1)[0] == FINISHED
    assert run(probes, "half_a_warp", odd, 64)[0] == DIVERGED
    assert run(probes, "warp", odd, 6 * 64, block=(48, 1, 1))[0] == DIVERGED


def test_ended_threads_do_not_hold_a_barrier(probes) -> None:
    outcome, out = run(probes, "barrier_after_some_ended", np.arange(64), 64)
    assert outcome == FINISHED
    assert out.tolist() == [1, 7] * 32


def test_warp_intrinsics_act_over_32_lanes(probes) -> None:
    numbers = np.random.default_rng(0).integers(0, 2**31, 64)
    for seed in SEEDS:
        outcome, out = run(probes, "warp", numbers, 6 * 64, seed=seed)
        assert outcome == FINISHED
        for warp in range(2):
            lanes = numbers[32 * warp : 32 * warp + 32]
            word = sum(int(value % 2) << lane for lane, value in enumerate(lanes))
            counts = (word.bit_count(), (word & -word).bit_length(), 32 - word.bit_length())
            for lane in range(32):
                figures = out[6 * (32 * warp + lane) :][:6].tolist()
                assert figures == [word, lanes[3], lanes[lane ^ 1], *counts]


def test_every_thread_has_its_index(probes) -> None:
    _, out = run(probes, "indices", [0], 24 * 12, grid=(2, 3, 4), block=(3, 2, 2))
    np.testing.assert_array_equal(out, [1000 * b + t for b in range(24) for t in range(12)])


def test_float16_is_rounded_to_nearest_even(probes) -> None:
    special = [0, -0.0, 1, 65504, 65519.9, 65520, 1e-8, 6e-8, 5.97e-8, 2049, 2051, np.inf]
    noise = np.random.default_rng(0).normal(0, 100, 52)
    values = np.array([*special, *noise], np.float32)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    _, out = run(probes, "halves", values.view(np.uint32), 64)
    np.testing.assert_array_equal(out, expected.view(np.uint16))


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-alone program, under AddressSanitizer and UBSan."""
    program = tmp_path_factory.mktemp("check") / "check"
    compile_host(
        *("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *ROUNDED),
        *(SOURCES / "host/check.cpp", "-o", program),
    )
    return program


@pytest.mark.parametrize("rounds", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_sanitizers_find_nothing(check: Path, rounds: int) -> None:
    """Every entry on arrays of exactly their size."""
    done = subprocess.run([check, str(rounds)], capture_output=True, text=True, check=False)
    messages = [line for line in done.stderr.splitlines() if "swapcontext functions" not in line]
    assert (done.returncode, messages) == (0, [])
    assert done.stdout == f"{rounds} rounds of 13 entries\n"


def test_the_sanitizers_are_on(check: Path) -> None:
    """An output that is one element too short is found."""
    done = subprocess.run([check, "1", "1"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
