// What a thread keeps in cache while it works on a block of rows: for the teachers the student's part of the tile, for
// the gradient the exponentials of the first sweep, which then need only be weighed. Included once per instruction set.

constexpr int64_t kBlockBytes = 128 << 10;  // of a block of short rows
constexpr int64_t kKeptBytes = 4 << 20;     // of a long row; past it, the exponentials are computed again

template <typename T>
class Scratch {
 public:
  Tile<T> share, out;
  Raise<T> student_raise;   // since the last tile
  T student_sum_before;     // of the last tile
  Lanes<T> student_lowest;  // s − max in this tile; −inf asks for care

  Scratch(const KDArgs<T>& args, bool gradient) : tiles_((args.classes + kTileColumns - 1) / kTileColumns) {
    const bool one_tile = tiles_ == 1;
    const int64_t pitch = pitch_of(args.classes);
    const int64_t row_bytes = pitch * (args.teachers + 2) * static_cast<int64_t>(sizeof(T));
    rows_ = one_tile ? std::clamp<int64_t>(kBlockBytes / row_bytes, 1, kLanes<T>) : 1;
    keeps_student_ = gradient && (one_tile || row_bytes <= kKeptBytes);
    keeps_teachers_ = keeps_student_ && args.divergence == Divergence::forward_kl;
    tile_pitch_ = one_tile ? pitch : pitch_of(kTileColumns);
    student_pitch_ = keeps_student_ ? pitch : tile_pitch_;
    teacher_pitch_ = keeps_teachers_ ? pitch : 0;

    const int64_t per_tile = rows_ * tile_pitch_, student = rows_ * student_pitch_;
    const int64_t teachers = keeps_teachers_ ? args.teachers * rows_ * pitch : tile_pitch_;
    const int64_t maxima = (args.teachers + 1) * rows_ * tiles_;
    const size_t bytes = (2 * per_tile + student + teachers + maxima) * sizeof(T);
    memory_.reset(static_cast<T*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    if (!memory_) throw std::bad_alloc();
    shifted_ = memory_.get() + per_tile;
    student_exps_ = shifted_ + per_tile;
    teacher_exps_ = student_exps_ + student;
    max_at_ = teacher_exps_ + teachers;
  }

  int rows() const { return rows_; }
  bool keeps_student() const { return keeps_student_; }
  bool keeps_teachers() const { return keeps_teachers_; }

  // Of the current tile:
  T* widened(int row) { return memory_.get() + row * tile_pitch_; }
  T* shifted(int row) { return shifted_ + row * tile_pitch_; }  // s − max

  // e^{(x−max)/τ} of the tile at `begin`, kept or of the current tile only; those of the teachers overwrite each other
  // if they are not kept.
  T* student_exps(int row, int64_t begin) {
    return student_exps_ + row * student_pitch_ + (keeps_student_ ? begin : 0);
  }
  T* teacher_exps(int k, int row, int64_t begin) {
    return teacher_exps_ + (k * rows_ + row) * teacher_pitch_ + (keeps_teachers_ ? begin : 0);
  }

  // The maximum that they are relative to: the largest logit when the tile passed by, not yet that of the row.
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
  bool keeps_student_, keeps_teachers_;
  std::unique_ptr<T, Free> memory_;
  T *shifted_, *student_exps_, *teacher_exps_, *max_at_;
};
