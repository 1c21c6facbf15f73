#include "kernels/moe_router/moe_router.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/arena.h"
#include "core/isa.h"
#include "core/rows.h"
#include "kernels/moe_router/moe_router_body.h"
#include "kernels/moe_router/moe_router_device.h"

namespace gptcore {

GPTCORE_BODIES(MoeRouterBodies, moe_router_bodies)
GPTCORE_DEVICE_BODIES(MoeRouterDeviceBodies, moe_router_device_bodies)

namespace {

constexpr int64_t kMostExperts = 4096;
// Tokens whose sums are kept together: enough to make a task, and few enough chunks that their sums stay small.
constexpr int64_t kChunkTokens = 256, kMostChunks = 64;

struct Sizes {
  int64_t tokens, experts, choices;
};

Sizes check_inputs(const Checker& check, const TensorView& logits, const TensorView& experts) {
  check.input(logits, "logits", {DType::f32, DType::bf16});
  check.ndim(logits, "logits", 2);
  check.last_contiguous(logits, "logits");
  Sizes sizes{logits.size(0), logits.size(1), 0};
  if (sizes.experts < 1 || sizes.experts > kMostExperts) {
    check.fail("logits", std::to_string(sizes.experts) + " experts", "1 to " + std::to_string(kMostExperts));
  }
  check.input(experts, "experts", {DType::i32});
  check.ndim(experts, "experts", 2);
  check.shape(experts, "experts", {sizes.tokens, -1});
  sizes.choices = experts.size(1);
  const int64_t most = std::min(kMostChoices, sizes.experts);
  if (sizes.choices < 1 || sizes.choices > most) {
    check.fail("top_k", std::to_string(sizes.choices) + " of " + std::to_string(sizes.experts) + " experts",
               "1 to " + std::to_string(most));
  }
  if (sizes.tokens * sizes.choices > std::numeric_limits<int32_t>::max()) {
    check.fail("logits", describe(logits), "fewer than 2^31 choices");
  }
  return sizes;
}

void check_table(const Checker& check, const TensorView& tensor, const char* name, DType type,
                 std::initializer_list<int64_t> shape) {
  check.input(tensor, name, {type});
  check.shape(tensor, name, shape);
  check.contiguous(tensor, name);
}

// Tokens by falling priority, of equal ones the earlier first; a NaN comes last.
void sort_tokens(const float* priority, int64_t tokens, int32_t* order) {
  for (int64_t n = 0; n < tokens; ++n) order[n] = static_cast<int32_t>(n);
  const auto key = [priority](int32_t n) {
    return std::isnan(priority[n]) ? -std::numeric_limits<float>::infinity() : priority[n];
  };
  std::sort(order, order + tokens, [&](int32_t a, int32_t b) {
    const float x = key(a), y = key(b);
    return x != y ? x > y : a < b;
  });
}

struct Places {
  Sizes sizes;
  const int32_t* order;  // null: as they come
  int64_t capacity;
  const int32_t* chosen;
  float* gates;
  int32_t* rows;

  void drop(int64_t at) const { rows[at] = -1, gates[at] = 0.0f; }

  // Marks second choices that chance does not keep. A NaN gate is not kept.
  void draw_second(const float* uniforms, double threshold) const {
    for (int64_t n = 0; n < sizes.tokens; ++n) {
      const float *gate = gates + n * sizes.choices, share = gate[1] / (gate[0] + gate[1]);
      rows[n * sizes.choices + 1] = static_cast<double>(uniforms[n]) * threshold < share ? 0 : -1;
    }
  }

