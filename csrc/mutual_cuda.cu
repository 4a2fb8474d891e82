// The op `mutual` on CUDA devices. A block takes one or more rows of all M students, a tile of columns at a time, in
// shared memory as d = z − max and e = e^{d/τ}: a warp reads and exponentiates the tile of one student, then a warp
// sums what the tile adds to one D_ij, then, if the tile is the whole row, a warp writes the gradient of one student.
//
//   forward    M reads, M writes where the rows fit on chip; else M reads, and O(N·M²) numbers
//   backward   M reads, M writes
#include "chunk.cuh"
#include "group.cuh"
#include "mutual.h"

namespace mtkd_fast {

#include "row_formulas.h"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kChunksAtOnce = 2;
constexpr int kTileBytes = 64 * 1024;    // of d and e in a block
constexpr int kOnChipBytes = 99 * 1024;  // of shared memory, what every GPU since Ampere has

template <typename Args>
struct MutualKernelArgs : Args {
  int rows_in_block;
  int columns;    // of a tile, a multiple of kChunk
  int64_t tiles;  // of a row
};

struct StudentState {
  float max, sum;
  float sum_before;    // of the last tile
  Raise<float> raise;  // since the last tile
};

MTKD_DEVICE int warp_index() { return device::thread_index() / kWarp; }
MTKD_DEVICE int lane_index() { return device::thread_index() % kWarp; }

// The block's shared memory. A student is one of a row in the block: s = row·M + i.
struct Shared {
  int students, columns, all;  // all = rows_in_block·M
  float* d;                    // [all, columns]
  float* e;                    // [all, columns]
  StudentState* states;        // [all]
  float* pairs;                // [rows_in_block, M, M]: cross sums, then D_ij
  float* weights;              // [M, M], a_ij
  float* roles;                // [2, M]: not 0 if student i learns from some, teaches some

  template <typename Args>
  MTKD_DEVICE explicit Shared(const MutualKernelArgs<Args>& args)
      : students(args.students), columns(args.columns), all(args.rows_in_block * args.students) {
    d = reinterpret_cast<float*>(device::shared_memory());
    e = d + all * columns;
    states = reinterpret_cast<StudentState*>(e + all * columns);
    pairs = reinterpret_cast<float*>(states + all);
    weights = pairs + all * students;
    roles = weights + students * students;
  }
  static int64_t bytes(int all, int students, int64_t columns) {
    const int64_t floats = 2 * all * columns + all * students + students * students + 2 * students;
    return floats * static_cast<int64_t>(sizeof(float)) + all * static_cast<int64_t>(sizeof(StudentState));
  }

  MTKD_DEVICE float weight(int i, int j) const { return weights[i * students + j]; }
  MTKD_DEVICE float& pair(int row, int i, int j) const { return pairs[(row * students + i) * students + j]; }
  MTKD_DEVICE bool learns(int i) const { return roles[i] != 0; }
  MTKD_DEVICE bool teaches(int i) const { return roles[students + i] != 0; }
};

MTKD_DEVICE void read_weights(const MutualArgs<float>& args, const Shared& shared) {
  const int m = args.students;
  for (int t = device::thread_index(); t < m * m; t += kThreads) {
    const bool diagonal = t / m == t % m;
    const float uniform = 1.0f / (m - 1);
    shared.weights[t] = diagonal ? 0.0f : args.pair_weights == nullptr ? uniform : device::load(args.pair_weights + t);
  }
  device::sync_block();
  for (int i = device::thread_index(); i < m; i += kThreads) {
    bool learns = false, teaches = false;
    for (int j = 0; j < m; ++j) {
      learns = learns || shared.weight(i, j) != 0;
      teaches = teaches || shared.weight(j, i) != 0;
    }
    shared.roles[i] = learns ? 1.0f : 0.0f;
    shared.roles[m + i] = teaches ? 1.0f : 0.0f;
  }
  device::sync_block();
}

// The block's rows: what a row is worth, 0 for one that does not count.
MTKD_DEVICE float row_weight(const MutualForward<float>& args, int64_t row) {
  if (row >= args.rows) return 0.0f;
  return args.row_weights == nullptr ? 1.0f : device::load(args.row_weights + row);
}

MTKD_DEVICE float row_weight(const MutualBackward<float>& args, int64_t row) {
  if (row >= args.rows) return 0.0f;
  return device::load(args.row_stats + MutualStats{args.students}.scale() * args.rows + row);
}

// ------------------------------------------------------------------------------------------------------------- a tile

// A warp: the tile's logits of one student, as they are, to d. The largest of the lane's.
MTKD_DEVICE float load_student(const InputRow& logits, int64_t first_chunk, int chunks, int64_t classes, float* d) {
  float max = -infinity<float>();
  for (int c = lane_index(); c < chunks; c += kChunksAtOnce * kWarp) {
    RawChunk raw[kChunksAtOnce];
#pragma unroll
    for (int u = 0; u < kChunksAtOnce; ++u) {
      raw[u] = empty_chunk(logits.dtype);
      if (c + u * kWarp < chunks) raw[u] = load_chunk(logits, first_chunk + c + u * kWarp, classes);
    }
#pragma unroll
    for (int u = 0; u < kChunksAtOnce; ++u) {
      if (c + u * kWarp >= chunks) continue;
      float z[kChunk];
      decode(raw[u], logits.dtype, z);
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        max = fmaxf(max, z[k]);
        d[(c + u * kWarp) * kChunk + k] = z[k];
      }
    }
  }
  return max;
}

