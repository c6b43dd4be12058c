// libcuda.so.1 for a rehearsal: device memory is host memory, and the image of a kernel is its name. A
// launch validates its configuration as a driver does and runs the kernel on the emulator.
#include "emulator.h"

#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <string>

#include "../../common/kernels/cuda/driver.h"

#include "../../common/kernels/cuda/call.h"
#include "../../common/kernels/cuda/recurrence.cu"

struct CUfunc_st {
  int threads, shared_bytes, cluster;
  void (*run)(const Call &, unsigned *shared);
  int allowed = 0;  // bytes of shared memory; 0 until requested, even for small kernels
  bool non_portable = false;
};
static std::map<std::string, CUfunc_st> kernels;

template <int C, class Kernel>
bool add(const char *name) {
  const auto run = [](const Call &a, unsigned *shared) { Kernel().run(a, shared); };
  return kernels.insert({name, {Kernel::threads, Kernel::shared_bytes, C, run}}).second;
}

static unsigned seed = 1;
static std::string last_fault = "CUDA_ERROR";

extern "C" {
void mock_seed(unsigned s) { seed = s; }
void mock_mma(const uint32_t (*in)[10], float (*out)[4], int bf16) { warp_mma(in, out, bf16); }

CUresult cuDriverGetVersion(int *version) { return *version = 13000, 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, 0; }
CUresult cuCtxSetCurrent(CUcontext) { return 0; }
CUresult cuStreamGetCtx(CUstream, CUcontext *context) { return cuCtxGetCurrent(context); }
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const auto at = kernels.find((const char *)image);
  if (at == kernels.end()) return 200;  // CUDA_ERROR_INVALID_IMAGE
  *module = (CUmodule)&at->second;
  return 0;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return strcmp(name, "gru") ? 500 : 0;  // CUDA_ERROR_NOT_FOUND
}
CUresult cuFuncSetAttribute(CUfunction f, int attribute, int value) {
  if (attribute == MAX_DYNAMIC_SHARED_SIZE_BYTES) f->allowed = value;
  if (attribute == NON_PORTABLE_CLUSTER_SIZE_ALLOWED) f->non_portable = value;
  return f->allowed > 227 << 10;  // the limit of an H100 for a block
}
CUresult cuGetErrorName(CUresult, const char **name) { return *name = last_fault.c_str(), 0; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **) {
  const bool clustered = c->numAttrs && c->attrs[0].id == CLUSTER_DIMENSION;
  const int C = clustered ? (int)c->attrs[0].value.clusterDim.x : 1;
  if (C != f->cluster || (int)c->blockDimX != f->threads || c->gridDimX % C || !c->gridDimX ||
      c->gridDimY != 1 || c->gridDimZ != 1 || (int)c->sharedMemBytes > f->allowed ||
      C > (f->non_portable ? 16 : 8) || (int)c->sharedMemBytes != f->shared_bytes) {
    last_fault = "CUDA_ERROR_INVALID_VALUE";
    return 1;
  }
  static std::mutex one_at_a_time;  // as in a stream
  std::lock_guard<std::mutex> lock(one_at_a_time);
  const Call call = *(const Call *)arguments[0];
  const char *const variable = getenv("MOCK_FAULT");  // a fault for tests of trials
  const std::string planted = variable ? variable : "";
  while (planted == "hang") pause();
  if (planted == "crash") raise(SIGSEGV);
  if (planted == "error") return last_fault = "CUDA_ERROR_ILLEGAL_ADDRESS", 700;
  try {
    for (unsigned b = 0; b < c->gridDimX; b += C)
      emulator::run_cluster(C, (int)b, f->threads, (int)c->sharedMemBytes,
                            [&] { f->run(call, emulator::current->block->shared.get()); },
                            seed ? seed + b : 0);
  } catch (const std::runtime_error &fault) {
    last_fault = fault.what();
    return 700;  // CUDA_ERROR_ILLEGAL_ADDRESS
  }
  if (planted == "wrong" && call.h_last) *call.h_last += 0.01f;
  return 0;
}
}
