#include "kernels/philox/philox.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

const Once philox_case("philox", []() -> Outputs {
  const Tensor counters = indices(DType::i32, {200000, 4}, 1000, 1), out(DType::i32, {200000, 4});
  philox(counters, 12345, out);
  return {out};
});

}  // namespace
}  // namespace gptcore::cases
