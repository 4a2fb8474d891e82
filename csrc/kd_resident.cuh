// Strategy A: a row stays on chip, so one pass gives its loss and its gradient. Memory sees K + 1 reads and one write,
// or no write where no gradient is asked for; what a row takes on chip does not grow with K, but for a few teachers on
// their way.
//
// With x_k the teacher's p (forward KL, DKD), log p (reverse KL) or of_student (elementwise), the gradient needs Σ w_k
// x_k. Known weights: one sum. Computed ones, which only the last teacher settles: Σ x_k and Σ v_k x_k, v_k = e^{CE_k −
// M} with a running maximum M, or H_k.
//
// x_k needs the sums of the teacher's whole row: a second pass over the tile. It is also where an elementwise
// divergence is summed.
#pragma once

#include <type_traits>

#include "kd_elementwise.cuh"
#include "kd_shared.cuh"
#include "kd_tiles.cuh"

namespace mtkd_fast {

// How one teacher enters the sums: by_signal fades, then plain += first·x, by_signal += second·x.
struct Share {
  float first, fade, second;
};

template <bool two_sums>
MTKD_DEVICE Share share_of(WeightRule rule, float known_weight, float signal, float& largest_signal) {
  if (!two_sums) return {known_weight, 1.0f, 0.0f};
  if (rule == WeightRule::entropy) return {1.0f, 1.0f, signal};
  const float max = larger(largest_signal, signal);
  const Share share{1.0f, relative_exp(largest_signal, max), relative_exp(signal, max)};
  largest_signal = max;
  return share;
}

// How a teacher's logits become x, given the row's maximum and sum: p is a factor times an exponential, log p a
// difference. The exponential is 2^{t·log2(e)/τ − reference}, one operation before it; what rounding took from the
// reference is in the factor, unless logits are so large that it were no number.
struct Likelihoods {
  float max;
  float log_sum;
  float inv_sum;
  float reference;    // max·log2(e)/τ
  float of_rounding;  // of all columns
  bool is_far;        // 2^{(t − max)·log2(e)/τ} then
};

template <Kind kind>
MTKD_DEVICE Likelihoods likelihoods_of(const TeacherSummary& teacher, const Terms& terms) {
  constexpr float kFar = 64;
  const float max = offset_of(teacher.max), reference = max * terms.log2e_t;
  const float rounded_off = fmaf(max, terms.log2e_t, -reference);
  const bool is_far = !(fabsf(rounded_off) < kFar);
  // Without a class beside a target that stands apart, p is 0.
  const bool nothing = kind == Kind::dkd && teacher.sum == 0;
  return {max,
          log_of(teacher.sum),
          nothing ? 0.0f : 1.0f / teacher.sum,
          reference,
          is_far ? 1.0f : device::exp2(-rounded_off),
          is_far};
}

template <Kind kind, bool two_sums, typename Group, typename Tile>
struct ResidentRow {
  static constexpr int kWidth = Tile::kWidth;
  static constexpr bool kIsLong = Tile::kPieces > 1;
  // Whether p is an exponential of the first pass, but for a factor.
  static constexpr bool kIsKept = Tile::kKeepsExponentials && (kind == Kind::forward_kl || kind == Kind::dkd);
  using Kept = float[kIsKept ? Tile::kPieces : 1][kWidth];
  const KDForward<float>& args;
  const Terms& terms;
  Group& group;
  Tile& tile;
  const Summaries summaries;  // shared
  const Row row;

  MTKD_DEVICE InputRow student_logits() const { return input_row(args.student, row.position); }
  MTKD_DEVICE InputRow teacher_logits(int k) const { return input_row(args.teacher[k], row.position); }

  MTKD_DEVICE Wanted wanted(const Logits& logits, bool reads) const {
    const int64_t first = row.position.inner - device::thread_index() % kWarp;
    const bool in_line = logits.inner_stride == 1 && first >= 0 && first + kWarp <= args.inner;
    return {input_row(logits, row.position), reads, in_line};
  }
  MTKD_DEVICE Wanted wanted_teacher(int k) const {
    if (k >= args.teachers) return {};
    return wanted(args.teacher[k], reads_teacher(args, row, known_weight(args, terms, k, row)));
  }
  MTKD_DEVICE void fetch_first() const {
    if constexpr (!Tile::kReadsOn) {
      tile.fetch_student(wanted(args.student, reads_student(args, row)));
#pragma unroll 1
      for (int k = 0; k < Tile::kAhead; ++k) tile.fetch_teacher(k, wanted_teacher(k));
    }
  }
  // Teacher k is in registers, or will not be.
  MTKD_DEVICE void fetch_later(int k) const {
    if constexpr (!Tile::kReadsOn) tile.fetch_teacher(k + Tile::kAhead, wanted_teacher(k + Tile::kAhead));
  }
  // The student, or a teacher that has been read, is done with.
  MTKD_DEVICE void fetch_next() const {
    if constexpr (Tile::kReadsOn) tile.fetch_next();
  }

