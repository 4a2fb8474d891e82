// The threads that share one row: part of a warp, a block, or a cluster of blocks. Each merges a state of its threads
// into one that every thread then holds. A state is a plain struct of floats with merge_lanes(width), which joins
// neighbouring lanes, and a default value that is empty. What a group keeps in shared memory every block of it has for
// itself, written by the thread that leads there.
#pragma once

#include "device.h"

namespace mtkd_fast {

constexpr int kMaxWarps = 32;
constexpr int kMaxStateFields = 6;

MTKD_DEVICE float sum_lanes(float x, int width) {
  for (int lanes = width / 2; lanes > 0; lanes /= 2) x += device::shuffle_xor(x, lanes);
  return x;
}

struct SumOfLanes {
  int width;
  MTKD_DEVICE float operator()(float x) const { return sum_lanes(x, width); }
};

// Merges a state of sums, which says how it absorbs another.
struct AddLanes {
  template <typename Sums>
  MTKD_DEVICE void operator()(Sums& x, int width) const {
    Sums total;
    total.absorb(x, SumOfLanes{width});
    x = total;
  }
};

// The largest; NaN is passed over, as in `larger`.
MTKD_DEVICE float max_lanes(float x, int width) {
  for (int lanes = width / 2; lanes > 0; lanes /= 2) x = fmaxf(x, device::shuffle_xor(x, lanes));
  return x;
}

MTKD_DEVICE bool any_lane(bool x, int width) { return sum_lanes(x ? 1.0f : 0.0f, width) != 0; }

// Groups that lie within a block: blocks take rows in turn.
struct WithinBlock {
  static constexpr bool kExists = true;

  MTKD_DEVICE static int64_t place() { return device::block_index(); }
  MTKD_DEVICE static int64_t places() { return device::grid_blocks(); }
};

// `width` lanes of a warp, a power of two, share a row; a block holds threads/width rows. Every lane of a warp takes
// every step, whatever its row wants, since the shuffles need them all.
struct LaneGroup : WithinBlock {
  int width;

  MTKD_DEVICE explicit LaneGroup(int width, char*) : width(width) {}
  MTKD_DEVICE int rank() const { return device::thread_index() % width; }
  MTKD_DEVICE int size() const { return width; }
  MTKD_DEVICE bool leads() const { return rank() == 0; }
  MTKD_DEVICE int lanes() const { return width; }
  MTKD_DEVICE int groups_in_block() const { return device::block_threads() / width; }
  MTKD_DEVICE int index_in_block() const { return device::thread_index() / width; }
  MTKD_DEVICE int groups_in_warp() const { return kWarp / width; }
  MTKD_DEVICE bool any(bool x) const { return device::any_in_warp(x); }  // of all rows that walk together
  MTKD_DEVICE void sync() const { device::sync_warp(); }

  template <typename State, typename MergeLanes>
  MTKD_DEVICE void merge(State& state, const MergeLanes& merge_lanes) const {
    merge_lanes(state, width);
  }

  static constexpr int scratch_bytes() { return 0; }
};

// The whole block shares a row. One barrier a merge: the scratch is used in turns, so that a warp still reading one
// half cannot meet a warp that already writes the next. A block of one warp has the barrier alone: it shows what one
// lane has written to the others.
struct BlockGroup : WithinBlock {
  float* scratch;  // [2][kMaxStateFields][kMaxWarps]
  int turn = 0;

  MTKD_DEVICE explicit BlockGroup(int, char* shared) : scratch(reinterpret_cast<float*>(shared)) {}
  MTKD_DEVICE int rank() const { return device::thread_index(); }
  MTKD_DEVICE int size() const { return device::block_threads(); }
  MTKD_DEVICE bool leads() const { return rank() == 0; }
  MTKD_DEVICE int lanes() const { return kWarp; }
  static constexpr int groups_in_block() { return 1; }
  MTKD_DEVICE int index_in_block() const { return 0; }
  static constexpr int groups_in_warp() { return 1; }
  MTKD_DEVICE bool any(bool x) const { return x; }  // the same for every thread
  MTKD_DEVICE void sync() const { device::sync_block(); }