// The same lane's share of the tile: d = z − max, e = e^{d/τ}. Returns the lane's sum of e.
MTKD_DEVICE float exponentiate(float* d, float* e, int chunks, float max, float log2e_t) {
  float sum = 0;
  for (int c = lane_index(); c < chunks; c += kWarp) {
#pragma unroll
    for (int k = c * kChunk; k < (c + 1) * kChunk; ++k) {
      d[k] = shifted(d[k], max);
      e[k] = device::exp2(d[k] * log2e_t);
      sum += e[k];
    }
  }
  return sum;
}

MTKD_DEVICE int chunks_of_tile(int64_t classes, int columns, int64_t first_chunk) {
  const int64_t left = (classes + kChunk - 1) / kChunk - first_chunk;
  return left < columns / kChunk ? static_cast<int>(left) : columns / kChunk;
}

// Calls body(row in the block, i) once a warp and student.
template <typename Args, typename Body>
MTKD_DEVICE void each_student(const MutualKernelArgs<Args>& args, Body body) {
  for (int s = warp_index(); s < args.rows_in_block * args.students; s += kWarps) {
    body(s / args.students, s % args.students);
  }
}

MTKD_DEVICE void absorb_students(const MutualKernelArgs<MutualForward<float>>& args, const Shared& shared,
                                 int64_t first_row, int64_t first_chunk, int chunks) {
  each_student(args, [&](int r, int i) {
    const int64_t row = first_row + r;
    if (row_weight(args, row) == 0 || !(shared.learns(i) || shared.teaches(i))) return;
    const int s = r * args.students + i;
    float *d = shared.d + s * shared.columns, *e = shared.e + s * shared.columns;
    StudentState state = shared.states[s];
    const InputRow logits = input_row(args.student[i], row_position(row, args.inner));
    const float found = max_lanes(load_student(logits, first_chunk, chunks, args.classes, d), kWarp);
    const float max = larger(state.max, found), inv_t = 1.0f / args.temperature;
    state.raise = Raise<float>(state.max, max, inv_t);
    state.sum_before = state.sum;
    state.max = max;
    state.sum =
        state.sum * state.raise.factor + sum_lanes(exponentiate(d, e, chunks, max, device::kLog2E * inv_t), kWarp);
    device::sync_warp();  // every lane has read the state
    if (lane_index() == 0) shared.states[s] = state;
  });
}

// Every D_ij, i ≠ j, has a number below M(M − 1).
struct Pair {
  int i, j;
  MTKD_DEVICE Pair(int number, int students) : i(number / (students - 1)), j(number % (students - 1)) { j += j >= i; }
};

