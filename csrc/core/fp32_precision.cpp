#include "core/fp32_precision.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace gptcore {
namespace {

std::atomic<bool> tf32{false};

}  // namespace

const char* fp32_precision() { return tf32 ? "tf32" : "ieee"; }

void set_fp32_precision(const char* name) {
  const std::string wanted = name;
  if (wanted != "ieee" && wanted != "tf32") {
    throw std::invalid_argument("set_fp32_precision: got '" + wanted + "', expected 'ieee' or 'tf32'");
  }
  tf32 = wanted == "tf32";
}

bool tf32_products() { return tf32; }

}  // namespace gptcore
