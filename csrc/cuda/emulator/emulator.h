// The CUDA blocks of a cluster on one CPU thread: every CUDA thread is a fiber, so that the kernels' own source is
// tested without a GPU.
//
// What is emulated is what can go wrong between threads: a block barrier, a warp operation or a wait suspends the fiber
// until the others have come; shared memory starts as NaN; an asynchronous copy lands only where its thread waits for
// it, and its destination is NaN until then, so that a missing wait is seen. With an even seed
// (RETRO_KERNELS_EMULATOR_SEED) the order of the warps is drawn anew at every turn and warps are held back at random;
// with an odd one the warps of a block have ranks, and one goes on only when none before it can, so that the last is as
// late as can be. So a missing barrier is seen: the results for all seeds must be bitwise the same.
//
// Ordinary stores to shared memory are another proxy's than what wgmma and the copy engine read and write. Every byte
// that a thread has written is the thread's until its fence.proxy.async, and a Fault where the other proxy comes to it
// before. RETRO_KERNELS_EMULATOR_SKIP ("rows.cuh:53") leaves out the fences of one line, so that a test can tell whether
// each is missed. What is not emulated: time, caches, bank conflicts, the order of a tensor core's additions, and misuse
// of PTX that the wrappers of ptx.cuh do not express.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace retro_kernels {
namespace emulator {

constexpr int kLanes = 32, kNamedBarriers = 16;
constexpr size_t kStack = 256 << 10, kGuard = 4096;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An asynchronous copy that has not landed yet: `valid` bytes of the source, the rest of `bytes` zero.
struct Copy {
  char* to;
  const char* from;
  int bytes, valid;
};

// A product of wgmma that has been issued; done where its thread waits for it. See hopper.h.
struct Product {
  float* sum;
  std::function<void()> multiply;
};

// What the copy engine was asked for by `thread`; done between turns, or where that thread waits for it.
struct Request {
  int thread;
  std::function<void()> move;
};

struct Fiber {
  int thread = 0;  // index in its block
  bool started = false, done = false, waited = false;
  ucontext_t entry;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;                // not committed
  std::vector<Product> products;
  bool products_fenced = false;                            // since the registers of its sums were touched
  std::vector<std::pair<uint32_t, uint32_t>> written;      // (address, bytes) in shared memory, since its last fence
  std::vector<uint32_t> barriers;                          // made since its last fence of barriers
};

struct Warp {
  const char* operation = nullptr;
  void* lanes[kLanes];
  int arrived = 0;
  uint64_t generation = 0;
};

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

class Block;

// Blocks that run together and reach each other's shared memory.
struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
};

class Block {
 public:
  Block(unsigned index, int threads, size_t shared_bytes, std::function<void()> kernel, uint64_t seed, Cluster* cluster,
        bool overlaps)
      : index(index), threads(threads), shared_bytes(shared_bytes), cluster(cluster), kernel_(std::move(kernel)),
        random_(seed + index), seeded_(seed != 0), ranked_(seed % 2 == 1), shuffled_(seeded_ && !ranked_),
        shared_(shared_bytes + 2 * kGuard + 1024), writer_(shared_bytes), warps_((threads + kLanes - 1) / kLanes), order_(warps_.size()),
        held_until_(warps_.size()), overlaps_(overlaps) {
    if (threads % kLanes) throw Fault("a block must be whole warps");
    std::memset(shared_.data(), 0xff, shared_.size());
    // the guards tell of a write beside shared memory, and the base is aligned as the kernels ask for
    base_ = shared_.data() + kGuard;
    base_ += (1024 - reinterpret_cast<uintptr_t>(base_) % 1024) % 1024;
    std::memset(base_ - kGuard, 0xa5, kGuard);
    std::memset(base_ + shared_bytes, 0xa5, kGuard);
  }

