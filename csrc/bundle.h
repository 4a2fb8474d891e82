// Registers that take every step side by side. A chain of dependent instructions, such as an exponential's, leaves the
// multipliers waiting; the processor looks ahead some 10 chains, and 2 of them abreast are 20. Included once per
// instruction set.

template <typename T, int N>
struct Bundle {
  static constexpr int size = N;
  Vec<T> of[N];
};

constexpr int kAbreast = 2;

template <int N, typename T>
MTKD_INLINE Bundle<T, N> load_bundle(const T* from) {
  Bundle<T, N> x;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x.of[i] = load(from + i * kLanes<T>);
  return x;
}

template <typename T, int N>
MTKD_INLINE void store(T* to, const Bundle<T, N>& x) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) store(to + i * kLanes<T>, x.of[i]);
}

// Register i of an operand: of a bundle its own, else the one that all share.
template <typename T, int N>
MTKD_INLINE Vec<T> part(const Bundle<T, N>& x, int i) {
  return x.of[i];
}
template <typename X>
MTKD_INLINE X part(const X& x, int) {
  return x;
}

// f of every register, with the operands that stand beside it.
template <typename F, typename T, int N, typename... More>
MTKD_INLINE Bundle<T, N> each(F f, const Bundle<T, N>& x, const More&... more) {
  Bundle<T, N> y;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) y.of[i] = f(x.of[i], part(more, i)...);
  return y;
}

template <typename T, int N, typename Y>
MTKD_INLINE Bundle<T, N> operator+(const Bundle<T, N>& x, const Y& y) {
  return each([](Vec<T> a, auto b) { return a + b; }, x, y);
}
template <typename T, int N, typename Y>
MTKD_INLINE Bundle<T, N> operator-(const Bundle<T, N>& x, const Y& y) {
  return each([](Vec<T> a, auto b) { return a - b; }, x, y);
}
template <typename T, int N, typename Y>
MTKD_INLINE Bundle<T, N> operator*(const Bundle<T, N>& x, const Y& y) {
  return each([](Vec<T> a, auto b) { return a * b; }, x, y);
}

// Into one sum, a register after the other.
template <typename T, int N>
MTKD_INLINE void add_to(Vec<T>& sum, const Bundle<T, N>& x) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) sum += x.of[i];
}

template <typename V>
MTKD_INLINE void raise_to(V& max, const V& x) {
  max = larger_of(max, x);
}
template <typename T, int N>
MTKD_INLINE void raise_to(Vec<T>& max, const Bundle<T, N>& x) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) max = larger_of(max, x.of[i]);
}
