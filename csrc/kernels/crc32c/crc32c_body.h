// What crc32c.cpp hands to the per-ISA bodies, and the polynomial that both reckon with.
//
// A register holds 32 bits of a polynomial over GF(2), the coefficient of x^0 in its uppermost bit.
#pragma once

#include <cstdint>

namespace gptcore {

constexpr uint32_t kCastagnoli = 0x82f63b78;  // P without x^32
// Bytes of a task: 20 microseconds of work, and few enough remainders to be joined one after the other.
constexpr int64_t kCrcChunk = 256 << 10;

struct Crc32cBodies {
  // remainders[i]: that of chunk i by itself, from a register of 0. Copies the bytes where `copy` is not null.
  void (*chunks)(const uint8_t* data, int64_t size, uint8_t* copy, uint32_t* remainders);
};

// Only for the compiler and for crc32c.cpp: a copy made for one instruction set could be linked into another's code.
namespace crc32c_field {

constexpr uint32_t times_x(uint32_t a) { return (a >> 1) ^ (a & 1 ? kCastagnoli : 0); }

constexpr uint32_t product(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (; a; a <<= 1, b = times_x(b)) sum ^= a >> 31 ? b : 0;
  return sum;
}

// x^(8 bytes): what a register is multiplied by when so many bytes follow.
constexpr uint32_t shift_by(int64_t bytes) {
  uint32_t power = 1u << 31, square = times_x(times_x(times_x(times_x(1u << 31))));
  square = product(square, square);  // x^8
  for (; bytes; bytes >>= 1, square = product(square, square)) {
    if (bytes & 1) power = product(power, square);
  }
  return power;
}

}  // namespace crc32c_field
}  // namespace gptcore
