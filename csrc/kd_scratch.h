// What a thread keeps in cache while it works on a block of rows: for the teachers the student's part of the tile, for
// the gradient the exponentials of the first sweep, which then need only be weighed. Included once per instruction set.

constexpr int64_t kBlockBytes = 128 << 10;  // of a block of short rows
constexpr int64_t kKeptBytes = 4 << 20;     // of a long row; past it, the exponentials are computed again
constexpr int64_t kKeptShare = 8;           // and so they are if they took more than this part of the gradient's memory
constexpr int64_t kShortRow = 128;  // classes up to which rows are worked on across (kd_block.h), wherever they lie

// Whether what a thread keeps of `rows` rows, beyond a block of short ones, is little beside their gradient.
template <typename T>
bool affordable(const KDArgs<T>& args, int64_t rows, int64_t bytes) {
  const int64_t gradient_bytes = rows * args.classes * element_bytes(args.student.dtype);
  return bytes <= std::min(kKeptBytes, gradient_bytes / kKeptShare);
}

// Short rows, and pixels, unless a line of each of their tensors is too much to keep.
template <typename T>
bool goes_across(const KDArgs<T>& args, int64_t rows) {
  const int64_t bytes = args.classes * kLanes<T> * int64_t{sizeof(T)} * (args.teachers + 2);
  if (bytes <= kBlockBytes) return args.classes <= kShortRow || lies_in_planes(args.student);
  return lies_in_planes(args.student) && affordable(args, rows, bytes);
}

// Whether a gradient goes past the caches: rows that are long, or short and dense, so that a block of them is one
// piece.
template <typename T>
bool streams_gradient(const KDArgs<T>& args, const Gradient& of) {
  if (of.data == nullptr || of.class_stride != 1 || of.dtype != kNative<T>) return false;
  const bool dense = goes_across(args, args.rows) && of.inner_stride == args.classes;
  return (dense || args.classes >= kStreamColumns) && outgrows_caches<T>(args.rows, args.classes);
}

template <typename T>
class Scratch {
  const bool across_;

 public:
  Tile<T> share, out;
  const bool streams;  // the student's gradient goes past the caches: a row at a time, or neighbouring rows together

  // For a thread that has `rows` rows to do.
  Scratch(const KDArgs<T>& args, int64_t rows, bool gradient, bool streams)
      : across_(goes_across(args, rows)),
        streams(streams),
        in_planes_(across_ && lies_in_planes(args.student)),
        line_(across_ ? args.classes * kLanes<T> : args.classes),
        tiles_(across_ ? 1 : (args.classes + kTileColumns - 1) / kTileColumns) {
    const int64_t pitch = pitch_of(line_), number = sizeof(T);
    const int64_t line_bytes = pitch * (args.teachers + 2) * number;
    const int64_t fitting = std::clamp<int64_t>(kBlockBytes / line_bytes, 1, std::min<int64_t>(kLanes<T>, rows));
    const int64_t lines = one_tile() && !across_ ? fitting : 1;
    rows_ = across_ ? kLanes<T> : lines;
    // The others weigh logarithms, which come from the logits.
    keeps_ = gradient && expectation_of(args.divergence) == Expectation::teacher &&
             (one_tile() || affordable(args, rows, line_bytes));
    tile_pitch_ = one_tile() ? pitch : pitch_of(kTileColumns);
    student_pitch_ = keeps_ ? pitch : tile_pitch_;
    teacher_pitch_ = keeps_ ? pitch : 0;

    lines_ = lines;
    const int64_t per_tile = lines * tile_pitch_, student = lines * student_pitch_;
    const int64_t teachers = keeps_ ? args.teachers * lines * pitch : tile_pitch_;
    const int64_t maxima = (args.teachers + 1) * lines * tiles_;
    const size_t bytes = (2 * per_tile + student + teachers + maxima) * number;
    memory_.reset(static_cast<T*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    if (!memory_) throw std::bad_alloc();
    shifted_ = memory_.get() + per_tile;
    student_exps_ = shifted_ + per_tile;
    teacher_exps_ = student_exps_ + student;
    max_at_ = teacher_exps_ + teachers;
  }

  // Whether row n may join the block. Pixels that do not count lie between those that do, but not too many.
  bool has_room(const Block<T>& block, int64_t n, int64_t inner) const {
    if (!in_planes_ || block.rows == 0) return block.rows < rows_;
    return block.rows < rows_ && n - block.n[0] < 2 * kLanes<T> && n / inner == block.outer[0];
  }

  bool keeps() const { return keeps_; }
  bool across() const { return across_; }
  bool one_tile() const { return tiles_ == 1; }
  int64_t line() const { return line_; }  // numbers
  int64_t tile_columns() const { return across_ ? line_ / kLanes<T> : kTileColumns; }

  // Of the current tile:
  T* widened(int line) { return memory_.get() + line * tile_pitch_; }
  T* shifted(int line) { return shifted_ + line * tile_pitch_; }  // s − max

  // e^{(x−max)/τ} of the tile at `begin`, kept or of the current tile only; those of the teachers overwrite each other
  // if they are not kept.
  T* student_exps(int line, int64_t begin) { return student_exps_ + line * student_pitch_ + (keeps_ ? begin : 0); }
  T* teacher_exps(int k, int line, int64_t begin) {
    return teacher_exps_ + (k * lines_ + line) * teacher_pitch_ + (keeps_ ? begin : 0);
  }

  // The largest logit when the tile passed by, which they are relative to; not yet that of the row.
  T& student_max_at(int line, int64_t begin) { return max_at_[line * tiles_ + tile_of(begin)]; }
  T& teacher_max_at(int k, int line, int64_t begin) {
    return max_at_[((k + 1) * lines_ + line) * tiles_ + tile_of(begin)];
  }

 private:
  int64_t tile_of(int64_t begin) const { return across_ ? 0 : begin / kTileColumns; }

  // From row to row: whole groups of four vectors, as gradient_of_kept takes them, and one more, because rows of
  // exactly 4 KB would all map to the same sets of the cache.
  static int64_t pitch_of(int64_t columns) {
    constexpr int64_t kGroup = 4 * kLanes<T>;
    return (columns + kGroup - 1) / kGroup * kGroup + kLanes<T>;
  }

  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  const bool in_planes_;
  const int64_t line_, tiles_;
  int64_t rows_, lines_, tile_pitch_, student_pitch_, teacher_pitch_;
  bool keeps_;
  std::unique_ptr<T, Free> memory_;
  T *shifted_, *student_exps_, *teacher_exps_, *max_at_;
};
