// Strategy B, forward: no row stays on chip. Tiles of columns outside, teachers inside, so that the student is read
// once: K + 1 reads. Each thread has states of its own, the student's in registers, the teachers' in shared memory as
// [k][field][thread], one word a thread, so that a warp touches 32 banks. They merge once, at the end of the row.
//
// An elementwise divergence wants those merged states first: a second sweep, 2(K + 1) reads, of which L2 serves what it
// still holds.
#pragma once

#include "kd_elementwise.cuh"
#include "kd_row.cuh"

namespace mtkd_fast {

// Columns of a thread in a tile: as many as 128 registers hold. Reverse KL keeps the student's exponentials too, the
// elementwise divergences q and log q; a thread with a row of its own, that row's numbers.
constexpr int stream_width(Kind kind, int rows_in_warp) {
  return rows_in_warp == 1 && (kind == Kind::forward_kl || kind == Kind::dkd) ? 16 : 8;
}
constexpr int kStreamThreads = 256;

// The fields of a teacher's state that a call needs. `student_sum` is the thread's own and needs no place.
inline int stream_fields(WeightRule rule) {
  return 3 + (rule == WeightRule::confidence ? 1 : rule == WeightRule::entropy ? 2 : 0);
}

struct StreamingArgs : KDForward<float> {
  int fields;
  int group_width;  // warps that share pixels
};

inline int64_t stream_state_bytes(const StreamingArgs& args) {
  return static_cast<int64_t>(args.teachers) * args.fields * sizeof(float);  // a thread
}

template <Kind kind, typename Group>
struct StreamingRow {
  static constexpr int kWidth = stream_width(kind, Group::groups_in_warp());
  static constexpr int kChunks = kWidth / kChunk;

  const StreamingArgs& args;
  const Terms& terms;
  Group& group;
  const Summaries summaries;
  float* states;
  const Row row;

  MTKD_DEVICE float* field(int k, int i) const {
    return states + (k * args.fields + i) * device::block_threads() + device::thread_index();
  }
  MTKD_DEVICE TeacherState get(int k, float student_sum) const {
    TeacherState state;
    state.max = *field(k, 0);
    state.sum = *field(k, 1);
    state.cross = *field(k, 2);
    if (terms.teacher_sum1) state.sum1 = *field(k, 3);
    if (terms.teacher_dot1) state.dot1 = *field(k, 4);
    state.student_sum = student_sum;
    return state;
  }
  MTKD_DEVICE void put(int k, const TeacherState& state) const {
    *field(k, 0) = state.max;
    *field(k, 1) = state.sum;
    *field(k, 2) = state.cross;
    if (terms.teacher_sum1) *field(k, 3) = state.sum1;
    if (terms.teacher_dot1) *field(k, 4) = state.dot1;
  }

  MTKD_DEVICE bool reads(int k) const { return reads_teacher(args, row, known_weight(args, terms, k, row)); }

  MTKD_DEVICE int64_t chunk(int64_t tile, int c) const { return tile + static_cast<int64_t>(c) * group.size(); }

