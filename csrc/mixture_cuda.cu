// The op `mixture` on CUDA devices. Lanes of a warp share a row of up to 256 classes, a block a longer one.
//
//   mixture_resident     up to 8192 classes: a teacher's columns stay in registers between its state and its part of
//                        the mixture. K reads, 1 write
//   mixture_streaming    longer rows: a sweep for the states and one for the mixture
//   mixture_backward     K + 1 reads; the gradient of a teacher reads it and the upstream again
//   mixture_divergence   a sweep for the states, one for the value and the student's gradient, and in it, where the
//                        weights want a gradient, one more of the teachers' chunks
//
// Where shared memory has room for what is swept again, a row's logits are all copied there at once, and memory is read
// once: K reads, K + 1 of the divergence. Else a sweep is a read, which finds short enough rows in cache.
#include "chunk.cuh"
#include "group.cuh"
#include "mixture.h"

namespace mtkd_fast {

#include "row_formulas.h"

namespace {

constexpr int kLaneThreads = 128;
constexpr int kLaneColumns = kWarp * kChunk;
constexpr int kBlockThreads = 256;
constexpr int kResidentThreads = 512;
constexpr int kResidentChunks = 2;  // of a thread
constexpr int kResidentColumns = kResidentThreads * kResidentChunks * kChunk;

// Rows that stay in shared memory: of `rows` tensors a thread has its own chunks, [rows][planes][chunks][threads] of 16
// bytes.
struct KeptShape {
  int chunks;  // of a thread; 0: nothing is kept
  int planes;  // 2 where some logits are floats
};

template <typename Args>
struct Grouped : Args {
  int group_width;
  KeptShape kept;
};

struct KeptRows {
  KeptShape shape;
  Words* first;  // this thread's

  MTKD_DEVICE Words* at(int row, int plane, int j) const {
    return first + ((row * shape.planes + plane) * shape.chunks + j) * device::block_threads();
  }
  MTKD_DEVICE RawChunk get(int row, int j, DType dtype) const {
    RawChunk raw;
    raw.low = *at(row, 0, j);
    raw.high = dtype == DType::f32 ? *at(row, 1, j) : raw.low;
    return raw;
  }
};

// A row's softmax, and what its columns need of it.
struct Softmax {
  float max = -infinity<float>();
  float sum = 0;
};

struct MergeSoftmax {
  float inv_t;

  MTKD_DEVICE void operator()(Softmax& x, int width) const {
    const float max = max_lanes(x.max, width);
    x.sum = sum_lanes(x.sum * Raise<float>(x.max, max, inv_t).factor, width);
    x.max = max;
  }
};

struct Sum {
  float value = 0;
};

struct MergeSum {
  MTKD_DEVICE void operator()(Sum& x, int width) const { x.value = sum_lanes(x.value, width); }
};

MTKD_DEVICE void absorb_chunk(Softmax& state, const float (&x)[kChunk], float inv_t) {
  float max = state.max, sum = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) max = larger(max, x[i]);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) sum += device::exp2(shifted(x[i], max) * (device::kLog2E * inv_t));
  state.sum = state.sum * Raise<float>(state.max, max, inv_t).factor + sum;
  state.max = max;
}

// A teacher of a row, in shared memory.
struct Member {
  float weight;
  float max;
  float sum;
  float read;  // 0 or 1
};

MTKD_DEVICE float softmax_numerator(float x, float max, float inv_t) {
  return device::exp2(shifted(x, max) * (device::kLog2E * inv_t));
}

// One row and the threads that share it. Groups of lanes walk together: merges are taken whatever a row reads.
template <typename Group>
struct MixtureRow {
  const MixtureArgs<float>& args;
  Group& group;
  Member* members;  // [K] of this group, shared
  const int64_t index;
  const bool exists;
  const RowPosition position;
  const float inv_t;

  const KeptRows kept;

