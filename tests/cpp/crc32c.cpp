#include "kernels/crc32c/crc32c.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

const Once crc32c_case("crc32c", []() -> Outputs {
  const Tensor x = indices(DType::i32, {300001}, 1u << 31, 1), copy(DType::i32, {300001});
  const Tensor crc(DType::i64, {1});
  *crc.view().as<int64_t>() = crc32c(x, 7, copy);
  return {crc, copy};
});

}  // namespace
}  // namespace gptcore::cases
