#include "core/cuda/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>
#include <string>

#include "core/cuda/launch.cuh"

namespace gptcore::cuda {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));

// The driver's function, found at run time: the module loads without a driver.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                                &result),
               "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess || !function)
      throw std::runtime_error("gptcore: CUDA: this driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}

}  // namespace

TensorMap tensor_map(const TensorBoxes& b) {
  if (const char* reason = unfit_for_tensor_map(b))
    throw std::runtime_error(std::string("gptcore: CUDA: no tensor map for ") + reason);
  const auto type = b.dtype == DType::bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                    : b.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const auto swizzle = b.swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : b.swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                       : b.swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                         : CU_TENSOR_MAP_SWIZZLE_NONE;
  cuuint64_t sizes[5], strides[4];  // in bytes, that of the innermost dimension left out
  cuuint32_t box[5], steps[5];
  for (int d = 0; d < b.rank; ++d) {
    sizes[d] = static_cast<cuuint64_t>(b.sizes[d]);
    box[d] = static_cast<cuuint32_t>(b.box[d]), steps[d] = 1;
    if (d > 0)
      strides[d - 1] = b.sizes[d] == 1 ? 16 : static_cast<cuuint64_t>(b.strides[d] * size_of(b.dtype));
  }
  CUtensorMap map;
  const CUresult status = encoder()(&map, type, static_cast<cuuint32_t>(b.rank), const_cast<void*>(b.data),
                                    sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("gptcore: CUDA: cuTensorMapEncodeTiled: error " + std::to_string(status));
  TensorMap result;
  std::memcpy(&result, &map, sizeof(map));
  return result;
}

}  // namespace gptcore::cuda
