#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "device.h"

namespace mtkd_fast::emulator {

Thread* current = nullptr;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kMaxThreads = 1024;
constexpr size_t kGuardBytes = 64;  // behind shared memory
constexpr unsigned char kGuard = 0xa5;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---------------------------------------------------------------------------------------------------------- global
// memory

struct Buffer {
  const char* begin;
  int64_t bytes;
  bool writable;
  int64_t loaded, stored;
};
std::vector<Buffer> buffers;

constexpr uintptr_t kSector = 32;
using WarpAccess = std::tuple<const Buffer*, int64_t, int, int, int>;  // block, warp, line, which of the line's
std::map<WarpAccess, std::set<uintptr_t>> sectors;
bool counts_sectors = false;

// -----------------------------------------------------------------------------------------------------------------
// fibers

enum class Waits { nothing, at_warp, at_barrier, at_cluster, at_mailbox, ended };

struct PendingCopy {
  void* to;
  int size;
  char bytes[sizeof(Words)];
};
using CopyGroup = std::vector<PendingCopy>;

struct Fiber : Thread {
  Waits waits;
  int line;           // where it waits
  unsigned warp_ops;  // how many warp operations it has begun
  ucontext_t start;
  jmp_buf at;
  bool started;
  int arrivals;           // at the barrier of the cluster
  int met;                // how often it has waited for it
  const struct Box* box;  // that it waits at
  int parity;
  std::map<int, int> accesses;  // of each line of the source
  CopyGroup uncommitted;
  std::deque<CopyGroup> in_flight;
  std::unique_ptr<char, decltype(&free)> stack{nullptr, free};
};

struct Slots {
  uint32_t value[2][kWarp];  // in turns: a lane may be one operation ahead of another
};

// A phase ends when something is expected and all of it has come.
struct Box {
  int phases = 0;
  bool expects = false;
  int64_t missing = 0;  // bytes; below 0 where they come before they are expected

  bool has_ended(int parity) const { return phases % 2 != parity; }
};

struct Parcel {
  std::vector<char> bytes;
  char* to;
  Box* box;
  int block;  // of the cluster, that it goes to
};

struct Cluster {
  std::vector<Fiber*> threads;  // block after block
  std::vector<Slots> warps;
  std::map<const char*, Box> boxes;
  std::vector<Parcel> sent;  // and not yet there
  int block_threads;
};

std::vector<std::unique_ptr<Fiber>> pool;
Cluster cluster;
jmp_buf scheduler;
void (*running_body)(const void*, const void*);
const void* running_kernel;
const void* running_args;
std::string fault;
int order_kind = 0;  // 0 forward, 1 reverse, 2 shuffled; 3 a warp alone up to its next barrier, 4 the last warp first
std::mt19937 order_random;

Fiber& self() { return *static_cast<Fiber*>(current); }

void fiber_main() {
  try {
    running_body(running_kernel, running_args);
  } catch (const std::exception& e) {
    if (fault.empty()) {
      fault = std::string(e.what()) + " (block " + std::to_string(current->block_index) + ", thread " +
              std::to_string(current->index) + ")";
    }
  }
  self().waits = Waits::ended;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  current = &fiber;
  fiber.waits = Waits::nothing;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    setcontext(&fiber.start);
  }
}

void wait(Waits what, int line) {
  Fiber& fiber = self();
  fiber.waits = what;
  fiber.line = line;
  if (_setjmp(fiber.at) == 0) _longjmp(scheduler, 1);
}

// --------------------------------------------------------------------------------------------------------------
// scheduling

std::string describe(const Fiber& fiber) {
  const std::string who = "thread " + std::to_string(fiber.index) + " of block " + std::to_string(fiber.block_index);
  if (fiber.waits == Waits::ended) return who + " has ended";
  const char* const what = fiber.waits == Waits::at_warp      ? "shuffle"
                           : fiber.waits == Waits::at_barrier ? "barrier"
                           : fiber.waits == Waits::at_cluster ? "barrier of the cluster"
                                                              : "mailbox";
  return who + " waits at the " + what + " of line " + std::to_string(fiber.line);
}

