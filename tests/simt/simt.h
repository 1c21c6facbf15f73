// The processor as a GPU: one block (or cluster) at a time, each thread a fiber.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace simt {

// Threads of a warp under one mask: each leaves a value, all read all.
struct Meeting {
  unsigned mask = 0, arrived = 0, generation = 0;
  uint64_t values[2][32];
};

struct Warp {
  unsigned lanes = 0;  // that exist
  std::vector<Meeting> meetings;
};

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Block {
  uint3 index{};
  unsigned rank = 0;  // in its cluster
  int threads = 0, finished = 0;
  std::vector<Warp> warps;
  Barrier barriers[16];
  unsigned char* shared = nullptr;
  int64_t shared_bytes = 0;
  std::vector<unsigned char> room;
};

// 16 bytes on their way to shared memory, of which `bytes` come from the source.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
};

// What a thread has begun, in groups that it waits for, the oldest first: done by the waits, as late as they allow.
struct Groups {
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> closed;

  bool empty() const { return open.empty() && closed.empty(); }
  void commit();
  void wait(size_t groups_left);
};

struct Thread {
  uint3 index{};
  int linear = 0;
  Block* block = nullptr;
  void* stack_pointer = nullptr;
  bool finished = false;
  std::vector<Copy> open_copies;               // not yet committed
  std::vector<std::vector<Copy>> copy_groups;  // committed, the oldest first
  Groups stores, products;                     // Hopper's bulk stores, and products of a warpgroup
  bool products_fenced = false;                // since the last wait for them
  std::vector<const void*> sums;               // that products begun will write, once for each

  // Whether this is the first of those under way into these sums.
  bool begin_product(const void* into) {
    sums.push_back(into);
    return std::count(sums.begin(), sums.end(), into) == 1;
  }
  void end_product(const void* into) { sums.erase(std::find(sums.begin(), sums.end(), into)); }
};

struct Grid {
  dim3 blocks, threads;
  std::vector<Block> cluster;  // the blocks at work
  Barrier cluster_barrier;
};

extern Thread* current;
extern Grid grid;
extern const char* last_kernel;  // launched, in the compiler's words: tests ask which one served a call

// Runs `body` as every thread of every block; blocks in a shuffled order unless `ordered`.
void run(dim3 blocks, dim3 threads, int64_t shared_bytes, int cluster, bool ordered,
         const std::function<void()>& body);

// Ends the launch with an error: launch() throws it.
[[noreturn]] void fail(const std::string& message);

// Lets the others go on.
void yield();
// Counts what lets somebody go on; a round of turns without any is a deadlock.
void note_progress();

template <class Ready>
void wait_until(const Ready& ready) {
  while (!ready()) yield();
  note_progress();
}

// A barrier of `count` threads; 0: all that have not ended. Waits unless `arrive_only`.
void barrier(int id, int count, bool arrive_only = false);
void cluster_barrier();

// Leaves `mine` and returns what each lane of `mask` left, at its lane's place. Valid until the next meeting.
const uint64_t* meet(unsigned mask, uint64_t mine);

// What all lanes of a warp do together: `work` is called once with what each of them brought (a struct that lives until
// then, with a member `bool done`), before any of them goes on.
template <class Request, class Work>
void together(Request& mine, const Work& work) {
  const uint64_t* all = meet(0xffffffffu, reinterpret_cast<uint64_t>(&mine));
  if (mine.done) return;
  if (current->block->warps[static_cast<size_t>(current->linear) / 32].lanes != 0xffffffffu)
    fail("a warp of fewer than 32 threads at an instruction of a whole warp");
  Request* lanes[32];
  for (int i = 0; i < 32; ++i) lanes[i] = reinterpret_cast<Request*>(all[i]);
  work(lanes);
  for (Request* lane : lanes) lane->done = true;
}

// Asynchronous copies of this thread: each is made at once or when its group is waited for, as chance has it.
void copy(const Copy& c);
void commit_copies();
void wait_for_copies(size_t groups_left);

// Work that the hardware does on its own time, done at the latest when `flush_async` finds nobody else able to go on,
// at the earliest a few turns later.
void later(std::function<void()> work);

inline unsigned lane() { return static_cast<unsigned>(current->linear) % 32; }

}  // namespace simt