  // From the first chunk on, whose `lead` first columns are not the row's.
  MTKD_DEVICE int64_t end() const { return args.classes + tile.lead(); }
  MTKD_DEVICE int64_t label() const {
    return row.label >= 0 && row.label_in_range ? row.label + tile.lead() : row.label;
  }
  MTKD_DEVICE Columns columns(int j, int c) const {
    return columns_of<kind>(tile.chunk(j, c), end(), label(), tile.lead());
  }
  MTKD_DEVICE void set_target_apart(int j, float (&x)[kWidth]) const {
#pragma unroll
    for (int c = 0; c < Tile::kChunks; ++c) set_apart<kind>(columns(j, c), x + c * kChunk);
  }

  // The sums of a thread's columns are relative to the largest of them: of an only piece x, or of all pieces, looked at
  // before any is exponentiated.
  MTKD_DEVICE float largest_of(const float (&x)[kWidth]) const { return largest(x, -infinity<float>()); }
  template <typename EachPiece>
  MTKD_DEVICE float largest_of_pieces(const EachPiece& each_piece) const {
    float max = -infinity<float>();
    if constexpr (kIsLong && kind == Kind::dkd) {
      each_piece([&](int j, float (&x)[kWidth]) {
        set_target_apart(j, x);
        max = largest(x, max);
      });
    } else if constexpr (kIsLong) {
      max = tile.largest_arrived();
    }
    return max;
  }

  MTKD_DEVICE SoftmaxState<float> absorb_student_row() {
    SoftmaxState<float> state;
    state.max = largest_of_pieces([&](const auto& step) { tile.template each_piece_of_student<1, false>(step); });
    tile.template each_piece_of_student<1, true>([&](int j, float (&x)[kWidth]) {
      Columns added[Tile::kChunks];
      set_target_apart(j, x);
      if (!kIsLong) state.max = largest_of(x);
#pragma unroll
      for (int c = 0; c < Tile::kChunks; ++c) added[c] = columns(j, c);
      add_student(state, x, added, terms);
    });
    group.merge(state, MergeStudent{terms});
    return state;
  }

  MTKD_DEVICE void student_piece(int j, float max, float (&ds)[kWidth]) const {
    tile.student_less(j, max, ds);
    set_target_apart(j, ds);
  }

  // What x of a piece is but for a factor. A log p of −inf stands as 0: its divergence is +inf already, or its column
  // weighs nothing.
  template <bool far>
  MTKD_DEVICE void values_of_piece(const float (&t)[kWidth], const Likelihoods& teacher, float (&x)[kWidth]) const {
    const auto exponential = [&](int i) {
      if constexpr (far) return device::exp2((t[i] - teacher.max) * terms.log2e_t);
      return device::exp2(fmaf(t[i], terms.log2e_t, -teacher.reference));
    };
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (kind == Kind::reverse_kl) {
        x[i] = t[i] == -infinity<float>() ? 0.0f : (t[i] - teacher.max) * terms.inv_t - teacher.log_sum;
      } else {
        x[i] = exponential(i);
      }
    }
  }
  // The factor of exponentials that are relative to the thread's own maximum.
  MTKD_DEVICE float factor_of_kept(float max, const Likelihoods& teacher) const {
    const float shift = max == -infinity<float>() ? 0.0f : max - teacher.max;
    return device::exp2(shift * terms.log2e_t) * teacher.inv_sum;
  }
  // The same for an elementwise divergence, and its part of D and G.
  MTKD_DEVICE void elements_of_piece(int j, const float (&t)[kWidth], const Softmax& student, const Softmax& teacher,
                                     ElementSums& sums, float (&x)[kWidth]) const {
    float ds[kWidth];
    tile.student_less(j, student.max, ds);
    auto p = [&](int i) { return probability(t[i], teacher, terms); };
    auto q = [&](int i) { return probability_of_shifted(ds[i], student, terms); };
    constexpr int kAtATime = Tile::kPieces == 1 && kWidth == kChunk ? kTogether : 2;  // beside sums of many columns
    for_each_element<kWidth, kAtATime>(args.divergence, args.beta, p, q, [&](int i, float, const Element<float>& of) {
      sums.add(of);
      x[i] = of.of_student;
    });
  }

