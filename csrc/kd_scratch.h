// What a thread keeps in cache while it works on a block of rows: for the teachers the student's part of the tile, for
// the gradient the exponentials of the first sweep, which then need only be weighed. Rows of several tiles keep them
// elsewhere (kd_behind.h). Included once per instruction set.

constexpr int64_t kBlockBytes = 192 << 10;  // of a block that goes along; no row is read while it is written
constexpr int64_t kKeptBytes = 4 << 20;     // of pixels with many classes
constexpr int64_t kKeptShare = 8;           // of the gradient's memory at most, the inverse
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
  if (bytes <= kAcrossBytes) return args.classes <= kShortRow || lies_in_planes(args.student);
  return lies_in_planes(args.student) && affordable(args, rows, bytes);
}

// Whether a gradient goes past the caches: rows that are long, or short and dense, so that a block of them is one
// piece.
template <typename T>
bool streams_gradient(const KDArgs<T>& args, const Gradient& of) {
  if (of.data == nullptr || of.class_stride != 1 || !can_stream<T>(of.dtype)) return false;
  const bool dense = goes_across(args, args.rows) && of.inner_stride == args.classes;
  return (dense || args.classes >= kStreamColumns) && outgrows_caches(of.dtype, args.rows, args.classes);
}

// What becomes of the exponentials of the first sweep, where the student's gradient weighs them.
enum class Exps { unused, kept, computed_again };

// The sums of a row that is gathered.
enum Sum { kSum, kSum1, kDot1, kCross, kSums };

template <typename T>
class Scratch {
  static constexpr int kSumsOfRow = kSums * kLanes<T>;  // numbers
  const bool across_;

 public:
  Tile<T> share, out;
  const bool streams;  // the student's gradient goes past the caches: a row at a time, or neighbouring rows together

