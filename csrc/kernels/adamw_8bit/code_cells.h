// The dynamic map's codes (dynamic_map_tables.h) as tables that one read and one addition look a code up in.
//
// A magnitude y is moved to z = y + 2^-19, so that few binades hold all of them and none lies below. The upper 16 bits of
// z are its cell, which has one border between codes in it at most. The cell's entry, added to the word of z, carries into
// bit 16 from that border on, and has the code below it there: bits 16 .. 23 of the sum. The highest bit is still the
// sign of z, where it has one.
#pragma once

#include "kernels/adamw_8bit/dynamic_map_tables.h"

namespace gptcore {

constexpr float kCellOffset = 1.0f / (1 << 19);
// By the low 12 bits of a cell, from that of 2^-19 on; the last ones hold 1 and, for NaN, what lies above.
constexpr int kCellMask = 0xfff, kFirstCell = 0x600, kCells = 0x1000 - kFirstCell;

struct alignas(16) MapTables {
  float value[256];
  uint32_t entry[kCells];
  bool one_border_each;
};

// Values by place, of magnitudes: first - 1 is zero, first * 2^7 one.
static constexpr double value_at(int first, int place) {
  if (place < first) return 0;
  int i = 0, n = first;
  while (i < 7 && place >= 2 * n) n *= 2, ++i;
  return i == 7 ? 1 : value_of(i, n, place - n);
}

// Entries give places less those of zero: the code of v, and of m what is added to or taken from 127.
static constexpr MapTables make_tables(int first) {
  MapTables tables = {};
  const bool both_signs = first == 1;
  for (int code = 0; code < 256; ++code) {
    const int place = both_signs ? code - kSignedZero : code + 1;
    tables.value[code] = static_cast<float>(place < 0 ? -value_at(first, -place) : value_at(first, place));
  }
  tables.one_border_each = true;
  const int last = first << 7;
  const auto border_below = [first](int place) {
    const double middle = (value_at(first, place - 1) + value_at(first, place)) / 2;
    return __builtin_bit_cast(uint32_t, static_cast<float>(middle + kCellOffset));
  };
  int place = first - 1;  // of the cell's beginning
  uint32_t border = border_below(first);
  for (int cell = 0; cell < kCells; ++cell) {
    const uint32_t begin = static_cast<uint32_t>(0x3000 | (kFirstCell + cell)) << 16;
    const uint32_t code = static_cast<uint32_t>(place - (first - 1)) << 16;
    tables.entry[cell] = code - begin;
    if (place == last || border - begin > 0xffff) continue;
    tables.entry[cell] += 0x10000 - (border - begin);
    border = ++place < last ? border_below(place + 1) : 0;
    if (place < last && border - begin <= 0xffff) tables.one_border_each = false;
  }
  return tables;
}
static_assert(make_tables(1).one_border_each && make_tables(2).one_border_each);

}  // namespace gptcore