  void begin() {
    fibers_.resize(threads);
    for (int i = 0; i < threads; ++i) fibers_[i] = take_fiber(i);
    for (size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<int>(i);
    if (ranked_) std::shuffle(order_.begin(), order_.end(), random_);
  }

  bool ended() const { return unfinished_ == 0; }
  int unfinished() const { return unfinished_; }

  // Lets every warp go on for as far as it can, or some of them. -> true where nothing went on and nothing was held back
  bool turn() {
    const uint64_t before = progress_;
    bool held = false;
    if (shuffled_) std::shuffle(order_.begin(), order_.end(), random_);
    for (int warp : order_) {
      if (shuffled_ && (turns_ < held_until_[warp] || random_() % 4 == 0)) {
        held = true;
        continue;
      }
      if (shuffled_ && random_() % 128 == 0) held_until_[warp] = turns_ + random_() % 128;  // for long, now and then
      for (int lane = 0; lane < kLanes; ++lane) step(*fibers_[warp * kLanes + lane]);
      if (ranked_ && progress_ != before) break;  // the others wait for as long as this one can go on
    }
    // as late as can be; with a seed, at any time
    if (!engine.empty() && (progress_ == before || (seeded_ && random_() % 16 == 0))) {
      const Request request = std::move(engine.front());
      engine.pop_front();
      request.move();
      ++progress_;
    }
    ++turns_;
    return progress_ == before && !held;
  }

  void end() {
    for (; !engine.empty(); engine.pop_front()) engine.front().move();
    for (char* edge : {base_ - kGuard, base_ + shared_bytes})
      for (size_t i = 0; i < kGuard; ++i)
        if (edge[i] != static_cast<char>(0xa5))
          throw Fault("block " + std::to_string(index) + " wrote beside its shared memory");
    for (auto& fiber : fibers_) pool().push_back(std::move(fiber));
  }

  // Suspends the running fiber until `ready()`.
  template <class Ready>
  void wait(Ready ready) {
    while (!ready()) {
      Fiber& fiber = *running_;
      if (_setjmp(fiber.resume) == 0) _longjmp(scheduler_, 1);
    }
  }

  // A warp operation: each lane brings `mine`; the last one to come calls combine(lanes) for all.
  template <class Combine>
  void collective(const char* operation, void* mine, Combine combine) {
    Warp& warp = warps_[running_->thread / kLanes];
    if (warp.arrived > 0 && warp.operation != operation && std::strcmp(warp.operation, operation) != 0)
      throw Fault(std::string("lanes of a warp meet in ") + warp.operation + " and in " + operation);
    warp.operation = operation;
    warp.lanes[running_->thread % kLanes] = mine;
    ++progress_;
    const uint64_t generation = warp.generation;
    if (++warp.arrived == kLanes) {
      combine(warp.lanes);
      warp.arrived = 0;
      ++warp.generation;
    } else {
      wait([&] { return warp.generation != generation; });
    }
  }

  // bar.sync: `count` threads meet at barrier `id`.
  void barrier(int id, int count) { meet(barriers_[id], count); }

  void meet(Barrier& barrier, int count) {
    ++progress_;
    const uint64_t generation = barrier.generation;
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.generation;
    } else {
      wait([&] { return barrier.generation != generation; });
    }
  }

  char* shared(uint32_t address, size_t bytes, size_t alignment) {
    if (address + bytes > shared_bytes)
      throw Fault("shared memory of " + std::to_string(shared_bytes) + " bytes accessed at " + std::to_string(address));
    if (address % alignment) throw Fault("shared memory accessed at " + std::to_string(address) + ", not aligned");
    return base_ + address;
  }

