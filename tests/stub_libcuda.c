/* A CUDA driver without a GPU, for tests/test_pycuda_stub.py: memory is the host's, work is done
   when it is queued, and calls are lines of the file STUB_LOG. Calls that are not here fail when
   they are made: pycuda is loaded with lazy binding. Signatures are those of cuda.h. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef void *Handle;
typedef unsigned long long Address;

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_IMAGE = 200, NOT_FOUND = 500 };
static const size_t MOST_BYTES = 1 << 30; /* of one allocation */

static FILE *log_file(void) {
    static FILE *file;
    if (!file) {
        file = fopen(getenv("STUB_LOG"), "w");
        setvbuf(file, NULL, _IOLBF, 0);
    }
    return file;
}

#define LOG(...) fprintf(log_file(), __VA_ARGS__)

static int allocate(void **memory, size_t size) {
    if (size > MOST_BYTES || posix_memalign(memory, 256, size)) return OUT_OF_MEMORY;
    memset(*memory, 0xFF, size);
    return 0;
}

CUresult cuInit(unsigned flags) { LOG("cuInit\n"); return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult cuDeviceGet(int *device, int index) { *device = index; return 0; }
CUresult cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, length, "stub %d", device);
    return 0;
}
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 7 : 1; /* compute capability 8.7 */
    return 0;
}
CUresult cuGetErrorString(CUresult code, const char **text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : "device kernel image is invalid";
    return 0;
}

/* cuda-bindings asks for every function by its name without a version. */
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags,
                             int *status) {
    char versioned[128];
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) *function = dlsym(RTLD_DEFAULT, versioned);
    if (status) *status = *function ? 0 : 1;
    return *function ? 0 : NOT_FOUND;
}

/* Addresses from 1 << 40 on are of a second GPU, the first page is nobody's. */
CUresult cuPointerGetAttribute(void *value, int attribute, Address address) {
    LOG("cuPointerGetAttribute %d\n", attribute);
    if (address < 4096) return INVALID_VALUE;
    *(int *)value = address >> 40 ? 1 : 0;
    return 0;
}

/* The context is one for the process; a thread's stack of them is a count. */
static __thread int depth;
CUresult cuDevicePrimaryCtxRetain(Handle *context, int device) {
    *context = (Handle)0xC0;
    LOG("cuDevicePrimaryCtxRetain\n");
    return 0;
}
CUresult cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
CUresult cuCtxDetach(Handle context) { return 0; }
CUresult cuCtxPushCurrent_v2(Handle context) { depth++; return 0; }
CUresult cuCtxPopCurrent_v2(Handle *context) { depth--; return 0; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return 0; }
CUresult cuCtxGetApiVersion(Handle context, unsigned *version) { *version = 13000; return 0; }

CUresult cuStreamCreate(Handle *stream, unsigned flags) {
    static uintptr_t count = 0x5000;
    *stream = (Handle)++count;
    LOG("cuStreamCreate flags=%u\n", flags);
    return 0;
}
CUresult cuStreamDestroy_v2(Handle stream) { LOG("cuStreamDestroy %p\n", stream); return 0; }
CUresult cuStreamSynchronize(Handle stream) { LOG("cuStreamSynchronize %p\n", stream); return 0; }
CUresult cuStreamWaitEvent(Handle stream, Handle event, unsigned flags) {
    LOG("cuStreamWaitEvent %p\n", stream);
    return 0;
}
CUresult cuEventCreate(Handle *event, unsigned flags) {
    *event = (Handle)0xE0;
    LOG("cuEventCreate flags=%u\n", flags);
    return 0;
}
CUresult cuEventDestroy_v2(Handle event) { return 0; }
CUresult cuEventRecord(Handle event, Handle stream) { LOG("cuEventRecord %p\n", stream); return 0; }

CUresult cuMemAlloc_v2(Address *address, size_t size) {
    void *memory;
    if (allocate(&memory, size)) return OUT_OF_MEMORY;
    *address = (Address)memory;
    LOG("cuMemAlloc %zu depth=%d\n", size, depth);
    return 0;
}
CUresult cuMemFree_v2(Address address) { free((void *)address); LOG("cuMemFree\n"); return 0; }
CUresult cuMemHostAlloc(void **memory, size_t size, unsigned flags) {
    LOG("cuMemHostAlloc %zu flags=%u\n", size, flags);
    return allocate(memory, size);
}
CUresult cuMemFreeHost(void *memory) { free(memory); LOG("cuMemFreeHost\n"); return 0; }

