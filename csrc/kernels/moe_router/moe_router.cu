// The router on CUDA: tokens choose, segments of choices are counted and summed up, choices get their rows. Nothing is
// read by the processor.
#include "core/cuda/scratch.h"
#include "kernels/moe_router/moe_router_backward.cuh"
#include "kernels/moe_router/moe_router_choose.cuh"
#include "kernels/moe_router/moe_router_order.cuh"
#include "kernels/moe_router/moe_router_places.cuh"

namespace gptcore::cuda {
namespace {

unsigned blocks_of(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

// Hands out parts of one piece of memory; with null counts how much that is.
class Parts {
 public:
  explicit Parts(unsigned char* from) : from_(from) {}
  template <class T>
  T* take(int64_t count) {
    T* const part = from_ ? reinterpret_cast<T*>(from_ + bytes_) : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return part;
  }
  int64_t bytes() const { return bytes_; }

 private:
  unsigned char* from_;
  int64_t bytes_ = 0;
};

struct ForwardScratch {
  RouterScratch router;
  OrderKey* sorted;
};

ForwardScratch divide(const MoeRouterDeviceForward& a, const RouterPlan& plan, Parts* parts) {
  const bool ordered = a.by_gate || a.priority;
  const int64_t keys = tile_keys(a.tokens);
  ForwardScratch s{};
  s.router.chunk = plan.chunk, s.router.chunks = plan.chunks;
  s.router.balance = parts->take<double>(a.experts);
  s.router.probabilities = parts->take<float>(plan.chunks * a.experts);
  s.router.losses = parts->take<float>(plan.chunks * 3);
  s.router.counts = parts->take<int32_t>((a.choices + 1) * plan.chunks * a.experts);
  if (a.by_gate) s.router.top_probability = parts->take<float>(a.tokens);
  if (!ordered) return s;
  s.router.order = parts->take<int32_t>(a.tokens);
  s.sorted = parts->take<OrderKey>((a.tokens + keys - 1) / keys * keys);
  return s;
}

void forward(const MoeRouterDeviceForward& a) {
  const RouterPlan plan = router_plan(a.tokens, a.experts, a.choices);
  Parts sizes(nullptr);
  divide(a, plan, &sizes);
  const DeviceScratch memory(sizes.bytes());
  Parts parts(memory.as<unsigned char>());
  const ForwardScratch scratch = divide(a, plan, &parts);
  const RouterScratch& s = scratch.router;
  const unsigned chunks = static_cast<unsigned>(plan.chunks);

  const Launch choose{dim3(chunks), dim3(static_cast<unsigned>(plan.threads)),
                      router_shared_bytes(plan, a.experts)};
  plan.lanes == 8 ? launch<&choose_experts<8>>(choose, a, s) : launch<&choose_experts<32>>(choose, a, s);
  if (s.order && a.tokens > 0) {
    sort_tokens(a.by_gate ? s.top_probability : a.priority, a.tokens, scratch.sorted, s.order);
    launch<&count_in_order>({dim3(chunks), dim3(kCountThreads), kCountSets * a.experts * 4}, a, s);
  }
  launch<&scan_segments>({dim3(blocks_of(a.experts, kWarp)), dim3(kScanWarps * kWarp), sizeof(ScanRoom)}, a,
                         s);
  launch<&place_choices>({dim3(chunks + 1), dim3(kPlaceThreads), (kPlaceWarps + a.experts + 1) * 4}, a, s);
}

void backward(const MoeRouterDeviceBackward& a) {
  const RouterPlan plan = router_plan(a.tokens, a.experts, a.choices);
  const bool losses = a.dbalance_loss || a.dz_loss;
  const unsigned count = static_cast<unsigned>(blocks_of(a.tokens, kCountTokensThreads) < kCountTokensBlocks
                                                   ? blocks_of(a.tokens, kCountTokensThreads)
                                                   : kCountTokensBlocks);
  const DeviceScratch memory(losses ? count * int64_t{sizeof(int)} : 0);
  int* parts = losses ? memory.as<int>() : nullptr;
  if (losses) launch<&count_tokens>({dim3(count), dim3(kCountTokensThreads), 32 * sizeof(int)}, a, parts);
  const int groups = plan.threads / plan.lanes;
  const Launch each{dim3(blocks_of(a.tokens, groups)), dim3(static_cast<unsigned>(plan.threads)),
                    groups * a.experts * 4};
  const int* found = parts;
  plan.lanes == 8 ? launch<&route_backward<8>>(each, a, found, static_cast<int>(count))
                  : launch<&route_backward<32>>(each, a, found, static_cast<int>(count));
}

}  // namespace

GPTCORE_CUDA_BODIES(MoeRouterDeviceBodies, moe_router_device_bodies) = {forward, backward};

}  // namespace gptcore::cuda
