#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// AddressSanitizer's, where the module is built with it.
extern "C" __attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* start, size_t bytes);

namespace simt {

Thread* current = nullptr;
Grid grid;
const char* last_kernel = "";

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int64_t kCanaryBytes = 1024;
constexpr unsigned char kCanary = 0xa5;

void* scheduler_stack = nullptr;
const std::function<void()>* kernel_body = nullptr;
std::string failure;
uint64_t progress = 0;
std::deque<std::function<void()>> pending;
std::vector<char*> stacks;

// --- switching between stacks --------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" void gptcore_simt_switch(void** from, void* to);
// Keeps what a called function must keep; the rest the compiler has saved around the call.
asm(R"(
.text
.globl gptcore_simt_switch
.hidden gptcore_simt_switch
.type gptcore_simt_switch, @function
gptcore_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gptcore_simt_switch, .-gptcore_simt_switch
)");

void enter();

void* fresh_stack(char* stack) {
  auto** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;                              // where enter() would return to
  *--top = reinterpret_cast<void*>(&enter);      // where the first switch goes
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // registers
  return top;
}
#else
struct Context {
  ucontext_t context;
};
std::vector<std::unique_ptr<Context>> contexts;
Context scheduler_context;

void gptcore_simt_switch(void** from, void* to) {
  auto* source = static_cast<Context*>(*from);
  swapcontext(&source->context, &static_cast<Context*>(to)->context);
}

void enter();

void* fresh_stack(char* stack) {
  contexts.push_back(std::make_unique<Context>());
  ucontext_t& c = contexts.back()->context;
  getcontext(&c);
  c.uc_stack.ss_sp = stack, c.uc_stack.ss_size = kStackBytes, c.uc_link = nullptr;
  makecontext(&c, enter, 0);
  scheduler_stack = &scheduler_context;
  return contexts.back().get();
}
#endif

void leave() { gptcore_simt_switch(&current->stack_pointer, scheduler_stack); }

void enter() {
  (*kernel_body)();
  if (!current->stores.empty() || !current->products.empty())
    failure = "a thread ends without having waited for its stores or products";
  current->finished = true;
  ++current->block->finished;
  ++progress;
  leave();
}

char* stack_of(size_t i) {
  while (stacks.size() <= i) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for stacks");
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[i];
}

// Threads of a launch that failed never return from what they were in, which leaves their stacks poisoned.
void clean_stacks() {
  for (char* stack : stacks) {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, kStackBytes);
  }
}

std::mt19937& random_order() {
  static std::mt19937 generator([] {
    const char* seed = std::getenv("GPTCORE_SIMT_SEED");
    return static_cast<unsigned>(seed ? std::atoi(seed) : 1);
  }());
  return generator;
}

void set_up(Block* block, dim3 threads, int64_t shared_bytes) {
  block->threads = static_cast<int>(threads.x * threads.y * threads.z);
  block->warps.resize(static_cast<size_t>(block->threads + 31) / 32);
  for (int i = 0; i < block->threads; ++i) block->warps[static_cast<size_t>(i) / 32].lanes |= 1u << (i % 32);
  block->room.assign(static_cast<size_t>(shared_bytes + kCanaryBytes + 1024),
                     0xff);  // NaN in every float type
  const auto at = reinterpret_cast<uintptr_t>(block->room.data());
  block->shared = reinterpret_cast<unsigned char*>((at + 1023) / 1024 * 1024);
  block->shared_bytes = shared_bytes;
  std::memset(block->shared + shared_bytes, kCanary, kCanaryBytes / 2);
}

void check_canary(const Block& block) {
  for (int64_t i = 0; i < kCanaryBytes / 2; ++i) {
    if (block.shared[block.shared_bytes + i] != kCanary) {
      failure = "a write past the block's " + std::to_string(block.shared_bytes) + " bytes of shared memory";
    }
  }
}

// One round of work that is done on its own time; whether there was any.
bool run_pending(size_t most) {
  const size_t count = std::min(most, pending.size());
  for (size_t i = 0; i < count; ++i) {
    std::function<void()> work = std::move(pending.front());
    pending.pop_front();
    work();
    ++progress;
  }
  return count > 0;
}

void run_cluster(std::vector<Thread>* threads) {
  std::vector<size_t> order(threads->size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  size_t left = order.size();
  for (int round = 0; left > 0 && failure.empty(); ++round) {
    std::shuffle(order.begin(), order.end(), random_order());
    const uint64_t before = progress;
    size_t still = 0;
    for (size_t i = 0; i < left && failure.empty(); ++i) {
      Thread& thread = (*threads)[order[i]];
      current = &thread;
      gptcore_simt_switch(&scheduler_stack, thread.stack_pointer);
      if (!thread.finished) order[still++] = order[i];
    }
    left = still;
    order.resize(left);
    if (failure.empty() && progress == before && !run_pending(1)) {
      failure = "a deadlock: " + std::to_string(left) + " of " + std::to_string(threads->size()) +
                " threads wait, the first in block " + std::to_string((*threads)[order[0]].block->index.x) +
                ", thread " + std::to_string((*threads)[order[0]].linear);
    }
  }
  run_pending(pending.size());
  current = nullptr;
}

}  // namespace

void yield() { leave(); }
void note_progress() { ++progress; }

void fail(const std::string& message) {
  failure = message;
  while (true) leave();
}

