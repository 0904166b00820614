/* A stand-in for NVIDIA's driver, libcuda.so.1: device memory is this process's memory, everything happens at once, and
   each call is written to the file that FAKE_CUDA_LOG names. A launch is written with its grid, its block, its shared
   memory and the first bytes of its parameters, as the signature in FAKE_CUDA_TYPES ('4' or '8' bytes each) has them.
   Calls that need the device's context current in their thread fail without it.
   FAKE_CUDA_FAILS names a call that fails, with the error FAKE_CUDA_ERROR (700 if that is not set). Functions that no test needs return 0. */
#include <stdint.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
enum { OUT_OF_MEMORY = 2, NOT_FOUND = 500, INVALID_CONTEXT = 201, FAILED = 700 };
static uint64_t handle = 0x1000;

static __thread void *current; /* context of each thread, as in the driver */
#define OURS ((void *)0x77)

static CUresult say(const char *name, const char *form, ...) {
  const char *path = getenv("FAKE_CUDA_LOG"), *fails = getenv("FAKE_CUDA_FAILS"), *error = getenv("FAKE_CUDA_ERROR");
  FILE *file = path ? fopen(path, "a") : NULL;
  if (file) {
    va_list values;
    fprintf(file, "%s ", name);
    va_start(values, form);
    vfprintf(file, form, values);
    va_end(values);
    fprintf(file, "\n");
    fclose(file);
  }
  if (current != OURS && (!strncmp(name, "cuMem", 5) || !strncmp(name, "cuEvent", 7) || !strncmp(name, "cuLaunch", 8)))
    return INVALID_CONTEXT;
  return fails && !strcmp(fails, name) ? error ? atoi(error) : FAILED : 0;
}

CUresult cuInit(unsigned flags) { return say("cuInit", ""); }
CUresult cuDriverGetVersion(int *version) {
  const char *wanted = getenv("FAKE_CUDA_VERSION"); /* such as 12040 */
  *version = wanted ? atoi(wanted) : 13000;
  return 0;
}
CUresult cuDeviceGetCount(int *count) { *count = 1; return say("cuDeviceGetCount", ""); }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  const char *capability = getenv("FAKE_CUDA_CAPABILITY"); /* such as 9.0 */
  *value = attribute == 75 ? capability ? capability[0] - '0' : 9 : attribute == 76 ? capability ? capability[2] - '0' : 0 : 1;
  return 0;
}
CUresult cuDeviceGetName(char *name, int length, int device) { strncpy(name, "NVIDIA V100", length); return 0; }
CUresult cuDeviceGetPCIBusId(char *name, int length, int device) { strncpy(name, "0000:3B:00.0", length); return 0; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = OURS; return say("cuDevicePrimaryCtxRetain", ""); }
CUresult cuCtxGetCurrent(void **context) { *context = current; return 0; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return 0; }
CUresult cuCtxGetDevice_v2(int *device, void *context) { *device = 0; return 0; }
CUresult cuCtxSetCurrent(void *context) { current = context; return 0; }
CUresult cuMemGetInfo(size_t *unused, size_t *total) { *unused = 1 << 24; *total = 1 << 25; return say("cuMemGetInfo", ""); }
CUresult cuMemAlloc(uint64_t *address, size_t nbytes) {
  CUresult error = say("cuMemAlloc", "%zu", nbytes);
  if (nbytes > 1 << 24) return OUT_OF_MEMORY;
  *address = (uint64_t)aligned_alloc(256, (nbytes + 255) / 256 * 256);
  return error;
}
CUresult cuMemFree(uint64_t address) { free((void *)address); return say("cuMemFree", ""); }
CUresult cuMemHostRegister(void *place, size_t nbytes, unsigned flags) { return say("cuMemHostRegister", "%zu %u", nbytes, flags); }
CUresult cuMemHostUnregister(void *place) { return say("cuMemHostUnregister", ""); }
CUresult cuMemcpyHtoDAsync(uint64_t to, const void *from, size_t nbytes, void *stream) {
  memcpy((void *)to, from, nbytes);
  return say("cuMemcpyHtoDAsync", "%zu %p", nbytes, stream);
}
CUresult cuMemcpyDtoHAsync(void *to, uint64_t from, size_t nbytes, void *stream) {
  memcpy(to, (void *)from, nbytes);
  return say("cuMemcpyDtoHAsync", "%zu %p", nbytes, stream);
}
CUresult cuMemsetD8Async(uint64_t to, unsigned char value, size_t n, void *stream) {
  memset((void *)to, value, n);
  return say("cuMemsetD8Async", "%zu %p", n, stream);
}
CUresult cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = (void *)(handle += 16); return say("cuStreamCreateWithPriority", "%p", *stream); }
CUresult cuStreamGetCtx(void *stream, void **context) { *context = (void *)0x77; return 0; }
CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
CUresult cuEventCreate(void **event, unsigned flags) { *event = (void *)(handle += 16); return say("cuEventCreate", "%u", flags); }
CUresult cuEventRecord(void *event, void *stream) { return say("cuEventRecord", "%p %p", event, stream); }
CUresult cuEventSynchronize(void *event) { return say("cuEventSynchronize", "%p", event); }
CUresult cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return say("cuStreamWaitEvent", "%p %p", stream, event); }
CUresult cuLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
  *library = (void *)(handle += 16);
  return say("cuLibraryLoadData", "%.8s", (const char *)code);
}
CUresult cuLibraryGetKernel(void **kernel, void *library, const char *name) { *kernel = (void *)(handle += 16); return say("cuLibraryGetKernel", "%s", name); }
CUresult cuKernelGetFunction(void **function, void *kernel) { *function = kernel; return 0; }
CUresult cuModuleLoadData(void **module, const void *code) {
  *module = (void *)(handle += 16);
  return say("cuModuleLoadData", "%.8s", (const char *)code);
}
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)(handle += 16); return say("cuModuleGetFunction", "%s", name); }
static CUresult launched(unsigned *size, unsigned shared, void *stream, void **parameters) {
  char text[1024] = "";
  const char *types = getenv("FAKE_CUDA_TYPES");
  for (int i = 0; types && types[i]; i++) {
    long long value = types[i] == '4' ? *(int32_t *)parameters[i] : *(int64_t *)parameters[i];
    snprintf(text + strlen(text), sizeof text - strlen(text), " %lld", value);
  }
  return say("cuLaunchKernel", "%u %u %u %u %u %u %u %p:%s", size[0], size[1], size[2], size[3], size[4], size[5], shared, stream, text);
}
typedef struct { unsigned size[6], shared; void *stream, *attributes; unsigned n; } CUlaunchConfig;
CUresult cuLaunchKernelEx(const CUlaunchConfig *how, void *function, void **parameters, void **extra) {
  return launched((unsigned *)how->size, how->shared, how->stream, parameters);
}
CUresult cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream, void **parameters, void **extra) {
  unsigned size[6] = {gx, gy, gz, bx, by, bz};
  return launched(size, shared, stream, parameters);
}
CUresult cuGetErrorName(CUresult error, const char **text) { *text = error == FAILED ? "PLANTED" : "OTHER"; return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "planted"; return 0; }
static CUresult nothing(void) { return 0; }

