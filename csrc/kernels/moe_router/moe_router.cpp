#include "kernels/moe_router/moe_router.h"

#include <algorithm>
#include <cstring>

#include "core/arena.h"
#include "core/isa.h"
#include "core/rows.h"
#include "kernels/moe_router/moe_router_body.h"
#include "kernels/moe_router/moe_router_checks.h"
#include "kernels/moe_router/moe_router_device.h"
#include "kernels/moe_router/moe_router_places.h"

namespace gptcore {

GPTCORE_BODIES(MoeRouterBodies, moe_router_bodies)
GPTCORE_DEVICE_BODIES(MoeRouterDeviceBodies, moe_router_device_bodies)

namespace {

// Tokens whose sums are kept together: enough to make a task, and few enough chunks that their sums stay small.
constexpr int64_t kChunkTokens = 256, kMostChunks = 64;

// What the chunks counted: which = 0 first choices, 1 later ones. Returns how many that are.
int64_t sum_counts(const MoeRouterForward& a, int64_t chunks, int which, int32_t* sums) {
  int64_t total = 0;
  std::memset(sums, 0, static_cast<size_t>(a.experts) * sizeof(int32_t));
  for (int64_t c = 0; c < chunks; ++c) {
    const int32_t* counts = a.counts + (2 * c + which) * a.experts;
    for (int64_t e = 0; e < a.experts; ++e) sums[e] += counts[e], total += counts[e];
  }
  return total;
}

void write_losses(const MoeRouterForward& a, int64_t chunks, int64_t counted, const float* share,
                  float* balance_loss, float* z_loss, float* mean_entropy) {
  double balance = 0, z = 0, entropy = 0;
  for (int64_t e = 0; e < a.experts; ++e) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += a.probabilities[c * a.experts + e];
    balance += static_cast<double>(share[e]) * sum;
  }
  for (int64_t c = 0; c < chunks; ++c) z += a.z_and_entropy[2 * c], entropy += a.z_and_entropy[2 * c + 1];
  const double n = static_cast<double>(std::max<int64_t>(counted, 1));
  *balance_loss = static_cast<float>(static_cast<double>(a.experts) * balance / n);
  *z_loss = static_cast<float>(z / n);
  *mean_entropy = static_cast<float>(entropy / n);
}

struct ForwardInputs {
  const TensorView &logits, &mask, &priority, &uniforms;
  bool renormalise, by_gate, count_all;
  double second_threshold;
  int64_t capacity;

