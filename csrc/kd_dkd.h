// The numbers of a block whose targets stand apart (dkd.h), a row in each lane. The sweeps over the other classes are
// those of the forward KL. Included once per instruction set.

// Reads the logits at the targets, and what follows from them at temperature τ.
template <typename T>
void set_targets_apart(const KDArgs<T>& args, const Sweep<T>& sweep, Block<T>& block) {
  auto odds = [&](States<T>& state, const Logits& x, auto reads) {
    state.label = Vec<T>{};
    for (int row = 0; row < block.rows; ++row)
      if (reads(row))
        state.label[row] = widen_one<T>(x.data, x.dtype, block.start(x, row) + block.target[row] * x.class_stride);
    return log_odds(state.label.all(), state.max.all(), log_of(state.sum.all()), sweep.inv_t);
  };
  block.student.odds = odds(block.student_state, args.student, [](int) { return true; });
  for (int k = 0; k < args.teachers && args.kd_scale != 0; ++k)
    block.teacher[k].odds = odds(block.teacher_state[k], args.teacher[k], [&](int row) { return block.reads(k, row); });
}

// The log-odds of the target at temperature 1.
template <typename T>
Vec<T> odds_at_one(const States<T>& state) {
  return log_odds(state.label.all(), state.max.all(), Vec<T>(log_of(state.sum1.all())), T(1));
}

// D of teacher k, `kl` that of the other classes.
template <typename T>
Vec<T> decoupled_divergence(const KDArgs<T>& args, const Block<T>& block, int k, Vec<T> kl) {
  const Vec<T> of_target = binary_kl(block.teacher[k].odds.all(), block.student.odds.all());
  return decoupled(of_target, kl_of_others(block.teacher_state[k].sum.all(), kl), args.beta);
}

template <typename T>
Vec<T> cross_entropy_apart(const States<T>& state) {
  return -log_sigmoid(odds_at_one(state));
}

template <typename T>
Vec<T> entropy_apart(const States<T>& state) {
  const Vec<T> sum1 = state.sum1.all();
  return entropy_with_target(odds_at_one(state), sum1, entropy(sum1, state.dot1.all()));
}

// mean_c(−log q[c]) at temperature 1.
template <typename T>
Vec<T> uniform_cross_entropy_apart(const States<T>& state, int64_t classes) {
  const Vec<T> label = state.label.all(), max = state.max.all();
  const Vec<T> total = state.total.all() + (label - offset_of(max));
  return log_sum_with_target(odds_at_one(state), label, max, state.sum1.all()) - total / static_cast<T>(classes);
}

// What the exponentials of teacher k and of the student weigh in the gradient, per unit of w_k·∂/∂D.
template <typename T>
GradientShare<T> share_apart(const KDArgs<T>& args, const Block<T>& block, int k, Vec<T> per_weight) {
  const Vec<T> sum = block.teacher_state[k].sum.all(), beta = sum == T{} ? Vec<T>{} : splat(args.beta);
  const Vec<T> gap = sigmoid(block.student.odds.all()) - sigmoid(block.teacher[k].odds.all());
  return {sum == T{} ? Vec<T>{} : per_weight * beta / sum, per_weight * (beta - gap), -per_weight * gap};
}

// The factors of the hard label's gradient, whose target stands apart too.
template <typename T>
void hard_factors_apart(const KDArgs<T>& args, Block<T>& block, Vec<T> hard) {
  StudentNumbers<T>& g = block.student;
  const Vec<T> odds = odds_at_one(block.student_state), sum1 = block.student_state.sum1.all();
  g.hard = sum1 == 0 ? Vec<T>{} : hard * sigmoid(-odds) / sum1;
  g.label = g.label.all() + hard * (1 - args.label_smoothing - sigmoid(odds));
}