  MTKD_DEVICE MixtureRow(const MixtureArgs<float>& args, Group& group, Member* members, int64_t index,
                         KeptRows kept = {})
      : args(args),
        group(group),
        members(members),
        index(index),
        exists(index < args.rows),
        position(row_position(exists ? index : 0, args.inner)),
        inv_t(1.0f / args.temperature),
        kept(kept) {}

  MTKD_DEVICE int64_t chunks() const { return exists ? (args.classes + kChunk - 1) / kChunk : 0; }
  MTKD_DEVICE int64_t chunk(int j) const { return group.rank() + static_cast<int64_t>(j) * group.size(); }
  MTKD_DEVICE bool has(int j) const { return chunk(j) < chunks(); }

  MTKD_DEVICE float weight(int k) const {
    if (!exists) return 0.0f;
    if (args.weights == nullptr) return 1.0f / args.teachers;
    return device::load(args.weights + k * args.weights_teacher_stride + index * args.weights_row_stride);
  }
  MTKD_DEVICE bool reads(float weight) const { return exists && !(args.skip_zero_weights && weight == 0); }

  MTKD_DEVICE InputRow input(const Logits& x) const { return input_row(x, position); }
  MTKD_DEVICE void load(const InputRow& row, int64_t chunk, float (&x)[kChunk]) const {
    decode(load_chunk(row, chunk, args.classes), row.dtype, x);
  }

  // The thread's chunk j of teacher `row`, or of the student, `row` K.
  MTKD_DEVICE void load(int row, const Logits& logits, int j, float (&x)[kChunk]) const {
    if (kept.shape.chunks > 0) {
      decode(kept.get(row, j, logits.dtype), logits.dtype, x);
    } else {
      load(input(logits), chunk(j), x);
    }
  }

  // On their way all at once; a thread looks at its own chunks alone.
  MTKD_DEVICE void copy(int row, const Logits& logits) const {
    const InputRow from = input(logits);
    for (int j = 0; kept.shape.chunks > 0 && has(j); ++j) {
      copy_chunk(from, chunk(j), args.classes, kept.at(row, 0, j), kept.at(row, kept.shape.planes - 1, j));
    }
  }
  // Whether there are any.
  MTKD_DEVICE bool copy_teachers() const {
    bool any = false;
    for (int k = 0; kept.shape.chunks > 0 && k < args.teachers; ++k) {
      if (!reads(weight(k))) continue;
      copy(k, args.teacher[k]);
      any = true;
    }
    return any;
  }
  MTKD_DEVICE void wait_for_copies() const {
    if (kept.shape.chunks == 0) return;
    device::commit_copies();
    device::wait_for_copies<0>();
  }

  MTKD_DEVICE Softmax state_of(int row, const Logits& logits, bool read) const {
    Softmax state;
    for (int j = 0; read && has(j); ++j) {
      float x[kChunk];
      load(row, logits, j, x);
      absorb_chunk(state, x, inv_t);
    }
    group.merge(state, MergeSoftmax{inv_t});
    return state;
  }

  MTKD_DEVICE void put(int k, float w, const Softmax& state) const {
    if (group.rank() == 0) members[k] = {w, state.max, state.sum, reads(w) ? 1.0f : 0.0f};
  }

  // The first sweep.
  MTKD_DEVICE void find_states() const {
    for (int k = 0; k < args.teachers; ++k) {
      const float w = weight(k);
      put(k, w, state_of(k, args.teacher[k], reads(w)));
    }
    group.sync();
  }

