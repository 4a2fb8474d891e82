// Longer rows: logits in shared memory, N columns a thread in pieces of a chunk. Sums are registers, and beside one sum
// a teacher's exponentials where the tile `keeps` them: its logits cost two reads of shared memory then, else three,
// and nothing that is written there. Each block of the group has a stretch of the row, and each warp one of that, of
// whose chunks piece j is number lane + 32·j: pieces lie a constant apart.
//
// Rows come in turn into a few places, the students too: what comes next, also of the next row, is on its way while
// this teacher is worked on, and while a row ends and the next begins. Shared memory: [places, rows as they come;
// student, floats less their maximum][chunks of the block].
//
// Where all logits of a call lie alike (`in_step`), chunks are counted from the 16 bytes (floats: 32) at or before a
// row's first class, so that every chunk is whole accesses also in rows that begin elsewhere (odd class counts). The
// first `lead` columns of the first chunk are then the end of the row before, and the last chunk ends in nothing.
//
//   in step, whole, from sm_90 on: copied in bulk by the last warp that is done with the place; all await its mailbox
//   in step, in part, or before:   by the thread whose they are, 16 bytes at a time; it closes them with −inf when its
//                                  copies have come
//   else:                          by the same thread as they lie, −inf beside the row included
#pragma once

#include "kd_readings.cuh"
#include "kd_tiles.cuh"

namespace mtkd_fast {

constexpr int kMostPlaces = 8;

struct SharedArgs : ResidentArgs {
  int places;
  int place_words;  // of 16 bytes, in one
  int student_at;   // words from the first place to the student's floats
  int pitch;        // chunks that a block has, but for the last ones
  int warp_pitch;   // and a warp
  bool in_step = false, in_bulk = false;
  bool odd_ends = false;  // in step, of an odd class count: the first and the last chunk are in part
  bool moves = false;     // halves and floats in turns: threads copy to where others may still read
};

// In shared memory, before the places.
struct alignas(Words) Feed {
  Mailbox arrived[kMostPlaces];
  Reading next[2];  // in turns
  int64_t step;     // from row to row
  int done;         // warps that are, with the place that is to be taken
};

// The columns of the longest row, counted from the first chunk.
MTKD_HD int64_t columns_of_row(int64_t classes) { return classes % kChunk == 0 ? classes : classes + kChunk - 1; }
template <typename Int>
MTKD_HD Int chunks_of(Int columns) {
  return (columns + kChunk - 1) / kChunk;
}

inline int64_t chunks_of_block(int64_t classes, int blocks) {
  return (chunks_of(columns_of_row(classes)) + blocks - 1) / blocks;
}

inline bool any_half(const KDArgs<float>& args) {
  bool half = args.student.dtype != DType::f32;
  for (int k = 0; k < args.teachers; ++k) half |= args.teacher[k].dtype != DType::f32;
  return half;
}

inline int widest_row(const KDArgs<float>& args) { return any_wide(args) ? 4 : 2; }

inline int64_t shared_tile_bytes(const KDArgs<float>& args, int blocks, int places) {
  const int bytes_of_column = places * widest_row(args) + static_cast<int>(sizeof(float));
  return static_cast<int64_t>(sizeof(Feed)) + chunks_of_block(args.classes, blocks) * kChunk * bytes_of_column;
}

// Whether every row of these logits begins as many columns after 16 bytes (floats: 32) as the student's.
inline bool is_in_step(const Logits& x, const KDArgs<float>& args) {
  const auto alike = [](int64_t a, int64_t b) { return (a - b) % kChunk == 0; };
  const bool begins = reinterpret_cast<uintptr_t>(x.data) % (kChunk * host_element_size(x.dtype)) == 0;
  const bool may_lead = args.classes % kChunk != 0;
  return begins && x.class_stride == 1 && alike(x.outer_stride, may_lead ? args.student.outer_stride : 0) &&
         alike(x.inner_stride, may_lead ? args.student.inner_stride : 0);
}

inline bool all_in_step(const KDForward<float>& args) {
  bool all = is_in_step(args.student, args);
  for (int k = 0; k < args.teachers; ++k) all = all && is_in_step(args.teacher[k], args);
  return all;
}

template <int N, bool two_sums, bool keeps>
struct SharedTile : RegisterSums<N, two_sums> {
  static constexpr int kWidth = kChunk;
  static constexpr int kChunks = 1;
  static constexpr int kPieces = N / kChunk;
  static constexpr bool kReadsOn = true;
  static constexpr bool kKeepsExponentials = keeps;
  using Args = SharedArgs;

