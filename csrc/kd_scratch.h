// What a thread keeps in cache while it works on a block of rows: for the teachers the student's part of the tile, for
// the gradient the exponentials of the first sweep, which then need only be weighed. Included once per instruction set.

constexpr int64_t kBlockBytes = 128 << 10;  // of a block of short rows
constexpr int64_t kKeptBytes = 4 << 20;     // of a long row; past it, the exponentials are computed again
constexpr int64_t kKeptShare = 8;           // and so they are if they took more than this part of the gradient's memory

template <typename T>
class Scratch {
 public:
  Tile<T> share, out;
  const bool streams;  // the student's gradient goes past the caches

  // For a thread that has `rows` rows to do at a time.
  Scratch(const KDArgs<T>& args, int64_t rows, bool gradient, bool streams)
      : streams(streams), tiles_((args.classes + kTileColumns - 1) / kTileColumns) {
    const int64_t pitch = pitch_of(args.classes), number = sizeof(T);
    const int64_t row_bytes = pitch * (args.teachers + 2) * number;
    const bool one_tile = tiles_ == 1;
    rows_ = one_tile ? std::clamp<int64_t>(kBlockBytes / row_bytes, 1, std::min<int64_t>(kLanes<T>, rows)) : 1;
    const int64_t gradient_bytes = rows * args.classes * element_bytes(args.student.dtype);
    const bool affordable = row_bytes <= std::min(kKeptBytes, gradient_bytes / kKeptShare);
    // The others weigh logarithms, which come from the logits.
    keeps_ = gradient && expectation_of(args.divergence) == Expectation::teacher && (one_tile || affordable);
    tile_pitch_ = one_tile ? pitch : pitch_of(kTileColumns);
    student_pitch_ = keeps_ ? pitch : tile_pitch_;
    teacher_pitch_ = keeps_ ? pitch : 0;

    const int64_t per_tile = rows_ * tile_pitch_, student = rows_ * student_pitch_;
    const int64_t teachers = keeps_ ? args.teachers * rows_ * pitch : tile_pitch_;
    const int64_t maxima = (args.teachers + 1) * rows_ * tiles_;
    const size_t bytes = (2 * per_tile + student + teachers + maxima) * number;
    memory_.reset(static_cast<T*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    if (!memory_) throw std::bad_alloc();
    shifted_ = memory_.get() + per_tile;
    student_exps_ = shifted_ + per_tile;
    teacher_exps_ = student_exps_ + student;
    max_at_ = teacher_exps_ + teachers;
  }

  int rows() const { return rows_; }
  bool keeps() const { return keeps_; }

  // Of the current tile:
  T* widened(int row) { return memory_.get() + row * tile_pitch_; }
  T* shifted(int row) { return shifted_ + row * tile_pitch_; }  // s − max

  // e^{(x−max)/τ} of the tile at `begin`, kept or of the current tile only; those of the teachers overwrite each other
  // if they are not kept.
  T* student_exps(int row, int64_t begin) { return student_exps_ + row * student_pitch_ + (keeps_ ? begin : 0); }
  T* teacher_exps(int k, int row, int64_t begin) {
    return teacher_exps_ + (k * rows_ + row) * teacher_pitch_ + (keeps_ ? begin : 0);
  }

  // The largest logit when the tile passed by, which they are relative to; not yet that of the row.
  T& student_max_at(int row, int64_t begin) { return max_at_[row * tiles_ + begin / kTileColumns]; }
  T& teacher_max_at(int k, int row, int64_t begin) {
    return max_at_[((k + 1) * rows_ + row) * tiles_ + begin / kTileColumns];
  }

 private:
  // From row to row: whole groups of four vectors, as share_of_kept takes them, and one more, because rows of exactly
  // 4 KB would all map to the same sets of the cache.
  static int64_t pitch_of(int64_t columns) {
    constexpr int64_t kGroup = 4 * kLanes<T>;
    return (columns + kGroup - 1) / kGroup * kGroup + kLanes<T>;
  }

  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  int64_t tiles_, rows_, tile_pitch_, student_pitch_, teacher_pitch_;
  bool keeps_;
  std::unique_ptr<T, Free> memory_;
  T *shifted_, *student_exps_, *teacher_exps_, *max_at_;
};
