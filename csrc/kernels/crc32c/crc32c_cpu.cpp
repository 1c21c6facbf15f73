#include "core/parallel.h"
#include "core/prefetch.h"
#include "core/stream.h"
#include "kernels/crc32c/crc32c_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// tables[k][b]: the remainder of byte b with k more bytes behind it.
struct ByteTables {
  uint32_t tables[8][256];
};

consteval ByteTables byte_tables() {
  ByteTables made = {};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t remainder = byte;
    for (int k = 0; k < 8; ++k) {
      for (int bit = 0; bit < 8; ++bit) remainder = crc32c_field::times_x(remainder);
      made.tables[k][byte] = remainder;
    }
  }
  return made;
}

constexpr ByteTables kBytes = byte_tables();

// Without an instruction for it: eight bytes by eight looks into tables (Kounavis and Berry 2005).
constexpr uint32_t by_tables(uint32_t remainder, uint64_t word) {
  word ^= remainder;
  uint32_t sum = 0;
  for (int i = 0; i < 8; ++i) sum ^= kBytes.tables[7 - i][word >> 8 * i & 0xff];
  return sum;
}

constexpr uint32_t by_table(uint32_t remainder, uint8_t byte) {
  return (remainder >> 8) ^ kBytes.tables[0][(remainder ^ byte) & 0xff];
}

// "12345678", "9": the standard's own example.
static_assert(~by_table(by_tables(~0u, 0x3837363534333231), '9') == 0xe3069283);

GPTCORE_INLINE uint32_t take(uint32_t remainder, uint8_t byte) {
#if defined(__SSE4_2__)
  return _mm_crc32_u8(remainder, byte);
#else
  return by_table(remainder, byte);
#endif
}

GPTCORE_INLINE uint32_t take_word(uint32_t remainder, const uint8_t* at) {
  uint64_t word;
  __builtin_memcpy(&word, at, sizeof(word));
#if defined(__SSE4_2__)
  return static_cast<uint32_t>(_mm_crc32_u64(remainder, word));
#elif __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  return by_tables(remainder, word);
#else
  return by_tables(remainder, __builtin_bswap64(word));
#endif
}

// The instruction takes three cycles and one starts in each, so three runs of bytes go side by side.
constexpr int64_t kRun = 1024;
constexpr int64_t kBlock = 3 * kRun;
// What fetches ahead by itself sees three short runs and gives up: the same places of the next block but one.
constexpr int64_t kAhead = 2 * kBlock;

// tables[k][b]: byte k of a register with a run behind it.
struct RunTables {
  uint32_t tables[4][256];
};

consteval RunTables run_tables() {
  RunTables made = {};
  const uint32_t shift = crc32c_field::shift_by(kRun);
  for (int k = 0; k < 4; ++k) {
    for (uint32_t byte = 0; byte < 256; ++byte)
      made.tables[k][byte] = crc32c_field::product(byte << 8 * k, shift);
  }
  return made;
}

constexpr RunTables kRuns = run_tables();

GPTCORE_INLINE uint32_t after_run(uint32_t remainder) {
  uint32_t sum = 0;
  for (int k = 0; k < 4; ++k) sum ^= kRuns.tables[k][remainder >> 8 * k & 0xff];
  return sum;
}

GPTCORE_INLINE uint32_t take_block(uint32_t remainder, const uint8_t* data) {
  uint32_t first = remainder, second = 0, third = 0;
  for (int64_t line = 0; line < kRun; line += 64) {
    for (int run = 0; run < 3; ++run) fetch_ahead<kAhead, 2>(data + line + run * kRun);
    for (int64_t at = line; at < line + 64; at += 8) {
      first = take_word(first, data + at);
      second = take_word(second, data + at + kRun);
      third = take_word(third, data + at + 2 * kRun);
    }
  }
  return after_run(after_run(first) ^ second) ^ third;
}

// Past the caches: whoever wants a copy beside its source does not want it at once.
GPTCORE_INLINE void copy_block(const uint8_t* data, uint8_t* copy, int64_t size, bool streams) {
  int64_t at = 0;
  if (kCanStream && streams) {
    at = -reinterpret_cast<intptr_t>(copy) & (kStreamLine - 1);
    if (at > size) at = size;
    __builtin_memcpy(copy, data, static_cast<size_t>(at));
    for (; at + kStreamLine <= size; at += kStreamLine) {
      Vec line;
      __builtin_memcpy(&line, data + at, sizeof(line));
      stream(reinterpret_cast<float*>(copy + at), line);
    }
  }
  __builtin_memcpy(copy + at, data + at, static_cast<size_t>(size - at));
}

uint32_t take_chunk(const uint8_t* data, int64_t size, uint8_t* copy, bool streams) {
  uint32_t remainder = 0;
  int64_t at = 0;
  for (; at + kBlock <= size; at += kBlock) {
    remainder = take_block(remainder, data + at);
    if (copy) copy_block(data + at, copy + at, kBlock, streams);  // out of the first-level cache
  }
  if (copy) copy_block(data + at, copy + at, size - at, streams);
  for (; at + 8 <= size; at += 8) remainder = take_word(remainder, data + at);
  for (; at < size; ++at) remainder = take(remainder, data[at]);
  return remainder;
}

void chunks(const uint8_t* data, int64_t size, uint8_t* copy, uint32_t* remainders) {
  const bool streams = copy && size >= kCrcChunk && lies_in_memory(copy, size);
  parallel_for((size + kCrcChunk - 1) / kCrcChunk, [&](int64_t task, int) {
    const int64_t begin = task * kCrcChunk, rest = size - begin;
    remainders[task] =
        take_chunk(data + begin, rest < kCrcChunk ? rest : kCrcChunk, copy ? copy + begin : copy, streams);
    if (streams) stream_fence();
  });
}

}  // namespace

extern const Crc32cBodies crc32c_bodies;
const Crc32cBodies crc32c_bodies = {chunks};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