#define ONE(name) {#name, (void *)name}
static const struct { const char *name; void *function; } table[] = {
  ONE(cuInit), ONE(cuDriverGetVersion), ONE(cuDeviceGetCount), ONE(cuDeviceGet), ONE(cuDeviceGetAttribute),
  ONE(cuDeviceGetName), ONE(cuDeviceGetPCIBusId),
  ONE(cuDevicePrimaryCtxRetain), ONE(cuCtxGetCurrent), ONE(cuCtxSetCurrent), ONE(cuMemGetInfo),
  ONE(cuMemAlloc), ONE(cuMemFree), ONE(cuMemHostRegister), ONE(cuMemHostUnregister), ONE(cuMemcpyHtoDAsync),
  ONE(cuMemcpyDtoHAsync), ONE(cuMemsetD8Async), ONE(cuStreamCreateWithPriority), ONE(cuStreamGetCtx),
  ONE(cuCtxGetStreamPriorityRange), ONE(cuEventCreate), ONE(cuEventRecord), ONE(cuEventSynchronize),
  ONE(cuStreamWaitEvent), ONE(cuLibraryLoadData), ONE(cuLibraryGetKernel), ONE(cuKernelGetFunction),
  ONE(cuModuleLoadData), ONE(cuModuleGetFunction), ONE(cuLaunchKernelEx), ONE(cuLaunchKernel),
  ONE(cuGetErrorName), ONE(cuGetErrorString),
};
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
  if (status) *status = 0;
  *function = (void *)nothing;
  if (!strcmp(name, "cuCtxGetDevice")) *function = version >= 13000 ? (void *)cuCtxGetDevice_v2 : (void *)cuCtxGetDevice;
  for (size_t i = 0; i < sizeof table / sizeof *table; i++)
    if (!strcmp(table[i].name, name)) *function = table[i].function;
  return 0;
}
CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
/* What is looked up by name carries the version in it. */
CUresult cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *stream) { return cuMemcpyHtoDAsync(to, from, n, stream); }
CUresult cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, void *stream) { return cuMemcpyDtoHAsync(to, from, n, stream); }
