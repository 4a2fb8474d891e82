// Kernels with one fault each, to see the emulator catch it; and sound ones, to see that it lets them pass. Each takes
// an input of one float a thread and an output of the same size.
#include "device.h"

namespace mtkd_fast {
namespace {

constexpr int kThreads = 64;

struct Args {
  const float* in;
  float* out;
};

// Every thread takes its neighbour's value through shared memory.
template <bool with_barrier>
MTKD_KERNEL(kThreads, 1)
neighbour(MTKD_PARAM(Args) args) {
  const int i = device::thread_index();
  float* shared = reinterpret_cast<float*>(device::shared_memory());
  shared[i] = device::load(args.in + i);
  if (with_barrier) device::sync_block();
  device::store(args.out + i, shared[(i + 1) % kThreads]);
}

// The same through an asynchronous copy of its own word.
template <bool with_wait>
MTKD_KERNEL(kThreads, 1)
copied(MTKD_PARAM(Args) args) {
  const int i = device::thread_index();
  uint32_t* shared = reinterpret_cast<uint32_t*>(device::shared_memory());
  device::copy_async(shared + i, reinterpret_cast<const uint32_t*>(args.in + i));
  device::commit_copies();
  if (with_wait) device::wait_for_copies<0>();
  device::store(args.out + i, device::word_as_float(shared[i]));
}

MTKD_KERNEL(kThreads, 1) read_out_of_bounds(MTKD_PARAM(Args) args) {
  const int i = device::thread_index();
  device::store(args.out + i, device::load(args.in + i + 1));
}

MTKD_KERNEL(kThreads, 1) write_to_input(MTKD_PARAM(Args) args) {
  const int i = device::thread_index();
  device::store(const_cast<float*>(args.in) + i, 0.0f);
}

MTKD_KERNEL(kThreads, 1) misaligned(MTKD_PARAM(Args) args) {
  const Words words = device::load(reinterpret_cast<const Words*>(args.in + 1));
  device::store(args.out, device::word_as_float(words.word[0]));
}

MTKD_KERNEL(kThreads, 1) past_shared_memory(MTKD_PARAM(Args)) { device::shared_memory()[kThreads * sizeof(float)] = 1; }

MTKD_KERNEL(kThreads, 1) divergent_barrier(MTKD_PARAM(Args) args) {
  if (device::thread_index() < 32) {
    device::sync_block();
  } else {
    device::sync_block();
  }
  device::store(args.out + device::thread_index(), 0.0f);
}

MTKD_KERNEL(kThreads, 1) absent_lanes(MTKD_PARAM(Args) args) {
  const int i = device::thread_index();
  float x = device::load(args.in + i);
  if (i % 32 < 16) x = device::shuffle_xor(x, 1);
  device::sync_block();
  device::store(args.out + i, x);
}

MTKD_KERNEL(kThreads, 1) early_exit(MTKD_PARAM(Args) args) {
  const int i = device::thread_index();
  if (i == 5) return;
  device::sync_block();
  device::store(args.out + i, 0.0f);
}

// Two blocks of half the threads; the first of each sends all its numbers to the other, one phase each.
enum class Sends { soundly, unopened, unmet, unawaited, too_little, leaving };

template <Sends how>
MTKD_KERNEL(kThreads, 1)
cluster_neighbour(MTKD_PARAM(Args) args) {
  const int threads = device::block_threads(), i = device::thread_index(), other = 1 - device::cluster_rank();
  Mailbox* const box = reinterpret_cast<Mailbox*>(device::shared_memory());
  float* const numbers = reinterpret_cast<float*>(box + 1);
  if (i == 0 && how != Sends::unopened) device::open(box);
  device::arrive_at_cluster();
  if (how == Sends::leaving && other == 0) return;
  if (how != Sends::unmet) device::wait_for_cluster();
  if (i == 0) {
    device::expect(box, threads * static_cast<int>(sizeof(float)));
    for (int j = how == Sends::too_little; j < threads; ++j) {
      device::send(device::load(args.in + device::cluster_rank() * threads + j), numbers + j, box, other);
    }
  }
  const float too_early = numbers[i];
  device::await(box, 0);
  device::store(args.out + device::cluster_rank() * threads + i, how == Sends::unawaited ? too_early : numbers[i]);
}

// Two phases through one place: soundly only where each block knows that the other has read the first.
template <bool answers>
MTKD_KERNEL(kThreads, 1)
cluster_twice(MTKD_PARAM(Args) args) {
  const int i = device::thread_index(), other = 1 - device::cluster_rank();
  Mailbox* const boxes = reinterpret_cast<Mailbox*>(device::shared_memory());
  float* const number = reinterpret_cast<float*>(boxes + 2);
  if (i == 0) {
    device::open(boxes);
    device::open(boxes + 1);
  }
  device::arrive_at_cluster();
  device::wait_for_cluster();
  float sum = 0;
  for (int phase = 0; phase < 2; ++phase) {
    if (i == 0) {
      device::expect(boxes, sizeof(float));
      device::send(static_cast<float>(phase + 1), number, boxes, other);
    }
    device::await(boxes, phase);
    sum = 10 * sum + *number;
    device::sync_block();
    if (!answers) continue;
    if (i == 0) {
      device::expect(boxes + 1, sizeof(float));
      device::send(0.0f, number + 1, boxes + 1, other);
    }
    device::await(boxes + 1, phase);
  }
  device::store(args.out + device::cluster_rank() * device::block_threads() + i, sum);
}

MTKD_KERNEL(kThreads, 1) never_arrived(MTKD_PARAM(Args)) { device::wait_for_cluster(); }

// The block's numbers in bulk, by the last thread that has looked at what is there before: zeros.
enum class Copies { soundly, unawaited, unread, unopened, off_words, part_of_words, past_the_end };

template <Copies how>
MTKD_KERNEL(kThreads, 1)
copied_in_bulk(MTKD_PARAM(Args) args) {
  const int i = device::thread_index(), neighbour = (i + 1) % kThreads;
  Mailbox* const box = reinterpret_cast<Mailbox*>(device::shared_memory());
  int* const looked = reinterpret_cast<int*>(box + 1);
  float* const numbers = reinterpret_cast<float*>(device::shared_memory() + sizeof(Words));
  if (i == 0) {
    if (how != Copies::unopened) device::open(box);
    *looked = 0;
  }
  numbers[i] = 0;
  device::sync_block();
  const auto copy = [&] {
    const int bytes = kThreads * static_cast<int>(sizeof(float)) - (how == Copies::part_of_words ? 4 : 0);
    device::expect(box, bytes);
    device::copy_bulk(reinterpret_cast<Words*>(numbers) + (how == Copies::past_the_end),
                      reinterpret_cast<const Words*>(args.in + (how == Copies::off_words)), bytes, box);
  };
  if (how == Copies::unread && i == 0) copy();
  const float before = numbers[neighbour];
  if (device::count(looked) == kThreads - 1 && how != Copies::unread) copy();
  const float too_early = numbers[neighbour];
  device::await_copies(box, 0);
  device::store(args.out + i, before + (how == Copies::unawaited ? too_early : numbers[neighbour]));
}

const char* launch(void (*kernel)(const Args&), const float* in, float* out, int cluster = 1) {
  return device::launch(kernel, {cluster, kThreads / cluster, kThreads * sizeof(float), cluster}, nullptr,
                        Args{in, out});
}

template <Copies how>
const char* launch_bulk(const float* in, float* out) {
  return device::launch(copied_in_bulk<how>, {1, kThreads, sizeof(Words) + kThreads * sizeof(float)}, nullptr,
                        Args{in, out});
}

}  // namespace
}  // namespace mtkd_fast

