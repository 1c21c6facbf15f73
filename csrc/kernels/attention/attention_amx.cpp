#include "kernels/attention/backward.h"
#include "kernels/attention/decode_amx.h"
#include "kernels/attention/engine.h"
#include "kernels/attention/forward.h"
#include "kernels/attention/tile_product.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// The bf16 engine with its products on tiles. Larger blocks than for VDPBF16PS: loading and storing the sums
// is what limits a tile product, so each visit should add much. 64 rows by 512 keys of scores (135 KB) lie in
// the second-level cache; a row of them is in the first while its softmax runs.
struct TileEngine : PairEngine {
  using Scope = TileScope;
  template <template <class> class Rows>
  using Decode = TileDecodeTask<PairEngine, Rows>;
  static constexpr int kRowStep = 16;
  static constexpr int kForwardRows = 64, kForwardKeys = 512;
  static constexpr int kBackwardRows = 128, kBackwardKeys = 128;

  static void product(const uint32_t* a, int64_t a_row, const Panels<uint32_t>& b, float* c, int64_t c_row,
                      int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
    tile_product(a, a_row, b, c, c_row, rows, columns, depth, accumulate);
  }
};

}  // namespace

extern const AttentionBodies attention_bf16_bodies;
const AttentionBodies attention_bf16_bodies = {forward<TileEngine, bf16>, backward<TileEngine, bf16>};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