  bool drawn() const { return second_threshold > 0; }
};

struct ForwardOutputs {
  const TensorView &experts, &gates, &rows, &offsets, &requested, &balance_loss, &z_loss, &entropy, &lse,
      &share;
};

const float* floats(const TensorView& tensor) { return tensor ? tensor.as<float>() : nullptr; }

void check_outputs(const Checker& check, const RouterSizes& sizes, const ForwardOutputs& out) {
  check_router_table(check, out.experts, "experts", DType::i32, {sizes.tokens, sizes.choices});
  check_router_table(check, out.gates, "gates", DType::f32, {sizes.tokens, sizes.choices});
  check_router_table(check, out.rows, "rows", DType::i32, {sizes.tokens, sizes.choices});
  check_router_table(check, out.offsets, "offsets", DType::i32, {sizes.experts + 1});
  check_router_table(check, out.requested, "requested", DType::i32, {sizes.experts});
  check_router_table(check, out.balance_loss, "balance_loss", DType::f32, {});
  check_router_table(check, out.z_loss, "z_loss", DType::f32, {});
  check_router_table(check, out.entropy, "entropy", DType::f32, {});
  check_router_table(check, out.lse, "lse", DType::f32, {sizes.tokens});
  check_router_table(check, out.share, "share", DType::f32, {sizes.experts});
  for (const TensorView* written : {&out.experts, &out.gates, &out.rows, &out.offsets, &out.requested,
                                    &out.balance_loss, &out.z_loss, &out.entropy, &out.lse, &out.share}) {
    check.writable(*written, "out");
  }
}

MoeRouterDeviceForward device_forward(const RouterSizes& sizes, const ForwardInputs& in,
                                      const ForwardOutputs& out) {
  MoeRouterDeviceForward d{};
  d.logits = in.logits.data, d.stride = in.logits.stride(0), d.tokens = sizes.tokens;
  d.experts = sizes.experts, d.choices = sizes.choices, d.bf16 = is_bf16(in.logits);
  d.mask = in.mask ? in.mask.as<uint8_t>() : nullptr, d.priority = floats(in.priority);
  d.uniforms = in.drawn() ? in.uniforms.as<float>() : nullptr;
  d.renormalise = in.renormalise, d.by_gate = in.by_gate, d.count_all = in.count_all;
  d.second_threshold = in.second_threshold, d.capacity = in.capacity;
  d.chosen = out.experts.as<int32_t>(), d.rows = out.rows.as<int32_t>();
  d.offsets = out.offsets.as<int32_t>(), d.requested = out.requested.as<int32_t>();
  d.gates = out.gates.as<float>(), d.lse = out.lse.as<float>(), d.share = out.share.as<float>();
  d.balance_loss = out.balance_loss.as<float>(), d.z_loss = out.z_loss.as<float>();
  d.entropy = out.entropy.as<float>();
  return d;
}

// Rows of the choices; `all` is how many want each expert, `next` and `order` are room.
void give_places(const RouterSizes& sizes, const ForwardInputs& in, const ForwardOutputs& out,
                 const float* top_probability, const int32_t* all, int32_t* next, int32_t* order) {
  const float* by = in.by_gate ? top_probability : floats(in.priority);
  if (by) sort_tokens(by, sizes.tokens, order);
  const RouterPlaces places{sizes,
                            by ? order : nullptr,
                            in.capacity,
                            out.experts.as<int32_t>(),
                            out.gates.as<float>(),
                            out.rows.as<int32_t>()};
  int32_t *asked = out.requested.as<int32_t>(), *start = out.offsets.as<int32_t>();
  const size_t bytes = static_cast<size_t>(sizes.experts) * sizeof(int32_t);
  if (in.drawn()) {
    places.draw_second(in.uniforms.as<float>(), in.second_threshold);
    std::memset(asked, 0, bytes);
    places.count_asking(asked);
  } else {
    std::memcpy(asked, all, bytes);
  }
  start[0] = 0;
  for (int64_t e = 0; e < sizes.experts; ++e) {
    start[e + 1] = start[e] + static_cast<int32_t>(std::min<int64_t>(asked[e], in.capacity));
  }
  std::memset(next, 0, bytes);
  places.assign(in.drawn(), start, next);
}

void forward_here(const Checker& check, const RouterSizes& sizes, const ForwardInputs& in,
                  const ForwardOutputs& out) {
  MoeRouterForward a{};
  a.logits = in.logits.data, a.stride = in.logits.stride(0), a.tokens = sizes.tokens;
  a.experts = sizes.experts, a.choices = sizes.choices, a.mask = in.mask ? in.mask.as<uint8_t>() : nullptr;
  a.renormalise = in.renormalise;
  a.chunk = std::max(kChunkTokens, (sizes.tokens + kMostChunks - 1) / kMostChunks);
  const int64_t chunks = (sizes.tokens + a.chunk - 1) / a.chunk;
  a.chosen = out.experts.as<int32_t>(), a.gates = out.gates.as<float>(), a.lse = out.lse.as<float>();
  const int64_t numbers = 2 * sizes.tokens + chunks * (sizes.experts + 2),
                counts = 2 * (chunks + 1) * sizes.experts;
  const Scratch scratch(static_cast<size_t>(numbers + counts) * sizeof(float));
  a.top_probability = scratch.as<float>();
  a.probabilities = a.top_probability + 2 * sizes.tokens;
  a.z_and_entropy = a.probabilities + chunks * sizes.experts;
  a.counts = scratch.as<int32_t>() + numbers;
  if (sizes.tokens > 0) moe_router_bodies_table.pick(check).forward[is_bf16(in.logits)](a);

  int32_t *firsts = a.counts + 2 * chunks * sizes.experts, *all = firsts + sizes.experts;
  const int64_t counted = sum_counts(a, chunks, 0, firsts);
  sum_counts(a, chunks, 1, all);
  for (int64_t e = 0; e < sizes.experts; ++e) all[e] += firsts[e];
  const double tokens = static_cast<double>(std::max<int64_t>(counted, 1));
  float* share = out.share.as<float>();
  for (int64_t e = 0; e < sizes.experts; ++e) {
    share[e] = static_cast<float>(static_cast<double>(in.count_all ? all[e] : firsts[e]) / tokens);
  }
  write_losses(a, chunks, counted, share, out.balance_loss.as<float>(), out.z_loss.as<float>(),
               out.entropy.as<float>());
  give_places(sizes, in, out, a.top_probability, all, firsts,
              reinterpret_cast<int32_t*>(a.top_probability + sizes.tokens));
}

}  // namespace