// Two threads wait alike, or it is a fault.
void check_alike(const Fiber& one, const Fiber& other) {
  if (other.waits != one.waits || (one.waits != Waits::ended && other.line != one.line)) {
    throw Fault("divergent threads: " + describe(one) + ", " + describe(other));
  }
}

// Adds the threads of those groups of `size` in [from, to) of which some, and then all, wait at `what`.
void release(Waits what, int size, int from, int to, std::vector<Fiber*>& ready) {
  const auto begin = cluster.threads.begin();
  for (int first = from; first < to; first += size) {
    const auto waits = [&](const Fiber* fiber) { return fiber->waits == what; };
    if (std::none_of(begin + first, begin + first + size, waits)) continue;
    for (int i = first + 1; i < first + size; ++i) check_alike(*cluster.threads[first], *cluster.threads[i]);
    ready.insert(ready.end(), begin + first, begin + first + size);
  }
}

void end_phase_if_complete(Box& box) {
  if (!box.expects || box.missing != 0) return;
  ++box.phases;
  box.expects = false;
}

void deliver() {
  for (const Parcel& parcel : cluster.sent) {
    for (int i = 0; i < cluster.block_threads; ++i) {
      const Fiber& there = *cluster.threads[parcel.block * cluster.block_threads + i];
      if (there.waits == Waits::ended) throw Fault("something is sent to threads that have ended");
    }
    memcpy(parcel.to, parcel.bytes.data(), parcel.bytes.size());
    parcel.box->missing -= static_cast<int64_t>(parcel.bytes.size());
    end_phase_if_complete(*parcel.box);
  }
  cluster.sent.clear();
}

void release_from_mailboxes(std::vector<Fiber*>& ready) {
  for (Fiber* fiber : cluster.threads) {
    if (fiber->waits == Waits::at_mailbox && fiber->box->has_ended(fiber->parity)) ready.push_back(fiber);
  }
}

void release_from_cluster(std::vector<Fiber*>& ready) {
  int arrivals = cluster.threads[0]->arrivals;
  for (const Fiber* fiber : cluster.threads) arrivals = std::min(arrivals, fiber->arrivals);
  for (Fiber* fiber : cluster.threads) {
    if (fiber->waits == Waits::at_cluster && fiber->met <= arrivals) ready.push_back(fiber);
  }
}

// Every thread waits or has ended: lets those go on whose partners have all come. False when all have ended.
bool release(std::vector<Fiber*>& ready) {
  const int all = static_cast<int>(cluster.threads.size());
  release_from_mailboxes(ready);
  if (ready.empty()) release(Waits::at_warp, kWarp, 0, all, ready);
  if (ready.empty()) release(Waits::at_barrier, cluster.block_threads, 0, all, ready);
  if (ready.empty()) release_from_cluster(ready);
  if (ready.empty()) {
    deliver();
    release_from_mailboxes(ready);
  }
  for (const Fiber* fiber : cluster.threads) {
    if (ready.empty() && fiber->waits != Waits::ended) throw Fault("nothing ends this: " + describe(*fiber));
  }
  return !ready.empty();
}

void put_in_order(std::vector<Fiber*>& ready) {
  if (order_kind == 1) std::reverse(ready.begin(), ready.end());
  if (order_kind == 2) std::shuffle(ready.begin(), ready.end(), order_random);
}

void check_guard(const char* shared, int bytes) {
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (static_cast<unsigned char>(shared[bytes + i]) != kGuard) throw Fault("a write past the end of shared memory");
  }
}

// A warp, up to a barrier or its end.
void run_warp(Fiber* const* warp) {
  do {
    for (Fiber* const* fiber = warp; fiber != warp + kWarp; ++fiber) {
      resume(**fiber);
      if (!fault.empty()) return;
    }
    for (int i = 1; i < kWarp; ++i) check_alike(*warp[0], *warp[i]);
  } while (warp[0]->waits == Waits::at_warp);
}

