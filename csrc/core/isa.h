// Which instruction sets this machine offers, found once; kernels are compiled for each and picked at run
// time.
//
//   v2       x86-64-v2 (SSE4.2), or the plain build elsewhere
//   v3       AVX2 + FMA
//   v4       AVX-512 F, BW, CD, DQ, VL
//   v4_bf16  and AVX512-BF16, AVX512-VNNI
//   amx      and AMX tiles with bf16, granted by the operating system
//   simt     CUDA's kernels, every thread run by the processor: for tests, where a build brings them (tests/simt)
#pragma once

#include <cstdint>

#include "core/check.h"
#include "core/device_link.h"

namespace gptcore {

enum class Isa : int32_t { v2 = 0, v3 = 1, v4 = 2, v4_bf16 = 3, amx = 4, simt = 5 };
constexpr int kCpuIsaCount = 5, kIsaCount = 6;

const char* name_of(Isa isa);

// Whether processor and operating system offer a set and this build has it.
bool has_isa(Isa isa);

// The best of those.
Isa best_isa();

// The set in use: best_isa(), or what GPTCORE_ISA names (ValueError if unknown or not available here).
Isa current_isa();

// Switches the set in use, for tests and comparisons; ValueError if not available here.
void set_isa(const char* name);

// A kernel's variants by ISA. Missing entries (null) fall to the next lower one; every op has a body for the
// lowest set of the build, and one for another device where a module brought it.
template <class Bodies>
struct IsaTable {
  const Bodies* entries[kCpuIsaCount];
  DeviceSlot device;

  // The processor's.
  const Bodies& pick() const {
    const Isa isa = current_isa();
    int level = static_cast<int>(isa == Isa::simt ? best_isa() : isa);
    while (level > 0 && !entries[level]) --level;
    return *entries[level];
  }

  // Whether the call that `check` has seen runs the other device's bodies, which find on it what the processor's read.
  bool on_device(const Checker& check) const {
    return device.bodies && (check.device() != Device::cpu || current_isa() == Isa::simt);
  }

  // That of the device on which the tensors lie that `check` has seen.
  const Bodies& pick(const Checker& check) const {
    return on_device(check) ? *static_cast<const Bodies*>(device.bodies) : pick();
  }

  // The device's alone, of a table without others; null where the call is the processor's.
  const Bodies* pick_device(const Checker& check) const {
    const bool other = check.device() != Device::cpu || current_isa() == Isa::simt;
    return other ? static_cast<const Bodies*>(device.bodies) : nullptr;
  }
};

// GPTCORE_BODIES(Bodies, name): declares `const Bodies name`, which <op>_cpu.cpp defines once per ISA
// namespace, and the table `name##_table` over them. Bodies is a struct of function pointers. Use in
// <op>.cpp, at the scope of namespace gptcore. The _AMX form adds the one in <op>_amx.cpp. The build defines
// GPTCORE_WITH_<isa> for the sets it compiles: all of a machine's kind, or fewer (GPTCORE_ISAS).
#define GPTCORE_BODY(isa, Bodies, name) \
  namespace isa {                       \
  extern const Bodies name;             \
  }
#if defined(GPTCORE_WITH_v2)
#define GPTCORE_IF_v2(then, otherwise) then
#else
#define GPTCORE_IF_v2(then, otherwise) otherwise
#endif
#if defined(GPTCORE_WITH_v3)
#define GPTCORE_IF_v3(then, otherwise) then
#else
#define GPTCORE_IF_v3(then, otherwise) otherwise
#endif
#if defined(GPTCORE_WITH_v4)
#define GPTCORE_IF_v4(then, otherwise) then
#else
#define GPTCORE_IF_v4(then, otherwise) otherwise
#endif
#if defined(GPTCORE_WITH_v4_bf16)
#define GPTCORE_IF_v4_bf16(then, otherwise) then
#else
#define GPTCORE_IF_v4_bf16(then, otherwise) otherwise
#endif
#if defined(GPTCORE_WITH_amx)
#define GPTCORE_IF_amx(then, otherwise) then
#else
#define GPTCORE_IF_amx(then, otherwise) otherwise
#endif
#define GPTCORE_BODIES_OF(Bodies, name, amx_entry)                                                          \
  GPTCORE_IF_v2(GPTCORE_BODY(v2, Bodies, name), ) GPTCORE_IF_v3(GPTCORE_BODY(v3, Bodies, name), )           \
      GPTCORE_IF_v4(GPTCORE_BODY(v4, Bodies, name), )                                                       \
          GPTCORE_IF_v4_bf16(GPTCORE_BODY(v4_bf16, Bodies, name), ) static const IsaTable<Bodies>           \
              name##_table{{GPTCORE_IF_v2(&v2::name, nullptr), GPTCORE_IF_v3(&v3::name, nullptr),           \
                            GPTCORE_IF_v4(&v4::name, nullptr), GPTCORE_IF_v4_bf16(&v4_bf16::name, nullptr), \
                            amx_entry},                                                                     \
                           {#name}};
#define GPTCORE_BODIES(Bodies, name) GPTCORE_BODIES_OF(Bodies, name, nullptr)
#define GPTCORE_BODIES_AMX(Bodies, name)            \
  GPTCORE_IF_amx(GPTCORE_BODY(amx, Bodies, name), ) \
      GPTCORE_BODIES_OF(Bodies, name, GPTCORE_IF_amx(&amx::name, nullptr))
// A table with nothing for the processor: types that only the other device computes with.
#define GPTCORE_DEVICE_BODIES(Bodies, name) static const IsaTable<Bodies> name##_table{{}, {#name}};

}  // namespace gptcore
