// Tiles of 128 x 256 sums by two warpgroups of 64 x 256 each, whose operands one warp fetches through four stages of 64
// along the depth, ahead into the next tile while the sums of the last are written.
#pragma once

#include "core/cuda/wgmma.cuh"
#include "kernels/grouped_linear/grouped_tiles.cuh"

namespace gptcore::cuda {

struct WgmmaTile {
  static constexpr int kRows = 128, kColumns = 256, kDepth = 64, kStages = 4;
  static constexpr int kPanel = 64 * 128;  // bytes of 64 rows by 64 elements
  static constexpr int kABytes = kRows * kDepth * 2, kBBytes = kColumns * kDepth * 2;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kProducts = 2;  // warpgroups that multiply
  static constexpr int kThreads = (1 + kProducts) * kWarpgroup, kWarps = 4 * kProducts;
  // Sums on their way out: of each warp 16 rows by 32 columns, eight rows' pairs in different banks.
  static constexpr int kOutStride = 32 + 8, kOutBytes = kWarps * 16 * kOutStride * 4;
  static constexpr int kBarriers = kStages * kStageBytes + kOutBytes;  // where they lie
  static constexpr int kBytes = kBarriers + 2 * kStages * 8;
  using Sums = float[kColumns / 2];
};

// What a tile's operands are: `steps` stages from depth k on, of rows (A) and columns (B) from the first on, of one
// expert's matrix (B).
struct TileWork {
  int steps, k, row, column, expert;
  int last;  // of the depth in the last stage, where what follows in memory is another group's; else 64
};

struct OperandMaps {
  TensorMap a, b;  // (depth, rows) or (rows, depth), innermost first; the same with experts
};

struct Stages {
  unsigned char* room;
  uint64_t *full, *empty;

  __device__ explicit Stages(unsigned char* shared)
      : room(shared),
        full(reinterpret_cast<uint64_t*>(shared + WgmmaTile::kBarriers)),
        empty(full + WgmmaTile::kStages) {}
  // One thread's business, with a barrier of the block behind it.
  __device__ void init() const {
    for (int i = 0; i < WgmmaTile::kStages; ++i) {
      mbarrier_init(full + i, 1), mbarrier_init(empty + i, WgmmaTile::kWarps);
    }
    mbarrier_init_fence();
  }
};

// Where in the ring of stages a warp is.
struct RingPlace {
  int slot = 0;
  unsigned phase = 0;
  __device__ __forceinline__ void next() {
    if (++slot == WgmmaTile::kStages) slot = 0, phase ^= 1;
  }
};

template <Major kA, Major kB>
__device__ __forceinline__ void fetch_stage(const OperandMaps& maps, const TileWork& work, int step,
                                            unsigned char* a, uint64_t* full) {
  const int k = work.k + step * WgmmaTile::kDepth;
  unsigned char* b = a + WgmmaTile::kABytes;
  mbarrier_arrive_expecting(full, WgmmaTile::kStageBytes);
  if constexpr (kA == Major::k) {
    tma_load(a, maps.a, full, k, work.row);
  } else {
#pragma unroll
    for (int p = 0; p < WgmmaTile::kRows / 64; ++p) {
      tma_load(a + p * WgmmaTile::kPanel, maps.a, full, work.row + 64 * p, k);
    }
  }
  if constexpr (kB == Major::k) {
    tma_load(b, maps.b, full, k, work.column, work.expert);
  } else {
#pragma unroll
    for (int p = 0; p < WgmmaTile::kColumns / 64; ++p) {
      tma_load(b + p * WgmmaTile::kPanel, maps.b, full, work.column + 64 * p, k, work.expert);
    }
  }
}

// One thread, for all tiles of the block.
template <Major kA, Major kB, class Works>
__device__ __forceinline__ void fetch_tiles(const OperandMaps& maps, const Works& works,
                                            const Stages& stages) {
  RingPlace place;
  for (int64_t t = blockIdx.x; t < works.count(); t += gridDim.x) {
    const TileWork work = works.at(t);
    for (int step = 0; step < work.steps; ++step, place.next()) {
      mbarrier_wait(stages.empty + place.slot, place.phase ^ 1);
      fetch_stage<kA, kB>(maps, work, step, stages.room + place.slot * WgmmaTile::kStageBytes,
                          stages.full + place.slot);
    }
  }
}

// Operands that lie across the depth: from its row `first` on they become zeros, by all warpgroups that multiply.
__device__ __forceinline__ void clear_depth(unsigned char* stage, int first) {
  constexpr int kThreads = WgmmaTile::kProducts * kWarpgroup,
                kPanels = WgmmaTile::kStageBytes / WgmmaTile::kPanel;
  const int left = (64 - first) * 8;  // pieces of 16 bytes of each panel
  for (int i = static_cast<int>(threadIdx.x) - kWarpgroup; i < left * kPanels; i += kThreads) {
    *reinterpret_cast<uint4*>(stage + i / left * WgmmaTile::kPanel + first * 128 + i % left * 16) =
        make_uint4(0, 0, 0, 0);
  }
  async_proxy_fence();
  named_barrier(1, kThreads);
}

template <Major kA, Major kB>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, int group, WgmmaTile::Sums& sums) {
  const unsigned char* b_tile = stage + WgmmaTile::kABytes;
  uint64_t a, b;
  if constexpr (kA == Major::k) {
    a = k_major_operand<128>(stage) + k_major_rows<128>(64) * static_cast<unsigned>(group);
  } else {
    a = mn_major_operand<128, 64>(stage) + mn_major_rows<128, 64>(64) * static_cast<unsigned>(group);
  }
  if constexpr (kB == Major::k) {
    b = k_major_operand<128>(b_tile);
  } else {
    b = mn_major_operand<128, 64>(b_tile);
  }
  wgmma_fence(sums);
#pragma unroll
  for (int i = 0; i < WgmmaTile::kDepth / 16; ++i) {
    const uint64_t a_step = kA == Major::k ? k_major_step<128, WgmmaTile::kRows>(i) : mn_major_step<128>(i);
    const uint64_t b_step =
        kB == Major::k ? k_major_step<128, WgmmaTile::kColumns>(i) : mn_major_step<128>(i);
    wgmma<WgmmaTile::kColumns, bf16, kA, kB>(sums, a + a_step, b + b_step, true);
  }
  wgmma_commit();
}