  MTKD_DEVICE void load_tile(const Logits& logits, int64_t tile, RawChunk (&raw)[kChunks]) const {
    const InputRow from = input_row(logits, row.position);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      raw[c] = chunk(tile, c) * kChunk < args.classes ? load_chunk(from, chunk(tile, c), args.classes)
                                                      : empty_chunk(from.dtype);
    }
  }
  MTKD_DEVICE static void decode_tile(const RawChunk (&raw)[kChunks], DType dtype, const Columns (&columns)[kChunks],
                                      float (&x)[kWidth]) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      decode(raw[c], dtype, x + c * kChunk);
      set_apart<kind>(columns[c], x + c * kChunk);
    }
  }
  MTKD_DEVICE void columns_of_tile(int64_t tile, Columns (&columns)[kChunks]) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) columns[c] = columns_of<kind>(chunk(tile, c), args.classes, row.label);
  }

  // Which teachers are read, looked up once: until its divergence is known, that place says so.
  MTKD_DEVICE void mark_read_teachers() const {
    for (int k = group.rank(); k < args.teachers; k += group.size()) summaries[k].divergence = reads(k) ? 1.0f : 0.0f;
    group.sync();
  }
  // The first teacher from k on that is read, or K.
  MTKD_DEVICE int next_read(int k) const {
    while (k < args.teachers && summaries[k].divergence == 0) ++k;
    return k;
  }

  // One tile: the student's columns, then every teacher's, the next one on its way.
  MTKD_DEVICE void absorb_tile(int64_t tile, SoftmaxState<float>& student) const {
    RawChunk student_raw[kChunks], raw[kChunks];
    load_tile(args.student, tile, student_raw);
    int k = next_read(0);
    if (k < args.teachers) load_tile(args.teacher[k], tile, raw);

    float ds[kWidth], es[kWidth];
    Columns columns[kChunks];
    columns_of_tile(tile, columns);
    decode_tile(student_raw, args.student.dtype, columns, ds);
    const SoftmaxState<float> before = student;
    const Raise<float> by = absorb_student(student, ds, columns, terms);
    const bool rose = student.max > before.max && before.max != -infinity<float>();
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      ds[i] = shifted(ds[i], student.max);
      es[i] = kind == Kind::reverse_kl ? device::exp2(ds[i] * terms.log2e_t) : 0.0f;
    }

    while (k < args.teachers) {
      const int now = k;
      float x[kWidth], e[kWidth];
      decode_tile(raw, args.teacher[now].dtype, columns, x);
      k = next_read(now + 1);
      if (k < args.teachers) load_tile(args.teacher[k], tile, raw);

      TeacherState state = get(now, before.sum);
      if (rose) raise_student_side(state, by);
      // DKD has no registers for the quick way.
      absorb_teacher<kind, kind != Kind::dkd>(state, x, ds, es, terms, e);
      put(now, state);
    }
  }

  // The student's maximum rose: so must the cross sum, whichever side it is on.
  MTKD_DEVICE static void raise_student_side(TeacherState& state, const Raise<float>& by) {
    if (kind == Kind::reverse_kl) {
      state.cross = raise_cross(state.cross, state.student_sum, by, unraised());
      state.student_sum *= by.factor;
    } else if (kind != Kind::elementwise) {
      state.cross = raise_cross(state.cross, state.sum, unraised(), by);
    }
  }

  // Every teacher's state into its summary; `own` is the thread's part of the student.
  MTKD_DEVICE void merge_teachers(const SoftmaxState<float>& own, const SoftmaxState<float>& student,
                                  float student_at_label) {
    const Raise<float> by(own.max, student.max, terms.inv_t);
    const float log_s = log_of(student.sum);
    for (int k = 0; k < args.teachers; ++k) {
      TeacherSummary summary{};
      const bool read = reads(k);
      if (group.any(read)) {
        const bool needs_label = read && group.rank() == 0 && wants_label_of_teachers<kind>(args.rule);
        const float at_label = needs_label ? label_logit(input_row(args.teacher[k], row.position), row) : 0.0f;
        TeacherState state = get(k, own.sum);
        raise_student_side(state, by);
        group.merge(state, MergeTeacher<kind>{terms});
        if (read && group.rank() == 0) {
          summary = summarise<kind>(state, at_label, args.rule);
          if constexpr (kind != Kind::elementwise) {
            set_divergence<kind>(summary, state.cross, student, log_s, {at_label, student_at_label}, args.beta, terms);
          }
        }
      }
      if (group.rank() != 0) continue;
      if (kind == Kind::elementwise) summary.divergence = summaries[k].divergence;  // the mark stays
      summaries[k] = summary;
    }
  }

  // The second sweep: D and G of the teachers that are read, each thread's own in the place of its states.
  MTKD_DEVICE void sum_elements(const SoftmaxState<float>& student) {
    group.sync();  // the summaries are there, but for D and G
    for (int k = 0; k < args.teachers; ++k) *field(k, 0) = *field(k, 1) = 0;
    const Softmax q = softmax_of(student.max, student.sum);
    const int first = next_read(0);
    const int64_t end = first < args.teachers ? chunks() : 0;
    for (int64_t tile = group.rank(); tile < end; tile += kChunks * group.size()) add_elements(tile, first, q);
    for (int k = 0; k < args.teachers; ++k) {
      const bool read = reads(k);
      if (!group.any(read)) continue;
      ElementSums sums{*field(k, 0), *field(k, 1)};
      group.merge(sums, AddLanes{});
      if (!read || group.rank() != 0) continue;
      summaries[k].divergence = sums.divergence;
      summaries[k].slope = sums.slope;
    }
  }
  MTKD_DEVICE void add_elements(int64_t tile, int first, const Softmax& student) const {
    RawChunk student_raw[kChunks], raw[kChunks];
    load_tile(args.student, tile, student_raw);
    load_tile(args.teacher[first], tile, raw);
    float x[kWidth];
    Probability q[kWidth];
    Columns columns[kChunks];
    columns_of_tile(tile, columns);
    decode_tile(student_raw, args.student.dtype, columns, x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) q[i] = probability(x[i], student, terms);
    for (int k = first; k < args.teachers;) {
      const int now = k;
      decode_tile(raw, args.teacher[now].dtype, columns, x);
      k = next_read(now + 1);
      if (k < args.teachers) load_tile(args.teacher[k], tile, raw);

      const Softmax teacher = softmax_of(summaries[now].max, summaries[now].sum);
      ElementSums sums{*field(now, 0), *field(now, 1)};
      auto p = [&](int i) { return probability(x[i], teacher, terms); };
      for_each_element<kWidth, kTogether / 2>(  // q of all columns has the rest of the registers
          args.divergence, args.beta, p, [&](int i) { return q[i]; },
          [&](int, float, const Element<float>& of) { sums.add(of); });
      *field(now, 0) = sums.divergence;
      *field(now, 1) = sums.slope;
    }
  }

  MTKD_DEVICE int64_t chunks() const { return (args.classes + kChunk - 1) / kChunk; }

  MTKD_DEVICE void forward() {
    const bool reads_student = row.counts && (args.kd_scale != 0 || args.ce_weight != 0);
    for (int k = 0; k < args.teachers; ++k) put(k, TeacherState());
    SoftmaxState<float> student;
    mark_read_teachers();
    if (reads_student) {
      for (int64_t tile = group.rank(); tile < chunks(); tile += kChunks * group.size()) absorb_tile(tile, student);
    }
    const bool needs_label = group.rank() == 0 && wants_label_of_student<kind>(args, row);
    const float at_label = needs_label ? label_logit(input_row(args.student, row.position), row) : 0.0f;
    const SoftmaxState<float> own = student;
    group.merge(student, MergeStudent{terms});
    merge_teachers(own, student, at_label);
    if constexpr (kind == Kind::elementwise) sum_elements(student);
    group.sync();  // the summaries are there
    if (group.rank() < group.lanes()) {
      const bool exists = row.index < args.rows;
      const Mixture mixture = mix<kind>(args, terms, row, summaries, group.rank(), group.lanes(), exists);
      const float ce = student_cross_entropy<kind>(args, row, student, at_label);
      if (exists && group.rank() == 0) write_row(args, row, student, ce, mixture);
    }
  }
};

// Shared memory: the group's scratch, [K][rows of the block] summaries, the states of the teachers.
template <Kind kind, typename Group>
MTKD_KERNEL(kStreamThreads, 2)
kd_streaming(MTKD_PARAM(StreamingArgs) args) {
  Group group(args.group_width, device::shared_memory());
  const int rows_in_block = device::block_threads() / group.size();
  TeacherSummary* summaries = summaries_of(group, device::shared_memory());
  const Terms terms = terms_of(args, args.rule);
  const int64_t step = device::grid_blocks() * rows_in_block;
  for (int64_t base = device::block_index() * rows_in_block; base < args.rows; base += step) {
    StreamingRow<kind, Group> row{args,
                                  terms,
                                  group,
                                  {summaries + group.index_in_block(), rows_in_block},
                                  reinterpret_cast<float*>(summaries + rows_in_block * args.teachers),
                                  read_row(args, args.items, base + group.index_in_block())};
    row.forward();
    group.sync();  // the summaries have been read
  }
}

}  // namespace mtkd_fast