  // Σ_k w_k p_k of the thread's chunk j.
  MTKD_DEVICE void mix(int j, float (&mixture)[kChunk]) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) mixture[i] = 0;
    for (int k = 0; k < args.teachers; ++k) {
      const Member m = members[k];
      if (m.weight == 0) continue;
      float x[kChunk];
      load(k, args.teacher[k], j, x);
      add_probabilities(m.weight / m.sum, m.max, x, mixture);
    }
  }

  MTKD_DEVICE void add_probabilities(float share, float max, const float (&x)[kChunk], float (&mixture)[kChunk]) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) mixture[i] += share * softmax_numerator(x[i], max, inv_t);
  }

  // log Σ_k w_k p_k of a chunk, whatever underflows: −inf where no teacher in use allows the class.
  MTKD_DEVICE void log_mixture(int j, float (&log_p)[kChunk]) const {
    float largest[kChunk], sum[kChunk], x[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      largest[i] = -infinity<float>();
      sum[i] = 0;
    }
    for (int k = 0; k < args.teachers; ++k) {
      const Member m = members[k];
      if (m.weight == 0) continue;
      load(k, args.teacher[k], j, x);
      const float log_sum = log_of(m.sum);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float l = shifted(x[i], m.max) * inv_t - log_sum;
        const float to = larger(largest[i], l);
        sum[i] = sum[i] * Raise<float>(largest[i], to, 1.0f).factor + m.weight * exp_of(shifted(l, to));
        largest[i] = to;
      }
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      log_p[i] = sum[i] == 0 && largest[i] == -infinity<float>() ? largest[i] : offset_of(largest[i]) + log_of(sum[i]);
    }
  }
};

// ------------------------------------------------------------------------------------------------------- probabilities

// Rows of a block, one a group.
template <typename Group, typename Body>
MTKD_DEVICE void for_each_row(Group& group, int64_t rows, const Body& body) {
  const int groups = device::block_threads() / group.size();
  for (int64_t first = device::block_index() * groups; first < rows; first += device::grid_blocks() * groups) {
    body(first + group.index_in_block());
    group.sync();  // what the row kept in shared memory has been read
  }
}

template <typename Group>
MTKD_DEVICE Member* members_of(const Group& group, int teachers) {
  Member* all = reinterpret_cast<Member*>(device::shared_memory() + Group::scratch_bytes());
  return all + group.index_in_block() * teachers;
}

// Behind `floats` for each thread and teacher, which come behind the members.
template <typename Group, typename Args>
MTKD_DEVICE KeptRows kept_rows(const Group& group, const Grouped<Args>& args, int floats) {
  const int groups = device::block_threads() / group.size(), teachers = args.teachers;
  Member* const end = reinterpret_cast<Member*>(device::shared_memory() + Group::scratch_bytes()) + groups * teachers;
  const int words = teachers * floats * device::block_threads() * 4 / static_cast<int>(sizeof(Words));
  return {args.kept, reinterpret_cast<Words*>(end) + words + device::thread_index()};
}

template <typename Group>
MTKD_DEVICE void store_states(const MixtureForward<float>& args, const MixtureRow<Group>& row) {
  for (int k = row.group.rank(); row.exists && k < args.teachers; k += row.group.size()) {
    const Member m = row.members[k];
    device::store(args.row_stats + k * args.rows + row.index, m.read != 0 ? m.max : 0.0f);
    device::store(args.row_stats + (args.teachers + k) * args.rows + row.index, m.read != 0 ? m.sum : 0.0f);
  }
}

MTKD_DEVICE OutputRow probability_row(const MixtureForward<float>& args, int64_t index) {
  return output_row(args.probabilities, index, args.classes, DType::f32);
}