CUresult cuMemcpyHtoD_v2(Address to, const void *from, size_t size) {
    memcpy((void *)to, from, size);
    LOG("cuMemcpyHtoD %zu\n", size);
    return 0;
}
CUresult cuMemcpyDtoH_v2(void *to, Address from, size_t size) {
    memcpy(to, (void *)from, size);
    LOG("cuMemcpyDtoH %zu\n", size);
    return 0;
}
CUresult cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t size, Handle stream) {
    memcpy((void *)to, from, size);
    LOG("cuMemcpyHtoDAsync %zu %p\n", size, stream);
    return 0;
}
CUresult cuMemcpyDtoHAsync_v2(void *to, Address from, size_t size, Handle stream) {
    memcpy(to, (void *)from, size);
    LOG("cuMemcpyDtoHAsync %zu %p\n", size, stream);
    return 0;
}
CUresult cuMemsetD8Async(Address to, unsigned char value, size_t count, Handle stream) {
    memset((void *)to, value, count);
    LOG("cuMemsetD8Async %zu %p\n", count, stream);
    return 0;
}

/* A module is its image, a function its name. The driver writes logs into buffers of the caller:
   options CU_JIT_INFO_LOG_BUFFER (3) and CU_JIT_ERROR_LOG_BUFFER (5). */
CUresult cuModuleLoadDataEx(Handle *module, const void *image, unsigned count, int *options,
                            void **values) {
    for (unsigned i = 0; i < count; i++)
        if (options[i] == 3 || options[i] == 5) *(char *)values[i] = 0;
    if (strncmp(image, "cubin", 5)) return INVALID_IMAGE;
    *module = (Handle)0xD0;
    LOG("cuModuleLoadDataEx\n");
    return 0;
}
CUresult cuModuleLoadData(Handle *module, const void *image) {
    return cuModuleLoadDataEx(module, image, 0, NULL, NULL);
}
CUresult cuModuleUnload(Handle module) { LOG("cuModuleUnload\n"); return 0; }
CUresult cuModuleGetFunction(Handle *function, Handle module, const char *name) {
    *function = strdup(name);
    return 0;
}
CUresult cuFuncSetBlockShape(Handle function, int x, int y, int z) { return 0; }
CUresult cuLaunchKernel(Handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned shared, Handle stream, void **arguments,
                        void **extra) {
    /* extra: CU_LAUNCH_PARAM_BUFFER_POINTER (1), the buffer, …_SIZE (2), its size, END (0) */
    const unsigned char *buffer = NULL;
    size_t size = 0;
    for (; extra && *extra; extra += 2) {
        if (*extra == (void *)1) buffer = extra[1];
        if (*extra == (void *)2) size = *(size_t *)extra[1];
    }
    LOG("cuLaunchKernel %s grid=%u,%u,%u block=%u,%u,%u %p ", (char *)function, gx, gy, gz, bx, by,
        bz, stream);
    for (size_t i = 0; i < size; i++) LOG("%02x", buffer[i]);
    LOG("\n");
    return 0;
}

CUresult cuStreamBeginCapture_v2(Handle stream, int mode) {
    LOG("cuStreamBeginCapture %p mode=%d\n", stream, mode);
    return 0;
}
CUresult cuStreamEndCapture(Handle stream, Handle *graph) {
    *graph = (Handle)0xA0;
    LOG("cuStreamEndCapture %p\n", stream);
    return getenv("STUB_UNCAPTURABLE") ? 901 : 0; /* STREAM_CAPTURE_INVALIDATED */
}
CUresult cuGraphInstantiateWithFlags(Handle *executable, Handle graph, uint64_t flags) {
    *executable = (Handle)0xB0;
    LOG("cuGraphInstantiate %p flags=%llu\n", graph, (unsigned long long)flags);
    return 0;
}
CUresult cuGraphDestroy(Handle graph) { LOG("cuGraphDestroy %p\n", graph); return 0; }
CUresult cuGraphLaunch(Handle executable, Handle stream) {
    LOG("cuGraphLaunch %p %p\n", executable, stream);
    return 0;
}
CUresult cuGraphExecDestroy(Handle executable) {
    LOG("cuGraphExecDestroy %p\n", executable);
    return 0;
}
