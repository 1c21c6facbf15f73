// Which instruction sets this machine offers, found once; kernels are compiled for each and picked at run
// time.
//
//   v2       x86-64-v2 (SSE4.2), or the plain build elsewhere
//   v3       AVX2 + FMA
//   v4       AVX-512 F, BW, CD, DQ, VL
//   v4_bf16  and AVX512-BF16, AVX512-VNNI
//   amx      and AMX tiles with bf16, granted by the operating system
#pragma once

#include <cstdint>

namespace gptcore {

enum class Isa : int32_t { v2 = 0, v3 = 1, v4 = 2, v4_bf16 = 3, amx = 4 };
constexpr int kIsaCount = 5;

const char* name_of(Isa isa);

// The best set that processor and operating system offer.
Isa best_isa();

// The set in use: best_isa(), or what GPTCORE_ISA names (ValueError if unknown or not available here).
Isa current_isa();

// Switches the set in use, for tests and comparisons; ValueError if not available here.
void set_isa(const char* name);

// A kernel's variants by ISA. Missing entries (null) fall to the next lower one; every op has a v2 body.
template <class Bodies>
struct IsaTable {
  const Bodies* entries[kIsaCount];

  const Bodies& pick() const {
    int level = static_cast<int>(current_isa());
    while (level > 0 && !entries[level]) --level;
    return *entries[level];
  }
};

// GPTCORE_BODIES(Bodies, name): declares `const Bodies name`, which <op>_cpu.cpp defines once per ISA
// namespace, and the table `name##_table` over them. Bodies is a struct of function pointers. Use in
// <op>.cpp, at the scope of namespace gptcore. The _AMX form adds the one in <op>_amx.cpp.
#define GPTCORE_BODY(isa, Bodies, name) \
  namespace isa {                       \
  extern const Bodies name;             \
  }
#if defined(GPTCORE_X86)
#define GPTCORE_BODIES(Bodies, name)  \
  GPTCORE_BODY(v2, Bodies, name)      \
  GPTCORE_BODY(v3, Bodies, name)      \
  GPTCORE_BODY(v4, Bodies, name)      \
  GPTCORE_BODY(v4_bf16, Bodies, name) \
  static const IsaTable<Bodies> name##_table{{&v2::name, &v3::name, &v4::name, &v4_bf16::name, nullptr}};
#define GPTCORE_BODIES_AMX(Bodies, name) \
  GPTCORE_BODY(v2, Bodies, name)         \
  GPTCORE_BODY(v3, Bodies, name)         \
  GPTCORE_BODY(v4, Bodies, name)         \
  GPTCORE_BODY(v4_bf16, Bodies, name)    \
  GPTCORE_BODY(amx, Bodies, name)        \
  static const IsaTable<Bodies> name##_table{{&v2::name, &v3::name, &v4::name, &v4_bf16::name, &amx::name}};
#else
#define GPTCORE_BODIES(Bodies, name) \
  GPTCORE_BODY(v2, Bodies, name)     \
  static const IsaTable<Bodies> name##_table{{&v2::name, nullptr, nullptr, nullptr, nullptr}};
#define GPTCORE_BODIES_AMX GPTCORE_BODIES
#endif

}  // namespace gptcore