  // For a piece of `rows` rows.
  Scratch(const KDArgs<T>& args, int64_t rows, Exps exps, const Behind<T>& behind, bool streams)
      : across_(goes_across(args, rows)),
        streams(streams),
        in_planes_(across_ && lies_in_planes(args.student)),
        keeps_(exps == Exps::kept && weighs_exps(args.divergence)),
        line_(across_ ? args.classes * kLanes<T> : args.classes),
        tiles_(across_ ? 1 : (args.classes + kTileColumns - 1) / kTileColumns),
        tile_pitch_(pitch_of(one_tile() ? line_ : kTileColumns)),
        behind_bytes_((args.teachers + 1) * tile_pitch_ * int64_t{sizeof(T)}),
        behind_(behind) {
    const int64_t sums_of_row = gathers() && exps != Exps::computed_again ? (args.teachers + 1) * kSumsOfRow : 0;
    const int64_t row_bytes = (tile_pitch_ * (args.teachers + 1) + sums_of_row) * int64_t{sizeof(T)};
    const int64_t fitting = std::clamp<int64_t>(kBlockBytes / row_bytes, 1, std::min<int64_t>(kLanes<T>, rows));
    lines_ = gathers() ? fitting : 1;
    rows_ = across_ ? kLanes<T> : lines_;
    const auto together = static_cast<uint64_t>(std::clamp<int64_t>(kTileColumns / line_, 1, kLanes<T>));
    together_ = gathers() ? static_cast<int>(std::bit_floor(together)) : 1;
    shifted_lines_ = at_one(args.temperature, true) == AtOne::own ? kLanes<T> : together_;
    teacher_pitch_ = exps != Exps::unused && weighs_exps(args.divergence) ? tile_pitch_ : 0;

    const int64_t per_tile = lines_ * tile_pitch_;
    const int64_t teachers = teacher_pitch_ ? args.teachers * per_tile : tile_pitch_;
    const int64_t references = one_tile() ? 0 : tiles_ * (args.teachers + 1);
    const int64_t widened = std::min<int64_t>(together_, lines_) * tile_pitch_,
                  shifted = std::min<int64_t>(shifted_lines_, lines_) * tile_pitch_;
    const size_t bytes = (widened + shifted + per_tile + teachers + lines_ * sums_of_row + references) * sizeof(T);
    memory_.reset(static_cast<T*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    if (!memory_) throw std::bad_alloc();
    shifted_ = memory_.get() + widened;
    student_exps_ = shifted_ + shifted;
    teacher_exps_ = student_exps_ + per_tile;
    sums_ = teacher_exps_ + teachers;
    references_ = sums_ + lines_ * sums_of_row;
  }

  // What the exponentials of a tile are relative to, of a row of several; tensor 0 is the student.
  T& reference(int tensor, int64_t begin) { return references_[tensor * tiles_ + begin / kTileColumns]; }

  // Whether row n may join the block. Pixels that do not count lie between those that do, but not too many.
  bool has_room(const Block<T>& block, int64_t n, int64_t inner) const {
    if (!in_planes_ || block.rows == 0) return block.rows < rows_;
    return block.rows < rows_ && n - block.n[0] < 2 * kLanes<T> && n / inner == block.outer[0];
  }

  // Before a block whose first row is n.
  void start(int64_t n) {
    if (keeps_ && !one_tile()) behind_.start(n, tiles_, behind_bytes_);
  }

  bool keeps(int64_t begin) const { return keeps_ && (one_tile() || begin < behind_.columns()); }
  bool across() const { return across_; }
  bool one_tile() const { return tiles_ == 1; }
  int64_t line() const { return line_; }  // numbers
  int64_t tile_columns() const { return across_ ? line_ / kLanes<T> : kTileColumns; }

  // Rows of a block that are swept together, a power of two: what the student leaves of them stays in the nearest
  // cache.
  int rows_together() const { return across_ ? kLanes<T> : together_; }

  // Whether a row's sums, a part in each lane, wait for those of the block's other rows.
  bool gathers() const { return one_tile() && !across_; }
  T* sums(int tensor, int row) { return sums_ + (tensor * lines_ + row) * kSumsOfRow; }

  // Of the rows that are swept together, or of all where the gradient wants them too:
  T* widened(int line) { return memory_.get() + (line & (together_ - 1)) * tile_pitch_; }
  T* shifted(int line) { return shifted_ + (line & (shifted_lines_ - 1)) * tile_pitch_; }  // s − reference

  // e^{(x−reference)/τ} of the tile at `begin`, kept or of the current tile only; those of the teachers overwrite each
  // other if they are not used.
  T* student_exps(int line, int64_t begin) {
    if (goes_behind(begin)) return behind_.tile(begin, behind_bytes_);
    return student_exps_ + line * tile_pitch_ + in_line(begin);
  }
  T* teacher_exps(int k, int line, int64_t begin) {
    if (goes_behind(begin)) return behind_.tile(begin, behind_bytes_) + (k + 1) * tile_pitch_;
    return teacher_exps_ + (k * lines_ + line) * teacher_pitch_ + in_line(begin);
  }

 private:
  int64_t in_line(int64_t begin) const { return one_tile() ? begin : 0; }
  bool goes_behind(int64_t begin) const { return !one_tile() && keeps(begin); }

  // From row to row: room for the padding of the last register, and no multiple of 4 KB, because such rows would all
  // map to the same sets of the cache.
  static int64_t pitch_of(int64_t columns) {
    constexpr int64_t kGroup = 4 * kLanes<T>;
    return (columns + kGroup - 1) / kGroup * kGroup + kLanes<T>;
  }

  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  const bool in_planes_, keeps_;
  const int64_t line_, tiles_, tile_pitch_, behind_bytes_;  // behind: a tile of all tensors
  Behind<T> behind_;
  int64_t rows_, lines_, teacher_pitch_;
  int together_, shifted_lines_;  // powers of two
  std::unique_ptr<T, Free> memory_;
  T *shifted_, *student_exps_, *teacher_exps_, *sums_, *references_;
};