  // First pass: the state of the thread's columns.
  MTKD_DEVICE TeacherState state_of_teacher(float student_max, Kept& kept) const {
    TeacherState state;
    state.max = largest_of_pieces([&](const auto& step) { tile.template each_piece_of_teacher<1, false>(step); });
    tile.template each_piece_of_teacher<kIsKept ? Tile::kPieces : 4, true>([&](int j, float (&x)[kWidth]) {
      const int at = kIsKept ? j : 0;
      float ds[kWidth], es[kWidth];
      set_target_apart(j, x);
      if (!kIsLong) state.max = largest_of(x);
      student_piece(j, student_max, ds);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        es[i] = kind == Kind::reverse_kl ? device::exp2(ds[i] * terms.log2e_t) : 0.0f;
      }
      add_teacher<kind, kIsLong>(state, x, ds, es, terms, kept[at]);
    });
    return state;
  }

  // Second pass, where exponentials are not kept: x of every column into the sums; an elementwise divergence.
  MTKD_DEVICE ElementSums sweep_teacher(const SoftmaxState<float>& student, const TeacherState& state,
                                        const Likelihoods& likelihoods, const Share& share, bool adds) {
    constexpr bool is_p = kind == Kind::forward_kl || kind == Kind::dkd;
    const Softmax p = softmax_of(state.max, state.sum), q = softmax_of(student.max, student.sum);
    const float factor = is_p ? likelihoods.of_rounding * likelihoods.inv_sum : 1.0f;
    ElementSums sums;
    const auto sweep = [&](auto far) {
      constexpr bool is_far = decltype(far)::value;
      // An elementwise step is too long for three of it, and a far one too rare.
      constexpr bool for_each_dtype = kind != Kind::elementwise && !is_far;
      tile.template each_piece_of_teacher<Tile::kPieces, for_each_dtype>([&](int j, float (&t)[kWidth]) {
        float x[kWidth];
        set_target_apart(j, t);
        if constexpr (kind == Kind::elementwise) {
          elements_of_piece(j, t, q, p, sums, x);
        } else {
          values_of_piece<is_far>(t, likelihoods, x);
        }
        if (adds) tile.accumulate(j, x, share.first * factor, share.second * factor);
      });
    };
    if (is_p && likelihoods.is_far) {
      sweep(std::bool_constant<is_p>());
    } else {
      sweep(std::false_type());
    }
    return sums;
  }

  // One teacher: its state into the summary, its columns into the sums, and a later teacher on its way.
  MTKD_DEVICE void absorb_teacher_row(int k, const SoftmaxState<float>& student, float log_s, float student_at_label,
                                      float& largest_signal) {
    const float weight = known_weight(args, terms, k, row);
    const bool reads = reads_teacher(args, row, weight);
    if (!group.any(reads)) {
      if (group.leads()) summaries[k] = TeacherSummary{};
      fetch_later(k);
      return;
    }
    tile.teacher_arrives(k, args.teacher[k].dtype, reads);
    fetch_later(k);
    // Where weights are known, one thread of a block needs it: the one that finishes the summary.
    const bool needs_label = reads && wants_label_of_teachers<kind>(args.rule) && (two_sums || group.leads());
    const float at_label = needs_label ? label_logit(teacher_logits(k), row) : 0.0f;

    Kept kept;
    TeacherState state = state_of_teacher(student.max, kept);
    const float own_max = state.max;
    group.merge(state, MergeTeacher<kind>{terms});
    TeacherSummary summary = summarise<kind, two_sums>(state, at_label, args.rule);

    const bool adds = args.gradient.data != nullptr && reads && (two_sums || weight != 0);
    const Share share = share_of<two_sums>(args.rule, weight, summary.signal, largest_signal);
    const Likelihoods likelihoods = likelihoods_of<kind>(summary, terms);
    ElementSums sums;
    if (adds && share.fade != 1) tile.fade(share.fade);  // the first teachers', and at a new largest signal
    if constexpr (kIsKept) {
      fetch_next();
      const float factor = factor_of_kept(own_max, likelihoods);
#pragma unroll
      for (int j = 0; j < Tile::kPieces && adds && tile.has(j); ++j) {
        tile.accumulate(j, kept[j], share.first * factor, share.second * factor);
      }
    } else {
      if (adds || kind == Kind::elementwise) sums = sweep_teacher(student, state, likelihoods, share, adds);
      fetch_next();
    }
    if constexpr (kind == Kind::elementwise) group.merge(sums, AddLanes{});
    if (!group.leads()) return;
    if constexpr (kind == Kind::elementwise) {
      summary.divergence = sums.divergence;
      summary.slope = sums.slope;
    } else {
      set_divergence<kind>(summary, state.cross, student, log_s, {at_label, student_at_label}, args.beta, terms);
    }
    summaries[k] = reads ? summary : TeacherSummary{};
  }

  MTKD_DEVICE void write_gradient(const SoftmaxState<float>& student, float at_label, const Mixture& mixture) const {
    const OutputRow out = output_row(args.gradient, row.position, tile.lead());
    StudentGradient g = student_gradient<kind>(args, row, row.scale, student, at_label, mixture);
    g.label = label();
#pragma unroll
    for (int j = 0; j < Tile::kPieces && tile.has(j); ++j) {
      float x[kWidth], mean[kWidth];
      student_piece(j, student.max, x);
      tile.mean(j, mixture.plain, mixture.by_signal, mean);
#pragma unroll
      for (int c = 0; c < Tile::kChunks; ++c) {
        const int64_t chunk = tile.chunk(j, c);
        gradient_of_chunk<kind>(g, terms, chunk * kChunk, x + c * kChunk, mean + c * kChunk);
        if (!row.counts) {
#pragma unroll
          for (int i = 0; i < kChunk; ++i) x[c * kChunk + i] = 0;
        }
        if (chunk * kChunk < end()) store_chunk(out, chunk, end(), x + c * kChunk, tile.lead());
      }
    }
  }

  MTKD_DEVICE void forward() {
    tile.begin_row(row.index);
    fetch_first();
    // One thread finishes the row; one of a block, the summaries. DKD's gradient of the hard label is everyone's.
    const bool finishes = kind == Kind::dkd ? group.leads() || args.ce_weight != 0 : group.rank() == 0;
    const bool needs_label = wants_label_of_student<kind>(args, row) && finishes;
    const float at_label = needs_label ? label_logit(student_logits(), row) : 0.0f;
    const bool reads = reads_student(args, row);
    tile.student_arrives(args.student.dtype, reads);
    const SoftmaxState<float> student = absorb_student_row();
    tile.shift_student(student.max);
    if (reads) fetch_next();
    const float ce = group.rank() == 0 ? student_cross_entropy<kind>(args, row, student, at_label) : 0.0f;

    tile.clear();
    float largest_signal = -infinity<float>();
    const float log_s = log_of(student.sum);
    for (int k = 0; k < args.teachers; ++k) absorb_teacher_row(k, student, log_s, at_label, largest_signal);
    group.sync();  // the summaries are there
    const bool exists = row.index < args.rows;
    const int lane = group.rank() % group.lanes();
    const bool writes = exists && group.rank() < group.lanes();
    const Mixture mixture = mix<kind>(args, terms, row, summaries, lane, group.lanes(), writes);
    if (!exists) return;
    if (group.rank() == 0) write_row(args, row, student, ce, mixture);
    if (args.gradient.data != nullptr) write_gradient(student, at_label, mixture);
  }
};