  // Ordinary stores of the running thread, its fence, and what the other proxy asks of bytes.
  void written(uint32_t address, uint32_t bytes) {
    shared(address, bytes, 1);
    std::fill_n(writer_.begin() + address, bytes, static_cast<uint16_t>(running_->thread + 1));
    running_->written.push_back({address, bytes});
  }
  void fence() {
    const auto mine = static_cast<uint16_t>(running_->thread + 1);
    for (const auto& [address, bytes] : running_->written)
      for (uint32_t i = address; i < address + bytes; ++i)
        if (writer_[i] == mine) writer_[i] = 0;
    running_->written.clear();
  }
  char* other_proxy(uint32_t address, size_t bytes, size_t alignment) {
    char* at = shared(address, bytes, alignment);
    for (size_t i = address; i < address + bytes; ++i)
      if (writer_[i])
        throw Fault("byte " + std::to_string(i) + " of shared memory, which thread " + std::to_string(writer_[i] - 1) +
                    " wrote, is used by wgmma or the copy engine without a fence.proxy.async after it");
    return at;
  }

  Fiber& running() { return *running_; }
  void made_progress() { ++progress_; }

  std::deque<Request> engine;
  const unsigned index;
  const int threads;
  const size_t shared_bytes;
  Cluster* const cluster;

 private:
  static std::vector<std::unique_ptr<Fiber>>& pool() {
    static thread_local std::vector<std::unique_ptr<Fiber>> fibers;
    return fibers;
  }

  std::unique_ptr<Fiber> take_fiber(int thread) {
    std::unique_ptr<Fiber> fiber;
    if (pool().empty()) {
      fiber = std::make_unique<Fiber>();
      fiber->stack.reset(new char[kStack]);
    } else {
      fiber = std::move(pool().back());
      pool().pop_back();
    }
    fiber->thread = thread;
    fiber->started = fiber->done = fiber->waited = false;
    fiber->groups.clear();
    fiber->open.clear();
    fiber->products.clear();
    fiber->written.clear();
    fiber->barriers.clear();
    fiber->products_fenced = false;
    return fiber;
  }

  void step(Fiber& fiber) {
    if (fiber.done) return;
    running_ = &fiber;
    if (_setjmp(scheduler_) == 0) {
      if (fiber.started) _longjmp(fiber.resume, 1);
      fiber.started = true;
      getcontext(&fiber.entry);
      fiber.entry.uc_stack.ss_sp = fiber.stack.get();
      fiber.entry.uc_stack.ss_size = kStack;
      fiber.entry.uc_link = nullptr;
      const auto self = reinterpret_cast<uintptr_t>(this);
      makecontext(&fiber.entry, reinterpret_cast<void (*)()>(&Block::enter), 2, static_cast<unsigned>(self),
                  static_cast<unsigned>(self >> 32));
      setcontext(&fiber.entry);
    }
    if (error_) std::rethrow_exception(error_);
  }

  static void enter(unsigned low, unsigned high) {
    Block& block = *reinterpret_cast<Block*>(static_cast<uintptr_t>(low) | static_cast<uintptr_t>(high) << 32);
    try {
      block.kernel_();
    } catch (...) {
      block.error_ = std::current_exception();
    }
    if (!block.error_ && (!block.running_->open.empty() || !block.running_->groups.empty()))
      block.error_ = std::make_exception_ptr(Fault("a thread ended with asynchronous copies under way"));
    if (!block.error_ && block.overlaps_ && !block.running_->waited)
      block.error_ = std::make_exception_ptr(Fault("a thread that may start early has not waited for the kernel before"));
    block.running_->done = true;
    --block.unfinished_;
    ++block.progress_;
    _longjmp(block.scheduler_, 1);
  }

  std::function<void()> kernel_;
  std::mt19937_64 random_;
  bool seeded_, ranked_, shuffled_;
  std::vector<char> shared_;
  std::vector<uint16_t> writer_;  // thread + 1 of each byte written by an ordinary store and not fenced since
  char* base_ = nullptr;
  std::vector<Warp> warps_;
  std::vector<int> order_;
  std::vector<uint64_t> held_until_;
  uint64_t turns_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Barrier barriers_[kNamedBarriers];
  jmp_buf scheduler_;
  Fiber* running_ = nullptr;
  int unfinished_ = threads;
  uint64_t progress_ = 0;
  std::exception_ptr error_;
  const bool overlaps_;
};