// A warp's 16 rows by 32 columns at a time through shared memory, so that lines of 64 bytes are written.
__device__ __forceinline__ void store_sums(const TileOut<bf16>& out, unsigned char* room, int group,
                                           const WgmmaTile::Sums& sums) {
  const int warp_of_all = group * 4 + warp() % 4, row = lane() / 4, t = lane() % 4;
  float* own = reinterpret_cast<float*>(room) + warp_of_all * 16 * WgmmaTile::kOutStride;
#pragma unroll
  for (int block = 0; block < WgmmaTile::kColumns / 32; ++block) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int from = (block * 4 + j) * 4 + 2 * half;
        *reinterpret_cast<float2*>(own + (row + 8 * half) * WgmmaTile::kOutStride + 8 * j + 2 * t) =
            make_float2(sums[from], sums[from + 1]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float values[8];
      const float* from = own + (row + 8 * half) * WgmmaTile::kOutStride + 8 * t;
#pragma unroll
      for (int c = 0; c < 8; ++c) values[c] = from[c];
      out.put(warp_of_all * 16 + row + 8 * half, block * 32 + 8 * t, values);
    }
    __syncwarp();
  }
}

// A warpgroup's half of all tiles of the block.
template <Major kA, Major kB, class Works>
__device__ __forceinline__ void multiply_tiles(const Works& works, const Stages& stages) {
  const int group = warpgroup() - 1;
  RingPlace place;
  const auto stage_at = [&](int slot) { return stages.room + slot * WgmmaTile::kStageBytes; };
  const auto release = [&](int slot) {
    if (lane() == 0) mbarrier_arrive(stages.empty + slot);
  };
  for (int64_t t = blockIdx.x; t < works.count(); t += gridDim.x) {
    const TileWork work = works.at(t);
    if (work.steps < 0) continue;
    WgmmaTile::Sums sums = {};
    int before = -1;  // the stage whose products may still run
    for (int step = 0; step < work.steps; ++step, place.next()) {
      mbarrier_wait(stages.full + place.slot, place.phase);
      if constexpr (kA == Major::mn && kB == Major::mn) {
        if (step + 1 == work.steps && work.last < WgmmaTile::kDepth)
          clear_depth(stage_at(place.slot), work.last);
      }
      multiply_stage<kA, kB>(stage_at(place.slot), group, sums);
      wgmma_wait<1>(sums);
      if (before >= 0) release(before);
      before = place.slot;
    }
    wgmma_wait<0>(sums);
    if (before >= 0) release(before);
    store_sums(works.out(t), stages.room + WgmmaTile::kStages * WgmmaTile::kStageBytes, group, sums);
  }
}

// Works: count(), at(tile), whose steps are -1 where nothing is to be written, and out(tile).
template <Major kA, Major kB, class Works>
__device__ __forceinline__ void run_tiles(const OperandMaps& maps, const Works& works, const Stages& stages) {
  if (threadIdx.x == 0) stages.init();
  __syncthreads();
  if (warpgroup() == 0) {
    keep_registers<40>();
    if (warp() == 0 && elect_one()) fetch_tiles<kA, kB>(maps, works, stages);
  } else {
    take_registers<232>();
    multiply_tiles<kA, kB>(works, stages);
  }
}

}  // namespace gptcore::cuda