// Shared memory: the group's scratch, [groups][K] members.
template <typename Group, int kChunks, int max_threads>
MTKD_KERNEL(max_threads, 1)
mixture_resident(MTKD_PARAM(Grouped<MixtureForward<float>>) args) {
  Group group(args.group_width, device::shared_memory());
  Member* members = members_of(group, args.teachers);
  for_each_row(group, args.rows, [&](int64_t index) {
    const MixtureRow<Group> row(args, group, members, index);
    float mixture[kChunks][kChunk] = {};
    for (int k = 0; k < args.teachers; ++k) {
      const float w = row.weight(k);
      const bool reads = row.reads(w);
      const InputRow from = row.input(args.teacher[k]);
      RawChunk raw[kChunks];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int64_t chunk = group.rank() + c * group.size();
        raw[c] = reads && chunk < row.chunks() ? load_chunk(from, chunk, args.classes) : empty_chunk(from.dtype);
      }
      Softmax state;
      float x[kChunk];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        decode(raw[c], from.dtype, x);
        absorb_chunk(state, x, row.inv_t);
      }
      group.merge(state, MergeSoftmax{row.inv_t});
      row.put(k, w, state);
      if (w == 0) continue;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        decode(raw[c], from.dtype, x);
        row.add_probabilities(w / state.sum, state.max, x, mixture[c]);
      }
    }
    group.sync();
    store_states(args, row);
    if (!row.exists) return;
    const OutputRow out = probability_row(args, index);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int64_t chunk = group.rank() + c * group.size();
      if (chunk < row.chunks()) store_chunk(out, chunk, args.classes, mixture[c]);
    }
  });
}

// The same, and the rows that are kept.
MTKD_KERNEL(kBlockThreads, 2) mixture_streaming(MTKD_PARAM(Grouped<MixtureForward<float>>) args) {
  BlockGroup group(args.group_width, device::shared_memory());
  Member* members = members_of(group, args.teachers);
  for_each_row(group, args.rows, [&](int64_t index) {
    const MixtureRow<BlockGroup> row(args, group, members, index, kept_rows(group, args, 0));
    row.copy_teachers();
    row.wait_for_copies();
    row.find_states();
    store_states(args, row);
    const OutputRow out = probability_row(args, index);
    for (int j = 0; row.has(j); ++j) {
      float mixture[kChunk];
      row.mix(j, mixture);
      store_chunk(out, row.chunk(j), args.classes, mixture);
    }
  });
}

// ------------------------------------------------------------------------------------------------------------ backward

template <typename Group>
MTKD_DEVICE void write_teacher_gradient(const MixtureBackward<float>& args, const MixtureRow<Group>& row, int k,
                                        const Softmax& state, float w, float dot) {
  const InputRow teacher = row.input(args.teacher[k]), upstream = row.input(args.upstream);
  const OutputRow out = output_row(args.teacher_gradient[k], row.index, args.classes, args.teacher[k].dtype);
  const float share = w * row.inv_t / state.sum;
  for (int64_t c = row.group.rank(); c < row.chunks(); c += row.group.size()) {
    float gradient[kChunk] = {};
    if (w != 0) {
      float t[kChunk], g[kChunk];
      row.load(teacher, c, t);
      row.load(upstream, c, g);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        gradient[i] = share * softmax_numerator(t[i], state.max, row.inv_t) * (g[i] - dot);
    }
    store_chunk(out, c, args.classes, gradient);
  }
}