// Shared memory: the group's scratch, [K][rows of the block] summaries, the tile.
MTKD_HD int64_t summary_bytes(int summaries) {  // whole Words, for the tile that follows
  const int64_t bytes = summaries * static_cast<int64_t>(sizeof(TeacherSummary));
  return (bytes + sizeof(Words) - 1) / sizeof(Words) * sizeof(Words);
}

template <typename Tile, typename Group>
MTKD_DEVICE Tile tile_of(const typename Tile::Args& args, const Group& group, char* shared) {
  if constexpr (Tile::kReadsOn) {
    return Tile(args, group.rank(), shared, Group::place(), Group::places());
  } else {
    return Tile(args, group.rank(), shared);
  }
}

template <Kind kind, bool two_sums, typename Group, typename Tile>
MTKD_DEVICE void forward_rows(const typename Tile::Args& args) {
  Group group(args.group_width, device::shared_memory());
  const int rows_in_block = group.groups_in_block();
  TeacherSummary* summaries = summaries_of(group, device::shared_memory());
  Tile tile =
      tile_of<Tile>(args, group, reinterpret_cast<char*>(summaries) + summary_bytes(rows_in_block * args.teachers));
  Terms terms = terms_of(args, args.rule);
  terms.teacher_sum1 = two_sums;  // as the rule has it, known to the compiler
  terms.teacher_dot1 &= two_sums;

  // Lanes of one warp walk on together: a row beyond the last one does not count.
  const int first_of_warp = group.index_in_block() / group.groups_in_warp() * group.groups_in_warp();
  const int64_t step = Group::places() * rows_in_block;
  for (int64_t base = Group::place() * rows_in_block; base + first_of_warp < args.rows; base += step) {
    const int64_t index = base + group.index_in_block();
    ResidentRow<kind, two_sums, Group, Tile> row{args,
                                                 terms,
                                                 group,
                                                 tile,
                                                 {summaries + group.index_in_block(), rows_in_block},
                                                 read_row(args, args.items, index)};
    row.forward();
    group.sync();  // the summaries have been read
  }
}

template <Kind kind, bool two_sums, typename Group, typename Tile, int max_threads>
MTKD_KERNEL(max_threads, 1)
kd_resident(MTKD_PARAM(typename Tile::Args) args) {
  if constexpr (Group::kExists) forward_rows<kind, two_sums, Group, Tile>(args);
}

}  // namespace mtkd_fast