  template <typename State, typename MergeLanes>
  MTKD_DEVICE void merge(State& state, const MergeLanes& merge_lanes) {
    constexpr int kFields = sizeof(State) / sizeof(float);
    static_assert(kFields <= kMaxStateFields, "the scratch is too small for this state");
    merge_lanes(state, kWarp);
    const int warp = rank() / kWarp, lane = rank() % kWarp, warps = size() / kWarp;
    if (warps == 1) {
      device::sync_block();
      return;
    }
    float* slots = scratch + turn * kMaxStateFields * kMaxWarps;
    turn ^= 1;
    float* fields = reinterpret_cast<float*>(&state);
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kFields; ++i) slots[i * kMaxWarps + warp] = fields[i];
    }
    device::sync_block();
    state = State();
    if (lane < warps) {
#pragma unroll
      for (int i = 0; i < kFields; ++i) fields[i] = slots[i * kMaxWarps + lane];
    }
    merge_lanes(state, kWarp);
  }

  static constexpr int scratch_bytes() { return 2 * kMaxStateFields * kMaxWarps * sizeof(float); }
};

// A cluster of blocks shares a row. A merge is one within each block, then one across the blocks: each sends what it
// has come to to all of them, itself too, and waits for theirs. Again in turns: who sends to a slot a second time has
// had every block's next state since, and so knows that the slot has been read.
struct ClusterGroup {
  static constexpr bool kExists = device::kHasClusters;

  BlockGroup block;
  Mailbox* boxes;  // [2], behind the block's scratch
  float* slots;    // [2][kMaxStateFields][kMaxCluster]
  int merges = 0;

  MTKD_DEVICE explicit ClusterGroup(int, char* shared)
      : block(0, shared),
        boxes(reinterpret_cast<Mailbox*>(shared + BlockGroup::scratch_bytes())),
        slots(reinterpret_cast<float*>(boxes + 2)) {
    if (leads()) {
      device::open(boxes);
      device::open(boxes + 1);
    }
    device::arrive_at_cluster();
  }
  MTKD_DEVICE int rank() const { return device::cluster_rank() * device::block_threads() + device::thread_index(); }
  MTKD_DEVICE int size() const { return device::cluster_blocks() * device::block_threads(); }
  MTKD_DEVICE bool leads() const { return device::thread_index() == 0; }
  MTKD_DEVICE int lanes() const { return kWarp; }
  static constexpr int groups_in_block() { return 1; }
  MTKD_DEVICE int index_in_block() const { return 0; }
  static constexpr int groups_in_warp() { return 1; }
  MTKD_DEVICE bool any(bool x) const { return x; }
  MTKD_DEVICE void sync() const { device::sync_block(); }  // what is shared beyond merges, each block has for itself
  MTKD_DEVICE static int64_t place() { return device::cluster_index(); }
  MTKD_DEVICE static int64_t places() { return device::grid_clusters(); }

  template <typename State, typename MergeLanes>
  MTKD_DEVICE void merge(State& state, const MergeLanes& merge_lanes) {
    constexpr int kFields = sizeof(State) / sizeof(float);
    block.merge(state, merge_lanes);
    if (merges == 0) device::wait_for_cluster();  // a block that has not begun has no mailbox
    const int turn = merges % 2, parity = merges / 2 % 2;
    const int blocks = device::cluster_blocks(), lane = device::thread_index() % kWarp;
    ++merges;
    float* const from = slots + turn * kMaxStateFields * kMaxCluster;
    float* const fields = reinterpret_cast<float*>(&state);
    if (leads()) device::expect(boxes + turn, blocks * static_cast<int>(sizeof(State)));
    if (device::thread_index() < blocks) {
#pragma unroll
      for (int i = 0; i < kFields; ++i) {
        device::send(fields[i], from + i * kMaxCluster + device::cluster_rank(), boxes + turn, lane);
      }
    }
    device::await(boxes + turn, parity);
#pragma unroll
    for (int i = 0; i < kFields; ++i) fields[i] = from[i * kMaxCluster + lane % blocks];
    merge_lanes(state, blocks);
  }

  static constexpr int scratch_bytes() {  // whole Words, for what follows
    constexpr int kBytes =
        2 * static_cast<int>(sizeof(Mailbox)) + 2 * kMaxStateFields * kMaxCluster * static_cast<int>(sizeof(float));
    static_assert(kBytes % sizeof(Words) == 0, "");
    return BlockGroup::scratch_bytes() + kBytes;
  }
};

}  // namespace mtkd_fast