// Its threads from `first` on, up to where they wait for other blocks.
void run_block_by_warps(int first) {
  const int n = cluster.block_threads;
  std::vector<Fiber*> ready;
  do {
    for (int i = 0; i < n; i += kWarp) {
      run_warp(cluster.threads.data() + first + (order_kind == 3 ? i : n - kWarp - i));
      if (!fault.empty()) return;
    }
    ready.clear();
    release(Waits::at_barrier, n, first, first + n, ready);
  } while (!ready.empty());
}

// Of the blocks those that can go on.
void run_block_by_block(const std::vector<Fiber*>& ready) {
  const int all = static_cast<int>(cluster.threads.size()), n = cluster.block_threads;
  for (int i = 0; i < all && fault.empty(); i += n) {
    const int first = order_kind == 3 ? i : all - n - i;
    const Fiber* const* const block = cluster.threads.data() + first;
    const auto goes_on = [&](const Fiber* x) { return std::find(ready.begin(), ready.end(), x) != ready.end(); };
    if (std::none_of(block, block + n, goes_on)) continue;
    for (int j = 1; j < n && block[0]->started; ++j) check_alike(*block[0], *block[j]);
    run_block_by_warps(first);
  }
}

void run_in_turns(std::vector<Fiber*>& ready) {
  put_in_order(ready);
  for (Fiber* fiber : ready) {
    resume(*fiber);
    if (!fault.empty()) return;
  }
}

size_t shared_pitch(LaunchShape shape) { return (shape.shared_bytes + kGuardBytes + 127) / 128 * 128; }

void start_block(LaunchShape shape, int64_t index, char* shared) {
  memset(shared, 0xff, shape.shared_bytes);  // NaN
  memset(shared + shape.shared_bytes, kGuard, kGuardBytes);
  const int rank = static_cast<int>(index % shape.cluster);
  for (int i = 0; i < shape.threads; ++i) {
    Fiber& fiber = *pool[rank * shape.threads + i];
    static_cast<Thread&>(fiber) = {i,    shape.threads, index,  shape.blocks,
                                   rank, shape.cluster, shared, shape.shared_bytes};
    fiber.started = false;
    fiber.waits = Waits::nothing;
    fiber.warp_ops = 0;
    fiber.arrivals = fiber.met = 0;
    fiber.accesses.clear();
    fiber.uncommitted.clear();
    fiber.in_flight.clear();
    cluster.threads.push_back(&fiber);
  }
}

void run_cluster(LaunchShape shape, int64_t first_block, char* shared) {
  cluster.threads.clear();
  cluster.boxes.clear();
  cluster.sent.clear();
  cluster.block_threads = shape.threads;
  cluster.warps.assign(shape.cluster * shape.threads / kWarp, Slots());
  for (int i = 0; i < shape.cluster; ++i) start_block(shape, first_block + i, shared + i * shared_pitch(shape));
  std::vector<Fiber*> ready = cluster.threads;
  do {
    order_kind < 3 ? run_in_turns(ready) : run_block_by_block(ready);
    if (!fault.empty()) return;
    ready.clear();
  } while (release(ready));
  deliver();
  for (int i = 0; i < shape.cluster; ++i) check_guard(shared + i * shared_pitch(shape), shape.shared_bytes);
}

}  // namespace

// ------------------------------------------------------------------------------------------------- what device.h calls
// upon

void barrier(int line) { wait(Waits::at_barrier, line); }

void arrive_at_cluster() { ++self().arrivals; }

void wait_for_cluster(int line) {
  Fiber& fiber = self();
  if (++fiber.met != fiber.arrivals) throw Fault("a wait for the cluster without an arrival");
  wait(Waits::at_cluster, line);
}