void moe_router_forward(const TensorView& logits, const TensorView& mask, const TensorView& priority,
                        const TensorView& uniforms, bool renormalise, bool by_gate, double second_threshold,
                        int64_t capacity, bool count_all, const TensorView& experts, const TensorView& gates,
                        const TensorView& rows, const TensorView& offsets, const TensorView& requested,
                        const TensorView& balance_loss, const TensorView& z_loss, const TensorView& entropy,
                        const TensorView& lse, const TensorView& share) {
  const Checker check("moe_router", moe_router_device_bodies_table.device);
  const RouterSizes sizes = check_router_inputs(check, logits, experts);
  if (mask) check_vector(check, mask, "mask", sizes.tokens, {DType::boolean, DType::u8});
  check_router_choice(check, sizes, priority, uniforms, by_gate, second_threshold, capacity);
  const ForwardInputs in{logits,  mask,      priority,         uniforms, renormalise,
                         by_gate, count_all, second_threshold, capacity};
  const ForwardOutputs out{experts,      gates,  rows,    offsets, requested,
                           balance_loss, z_loss, entropy, lse,     share};
  check_outputs(check, sizes, out);
  if (const MoeRouterDeviceBodies* bodies = moe_router_device_bodies_table.pick_device(check)) {
    return bodies->forward(device_forward(sizes, in, out));
  }
  forward_here(check, sizes, in, out);
}

void moe_router_backward(const TensorView& dgates, const TensorView& dbalance_loss, const TensorView& dz_loss,
                         const TensorView& logits, const TensorView& experts, const TensorView& rows,
                         const TensorView& lse, const TensorView& share, bool renormalise,
                         const TensorView& dlogits) {
  const Checker check("moe_router_backward", moe_router_device_bodies_table.device);
  const RouterSizes sizes = check_router_inputs(check, logits, experts);
  check_router_table(check, experts, "experts", DType::i32, {sizes.tokens, sizes.choices});
  check_router_table(check, rows, "rows", DType::i32, {sizes.tokens, sizes.choices});
  if (dgates) check_router_table(check, dgates, "dgates", DType::f32, {sizes.tokens, sizes.choices});
  if (dbalance_loss) check_router_table(check, dbalance_loss, "dbalance_loss", DType::f32, {});
  if (dz_loss) check_router_table(check, dz_loss, "dz_loss", DType::f32, {});
  check_router_table(check, lse, "lse", DType::f32, {sizes.tokens});
  check_router_table(check, share, "share", DType::f32, {sizes.experts});
  check.output(dlogits, "dlogits", {logits.dtype});
  check.same_shape(dlogits, "dlogits", logits, "logits");
  check.last_contiguous(dlogits, "dlogits");
  if (sizes.tokens == 0) return;
  if (const MoeRouterDeviceBodies* bodies = moe_router_device_bodies_table.pick_device(check)) {
    MoeRouterDeviceBackward d{};
    d.logits = logits.data, d.dlogits = dlogits.data, d.stride = logits.stride(0);
    d.out_stride = dlogits.stride(0), d.tokens = sizes.tokens, d.experts = sizes.experts;
    d.choices = sizes.choices, d.bf16 = is_bf16(logits), d.chosen = experts.as<int32_t>();
    d.rows = rows.as<int32_t>(), d.dgates = floats(dgates), d.dbalance_loss = floats(dbalance_loss);
    d.dz_loss = floats(dz_loss), d.lse = lse.as<float>(), d.share = share.as<float>();
    d.renormalise = renormalise;
    return bodies->backward(d);
  }

  const int64_t counted = check_router_chosen(check, sizes, experts.as<int32_t>());
  const double n = static_cast<double>(std::max<int64_t>(counted, 1));
  const auto given = [](const TensorView& number) {
    return number ? static_cast<double>(*number.as<float>()) : 0.0;
  };
  const Scratch scratch(static_cast<size_t>(sizes.experts) * sizeof(float));
  float* factor = scratch.as<float>();
  const double balance = given(dbalance_loss) * static_cast<double>(sizes.experts) / n;
  for (int64_t e = 0; e < sizes.experts; ++e) factor[e] = static_cast<float>(balance * share.as<float>()[e]);
  MoeRouterBackward a{};
  a.logits = logits.data, a.dlogits = dlogits.data, a.stride = logits.stride(0);
  a.out_stride = dlogits.stride(0), a.tokens = sizes.tokens, a.experts = sizes.experts;
  a.choices = sizes.choices, a.chosen = experts.as<int32_t>(), a.rows = rows.as<int32_t>();
  a.dgates = floats(dgates), a.lse = lse.as<float>(), a.balance_factor = factor;
  a.z_factor = static_cast<float>(2.0 * given(dz_loss) / n), a.renormalise = renormalise;
  moe_router_bodies_table.pick(check).backward[is_bf16(logits)](a);
}

}  // namespace gptcore
