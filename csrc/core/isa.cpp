#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gptcore {
namespace {

constexpr const char* kNames[kIsaCount] = {"v2", "v3", "v4", "v4_bf16", "amx", "simt"};
constexpr bool kBuilt[kCpuIsaCount] = {GPTCORE_IF_v2(true, false), GPTCORE_IF_v3(true, false),
                                       GPTCORE_IF_v4(true, false), GPTCORE_IF_v4_bf16(true, false),
                                       GPTCORE_IF_amx(true, false)};

#if defined(__x86_64__)
// AMX state is 8 KB a thread, so Linux hands it out on request only (since 5.16).
bool request_amx_permission() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

bool has_amx_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d & (1u << 24), bf16 = d & (1u << 22);
  return tile && bf16 && request_amx_permission();
}

Isa detect() {
  // __builtin_cpu_supports checks XGETBV too: a set whose registers the system does not save is not offered.
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::v2;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl")) {
    return Isa::v3;
  }
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return Isa::v4;
  return has_amx_bf16() ? Isa::amx : Isa::v4_bf16;
}
#else
Isa detect() { return Isa::v2; }
#endif

Isa offered() {
  static const Isa isa = detect();
  return isa;
}

Isa parse(const char* name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) != 0) continue;
    if (i == static_cast<int>(Isa::simt)) {
      if (has_bodies(Device::cpu)) return Isa::simt;
      throw ValueError("GPTCORE_ISA: got 'simt', whose module is not loaded; tests/simt builds it");
    }
    if (!kBuilt[i])
      throw ValueError(std::string("GPTCORE_ISA: got '") + name + "', which this build leaves out");
    if (!has_isa(static_cast<Isa>(i))) {
      throw ValueError(std::string("GPTCORE_ISA: got '") + name +
                       "', which this machine lacks; the best here is '" + name_of(best_isa()) + "'");
    }
    return static_cast<Isa>(i);
  }
  throw ValueError(std::string("GPTCORE_ISA: got '") + name + "', expected one of v2, v3, v4, v4_bf16, amx");
}

std::atomic<int> current{-1};

}  // namespace

const char* name_of(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool has_isa(Isa isa) {
  return isa == Isa::simt ? has_bodies(Device::cpu) : kBuilt[static_cast<int>(isa)] && isa <= offered();
}

Isa best_isa() {
  for (int i = static_cast<int>(offered()); i >= 0; --i) {
    if (kBuilt[i]) return static_cast<Isa>(i);
  }
  throw ValueError(std::string("this build has no kernels for '") + name_of(offered()) +
                   "', the best set here");
}

Isa current_isa() {
  int level = current.load(std::memory_order_relaxed);
  if (level < 0) {
    const char* wanted = std::getenv("GPTCORE_ISA");
    level = static_cast<int>(wanted && *wanted ? parse(wanted) : best_isa());
    current.store(level, std::memory_order_relaxed);
  }
  return static_cast<Isa>(level);
}

void set_isa(const char* name) { current.store(static_cast<int>(parse(name)), std::memory_order_relaxed); }

}  // namespace gptcore
