#include "kernels/crc32c/crc32c.h"

#include <vector>

#include "core/check.h"
#include "core/isa.h"
#include "kernels/crc32c/crc32c_body.h"

namespace gptcore {

GPTCORE_BODIES(Crc32cBodies, crc32c_bodies)

namespace {

void check_array(const Checker& check, const TensorView& array, const char* argument) {
  check.input(array, argument,
              {DType::f32, DType::bf16, DType::f16, DType::f64, DType::i8, DType::u8, DType::i16, DType::i32,
               DType::i64, DType::boolean});
  check.contiguous(array, argument);
}

int64_t bytes_of(const TensorView& array) { return array.numel() * size_of(array.dtype); }

void check_copy(const Checker& check, const TensorView& x, const TensorView& out) {
  check_array(check, out, "out");
  check.writable(out, "out");
  const int64_t size = bytes_of(x);
  if (bytes_of(out) != size) {
    check.fail("out", std::to_string(bytes_of(out)) + " bytes",
               "as many as 'x' has, " + std::to_string(size));
  }
  const uintptr_t from = reinterpret_cast<uintptr_t>(x.data), to = reinterpret_cast<uintptr_t>(out.data);
  const uintptr_t apart = from < to ? to - from : from - to;
  if (size && apart < static_cast<uintptr_t>(size)) {
    check.fail("out", "memory of 'x'", "memory of its own");
  }
}

}  // namespace

uint32_t crc32c(const TensorView& x, uint32_t initial, const TensorView& out) {
  const Checker check("crc32c");
  check_array(check, x, "x");
  if (out) check_copy(check, x, out);
  const int64_t size = bytes_of(x), chunks = (size + kCrcChunk - 1) / kCrcChunk;
  std::vector<uint32_t> remainders(static_cast<size_t>(chunks));
  crc32c_bodies_table.pick().chunks(x.as<uint8_t>(), size, out ? out.as<uint8_t>() : nullptr,
                                    remainders.data());
  static const uint32_t whole = crc32c_field::shift_by(kCrcChunk);
  uint32_t joined = ~initial;
  for (int64_t i = 0; i < chunks; ++i) {
    const uint32_t shift = i + 1 < chunks ? whole : crc32c_field::shift_by(size - i * kCrcChunk);
    joined = crc32c_field::product(joined, shift) ^ remainders[static_cast<size_t>(i)];
  }
  return ~joined;
}

}  // namespace gptcore
