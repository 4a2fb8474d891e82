// Strategy B, forward: no row stays on chip. Tiles of columns outside, teachers inside, so that the student is read
// once: K + 1 reads. Each thread has states of its own, the student's in registers, the teachers' in shared memory as
// [k][field][thread], one word a thread, so that a warp touches 32 banks. They merge once, at the end of the row.
#pragma once

#include "kd_row.cuh"

namespace mtkd_fast {

// Columns of a thread in a tile: as many as 128 registers hold. Reverse KL keeps the student's exponentials too.
constexpr int stream_width(Divergence kind) { return kind == Divergence::forward_kl ? 16 : 8; }
constexpr int kStreamThreads = 256;

// The fields of a teacher's state that a call needs. `student_sum` is the thread's own and needs no place.
inline int stream_fields(WeightRule rule) {
  return 3 + (rule == WeightRule::confidence ? 1 : rule == WeightRule::entropy ? 2 : 0);
}

struct StreamingArgs : KDForward<float> {
  int fields;
};

inline int64_t stream_state_bytes(const StreamingArgs& args) {
  return static_cast<int64_t>(args.teachers) * args.fields * sizeof(float);  // a thread
}

template <Divergence kind>
struct StreamingRow {
  static constexpr int kWidth = stream_width(kind);
  static constexpr int kChunks = kWidth / kChunk;

  const StreamingArgs& args;
  const Terms& terms;
  BlockGroup& group;
  TeacherSummary* summaries;
  float* states;
  const Row row;

  MTKD_DEVICE float* field(int k, int i) const { return states + (k * args.fields + i) * group.size() + group.rank(); }
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

  MTKD_DEVICE bool reads(int k) const { return reads_teacher(args, row, known_weight(args, k, row)); }

  MTKD_DEVICE int64_t chunk(int64_t tile, int c) const { return tile + static_cast<int64_t>(c) * group.size(); }

  MTKD_DEVICE void load_tile(const Logits& logits, int64_t tile, RawChunk (&raw)[kChunks]) const {
    const InputRow from = input_row(logits, row.position);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      raw[c] = chunk(tile, c) * kChunk < args.classes ? load_chunk(from, chunk(tile, c), args.classes)
                                                      : empty_chunk(from.dtype);
    }
  }
  MTKD_DEVICE static void decode_tile(const RawChunk (&raw)[kChunks], DType dtype, float (&x)[kWidth]) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) decode(raw[c], dtype, x + c * kChunk);
  }

  // Which teachers are read, looked up once: until its summary is written, `signal` says so.
  MTKD_DEVICE void mark_read_teachers() const {
    for (int k = group.rank(); k < args.teachers; k += group.size()) summaries[k].signal = reads(k) ? 1.0f : 0.0f;
    group.sync();
  }
  // The first teacher from k on that is read, or K.
  MTKD_DEVICE int next_read(int k) const {
    while (k < args.teachers && summaries[k].signal == 0) ++k;
    return k;
  }

  // One tile: the student's columns, then every teacher's, the next one on its way.
  MTKD_DEVICE void absorb_tile(int64_t tile, SoftmaxState<float>& student) const {
    RawChunk student_raw[kChunks], raw[kChunks];
    load_tile(args.student, tile, student_raw);
    int k = next_read(0);
    if (k < args.teachers) load_tile(args.teacher[k], tile, raw);

    float ds[kWidth], es[kWidth];
    decode_tile(student_raw, args.student.dtype, ds);
    int valid[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int64_t left = args.classes - chunk(tile, c) * kChunk;
      valid[c] = left > kChunk ? kChunk : static_cast<int>(left);
    }
    const SoftmaxState<float> before = student;
    const Raise<float> by = absorb_student(student, ds, valid, terms);
    const bool rose = student.max > before.max && before.max != -infinity<float>();
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      ds[i] = shifted(ds[i], student.max);
      es[i] = kind == Divergence::reverse_kl ? device::exp2(ds[i] * terms.log2e_t) : 0.0f;
    }

    while (k < args.teachers) {
      const int now = k;
      float x[kWidth], dx[kWidth], e[kWidth];
      decode_tile(raw, args.teacher[now].dtype, x);
      k = next_read(now + 1);
      if (k < args.teachers) load_tile(args.teacher[k], tile, raw);

      TeacherState state = get(now, before.sum);
      if (rose) raise_student_side<kind>(state, by);
      absorb_teacher<kind>(state, x, ds, es, terms, dx, e);
      put(now, state);
    }
  }

  // The student's maximum rose: so must the cross sum, whichever side it is on.
  template <Divergence direction>
  MTKD_DEVICE static void raise_student_side(TeacherState& state, const Raise<float>& by) {
    if (direction == Divergence::forward_kl) {
      state.cross = raise_cross(state.cross, state.sum, unraised(), by);
    } else {
      state.cross = raise_cross(state.cross, state.student_sum, by, unraised());
      state.student_sum *= by.factor;
    }
  }

  MTKD_DEVICE void forward() {
    const bool reads_student = row.counts && (args.kd_scale != 0 || args.ce_weight != 0);
    for (int k = 0; k < args.teachers; ++k) put(k, TeacherState());
    SoftmaxState<float> student;
    float at_label = 0;
    mark_read_teachers();
    if (reads_student) {
      if (args.ce_weight != 0) at_label = label_logit(input_row(args.student, row.position), row);
      const int64_t chunks = (args.classes + kChunk - 1) / kChunk;
      for (int64_t tile = group.rank(); tile < chunks; tile += kChunks * group.size()) absorb_tile(tile, student);
    }
    const SoftmaxState<float> own = student;
    group.merge(student, MergeStudent{terms});
    const Raise<float> by(own.max, student.max, terms.inv_t);

    for (int k = 0; k < args.teachers; ++k) {
      TeacherSummary summary{0.0f, 0.0f, 0.0f, 0.0f};
      if (reads(k)) {
        const bool needs_label = args.rule == WeightRule::confidence;
        const float teacher_at_label = needs_label ? label_logit(input_row(args.teacher[k], row.position), row) : 0.0f;
        TeacherState state = get(k, own.sum);
        raise_student_side<kind>(state, by);
        group.merge(state, MergeTeacher<kind>{terms});
        summary = summarise<kind>(state, student, teacher_at_label, terms, args.rule);
      }
      if (group.rank() == 0) summaries[k] = summary;
    }
    group.sync();  // the summaries are there
    if (group.rank() < kWarp) {
      const Mixture mixture = mix(args, row, summaries, group.rank(), kWarp, true);
      if (group.rank() == 0) write_row(args, row, student, at_label, mixture);
    }
  }
};

// Shared memory: the group's scratch, [K] summaries, the states of the teachers.
template <Divergence kind>
MTKD_KERNEL(kStreamThreads, 2)
kd_streaming(MTKD_PARAM(StreamingArgs) args) {
  BlockGroup group(0, device::shared_memory());
  TeacherSummary* summaries = reinterpret_cast<TeacherSummary*>(device::shared_memory() + BlockGroup::scratch_bytes());
  const Terms terms = terms_of(args, args.rule);
  for (int64_t index = device::block_index(); index < args.rows; index += device::grid_blocks()) {
    StreamingRow<kind> row{args,
                           terms,
                           group,
                           summaries,
                           reinterpret_cast<float*>(summaries + args.teachers),
                           read_row(args, args.items, index)};
    row.forward();
    group.sync();  // the summaries have been read
  }
}

}  // namespace mtkd_fast
