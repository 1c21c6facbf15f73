#include "kernels/philox/philox.h"

#include "core/check.h"
#include "core/isa.h"
#include "kernels/philox/philox_body.h"

namespace gptcore {

GPTCORE_BODIES(PhiloxBodies, philox_bodies)

void philox(const TensorView& counters, int64_t seed, const TensorView& out) {
  const Checker check("philox", philox_bodies_table.device);
  check.input(counters, "counters", {DType::i32});
  check.shape(counters, "counters", {-1, 4});
  check.contiguous(counters, "counters");
  check.output(out, "out", {DType::i32});
  check.same_shape(out, "out", counters, "counters");
  check.contiguous(out, "out");
  philox_bodies_table.pick(check).run(static_cast<uint64_t>(seed), counters.as<uint32_t>(), counters.size(0),
                                      out.as<uint32_t>());
}

}  // namespace gptcore
