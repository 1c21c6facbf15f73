// Tile sizes of attention's forward by mma.sync, and the shared memory they take. Plain C++.
//
// A warp computes 16 or 32 rows of queries. With 32 every fragment of keys and values read from shared memory serves
// two products, which halves what limits mma.sync there; the sums of 32 rows fit a thread's registers up to a head size
// of 128. f32 needs three products for each fragment, so that 16 rows keep shared memory waiting anyway; tf32 does not.
#pragma once

#include <cstdint>

namespace gptcore::cuda {

struct ForwardShape {
  int warps, row_tiles;  // row tiles of 16 rows for each warp
  int keys;              // a tile of keys and values

  constexpr int rows() const { return warps * row_tiles * 16; }
  constexpr int threads() const { return warps * 32; }
  // Queries, which also stage the output, one tile of keys and one of values.
  constexpr int64_t shared_bytes(int row_bytes) const {
    return static_cast<int64_t>(rows() + 2 * keys) * row_bytes;
  }
};

// `dim` is one of kForwardDims. `plain`: nothing but intervals of keys, with a kernel of its own for the head
// sizes that matter most; the others do without one, and f32 does with powers of two.
constexpr bool has_plain_forward(int element_bytes, int dim) {
  return element_bytes == 2 && (dim == 64 || dim == 128);
}
constexpr ForwardShape forward_shape(int element_bytes, int dim, bool plain, bool is_tf32 = false) {
  if (is_tf32 && dim <= 64) return {4, 2, 32};
  if (is_tf32 && dim == 128) return {4, 1, 32};
  if (element_bytes == 4) return {4, 1, dim > 64 ? 16 : 32};
  if (dim > 128) return {8, 1, dim > 192 ? 16 : 32};
  if (dim == 96) return {8, 1, 64};
  if (dim == 128) return {4, 2, plain ? 32 : 16};
  return {4, 2, plain ? 64 : 32};
}

constexpr int kForwardDims[] = {32, 64, 96, 128, 192, 256};
// The smallest of them that a head size fits into.
constexpr int padded_dim(int element_bytes, int64_t head_dim) {
  for (int dim : kForwardDims) {
    if (head_dim <= dim && (element_bytes == 2 || (dim & (dim - 1)) == 0)) return dim;
  }
  return 0;
}

}  // namespace gptcore::cuda