template <typename Group, int max_threads>
MTKD_KERNEL(max_threads, 2)
mixture_backward(MTKD_PARAM(Grouped<MixtureBackward<float>>) args) {
  Group group(args.group_width, device::shared_memory());
  for_each_row(group, args.rows, [&](int64_t index) {
    const MixtureRow<Group> row(args, group, nullptr, index);
    for (int k = 0; k < args.teachers; ++k) {
      const float w = row.weight(k);
      const bool reads = row.reads(w);
      Softmax state;
      if (reads) {
        state.max = device::load(args.row_stats + k * args.rows + index);
        state.sum = device::load(args.row_stats + (args.teachers + k) * args.rows + index);
      }
      const InputRow teacher = row.input(args.teacher[k]), upstream = row.input(args.upstream);
      Sum dot;
      for (int64_t c = group.rank(); reads && c < row.chunks(); c += group.size()) {
        float t[kChunk], g[kChunk];
        row.load(teacher, c, t);
        row.load(upstream, c, g);
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (c * kChunk + i < args.classes) sum += softmax_numerator(t[i], state.max, row.inv_t) * g[i];
        }
        dot.value += sum;
      }
      group.merge(dot, MergeSum{});
      const float mean = reads ? dot.value / state.sum : 0.0f;
      if (row.exists && group.rank() == 0) device::store(args.dots + k * args.rows + index, mean);
      if (row.exists && args.teacher_gradient[k] != nullptr) write_teacher_gradient(args, row, k, state, w, mean);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------- divergence

// e·ratio; +inf also where e has underflowed.
MTKD_DEVICE float infinite_or_product(float e, float ratio) { return ratio == infinity<float>() ? ratio : e * ratio; }

template <typename Group>
struct DivergenceRow : MixtureRow<Group> {
  using Base = MixtureRow<Group>;
  using Base::exists;
  using Base::group;
  using Base::index;
  using Base::inv_t;
  using Base::members;

  const MixtureDivergence<float>& args;
  float* dots;          // [K][threads of the block], or null where no weight wants a gradient
  bool active = false;  // some teacher is read
  bool some = false;    // some teacher has a weight
  bool empty = false;   // of those, one has no finite logit
  float total_weight = 0;
  Softmax student;

  MTKD_DEVICE DivergenceRow(const MixtureDivergence<float>& args, Group& group, Member* members, float* dots,
                            int64_t index, KeptRows kept)
      : Base(args, group, members, index, kept), args(args), dots(dots) {}

  MTKD_DEVICE float& dot(int k) const { return dots[k * device::block_threads() + device::thread_index()]; }

  MTKD_DEVICE void look_at_members() {
    for (int k = 0; k < args.teachers; ++k) {
      const Member m = members[k];
      active = active || m.read != 0;
      if (dots != nullptr) dot(k) = 0;
      if (m.weight == 0) continue;
      some = true;
      total_weight += m.weight;
      empty = empty || m.sum == 0;
    }
  }

  MTKD_DEVICE void forward() {
    if (this->copy_teachers()) this->copy(args.teachers, args.student);
    this->wait_for_copies();
    this->find_states();
    look_at_members();
    student = this->state_of(args.teachers, args.student, active);
    Sum value;
    for (int j = 0; this->has(j); ++j) value.value += absorb(j);
    group.merge(value, MergeSum{});
    const bool undefined = empty || student.sum == 0;
    if (exists && group.rank() == 0) {
      const float divergence = undefined ? std::numeric_limits<float>::quiet_NaN() : value.value;
      device::store(args.divergence + index, some ? divergence : 0.0f);
    }
    write_stats();
  }

  // A chunk of the second sweep: its part of the value; the student's gradient is written, the dots grow.
  MTKD_DEVICE float absorb(int j) const {
    float mixture[kChunk], ratio[kChunk], gradient[kChunk] = {};
    float value = 0;
    if (active) {
      float s[kChunk];
      this->mix(j, mixture);
      this->load(args.teachers, args.student, j, s);
      value = value_and_gradient(j, s, mixture, ratio, gradient);
      if (dots != nullptr) add_dots(j, ratio);
    }
    if (args.gradient != nullptr) {
      if (!some) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) gradient[i] = 0;
      }
      const OutputRow out = output_row(args.gradient, index, args.classes, args.student.dtype);
      store_chunk(out, this->chunk(j), args.classes, gradient);
    }
    return value;
  }

  MTKD_DEVICE float value_and_gradient(int j, const float (&s)[kChunk], const float (&mixture)[kChunk],
                                       float (&ratio)[kChunk], float (&gradient)[kChunk]) const {
    const float log_sum = log_of(student.sum), of_student = total_weight / student.sum;
    bool safe = true;
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      safe = safe && (mixture[i] >= kSafeMixture<float> || this->chunk(j) * kChunk + i >= args.classes);
    if (safe) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) ratio[i] = log_of(mixture[i]);
    } else {
      this->log_mixture(j, ratio);
    }
    float value = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float ds = shifted(s[i], student.max);
      const bool possible = ratio[i] != -infinity<float>();
      ratio[i] -= ds * inv_t - log_sum;
      value += possible ? infinite_or_product(mixture[i], ratio[i]) : 0.0f;
      gradient[i] = inv_t * (of_student * device::exp2(ds * (device::kLog2E * inv_t)) - mixture[i]);
    }
    return value;
  }

  MTKD_DEVICE void add_dots(int j, const float (&ratio)[kChunk]) const {
    for (int k = 0; k < args.teachers; ++k) {
      const Member m = members[k];
      if (m.read == 0) continue;
      float x[kChunk], sum = 0;
      this->load(k, args.teacher[k], j, x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float term = infinite_or_product(softmax_numerator(x[i], m.max, inv_t), ratio[i]);
        sum += x[i] == -infinity<float>() ? 0.0f : term;
      }
      dot(k) += sum;
    }
  }

  // ∂KL/∂w_k, the states, and zeros.
  MTKD_DEVICE void write_stats() const {
    const RowStats stats{args.teachers};
    auto write = [&](int i, float x) {
      if (exists && group.rank() == 0) device::store(args.row_stats + i * args.rows + index, x);
    };
    for (int k = 0; k < args.teachers; ++k) {
      const Member m = members[k];
      Sum total;
      if (dots != nullptr) total.value = dot(k);
      group.merge(total, MergeSum{});
      const bool undefined = m.sum == 0 || student.sum == 0;
      const float of_weight = undefined ? std::numeric_limits<float>::quiet_NaN() : total.value / m.sum + 1;
      write(stats.divergence(k), m.read != 0 ? of_weight : 0.0f);
      write(stats.weight(k), m.weight);
      write(stats.teacher_max(k), m.read != 0 ? m.max : 0.0f);
      write(stats.teacher_sum(k), m.read != 0 ? m.sum : 0.0f);
      write(stats.teacher_ce(k), 0.0f);
      write(stats.teacher_entropy(k), 0.0f);
    }
    write(stats.student_max(), active ? student.max : 0.0f);
    write(stats.student_sum(), active ? student.sum : 0.0f);
    write(stats.student_sum1(), 0.0f);
    write(stats.student_ce(), 0.0f);
    write(stats.scale(), 1.0f);
  }
};