  const SharedArgs& args;
  Feed* const feed;
  Words *const places, *const s;
  const int first;            // chunk of the row
  const int begin, warp_end;  // this thread's first chunk of the block, and where its warp's end
  int lead_, count;           // of this row: columns, chunks up to this warp's end
  int latest;                 // the place that has arrived last, counted round
  const Words* t;             // and where that is
  DType dtype;
  bool is_there;
  unsigned phases = 0;  // a bit for every place: the parity of its mailbox
  int turn = 0;         // of feed->next

  MTKD_DEVICE SharedTile(const SharedArgs& args, int rank, char* shared, int64_t place, int64_t step)
      : args(args),
        feed(reinterpret_cast<Feed*>(shared)),
        places(reinterpret_cast<Words*>(feed + 1)),
        s(places + args.student_at),
        first(rank / device::block_threads() * args.pitch),
        begin(device::thread_index() / kWarp * args.warp_pitch + device::thread_index() % kWarp),
        warp_end((device::thread_index() / kWarp + 1) * args.warp_pitch),
        latest(args.places - 1) {
    static_assert(sizeof(Feed) % sizeof(Words) == 0, "");
    if (device::thread_index() == 0) {
      if constexpr (device::kHasBulkCopies) {
        for (int i = 0; args.in_bulk && i < args.places; ++i) device::open(&feed->arrived[i]);
      }
      feed->next[0] = wanted_from(args, {place, 0}, step);
      feed->step = step;
      feed->done = 0;
    }
    for (int i = 0; i < args.places; ++i) {
      device::sync_block();
      fetch_into(i);
    }
  }

  MTKD_DEVICE int lead() const { return lead_; }
  MTKD_DEVICE bool has(int j) const { return at(j) < count; }
  MTKD_DEVICE int64_t chunk(int j, int) const { return first + at(j); }

  MTKD_DEVICE void begin_row(int64_t row) {
    lead_ = lead_of(first_element(args.student, row));
    count = own_up_to(chunks_of(classes() + lead_));
  }

  // By all threads, when they are done with what has arrived. Between two of them the block meets.
  MTKD_DEVICE void fetch_next() { fetch_into(latest); }

  MTKD_DEVICE void student_arrives(DType dtype, bool reads) {
    this->dtype = dtype;
    is_there = reads;
    if (reads) arrives();
  }
  MTKD_DEVICE void teacher_arrives(int, DType dtype, bool) {
    this->dtype = dtype;
    is_there = true;
    arrives();
  }

