/* The calls of the CUDA driver that cuda_ipc.py makes, with their types as in cuda.h and host memory for a device's.
   Memory is a file without a name; a handle says whose and which. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef int CUresult;
typedef int CUdevice;
typedef struct context *CUcontext;
typedef struct stream *CUstream;
typedef unsigned long long CUdeviceptr;
typedef struct { char reserved[64]; } CUipcMemHandle;

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, MOST = 64 };

static struct { void *address; size_t size; int file; int num_opened; char handle[64]; } memory[MOST];
static __thread CUcontext current;

static int find(CUdeviceptr pointer) {
    for (int i = 0; i < MOST; i++)
        if (memory[i].address && (CUdeviceptr)(uintptr_t)memory[i].address == pointer) return i;
    return -1;
}

static CUresult map(int file, size_t size, CUdeviceptr *pointer, const char *handle) {
    for (int i = 0; i < MOST; i++) {
        if (memory[i].address) continue;
        void *address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (address == MAP_FAILED) return OUT_OF_MEMORY;
        memory[i].address = address, memory[i].size = size, memory[i].file = file, memory[i].num_opened = 1;
        memset(memory[i].handle, 0, 64);
        if (handle) memcpy(memory[i].handle, handle, 64);
        *pointer = (CUdeviceptr)(uintptr_t)address;
        return 0;
    }
    return OUT_OF_MEMORY;
}

static void unmap(int i) {
    munmap(memory[i].address, memory[i].size);
    close(memory[i].file);
    memory[i].address = NULL;
}

CUresult cuInit(unsigned int flags) { return flags ? INVALID_VALUE : 0; }

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return ordinal ? INVALID_VALUE : 0;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)(uintptr_t)(0x7000000000000000 + device);
    return 0;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    current = context;
    return context == (CUcontext)(uintptr_t)0x7000000000000000 ? 0 : INVALID_CONTEXT;
}

CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t size) {
    if (!current) return INVALID_CONTEXT;
    if (size > 1 << 30) return OUT_OF_MEMORY;
    int file = memfd_create("fake-cuda", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, (off_t)size)) return OUT_OF_MEMORY;
    return map(file, size, pointer, NULL);
}

CUresult cuMemFree_v2(CUdeviceptr pointer) {
    int i = find(pointer);
    if (!current || i < 0) return INVALID_VALUE;
    unmap(i);
    return 0;
}

CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr pointer) {
    int i = find(pointer);
    if (!current || i < 0) return INVALID_VALUE;
    memset(handle, 0x5a, sizeof *handle); /* no text: it has bytes of all kinds, zeros too */
    handle->reserved[0] = 0;
    snprintf(handle->reserved + 1, 60, "%d/fd/%d", (int)getpid(), memory[i].file);
    return 0;
}

CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *pointer, CUipcMemHandle handle, unsigned int flags) {
    char path[80];
    struct stat status;
    if (!current) return INVALID_CONTEXT;
    if (flags != 1 || handle.reserved[0]) return INVALID_VALUE;
    for (int i = 0; i < MOST; i++)
        if (memory[i].address && !memcmp(memory[i].handle + 1, handle.reserved + 1, 40)) {
            memory[i].num_opened++;
            *pointer = (CUdeviceptr)(uintptr_t)memory[i].address;
            return 0;
        }
    snprintf(path, sizeof path, "/proc/%.40s", handle.reserved + 1);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0 || fstat(file, &status)) return INVALID_HANDLE;
    return map(file, (size_t)status.st_size, pointer, handle.reserved);
}

CUresult cuIpcCloseMemHandle(CUdeviceptr pointer) {
    int i = find(pointer);
    if (!current || i < 0) return INVALID_VALUE;
    if (!--memory[i].num_opened) unmap(i);
    return 0;
}

CUresult cuStreamCreate(CUstream *stream, unsigned int flags) {
    *stream = (CUstream)(uintptr_t)0x6000000000000001;
    return current && flags == 1 ? 0 : INVALID_VALUE;
}

CUresult cuStreamDestroy_v2(CUstream stream) { return stream == (CUstream)(uintptr_t)0x6000000000000001 ? 0 : INVALID_HANDLE; }

CUresult cuStreamSynchronize(CUstream stream) { return cuStreamDestroy_v2(stream); }

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr destination, CUdeviceptr source, size_t size, CUstream stream) {
    if (!current || cuStreamDestroy_v2(stream)) return INVALID_HANDLE;
    memcpy((void *)(uintptr_t)destination, (const void *)(uintptr_t)source, size);
    return 0;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : error == INVALID_HANDLE ? "invalid resource handle" : "invalid argument";
    return 0;
}