static Box& opened(const void* box) {
  const auto found = cluster.boxes.find(static_cast<const char*>(box));
  if (found == cluster.boxes.end()) throw Fault("a mailbox that nobody has opened");
  return found->second;
}

void open(Mailbox* box) { cluster.boxes[reinterpret_cast<const char*>(box)] = Box(); }

void expect(Mailbox* box, int bytes) {
  Box& of = opened(box);
  if (of.expects) throw Fault("a mailbox that expects something already");
  of.expects = true;
  of.missing += bytes;
  end_phase_if_complete(of);
}

void await(Mailbox* box, int parity, int line) {
  self().box = &opened(box);
  self().parity = parity;
  wait(Waits::at_mailbox, line);
}

// Where in the shared memory of another block.
static char* in_block(const void* shared, int bytes, int block) {
  const int64_t offset = static_cast<const char*>(shared) - current->shared;
  if (offset < 0 || offset + bytes > current->shared_bytes) throw Fault("what is sent goes past shared memory");
  return cluster.threads[block * current->block_threads]->shared + offset;
}

static void put_on_its_way(Parcel parcel, Mailbox* box) {
  parcel.box = &opened(in_block(box, sizeof(*box), parcel.block));
  cluster.sent.push_back(std::move(parcel));
  if (order_kind == 1 || order_kind == 4) deliver();
}

void send(float x, float* to, Mailbox* box, int block) {
  if (block < 0 || block >= current->cluster_blocks) throw Fault("a block that the cluster does not have");
  Fiber* const* const there = cluster.threads.data() + block * current->block_threads;
  for (int i = 0; i < current->block_threads; ++i) {
    if (!there[i]->started) throw Fault("something is sent to threads that have not begun");
  }
  const char* const bytes = reinterpret_cast<const char*>(&x);
  put_on_its_way({{bytes, bytes + sizeof(x)}, in_block(to, sizeof(x), block), nullptr, block}, box);
}

void copy_bulk(void* shared, const void* global, int bytes, Mailbox* box) {
  const char* const from = static_cast<const char*>(global);
  const int block = current->cluster_rank;
  char* const to = in_block(shared, bytes, block);
  if (bytes <= 0 || bytes % sizeof(Words) != 0) throw Fault("a bulk copy of bytes that are no multiple of 16");
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Words) != 0) throw Fault("a bulk copy to an address off 16 bytes");
  memset(to, 0xff, bytes);  // what is there until the copy lands must not be used
  put_on_its_way({{from, from + bytes}, to, nullptr, block}, box);
}

void warp_barrier(int line) { wait(Waits::at_warp, line); }

// Posts this lane's value and waits for the others; the slots then hold those of all lanes.
static const uint32_t* post(uint32_t value, int line) {
  Fiber& fiber = self();
  const int warp = (fiber.cluster_rank * fiber.block_threads + fiber.index) / kWarp;
  uint32_t* slots = cluster.warps[warp].value[fiber.warp_ops++ % 2];
  slots[fiber.index % kWarp] = value;
  wait(Waits::at_warp, line);
  return slots;
}

uint32_t shuffle(uint32_t value, int source_lane, int line) { return post(value, line)[source_lane]; }

bool any(bool value, int line) {
  const uint32_t* all = post(value, line);
  return std::any_of(all, all + kWarp, [](uint32_t x) { return x != 0; });
}

void check_access(const void* p, int bytes, bool writes, int line, int alignment) {
  const char* at = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % (alignment > 0 ? alignment : bytes) != 0)
    throw Fault("a misaligned access to global memory");
  for (Buffer& buffer : buffers) {
    if (at < buffer.begin || at + bytes > buffer.begin + buffer.bytes) continue;
    if (writes && !buffer.writable) continue;
    (writes ? buffer.stored : buffer.loaded) += bytes;
    if (counts_sectors) {
      Fiber& fiber = self();
      sectors[{&buffer, fiber.block_index, fiber.index / kWarp, line, fiber.accesses[line]++}].insert(
          reinterpret_cast<uintptr_t>(p) / kSector);
    }
    return;
  }
  throw Fault(writes ? "a write outside the outputs" : "a read outside the registered buffers");
}

