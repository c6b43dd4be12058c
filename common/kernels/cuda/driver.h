// The declarations of CUDA's driver that driver.cpp uses. NVIDIA's cuda.h is not always installed.
#pragma once

extern "C" {

typedef int CUresult;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;

enum { MAX_DYNAMIC_SHARED_SIZE_BYTES = 8, NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14 };
enum { CLUSTER_DIMENSION = 4 };

typedef struct {
  int id;
  char pad[4];
  union {
    char bytes[64];
    struct {
      unsigned x, y, z;
    } clusterDim;
  } value;
} CUlaunchAttribute;

typedef struct {
  unsigned gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
  CUstream hStream;
  CUlaunchAttribute *attrs;
  unsigned numAttrs;
} CUlaunchConfig;

CUresult cuDriverGetVersion(int *);
CUresult cuCtxGetCurrent(CUcontext *);
CUresult cuCtxSetCurrent(CUcontext);
CUresult cuStreamGetCtx(CUstream, CUcontext *);
CUresult cuModuleLoadData(CUmodule *, const void *image);
CUresult cuModuleGetFunction(CUfunction *, CUmodule, const char *name);
CUresult cuFuncSetAttribute(CUfunction, int attribute, int value);
CUresult cuLaunchKernelEx(const CUlaunchConfig *, CUfunction, void **arguments, void **extra);
CUresult cuGetErrorName(CUresult, const char **);

}
