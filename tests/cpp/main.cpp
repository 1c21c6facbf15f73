// Runs every case on 4 threads and on 1 and compares the bits, on each instruction set of the build; then all of
// them from two threads at once, as Python threads do with the GIL released. Built with ThreadSanitizer on
// core/parallel.h's std::thread backend (GPTCORE_SANITIZE=thread), since that sanitizer does not see into libgomp.
//
//   kernel_threads         exit status 0 if every case agrees; ThreadSanitizer's is 66
//   kernel_threads race    two tasks write one place, which must be reported
#include <cstdio>
#include <cstring>
#include <exception>
#include <thread>

#include "cases.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace {

using gptcore::cases::all;
using gptcore::cases::Case;
using gptcore::cases::Outputs;

bool same_bits(const Outputs& a, const Outputs& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].bytes() != b[i].bytes()) return false;
  }
  return true;
}

// One case on 1 and on 4 threads; true if the bits agree and the work was really divided.
bool check(const Case& test, Outputs* expected) {
  gptcore::set_num_threads(1);
  *expected = test.run();
  gptcore::set_num_threads(4);
  const int64_t before = gptcore::threads_started();
  const bool same = same_bits(test.run(), *expected);
  const bool divided = gptcore::threads_started() - before >= 3;
  if (!same) std::printf("  %s: other bits on 4 threads\n", test.name.c_str());
  if (!divided) std::printf("  %s: fewer than 4 tasks; make its sizes larger\n", test.name.c_str());
  return same && divided;
}

int run_all(const char* isa) {
  gptcore::set_isa(isa);
  int failures = 0;
  std::vector<Outputs> expected(all().size());
  for (size_t i = 0; i < all().size(); ++i) failures += !check(all()[i], &expected[i]);
  gptcore::set_num_threads(2);
  const auto caller = [&](size_t first, int* wrong) {
    for (size_t n = 0; n < all().size(); ++n) {
      const size_t i = (n + first) % all().size();
      *wrong += !same_bits(all()[i].run(), expected[i]);
    }
  };
  int wrong[2] = {0, 0};
  std::thread other(caller, size_t{1}, &wrong[1]);
  caller(0, &wrong[0]);
  other.join();
  if (wrong[0] + wrong[1])
    std::printf("  %d cases gave other bits beside a second caller\n", wrong[0] + wrong[1]);
  std::printf("%s: %zu cases, %d failures\n", isa, all().size(), failures + wrong[0] + wrong[1]);
  return failures + wrong[0] + wrong[1];
}

void race() {
  int64_t place = 0;
  gptcore::set_num_threads(4);
  gptcore::parallel_for(4, [&](int64_t task, int) { place += task; });
  std::printf("%d\n", static_cast<int>(place));
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count == 2 && std::strcmp(arguments[1], "race") == 0) {
      race();
      return 0;
    }
    int failures = 0;
    for (int i = 0; i < gptcore::kIsaCount; ++i) {
      const auto isa = static_cast<gptcore::Isa>(i);
      if (gptcore::has_isa(isa)) failures += run_all(gptcore::name_of(isa));
    }
    return failures ? 1 : 0;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