// Shared memory: the group's scratch, [groups][K] members, [K][threads] dots, the rows that are kept.
template <typename Group, int max_threads>
MTKD_KERNEL(max_threads, 2)
mixture_divergence(MTKD_PARAM(Grouped<MixtureDivergence<float>>) args) {
  Group group(args.group_width, device::shared_memory());
  const int groups = device::block_threads() / group.size();
  Member* members = members_of(group, args.teachers);
  Member* end = members_of(group, 0) + groups * args.teachers;
  float* dots = args.weights != nullptr && !args.skip_zero_weights ? reinterpret_cast<float*>(end) : nullptr;
  for_each_row(group, args.rows, [&](int64_t index) {
    DivergenceRow<Group> row(args, group, members, dots, index, kept_rows(group, args, 1));
    row.forward();
  });
}

// -------------------------------------------------------------------------------------------------------------- launch

const char* only_float(const MixtureArgs<float>& args, DType student) {
  bool allowed = student != DType::f64;
  for (int k = 0; k < args.teachers; ++k) allowed = allowed && args.teacher[k].dtype != DType::f64;
  return allowed ? nullptr : "float64 logits have no CUDA kernel";
}

bool by_lanes(const MixtureArgs<float>& args) { return args.classes <= kLaneColumns; }

// 1, 2, 4, ... up to a warp: the lanes that share a row. With many teachers fewer rows share a block and its memory.
int lane_width(const MixtureArgs<float>& args) {
  constexpr int kManyTeachers = 16;
  int width = args.teachers > kManyTeachers ? 8 : 1;
  while (width * kChunk < args.classes && width < kWarp) width *= 2;
  return width;
}