using namespace mtkd_fast;

extern "C" {

const char* sound_neighbour(const float* in, float* out) { return launch(neighbour<true>, in, out); }
const char* sound_copy(const float* in, float* out) { return launch(copied<true>, in, out); }
const char* sound_cluster(const float* in, float* out) { return launch(cluster_neighbour<Sends::soundly>, in, out, 2); }
const char* sound_phases(const float* in, float* out) { return launch(cluster_twice<true>, in, out, 2); }
const char* missing_answer(const float* in, float* out) { return launch(cluster_twice<false>, in, out, 2); }
const char* missing_await(const float* in, float* out) {
  return launch(cluster_neighbour<Sends::unawaited>, in, out, 2);
}
const char* fault_unopened(const float* in, float* out) {
  return launch(cluster_neighbour<Sends::unopened>, in, out, 2);
}
const char* fault_unmet(const float* in, float* out) { return launch(cluster_neighbour<Sends::unmet>, in, out, 2); }
const char* fault_too_little(const float* in, float* out) {
  return launch(cluster_neighbour<Sends::too_little>, in, out, 2);
}
const char* fault_leaving(const float* in, float* out) { return launch(cluster_neighbour<Sends::leaving>, in, out, 2); }
const char* fault_never_arrived(const float* in, float* out) { return launch(never_arrived, in, out, 2); }
const char* sound_bulk_copy(const float* in, float* out) { return launch_bulk<Copies::soundly>(in, out); }
const char* missing_await_of_bulk(const float* in, float* out) { return launch_bulk<Copies::unawaited>(in, out); }
const char* missing_look(const float* in, float* out) { return launch_bulk<Copies::unread>(in, out); }
const char* fault_unopened_for_bulk(const float* in, float* out) { return launch_bulk<Copies::unopened>(in, out); }
const char* fault_off_words(const float* in, float* out) { return launch_bulk<Copies::off_words>(in, out); }
const char* fault_part_of_words(const float* in, float* out) { return launch_bulk<Copies::part_of_words>(in, out); }
const char* fault_bulk_past_the_end(const float* in, float* out) { return launch_bulk<Copies::past_the_end>(in, out); }
const char* missing_barrier(const float* in, float* out) { return launch(neighbour<false>, in, out); }
const char* missing_wait(const float* in, float* out) { return launch(copied<false>, in, out); }
const char* fault_read_out_of_bounds(const float* in, float* out) { return launch(read_out_of_bounds, in, out); }
const char* fault_write_to_input(const float* in, float* out) { return launch(write_to_input, in, out); }
const char* fault_misaligned(const float* in, float* out) { return launch(misaligned, in, out); }
const char* fault_past_shared_memory(const float* in, float* out) { return launch(past_shared_memory, in, out); }
const char* fault_divergent_barrier(const float* in, float* out) { return launch(divergent_barrier, in, out); }
const char* fault_absent_lanes(const float* in, float* out) { return launch(absent_lanes, in, out); }
const char* fault_early_exit(const float* in, float* out) { return launch(early_exit, in, out); }
}
