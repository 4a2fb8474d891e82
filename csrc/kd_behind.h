// Where rows of several tiles keep their exponentials: in the memory of gradients still to be written, those of the
// rows to come of the same piece. It takes no memory; the last rows of a piece compute theirs again. Included once per
// instruction set.

// At most so many bytes, as a second cache has room for. What comes back from further away costs more than to compute
// it again, as the last columns of a longer row do, from logits that are still near.
constexpr int64_t kBehindBytes = 1 << 20;

template <typename T>
class Behind {
 public:
  Behind() = default;  // nothing is kept
  Behind(const KDArgs<T>& args, const Gradient& gradient, int64_t end)
      : data_(reinterpret_cast<uintptr_t>(gradient.data)),
        row_bytes_(args.classes * element_bytes(gradient.dtype)),
        end_(data_ + end * row_bytes_) {
    const bool one_map = end <= args.inner || gradient.outer_stride == args.inner * args.classes;
    if (!one_map || gradient.class_stride != 1 || gradient.inner_stride != args.classes) *this = Behind();
  }

  // While row n is worked on. As far behind as there is room, so that it stays the same memory, in cache.
  void start(int64_t n, int64_t tiles, int64_t tile_bytes) {
    const auto first = static_cast<int64_t>((data_ + (n + 1) * row_bytes_ + 63) / 64 * 64);
    const int64_t room = std::min(static_cast<int64_t>(end_) - first, kBehindBytes);
    const int64_t fitting = std::clamp<int64_t>(room / tile_bytes, 0, tiles);
    begin_ = (end_ - fitting * tile_bytes) / 64 * 64;
    columns_ = fitting * kTileColumns;
  }

  int64_t columns() const { return columns_; }  // whose exponentials are kept
  T* tile(int64_t begin, int64_t tile_bytes) const {
    return reinterpret_cast<T*>(begin_ + begin / kTileColumns * tile_bytes);
  }

 private:
  uintptr_t data_ = 0;
  int64_t row_bytes_ = 0;
  uintptr_t end_ = 0, begin_ = 0;
  int64_t columns_ = 0;
};