// In shared memory beside the group's scratch: `members` for each group and teacher, `floats` for each thread and
// teacher.
LaunchShape shape_of(const MixtureArgs<float>& args, int block_threads, int members, int floats) {
  const bool lanes = by_lanes(args);
  const int threads = lanes ? kLaneThreads : block_threads;
  const int groups = lanes ? threads / lane_width(args) : 1;
  const int64_t blocks = (args.rows + groups - 1) / groups;
  const int scratch = lanes ? LaneGroup::scratch_bytes() : BlockGroup::scratch_bytes();
  const int kept = members * groups * static_cast<int>(sizeof(Member)) + floats * threads * 4;
  return {blocks < device::max_blocks() ? blocks : device::max_blocks(), threads, scratch + args.teachers * kept};
}

template <typename Args>
Grouped<Args> grouped(const Args& args) {
  return {args, lane_width(args), {0, 1}};
}

// Room for `rows` rows of logits, where there is.
template <typename Args>
void keep(Grouped<Args>& args, LaunchShape& shape, int rows, bool wide, int device) {
  const int64_t threads = by_lanes(args) ? args.group_width : shape.threads;
  const int64_t chunks = (args.classes + kChunk - 1) / kChunk, of_thread = (chunks + threads - 1) / threads;
  const int planes = wide ? 2 : 1;
  const int64_t bytes = shape.shared_bytes + rows * planes * of_thread * shape.threads * int64_t{sizeof(Words)};
  if (bytes > device::shared_memory_limit(device)) return;
  args.kept = {static_cast<int>(of_thread), planes};
  shape.shared_bytes = static_cast<int>(bytes);
}

bool any_wide(const MixtureArgs<float>& args) {
  bool wide = false;
  for (int k = 0; k < args.teachers; ++k) wide |= args.teacher[k].dtype == DType::f32;
  return wide;
}

}  // namespace

const char* mixture_forward_cuda(const MixtureForward<float>& args, int device, void* stream) {
  if (const char* error = only_float(args, DType::f32)) return error;
  if (args.rows == 0) return nullptr;
  Grouped<MixtureForward<float>> kernel_args = grouped(args);
  if (by_lanes(args)) {
    return device::launch(mixture_resident<LaneGroup, 1, kLaneThreads>, shape_of(args, 0, 1, 0), stream, kernel_args);
  }
  if (args.classes <= kResidentColumns) {
    return device::launch(mixture_resident<BlockGroup, kResidentChunks, kResidentThreads>,
                          shape_of(args, kResidentThreads, 1, 0), stream, kernel_args);
  }
  LaunchShape shape = shape_of(args, kBlockThreads, 1, 0);
  keep(kernel_args, shape, args.teachers, any_wide(args), device);
  return device::launch(mixture_streaming, shape, stream, kernel_args);
}

const char* mixture_backward_cuda(const MixtureBackward<float>& args, int, void* stream) {
  if (const char* error = only_float(args, DType::f32)) return error;
  if (args.rows == 0) return nullptr;
  const LaunchShape shape = shape_of(args, kBlockThreads, 0, 0);
  if (by_lanes(args)) {
    return device::launch(mixture_backward<LaneGroup, kLaneThreads>, shape, stream, grouped(args));
  }
  return device::launch(mixture_backward<BlockGroup, kBlockThreads>, shape, stream, grouped(args));
}

const char* mixture_divergence_cuda(const MixtureDivergence<float>& args, int device, void* stream) {
  if (const char* error = only_float(args, args.student.dtype)) return error;
  if (args.rows == 0) return nullptr;
  Grouped<MixtureDivergence<float>> kernel_args = grouped(args);
  LaunchShape shape = shape_of(args, kBlockThreads, 1, 1);
  keep(kernel_args, shape, args.teachers + 1, any_wide(args) || args.student.dtype == DType::f32, device);
  if (by_lanes(args)) {
    return device::launch(mixture_divergence<LaneGroup, kLaneThreads>, shape, stream, kernel_args);
  }
  return device::launch(mixture_divergence<BlockGroup, kBlockThreads>, shape, stream, kernel_args);
}

}  // namespace mtkd_fast