MTKD_DEVICE void absorb_pairs(const MutualKernelArgs<MutualForward<float>>& args, const Shared& shared,
                              int64_t first_row, int chunks) {
  const int m = args.students, directed = m * (m - 1);
  for (int t = warp_index(); t < args.rows_in_block * directed; t += kWarps) {
    const int r = t / directed;
    const Pair p(t % directed, m);
    if (shared.weight(p.i, p.j) == 0 || row_weight(args, first_row + r) == 0) continue;
    const int learner = r * m + p.i, peer = r * m + p.j;
    const float *d_i = shared.d + learner * shared.columns, *d_j = shared.d + peer * shared.columns;
    const float* e_j = shared.e + peer * shared.columns;
    float sum = 0;
    for (int c = lane_index(); c < chunks * kChunk; c += kWarp) sum += cross_term(d_j[c], e_j[c], d_j[c], d_i[c]);
    sum = sum_lanes(sum, kWarp);
    const StudentState &x = shared.states[peer], &y = shared.states[learner];
    if (lane_index() == 0) {
      float& cross = shared.pair(r, p.i, p.j);
      cross = raise_cross(cross, x.sum_before, x.raise, y.raise) + sum;
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ gradient

// One warp, the tile of one student's gradient: see MutualBackward. `factor` is scale·upstream/τ of the row.
MTKD_DEVICE void write_gradient(const MutualArgs<float>& args, const Shared& shared, int r, int i, float factor,
                                int64_t row, int64_t first_chunk, int chunks) {
  const int m = args.students;
  const StudentState* states = shared.states + r * m;
  const float *d = shared.d + r * m * shared.columns, *e = shared.e + r * m * shared.columns;
  const bool learns = shared.learns(i), to_peers = !args.detach_peers && shared.teaches(i);
  const float inv_t = 1.0f / args.temperature, own = factor / states[i].sum;
  float learnt = 0, constant = 0;
  for (int j = 0; j < m; ++j) {
    learnt += shared.weight(i, j);
    const float taught = shared.weight(j, i);
    if (!to_peers || taught == 0) continue;
    constant += taught * (log_of(states[j].sum) - log_of(states[i].sum) - shared.pair(r, j, i));
  }
  const OutputRow out = output_row(args.gradient[i], row, args.classes, args.student[i].dtype);
  for (int c = lane_index(); c < chunks; c += kWarp) {
    const int at = c * kChunk;
    float g[kChunk] = {}, ratio[kChunk] = {};
    for (int j = 0; j < m; ++j) {
      if (learns && shared.weight(i, j) != 0) {
        const float share = shared.weight(i, j) * factor / states[j].sum;
#pragma unroll
        for (int k = 0; k < kChunk; ++k) g[k] += share * e[j * shared.columns + at + k];
      }
      if (to_peers && shared.weight(j, i) != 0) {
        const float taught = shared.weight(j, i) * inv_t;
#pragma unroll
        for (int k = 0; k < kChunk; ++k)
          ratio[k] += taught * (d[i * shared.columns + at + k] - d[j * shared.columns + at + k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      const float e_i = e[i * shared.columns + at + k];
      if (learns) g[k] = learnt * own * e_i - g[k];
      if (to_peers && e_i != 0) g[k] += own * e_i * (ratio[k] + constant);
    }
    store_chunk(out, first_chunk + c, args.classes, g);
  }
}

template <typename Args, typename Factor>
MTKD_DEVICE void write_gradients(const MutualKernelArgs<Args>& args, const Shared& shared, int64_t first_row,
                                 int64_t first_chunk, int chunks, Factor factor_of) {
  each_student(args, [&](int r, int i) {
    const int64_t row = first_row + r;
    if (args.gradient[i] == nullptr || row >= args.rows) return;
    const float factor = factor_of(row);
    const bool some = shared.learns(i) || (!args.detach_peers && shared.teaches(i));
    if (some && row_weight(args, row) != 0) {
      write_gradient(args, shared, r, i, factor, row, first_chunk, chunks);
      return;
    }
    const float zeros[kChunk] = {};
    const OutputRow out = output_row(args.gradient[i], row, args.classes, args.student[i].dtype);
    for (int c = lane_index(); c < chunks; c += kWarp) store_chunk(out, first_chunk + c, args.classes, zeros);
  });
}

// ------------------------------------------------------------------------------------------------------------- forward

MTKD_DEVICE float scale_of(const MutualForward<float>& args, int64_t row) {
  return row_weight(args, row) / (args.items == nullptr ? 1.0f : device::load(args.items));
}

// D_ij in the place of the cross sums, 0 for pairs and rows that do not count; row_loss and row_stats.
MTKD_DEVICE void finish_rows(const MutualKernelArgs<MutualForward<float>>& args, const Shared& shared,
                             int64_t first_row) {
  const int m = args.students;
  for (int t = device::thread_index(); t < args.rows_in_block * m * m; t += kThreads) {
    const int r = t / (m * m), i = t / m % m, j = t % m;
    const StudentState &x = shared.states[r * m + j], &y = shared.states[r * m + i];
    float d = 0;
    if (shared.weight(i, j) != 0 && row_weight(args, first_row + r) != 0)
      d = kl_from_sums(shared.pairs[t], x.sum, log_of(x.sum), y.sum, log_of(y.sum), 1.0f / args.temperature);
    shared.pairs[t] = d;
  }
  device::sync_block();

  const MutualStats stats{m};
  for (int r = warp_index(); r < args.rows_in_block; r += kWarps) {
    const int64_t row = first_row + r;
    if (row >= args.rows) continue;
    const float weight = row_weight(args, row);
    float loss = 0;
    for (int t = lane_index(); t < m * m; t += kWarp) {
      const float d = shared.pairs[r * m * m + t];
      if (shared.weights[t] != 0) loss += shared.weights[t] * d;
      if (args.keep_stats) device::store(args.row_stats + t * args.rows + row, d);
    }
    loss = sum_lanes(loss, kWarp);
    for (int i = lane_index(); i < m && args.keep_stats; i += kWarp) {
      const bool read = weight != 0 && (shared.learns(i) || shared.teaches(i));
      const StudentState& state = shared.states[r * m + i];
      device::store(args.row_stats + stats.max(i) * args.rows + row, read ? state.max : 0.0f);
      device::store(args.row_stats + stats.sum(i) * args.rows + row, read ? state.sum : 0.0f);
    }
    if (lane_index() != 0) continue;
    device::store(args.row_loss + row, weight == 0 ? 0.0f : weight * args.scale * loss);
    device::store(args.row_stats + stats.scale() * args.rows + row, scale_of(args, row));
  }
}

MTKD_KERNEL(kThreads, 2) mutual_forward(MTKD_PARAM(MutualKernelArgs<MutualForward<float>>) args) {
  const Shared shared(args);
  read_weights(args, shared);
  const int m = args.students;
  for (int64_t block = device::block_index(); block * args.rows_in_block < args.rows; block += device::grid_blocks()) {
    const int64_t first_row = block * args.rows_in_block;
    for (int s = device::thread_index(); s < shared.all; s += kThreads) {
      StudentState& state = shared.states[s];
      state.max = -infinity<float>();
      state.sum = state.sum_before = 0;
    }
    for (int t = device::thread_index(); t < shared.all * m; t += kThreads) shared.pairs[t] = 0;
    device::sync_block();
    int chunks = 0;
    for (int64_t tile = 0; tile < args.tiles; ++tile) {
      const int64_t first_chunk = tile * (args.columns / kChunk);
      chunks = chunks_of_tile(args.classes, args.columns, first_chunk);
      absorb_students(args, shared, first_row, first_chunk, chunks);
      device::sync_block();
      absorb_pairs(args, shared, first_row, chunks);
      device::sync_block();
    }
    finish_rows(args, shared, first_row);
    if (args.tiles == 1) {
      const float kd = args.scale / args.temperature;
      write_gradients(args, shared, first_row, 0, chunks, [&](int64_t row) { return scale_of(args, row) * kd; });
    }
    device::sync_block();  // everything of these rows has been read
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

MTKD_KERNEL(kThreads, 2) mutual_backward(MTKD_PARAM(MutualKernelArgs<MutualBackward<float>>) args) {
  const Shared shared(args);
  read_weights(args, shared);
  const int m = args.students;
  const MutualStats stats{m};
  const int64_t groups = (args.rows + args.rows_in_block - 1) / args.rows_in_block;
  for (int64_t block = device::block_index(); block < groups * args.tiles; block += device::grid_blocks()) {
    const int64_t first_row = block / args.tiles * args.rows_in_block;
    const int64_t first_chunk = block % args.tiles * (args.columns / kChunk);
    const int chunks = chunks_of_tile(args.classes, args.columns, first_chunk);
    for (int t = device::thread_index(); t < shared.all * m; t += kThreads) {
      const int64_t row = first_row + t / (m * m);
      shared.pairs[t] = row < args.rows ? device::load(args.row_stats + t % (m * m) * args.rows + row) : 0.0f;
    }
    each_student(args, [&](int r, int i) {
      const int64_t row = first_row + r;
      if (row_weight(args, row) == 0 || !(shared.learns(i) || shared.teaches(i))) return;
      const int s = r * m + i;
      float *d = shared.d + s * shared.columns, *e = shared.e + s * shared.columns;
      const float max = device::load(args.row_stats + stats.max(i) * args.rows + row);
      load_student(input_row(args.student[i], row_position(row, args.inner)), first_chunk, chunks, args.classes, d);
      exponentiate(d, e, chunks, max, device::kLog2E / args.temperature);
      if (lane_index() == 0) shared.states[s].sum = device::load(args.row_stats + stats.sum(i) * args.rows + row);
    });
    device::sync_block();
    write_gradients(args, shared, first_row, first_chunk, chunks, [&](int64_t row) {
      const float up = args.upstream == nullptr ? 1.0f : device::load(args.upstream + row * args.upstream_stride);
      return row_weight(args, row) * up * args.scale / args.temperature;
    });
    device::sync_block();
  }
}

// --------------------------------------------------------------------------------------------------------- host side

int64_t whole_chunks(int64_t columns) { return (columns + kChunk - 1) / kChunk * kChunk; }

int64_t row_bytes(int64_t columns, int students) {  // of d and e
  return 2 * whole_chunks(columns) * students * static_cast<int64_t>(sizeof(float));
}

// As many rows as give every warp a student, if they fit; long rows in tiles.
template <typename Args>
MutualKernelArgs<Args> plan(const Args& args) {
  const bool whole = mutual_fits_on_chip(args);
  int rows = kWarps / args.students > 1 ? kWarps / args.students : 1;
  while (whole && rows > 1 && rows * row_bytes(args.classes, args.students) > kTileBytes) rows /= 2;
  const int64_t fit = kTileBytes / (rows * row_bytes(kChunk, args.students)) * kChunk;
  const int64_t columns = whole ? whole_chunks(args.classes) : fit;
  return {args, rows, static_cast<int>(columns), (args.classes + columns - 1) / columns};
}

template <typename Args>
const char* launch(void (*kernel)(MTKD_PARAM(MutualKernelArgs<Args>)), const Args& args, bool split, void* stream) {
  for (int i = 0; i < args.students; ++i)
    if (args.student[i].dtype == DType::f64) return "float64 logits have no CUDA kernel";
  if (args.rows == 0) return nullptr;
  const MutualKernelArgs<Args> planned = plan(args);
  const int64_t bytes = Shared::bytes(planned.rows_in_block * args.students, args.students, planned.columns);
  const int64_t groups = (args.rows + planned.rows_in_block - 1) / planned.rows_in_block;
  const int64_t blocks = groups * (split ? planned.tiles : 1);
  return device::launch(
      kernel, {blocks < device::max_blocks() ? blocks : device::max_blocks(), kThreads, static_cast<int>(bytes)},
      stream, planned);
}

}  // namespace

bool mutual_fits_on_chip(const MutualArgs<float>& args) {
  return Shared::bytes(args.students, args.students, whole_chunks(args.classes)) <= kOnChipBytes;
}

const char* mutual_forward_cuda(const MutualForward<float>& args, int, void* stream) {
  bool wanted = false;
  for (int i = 0; i < args.students; ++i) wanted = wanted || args.gradient[i] != nullptr;
  if (wanted && !mutual_fits_on_chip(args)) return "the rows do not fit on chip: no gradient in the forward";
  return launch(mutual_forward, args, /*split=*/false, stream);
}

const char* mutual_backward_cuda(const MutualBackward<float>& args, int, void* stream) {
  return launch(mutual_backward, args, /*split=*/true, stream);
}

}  // namespace mtkd_fast