  // Rows of choices, from where the rows of each expert start; `next` counts them, over the capacity too.
  void assign(bool second_is_drawn, const int32_t* offsets, int32_t* next) const {
    for (int64_t k = 0; k < sizes.choices; ++k) {
      for (int64_t i = 0; i < sizes.tokens; ++i) {
        const int64_t at = (order ? order[i] : i) * sizes.choices + k;
        const bool asks = chosen[at] >= 0 && !(k == 1 && second_is_drawn && rows[at] < 0);
        const int32_t place = asks ? next[chosen[at]]++ : -1;
        if (asks && place < capacity) {
          rows[at] = offsets[chosen[at]] + place;
        } else {
          drop(at);
        }
      }
    }
  }

  // Choices that ask for a place, by expert, where not all second ones do.
  void count_asking(int32_t* requested) const {
    for (int64_t n = 0; n < sizes.tokens; ++n) {
      for (int64_t k = 0; k < sizes.choices; ++k) {
        const int64_t at = n * sizes.choices + k;
        if (chosen[at] >= 0 && !(k == 1 && rows[at] < 0)) ++requested[chosen[at]];
      }
    }
  }
};

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

// Every choice is an expert, or all of a token's are -1; returns how many tokens chose.
int64_t check_chosen(const Checker& check, const Sizes& sizes, const int32_t* chosen) {
  int32_t least = 0, most = 0;  // without padding that is all there is to see, in a tenth of the time
  for (int64_t i = 0; i < sizes.tokens * sizes.choices; ++i) {
    least = chosen[i] < least ? chosen[i] : least;
    most = chosen[i] > most ? chosen[i] : most;
  }
  if (least == 0 && most < sizes.experts) return sizes.tokens;
  int64_t counted = 0;
  for (int64_t n = 0; n < sizes.tokens; ++n) {
    const int32_t* row = chosen + n * sizes.choices;
    const bool padding = row[0] < 0;
    for (int64_t k = 0; k < sizes.choices; ++k) {
      if (padding ? row[k] == -1 : row[k] >= 0 && row[k] < sizes.experts) continue;
      check.fail("experts", std::to_string(row[k]) + " for token " + std::to_string(n),
                 "0 to " + std::to_string(sizes.experts - 1) + ", or -1 for all choices of a token");
    }
    counted += !padding;
  }
  return counted;
}

void check_choice(const Checker& check, const Sizes& sizes, const TensorView& priority,
                  const TensorView& uniforms, bool by_gate, double second_threshold, int64_t capacity) {
  if (priority) check_vector(check, priority, "priority", sizes.tokens, {DType::f32});
  if (priority && by_gate) check.fail("priority", "values and by_gate", "one of them");
  if (capacity < 1) check.fail("capacity", std::to_string(capacity), "at least 1");
  check.number(second_threshold >= 0 && std::isfinite(second_threshold), "second_threshold", second_threshold,
               "a finite number from 0 on");
  if (second_threshold > 0) {
    if (sizes.choices < 2) check.fail("second_threshold", "one choice", "top_k of at least 2");
    check_vector(check, uniforms, "uniforms", sizes.tokens, {DType::f32});
  }
}

}  // namespace

void moe_router_forward(const TensorView& logits, const TensorView& mask, const TensorView& priority,
                        const TensorView& uniforms, bool renormalise, bool by_gate, double second_threshold,
                        int64_t capacity, bool count_all, const TensorView& experts, const TensorView& gates,
                        const TensorView& rows, const TensorView& offsets, const TensorView& requested,
                        const TensorView& balance_loss, const TensorView& z_loss, const TensorView& entropy,
                        const TensorView& lse, const TensorView& share) {
  const Checker check("moe_router", moe_router_device_bodies_table.device);
  const Sizes sizes = check_inputs(check, logits, experts);
  if (mask) check_vector(check, mask, "mask", sizes.tokens, {DType::boolean, DType::u8});
  check_choice(check, sizes, priority, uniforms, by_gate, second_threshold, capacity);
  check_table(check, experts, "experts", DType::i32, {sizes.tokens, sizes.choices});
  check_table(check, gates, "gates", DType::f32, {sizes.tokens, sizes.choices});
  check_table(check, rows, "rows", DType::i32, {sizes.tokens, sizes.choices});
  check_table(check, offsets, "offsets", DType::i32, {sizes.experts + 1});
  check_table(check, requested, "requested", DType::i32, {sizes.experts});
  check_table(check, balance_loss, "balance_loss", DType::f32, {});
  check_table(check, z_loss, "z_loss", DType::f32, {});
  check_table(check, entropy, "entropy", DType::f32, {});
  check_table(check, lse, "lse", DType::f32, {sizes.tokens});
  check_table(check, share, "share", DType::f32, {sizes.experts});
  for (const TensorView* out :
       {&experts, &gates, &rows, &offsets, &requested, &balance_loss, &z_loss, &entropy, &lse, &share}) {
    check.writable(*out, "out");
  }

  const bool drawn = second_threshold > 0;
  if (const MoeRouterDeviceBodies* bodies = moe_router_device_bodies_table.pick_device(check)) {
    MoeRouterDeviceForward d{};
    d.logits = logits.data, d.stride = logits.stride(0), d.tokens = sizes.tokens, d.experts = sizes.experts;
    d.choices = sizes.choices, d.bf16 = is_bf16(logits), d.mask = mask ? mask.as<uint8_t>() : nullptr;
    d.priority = priority ? priority.as<float>() : nullptr;
    d.uniforms = drawn ? uniforms.as<float>() : nullptr;
    d.renormalise = renormalise, d.by_gate = by_gate, d.count_all = count_all;
    d.second_threshold = second_threshold, d.capacity = capacity;
    d.chosen = experts.as<int32_t>(), d.rows = rows.as<int32_t>(), d.offsets = offsets.as<int32_t>();
    d.requested = requested.as<int32_t>(), d.gates = gates.as<float>(), d.lse = lse.as<float>();
    d.balance_loss = balance_loss.as<float>(), d.z_loss = z_loss.as<float>();
    d.entropy = entropy.as<float>(), d.share = share.as<float>();
    return bodies->forward(d);
  }

  MoeRouterForward a{};
  a.logits = logits.data, a.stride = logits.stride(0), a.tokens = sizes.tokens;
  a.experts = sizes.experts, a.choices = sizes.choices, a.mask = mask ? mask.as<uint8_t>() : nullptr;
  a.renormalise = renormalise;
  a.chunk = std::max(kChunkTokens, (sizes.tokens + kMostChunks - 1) / kMostChunks);
  const int64_t chunks = (sizes.tokens + a.chunk - 1) / a.chunk;
  a.chosen = experts.as<int32_t>(), a.gates = gates.as<float>(), a.lse = lse.as<float>();
  const int64_t numbers = 2 * sizes.tokens + chunks * (sizes.experts + 2),
                counts = 2 * (chunks + 1) * sizes.experts;
  const Scratch scratch(static_cast<size_t>(numbers + counts) * sizeof(float));
  a.top_probability = scratch.as<float>();
  a.probabilities = a.top_probability + 2 * sizes.tokens;
  a.z_and_entropy = a.probabilities + chunks * sizes.experts;
  a.counts = scratch.as<int32_t>() + numbers;
  if (sizes.tokens > 0) moe_router_bodies_table.pick(check).forward[is_bf16(logits)](a);

  int32_t *firsts = a.counts + 2 * chunks * sizes.experts, *all = firsts + sizes.experts;
  const int64_t counted = sum_counts(a, chunks, 0, firsts);
  sum_counts(a, chunks, 1, all);
  for (int64_t e = 0; e < sizes.experts; ++e) all[e] += firsts[e];
  const double tokens = static_cast<double>(std::max<int64_t>(counted, 1));
  for (int64_t e = 0; e < sizes.experts; ++e) {
    share.as<float>()[e] = static_cast<float>(static_cast<double>(count_all ? all[e] : firsts[e]) / tokens);
  }
  write_losses(a, chunks, counted, share.as<float>(), balance_loss.as<float>(), z_loss.as<float>(),
               entropy.as<float>());

  int32_t* order = reinterpret_cast<int32_t*>(a.top_probability + sizes.tokens);
  const float* by = by_gate ? a.top_probability : priority ? priority.as<float>() : nullptr;
  if (by) sort_tokens(by, sizes.tokens, order);
  const Places places{sizes, by ? order : nullptr, capacity, a.chosen, a.gates, rows.as<int32_t>()};
  int32_t *asked = requested.as<int32_t>(), *start = offsets.as<int32_t>(), *next = firsts;
  const size_t bytes = static_cast<size_t>(sizes.experts) * sizeof(int32_t);
  if (drawn) {
    places.draw_second(uniforms.as<float>(), second_threshold);
    std::memset(asked, 0, bytes);
    places.count_asking(asked);
  } else {
    std::memcpy(asked, all, bytes);
  }
  start[0] = 0;
  for (int64_t e = 0; e < sizes.experts; ++e) {
    start[e + 1] = start[e] + static_cast<int32_t>(std::min<int64_t>(asked[e], capacity));
  }
  std::memset(next, 0, bytes);
  places.assign(drawn, start, next);
}

void moe_router_backward(const TensorView& dgates, const TensorView& dbalance_loss, const TensorView& dz_loss,
                         const TensorView& logits, const TensorView& experts, const TensorView& rows,
                         const TensorView& lse, const TensorView& share, bool renormalise,
                         const TensorView& dlogits) {
  const Checker check("moe_router_backward", moe_router_device_bodies_table.device);
  const Sizes sizes = check_inputs(check, logits, experts);
  check_table(check, experts, "experts", DType::i32, {sizes.tokens, sizes.choices});
  check_table(check, rows, "rows", DType::i32, {sizes.tokens, sizes.choices});
  if (dgates) check_table(check, dgates, "dgates", DType::f32, {sizes.tokens, sizes.choices});
  if (dbalance_loss) check_table(check, dbalance_loss, "dbalance_loss", DType::f32, {});
  if (dz_loss) check_table(check, dz_loss, "dz_loss", DType::f32, {});
  check_table(check, lse, "lse", DType::f32, {sizes.tokens});
  check_table(check, share, "share", DType::f32, {sizes.experts});
  check.output(dlogits, "dlogits", {logits.dtype});
  check.same_shape(dlogits, "dlogits", logits, "logits");
  check.last_contiguous(dlogits, "dlogits");
  if (sizes.tokens == 0) return;
  if (const MoeRouterDeviceBodies* bodies = moe_router_device_bodies_table.pick_device(check)) {
    const auto number = [](const TensorView& tensor) { return tensor ? tensor.as<float>() : nullptr; };
    MoeRouterDeviceBackward d{};
    d.logits = logits.data, d.dlogits = dlogits.data, d.stride = logits.stride(0);
    d.out_stride = dlogits.stride(0), d.tokens = sizes.tokens, d.experts = sizes.experts;
    d.choices = sizes.choices, d.bf16 = is_bf16(logits), d.chosen = experts.as<int32_t>();
    d.rows = rows.as<int32_t>(), d.dgates = number(dgates), d.dbalance_loss = number(dbalance_loss);
    d.dz_loss = number(dz_loss), d.lse = lse.as<float>(), d.share = share.as<float>();
    d.renormalise = renormalise;
    return bodies->backward(d);
  }

  const int64_t counted = check_chosen(check, sizes, experts.as<int32_t>());
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
  a.dgates = dgates ? dgates.as<float>() : nullptr, a.lse = lse.as<float>(), a.balance_factor = factor;
  a.z_factor = static_cast<float>(2.0 * given(dz_loss) / n), a.renormalise = renormalise;
  moe_router_bodies_table.pick(check).backward[is_bf16(logits)](a);
}

}  // namespace gptcore
