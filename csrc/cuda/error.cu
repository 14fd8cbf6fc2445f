// What the bindings need of the CUDA runtime beside the launchers. The extension has a runtime of
// its own, linked in, which shares the driver's contexts with torch's.
#include <cuda_runtime_api.h>

#include "../eqcvt.h"

EQCVT_API const char* eqcvt_cuda_error_string(int status) {
    return cudaGetErrorString(static_cast<cudaError_t>(status));
}

EQCVT_API int eqcvt_cuda_set_device(int device) {
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) cudaGetLastError(); // or the next launch would report it again
    return error;
}