inline Block*& current() {
  static thread_local Block* block = nullptr;
  return block;
}

inline uint64_t seed() {
  const char* given = std::getenv("RETRO_KERNELS_EMULATOR_SEED");
  return given ? std::strtoull(given, nullptr, 10) : 0;
}

// In the block, `act` is what another block's thread does.
template <class Act>
void as(Block* block, Act act) {
  Block* outer = std::exchange(current(), block);
  try {
    act();
  } catch (...) {
    current() = outer;
    throw;
  }
  current() = outer;
}

// Whether RETRO_KERNELS_EMULATOR_SKIP names this line.
inline bool skipped(const char* file, int line) {
  const char* given = std::getenv("RETRO_KERNELS_EMULATOR_SKIP");
  if (!given) return false;
  const char* name = std::strrchr(file, '/');
  return (name ? name + 1 : file) + (":" + std::to_string(line)) == given;
}

// The virtual architecture that the kernels count as compiled for.
inline int compiled_for() {
  const char* given = std::getenv("RETRO_KERNELS_EMULATOR_COMPILED_FOR");
  return given ? std::atoi(given) : 90;
}

// Programmatic dependent launch: what code before sm_90 does not do.
inline void wait_for_predecessor() { current()->running().waited = compiled_for() >= 90; }

// Runs `blocks` blocks, `cluster` of them at a time; `overlaps`: every thread must wait for the kernel before this one.
inline void launch(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel,
                   int cluster = 1, bool overlaps = false) {
  if (blocks % cluster) throw Fault("the blocks of a launch must be whole clusters");
  for (int64_t first = 0; first < blocks; first += cluster) {
    Cluster together;
    std::vector<std::unique_ptr<Block>> owned;
    for (int i = 0; i < cluster; ++i) {
      owned.push_back(std::make_unique<Block>(static_cast<unsigned>(first + i), threads, shared_bytes, kernel, seed(),
                                              &together, overlaps));
      together.blocks.push_back(owned.back().get());
      owned.back()->begin();
    }
    for (int idle_turns = 0; idle_turns < 2;) {
      bool idle = true, ended = true;
      for (Block* block : together.blocks) {
        if (block->ended()) continue;
        ended = false;
        as(block, [&] { idle = block->turn() && idle; });
      }
      if (ended) break;
      idle_turns = idle ? idle_turns + 1 : 0;
      if (idle_turns == 2) {
        int left = 0;
        for (const Block* block : together.blocks) left += block->unfinished();
        throw Fault("deadlock in block " + std::to_string(first) + ": " + std::to_string(left) +
                    " threads wait and none can go on");
      }
    }
    for (Block* block : together.blocks) as(block, [&] { block->end(); });
  }
}

// cp.async: the destination holds NaN until the thread waits for the copy.
inline void start_copy(uint32_t to, const void* from, int bytes, int valid) {
  Block& block = *current();
  if (valid && reinterpret_cast<uintptr_t>(from) % bytes) throw Fault("cp.async from an address that is not aligned");
  char* target = block.shared(to, bytes, bytes);
  std::memset(target, 0xff, bytes);
  block.running().open.push_back({target, static_cast<const char*>(from), bytes, valid});
}

inline void commit_copies() {
  Fiber& fiber = current()->running();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

// Lands all but the `pending` youngest groups.
inline void land_copies(int pending) {
  Fiber& fiber = current()->running();
  while (static_cast<int>(fiber.groups.size()) > pending) {
    for (const Copy& copy : fiber.groups.front()) {
      std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
    }
    fiber.groups.pop_front();
  }
}

}  // namespace emulator
}  // namespace retro_kernels