void copy_async(void* shared, const void* global, int bytes) {
  PendingCopy copy{shared, bytes, {}};
  memcpy(copy.bytes, global, bytes);
  memset(shared, 0xff, bytes);  // what is there until the copy lands must not be used
  self().uncommitted.push_back(copy);
}

void commit_copies() {
  self().in_flight.push_back(std::move(self().uncommitted));
  self().uncommitted.clear();
}

void wait_for_copies(int pending) {
  std::deque<CopyGroup>& groups = self().in_flight;
  while (static_cast<int>(groups.size()) > pending) {
    for (const PendingCopy& copy : groups.front()) memcpy(copy.to, copy.bytes, copy.size);
    groups.pop_front();
  }
}

int shared_memory = 0;
int cluster_limit = 1;

const char* run(LaunchShape shape, void (*body)(const void*, const void*), const void* kernel, const void* args) {
  fault.clear();
  running_body = body;
  running_kernel = kernel;
  running_args = args;
  if (shape.blocks < 1 || shape.threads < 1 || shape.threads > kMaxThreads || shape.threads % kWarp != 0 ||
      shape.shared_bytes < 0 || shape.shared_bytes > shared_memory || shape.cluster < 1 ||
      shape.cluster > cluster_limit || shape.blocks % shape.cluster != 0) {
    fault = "a launch of " + std::to_string(shape.blocks) + " blocks of " + std::to_string(shape.threads) +
            " threads with " + std::to_string(shape.shared_bytes) + " bytes of shared memory, in clusters of " +
            std::to_string(shape.cluster);
    return fault.c_str();
  }
  while (static_cast<int>(pool.size()) < shape.cluster * shape.threads) {
    pool.push_back(std::make_unique<Fiber>());
    pool.back()->stack.reset(static_cast<char*>(malloc(kStackBytes)));
  }
  std::unique_ptr<char, decltype(&free)> shared{
      static_cast<char*>(aligned_alloc(128, shape.cluster * shared_pitch(shape))), free};
  try {
    for (int64_t i = 0; i < shape.blocks && fault.empty(); i += shape.cluster) run_cluster(shape, i, shared.get());
  } catch (const Fault& e) {
    fault = e.what();
  }
  return fault.empty() ? nullptr : fault.c_str();
}

}  // namespace mtkd_fast::emulator

// ------------------------------------------------------------------------------------------------------ what Python
// calls

using mtkd_fast::emulator::buffers;
using mtkd_fast::emulator::counts_sectors;
using mtkd_fast::emulator::sectors;

extern "C" {

void emulator_forget_buffers() {
  buffers.clear();
  sectors.clear();
}

void emulator_count_sectors(int on) { counts_sectors = on != 0; }

int64_t emulator_sectors(int buffer) {
  int64_t count = 0;
  for (const auto& [access, touched] : sectors) {
    if (std::get<0>(access) == &buffers[buffer]) count += static_cast<int64_t>(touched.size());
  }
  return count;
}

void emulator_add_buffer(const void* begin, int64_t bytes, int writable) {
  buffers.push_back({static_cast<const char*>(begin), bytes, writable != 0, 0, 0});
}

void emulator_traffic(int buffer, int64_t* loaded, int64_t* stored) {
  *loaded = buffers[buffer].loaded;
  *stored = buffers[buffer].stored;
}

void emulator_set_shared_memory(int bytes) { mtkd_fast::emulator::shared_memory = bytes; }

void emulator_set_cluster_limit(int blocks) { mtkd_fast::emulator::cluster_limit = blocks; }

void emulator_set_order(int kind, unsigned seed) {
  mtkd_fast::emulator::order_kind = kind;
  mtkd_fast::emulator::order_random.seed(seed);
}
}
