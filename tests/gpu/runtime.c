/* CUDA's runtime and driver without a device: one GPU of compute capability 9.0 whose kernels do nothing.
 *
 * Preloaded, and found as libcuda.so.1, it stands before NVIDIA's own libraries, which fail without a driver; what they
 * register at the start of a program stays theirs. The GPU's memory is the host's, which large blocks take only where
 * somebody writes.
 */
#define _GNU_SOURCE
#include <driver_types.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#define SUCCEEDS(name) int name() { return 0; }
#define GIVES(name, type, value) int name(type *result) { *result = (value); return 0; }
#define MAKES(name) int name(void **made) { *made = malloc(8); return 0; }

/* The device */
GIVES(cudaGetDeviceCount, int, 1)
GIVES(cudaGetDevice, int, 0)
GIVES(cudaDriverGetVersion, int, 13000)
GIVES(cudaRuntimeGetVersion, int, 13000)
SUCCEEDS(cudaSetDevice)
SUCCEEDS(cudaDeviceSynchronize)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaPeekAtLastError)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode)

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "no GPU, seconds of the host");
    p->totalGlobalMem = 140UL << 30;
    p->major = 9;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->l2CacheSize = 62914560;
    return 0;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    default: *value = 0;
    }
    return 0;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = *greatest = 0;
    return 0;
}

/* Memory */
cudaError_t cudaMalloc(void **p, size_t n) { return posix_memalign(p, 512, n ? n : 512) ? cudaErrorMemoryAllocation : 0; }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) { return cudaMalloc(p, n); }
cudaError_t cudaFree(void *p) { free(p); return 0; }
cudaError_t cudaFreeHost(void *p) { free(p); return 0; }
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) { memcpy(to, from, n); return 0; }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t stream) {
    if (kind != cudaMemcpyDeviceToDevice) /* which holds nothing that a kernel wrote */
        memcpy(to, from, n);
    return 0;
}
cudaError_t cudaMemset(void *p, int value, size_t n) { memset(p, value, n); return 0; }
cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t stream) { memset(p, value, n); return 0; }
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) { *free_bytes = *total = 140UL << 30; return 0; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeHost;
    return 0;
}

/* Streams and events */
MAKES(cudaStreamCreateWithPriority)
MAKES(cudaStreamCreateWithFlags)
MAKES(cudaEventCreate)
MAKES(cudaEventCreateWithFlags)
SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaStreamSynchronize)
SUCCEEDS(cudaStreamQuery)
SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cudaEventQuery)
SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventRecordWithFlags)
SUCCEEDS(cudaEventSynchronize)
GIVES(cudaEventElapsedTime, float, 1)
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return 0;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *n) {
    *status = cudaStreamCaptureStatusNone;
    return 0;
}

/* Kernels */
SUCCEEDS(cudaLaunchKernel)
SUCCEEDS(cudaLaunchKernelExC)
SUCCEEDS(__cudaLaunchKernel)
SUCCEEDS(cudaFuncSetAttribute)
int __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }
GIVES(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int, 2)
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->ptxVersion = a->binaryVersion = 90;
    return 0;
}

/* The driver, which Triton's kernels are loaded by */
GIVES(cuDeviceGet, int, 0)
GIVES(cuDriverGetVersion, int, 13000)
GIVES(cuCtxGetCurrent, void *, (void *)8)
GIVES(cuDevicePrimaryCtxRetain, void *, (void *)8)
GIVES(cuModuleLoad, void *, (void *)8)
GIVES(cuModuleLoadData, void *, (void *)8)
GIVES(cuModuleGetFunction, void *, (void *)8)
GIVES(cuFuncGetAttribute, int, 0)
SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuLaunchKernel)
SUCCEEDS(cuLaunchKernelEx)
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return cudaDeviceGetAttribute(value, attribute, device); }
int cuGetErrorString(int error, const char **text) { *text = "an error without a GPU"; return 0; }
int cuPointerGetAttribute(void *result, int attribute, size_t pointer) { *(size_t *)result = pointer; return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (result)
        *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return *function ? 0 : cudaErrorUnknown;
}