  // Of a student that is not read nothing, on which nothing then depends.
  MTKD_DEVICE void shift_student(float max) const {
    each_piece_of_student<1, true>([&](int j, float (&x)[kChunk]) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] = shifted(x[i], max);
      const RawChunk floats = encode(x, DType::f32);
      s[low(j)] = floats.low;
      s[high(j)] = floats.high;
    });
  }
  MTKD_DEVICE void student_less(int j, float, float (&x)[kChunk]) const {
    decode({s[low(j)], s[high(j)]}, DType::f32, x);
  }
  // Of this thread's columns; halves as they came, two at a time. NaN is passed over.
  MTKD_DEVICE float largest_arrived() const {
    float max = -infinity<float>();
    with_dtype([&](DType dtype) {
      RawChunk largest = empty_chunk(dtype);
#pragma unroll
      for (int j = 0; j < kPieces && is_there && has(j); ++j) {
        const RawChunk raw = get(j, dtype);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          largest.low.word[i] = larger_of_words(largest.low.word[i], raw.low.word[i], dtype);
          if (dtype == DType::f32) {
            largest.high.word[i] = larger_of_words(largest.high.word[i], raw.high.word[i], dtype);
          }
        }
      }
      float x[kChunk];
      decode(largest, dtype, x);
      max = mtkd_fast::largest(x, max);
    });
    return max;
  }
  // Of what has arrived: the student until the first teacher does.
  template <int unrolled, bool for_each_dtype, typename Step>
  MTKD_DEVICE void each_piece_of_student(const Step& step) const {
    each_piece_of_teacher<unrolled, for_each_dtype>(step);
  }
  template <int unrolled, bool for_each_dtype, typename Step>
  MTKD_DEVICE void each_piece_of_teacher(const Step& step) const {
    if (!is_there) return;
    if constexpr (for_each_dtype) {
      with_dtype([&](DType dtype) { each_piece<unrolled>([&](int j, auto& x) { read(j, dtype, x); }, step); });
    } else {
      each_piece<unrolled>([&](int j, auto& x) { with_dtype([&](DType dtype) { read(j, dtype, x); }); }, step);
    }
  }

 private:
  MTKD_DEVICE int at(int j) const { return begin + j * kWarp; }

  // A chunk of floats is two neighbouring Words. Of the student's every other four threads have the second half first,
  // so that eight threads, which shared memory serves at a time, touch all banks.
  MTKD_DEVICE static int swapped() { return device::thread_index() / 4 % 2; }
  MTKD_DEVICE int low(int j) const { return 2 * at(j) + swapped(); }
  MTKD_DEVICE int high(int j) const { return 2 * at(j) + (swapped() ^ 1); }

  // As it came; floats in the same order of accesses, exchanged afterwards.
  MTKD_DEVICE RawChunk get(int j, DType dtype) const {
    if (dtype != DType::f32) return {t[at(j)], {}};
    const Words one = t[low(j)], other = t[high(j)];
    const bool exchange = swapped();
    RawChunk raw;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      raw.low.word[i] = exchange ? other.word[i] : one.word[i];
      raw.high.word[i] = exchange ? one.word[i] : other.word[i];
    }
    return raw;
  }
  MTKD_DEVICE void read(int j, DType dtype, float (&x)[kChunk]) const { decode(get(j, dtype), dtype, x); }

  // Calls f(the dtype of what has arrived), which f is compiled for.
  template <typename F>
  MTKD_DEVICE void with_dtype(const F& f) const {
    if (dtype == DType::f32) {
      f(DType::f32);
    } else if (dtype == DType::bf16) {
      f(DType::bf16);
    } else {
      f(DType::f16);
    }
  }
  template <int unrolled, typename Read, typename Step>
  MTKD_DEVICE void each_piece(const Read& read_piece, const Step& step) const {
#pragma unroll unrolled
    for (int j = 0; j < kPieces; ++j) {
      if (!has(j)) break;
      float x[kChunk];
      read_piece(j, x);
      step(j, x);
    }
  }

  // ------------------------------------------------------------------------------------------------------- on its way

  MTKD_DEVICE Words* place(int i) const { return places + i * args.place_words; }
  MTKD_DEVICE int classes() const { return static_cast<int>(args.classes); }
  MTKD_DEVICE int chunks_up_to(int end) const {  // of this block
    const int left = end - first;
    return left < 0 ? 0 : left < args.pitch ? left : args.pitch;
  }
  MTKD_DEVICE int own_up_to(int end) const {
    const int chunks = chunks_up_to(end);
    return chunks < warp_end ? chunks : warp_end;
  }
  MTKD_DEVICE int64_t first_element(const Logits& x, int64_t row) const {
    if (args.inner == 1) return row * x.outer_stride;
    const RowPosition at = row_position(row, args.inner);
    return at.outer * x.outer_stride + at.inner * x.inner_stride;
  }
  MTKD_DEVICE int lead_of(int64_t first_element) const {
    return args.odd_ends ? static_cast<int>(first_element % kChunk) : 0;
  }

  MTKD_DEVICE void fetch_into(int free) {
    const Reading reading = feed->next[turn];
    turn ^= 1;
    if (args.moves) device::sync_block();
    fetch(reading, free);
    device::commit_copies();
    // Behind the copies, since it may wait for labels and weights. The others read it when the block has met.
    if (device::thread_index() == 0) feed->next[turn] = wanted_from(args, {reading.row, reading.which + 1}, feed->step);
  }
  MTKD_DEVICE void fetch(const Reading& reading, int free) const {
    const bool exists = reading.row < args.rows;
    Words* const to = place(free);
    if constexpr (device::kHasBulkCopies) {
      if (args.in_bulk) {
        device::sync_warp();
        const int warps = device::block_threads() / kWarp;
        if (device::thread_index() % kWarp == 0 && (warps == 1 || device::count(&feed->done) == warps - 1)) {
          feed->done = 0;
          if (exists) fetch_in_bulk(reading, to, &feed->arrived[free]);
        }
      }
    }
    if (!exists || (args.in_bulk && !args.odd_ends)) return;
    const Logits& logits = logits_of(args, reading.which);
    const int lead = lead_of(first_element(logits, reading.row));
    InputRow row = input_row(logits, row_position(reading.row, args.inner));
    row.data -= lead * element_size(logits.dtype);
    if (!args.in_bulk) {
      fetch_own(row, classes() + lead, to);
    } else {
      fetch_ends(row, lead, to);
    }
  }

  MTKD_DEVICE void fetch_own(const InputRow& row, int end, Words* to) const {
    const int own = own_up_to(chunks_of(end)), words = row.dtype == DType::f32 ? 2 : 1;
#pragma unroll 1
    for (int j = 0; at(j) < own; ++j) {
      Words* const here = to + words * at(j);
      if (args.in_step) {
        copy_aligned_chunk(row, chunk(j, 0), end, here);
      } else {
        copy_chunk(row, chunk(j, 0), end, here, here + 1);
      }
    }
  }

  // The chunks that are wholly of the row, by one thread.
  MTKD_DEVICE void fetch_in_bulk(const Reading& reading, Words* to, Mailbox* box) const {
    const Logits& logits = logits_of(args, reading.which);
    const int64_t element = first_element(logits, reading.row);
    const int lead = lead_of(element), words = logits.dtype == DType::f32 ? 2 : 1;
    const int begin = first == 0 && lead > 0 ? 1 : 0, end = chunks_up_to((classes() + lead) / kChunk);
    const int bytes = end > begin ? (end - begin) * words * static_cast<int>(sizeof(Words)) : 0;
    device::expect(box, bytes);
    if (bytes == 0) return;
    const int64_t chunk = element / kChunk + first + begin;
    device::order_bulk_copies();
    device::copy_bulk(to + begin * words, static_cast<const Words*>(logits.data) + chunk * words, bytes, box);
  }
  // Those that are in part, each by the thread that will look at it.
  MTKD_DEVICE void fetch_ends(const InputRow& row, int lead, Words* to) const {
    const int end = classes() + lead;
    const int words = row.dtype == DType::f32 ? 2 : 1;
    const bool leads = first == 0 && lead > 0 && device::thread_index() == 0;
    const int tail = own_end(lead);
    if (leads) copy_aligned_chunk(row, 0, end, to);
    if (tail > 0 || (tail == 0 && !leads)) copy_aligned_chunk(row, first + tail, end, to + words * tail);
  }
  // The chunk in which the row ends, if that is in part and this thread's; or −1.
  MTKD_DEVICE int own_end(int lead) const {
    const int end = classes() + lead, tail = end / kChunk - first;
    if (end % kChunk == 0 || tail >= args.pitch) return -1;
    return tail < warp_end && tail >= begin && (tail - begin) % kWarp == 0 ? tail : -1;
  }

  MTKD_DEVICE void arrives() {
    latest = latest + 1 == args.places ? 0 : latest + 1;
    if (!args.in_bulk || args.odd_ends) wait_for_all_but(args.places - 1);
    if constexpr (device::kHasBulkCopies) {
      if (args.in_bulk) {
        device::await_copies(&feed->arrived[latest], phases >> latest & 1);
        phases ^= 1u << latest;
      }
    }
    Words* const here = place(latest);
    t = here;
    if (args.odd_ends) close_ends(here);
  }
  MTKD_DEVICE static void wait_for_all_but(int pending) {
    static_assert(kMostPlaces == 8, "");
    if (pending == 0) device::wait_for_copies<0>();
    if (pending == 1) device::wait_for_copies<1>();
    if (pending == 2) device::wait_for_copies<2>();
    if (pending == 3) device::wait_for_copies<3>();
    if (pending == 4) device::wait_for_copies<4>();
    if (pending == 5) device::wait_for_copies<5>();
    if (pending == 6) device::wait_for_copies<6>();
    if (pending == 7) device::wait_for_copies<7>();
  }

  // −inf in what came beside the classes.
  MTKD_DEVICE void close_ends(Words* here) const {
    if (first == 0 && lead_ > 0 && device::thread_index() == 0) close(here, 0, 0, lead_);
    const int tail = own_end(lead_);
    if (tail >= 0) close(here, tail, (classes() + lead_) % kChunk, kChunk);
  }
  MTKD_DEVICE void close(Words* here, int chunk, int begin, int end) const {
    const uint32_t nothing = empty_chunk(dtype).low.word[0];
    uint32_t* const floats = reinterpret_cast<uint32_t*>(here + 2 * chunk);
    uint16_t* const halves = reinterpret_cast<uint16_t*>(here + chunk);
    for (int i = begin; i < end; ++i) {
      if (dtype == DType::f32) {
        floats[i] = nothing;
      } else {
        halves[i] = static_cast<uint16_t>(nothing);
      }
    }
    if constexpr (device::kHasBulkCopies) device::order_bulk_copies();
  }
};

}  // namespace mtkd_fast