void barrier(int id, int count, bool arrive_only) {
  Block& block = *current->block;
  Barrier& b = block.barriers[id];
  const unsigned generation = b.generation;
  ++b.arrived;
  ++progress;
  const auto complete = [&] {
    if (b.generation != generation) return true;
    if (b.arrived < (count ? count : block.threads - block.finished)) return false;
    b.arrived = 0, ++b.generation;
    return true;
  };
  if (arrive_only) {
    complete();
  } else {
    wait_until(complete);
  }
}

void cluster_barrier() {
  Barrier& b = grid.cluster_barrier;
  int expected = 0;
  for (const Block& block : grid.cluster) expected += block.threads - block.finished;
  const unsigned generation = b.generation;
  ++b.arrived;
  wait_until([&] {
    if (b.generation != generation) return true;
    if (b.arrived < expected) return false;
    b.arrived = 0, ++b.generation;
    return true;
  });
}

const uint64_t* meet(unsigned mask, uint64_t mine) {
  Warp& warp = current->block->warps[static_cast<size_t>(current->linear) / 32];
  mask &= warp.lanes;
  const unsigned own = lane();
  if (!(mask >> own & 1)) fail("a thread meets others under a mask that leaves it out");
  size_t place = 0;
  while (place < warp.meetings.size() && warp.meetings[place].mask != mask) ++place;
  if (place == warp.meetings.size()) {
    if (warp.meetings.capacity() == 0) warp.meetings.reserve(64);  // references stay valid
    if (place == 64) fail("more than 64 masks in one warp");
    warp.meetings.emplace_back();
    warp.meetings.back().mask = mask;
  }
  Meeting& m = warp.meetings[place];
  const unsigned generation = m.generation;
  m.values[generation & 1][own] = mine;
  m.arrived |= 1u << own;
  ++progress;
  if (m.arrived == mask) {
    m.arrived = 0, ++m.generation;
  } else {
    wait_until([&] { return m.generation != generation; });
  }
  return m.values[generation & 1];
}

namespace {
void make(const Copy& c) {
  std::memset(c.to, 0, 16);
  if (c.bytes > 0) std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
}
}  // namespace

void copy(const Copy& c) {
  if (c.bytes < 0 || c.bytes > 16) fail("a copy of " + std::to_string(c.bytes) + " bytes");
  if (random_order()() & 1) {
    make(c);
  } else {
    current->open_copies.push_back(c);
  }
}

void commit_copies() {
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void wait_for_copies(size_t groups_left) {
  auto& groups = current->copy_groups;
  while (groups.size() > groups_left) {
    for (const Copy& c : groups.front()) make(c);
    groups.erase(groups.begin());
  }
}

void Groups::commit() {
  closed.push_back(std::move(open));
  open.clear();
}

void Groups::wait(size_t groups_left) {
  while (closed.size() > groups_left) {
    for (const auto& work : closed.front()) work();
    closed.erase(closed.begin());
  }
}

void later(std::function<void()> work) { pending.push_back(std::move(work)); }

void run(dim3 blocks, dim3 threads, int64_t shared_bytes, int cluster, bool ordered,
         const std::function<void()>& body) {
  if (threads.x * threads.y * threads.z > 1024)
    throw std::runtime_error("simt: a block of more than 1024 threads");
  if (blocks.x % static_cast<unsigned>(cluster) != 0)
    throw std::runtime_error("simt: a grid of broken clusters");
  grid.blocks = blocks, grid.threads = threads;
  kernel_body = &body;
  failure.clear();
  std::vector<uint64_t> order(uint64_t{blocks.x} / static_cast<unsigned>(cluster) * blocks.y * blocks.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (!ordered) std::shuffle(order.begin(), order.end(), random_order());
  const auto count = static_cast<size_t>(threads.x * threads.y * threads.z);
  std::vector<Thread> all(count * static_cast<size_t>(cluster));
  for (const uint64_t i : order) {
    const unsigned groups = blocks.x / static_cast<unsigned>(cluster);
    grid.cluster_barrier = Barrier{};
    grid.cluster.assign(static_cast<size_t>(cluster), Block{});
    for (size_t c = 0; c < grid.cluster.size(); ++c) {
      Block& block = grid.cluster[c];
      block.rank = static_cast<unsigned>(c);
      block.index = {static_cast<unsigned>(i % groups) * static_cast<unsigned>(cluster) + block.rank,
                     static_cast<unsigned>(i / groups % blocks.y),
                     static_cast<unsigned>(i / groups / blocks.y)};
      set_up(&block, threads, shared_bytes);
      for (size_t t = 0; t < count; ++t) {
        Thread& thread = all[c * count + t];
        thread.linear = static_cast<int>(t);
        thread.index = {static_cast<unsigned>(t) % threads.x,
                        static_cast<unsigned>(t) / threads.x % threads.y,
                        static_cast<unsigned>(t) / threads.x / threads.y};
        thread.block = &block, thread.finished = false;
        thread.open_copies.clear(), thread.copy_groups.clear();
        thread.stores = thread.products = Groups{}, thread.sums.clear();
        thread.stack_pointer = fresh_stack(stack_of(c * count + t));
      }
    }
    run_cluster(&all);
    for (const Block& block : grid.cluster) check_canary(block);
    if (!failure.empty()) {
      pending.clear();
      clean_stacks();
      throw std::runtime_error("simt: " + failure);
    }
  }
}

}  // namespace simt
