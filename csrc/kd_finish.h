// From the sums of a block's rows to their numbers: divergences, weights, losses, factors of the gradient; a row in
// each lane. Included once per instruction set.

// Divergences that come from sums, and the numbers that computed weights come from. A teacher that was not read has 0.
template <typename T>
void finish_teachers(const KDForward<T>& args, const Sweep<T>& sweep, Block<T>& block) {
  const bool apart = args.divergence == Divergence::dkd;
  const Vec<T> sum_s = block.student_state.sum.all(), log_s = block.student.log_sum.all();
  for (int k = 0; k < args.teachers; ++k) {
    const States<T>& state = block.teacher_state[k];
    TeacherNumbers<T>& numbers = block.teacher[k];
    const Vec<T> sum = state.sum.all(), log_t = log_of(sum), cross = state.cross.all();
    const Vec<T> kl = args.divergence == Divergence::reverse_kl
                          ? kl_from_sums(cross, sum_s, log_s, sum, log_t, sweep.inv_t)
                          : kl_from_sums(cross, sum, log_t, sum_s, log_s, sweep.inv_t);
    const Vec<T> divergence = apart ? decoupled_divergence(args, block, k, kl) : kl;
    numbers.log_sum = log_t;
    numbers.divergence = block.skips_zero_weights && numbers.weight.all() == 0 ? Vec<T>{} : divergence;
    if (args.rule == WeightRule::confidence)
      numbers.signal =
          apart ? cross_entropy_apart(state) : cross_entropy(state.sum1.all(), state.max.all(), state.label.all());
    if (args.rule == WeightRule::entropy)
      numbers.signal = apart ? entropy_apart(state) : entropy(state.sum1.all(), state.dot1.all());
  }
}

// (1 − softmax_k CE_k)/(K−1).
template <typename T>
void confidence_weights(TeacherNumbers<T>* teachers, int n_teachers) {
  if (n_teachers == 1) {  // 1, or NaN
    const Vec<T> signal = teachers[0].signal.all();
    teachers[0].weight = signal == signal ? splat(T(1)) : signal;
    return;
  }
  Vec<T> max = teachers[0].signal.all(), sum{};
  for (int k = 1; k < n_teachers; ++k) max = teachers[k].signal.all() > max ? teachers[k].signal.all() : max;
  for (int k = 0; k < n_teachers; ++k) {
    const Vec<T> e = relative_exp(teachers[k].signal.all(), max);
    teachers[k].weight = e;
    sum += e;
  }
  for (int k = 0; k < n_teachers; ++k) teachers[k].weight = (1 - teachers[k].weight.all() / sum) / T(n_teachers - 1);
}

// (1 − H_k/Σ H)/(K−1); Σ H = 0 gives 1/K.
template <typename T>
void entropy_weights(TeacherNumbers<T>* teachers, int n_teachers) {
  Vec<T> sum{};
  for (int k = 0; k < n_teachers; ++k) sum += teachers[k].signal.all();
  for (int k = 0; k < n_teachers; ++k) {
    const Vec<T> h = teachers[k].signal.all();
    const Vec<T> weight = n_teachers == 1 ? h / h : (1 - h / sum) / T(n_teachers - 1);
    teachers[k].weight = sum == 0 ? splat(T(1) / n_teachers) : weight;
  }
}

// −log q[y] at temperature 1, smoothed as in torch.nn.functional.cross_entropy.
template <typename T>
Vec<T> student_cross_entropy(const KDForward<T>& args, const States<T>& s) {
  const bool apart = args.divergence == Divergence::dkd;
  const Vec<T> hard = apart ? cross_entropy_apart(s) : cross_entropy(s.sum1.all(), s.max.all(), s.label.all());
  if (args.label_smoothing == 0) return hard;
  const Vec<T> uniform = apart ? uniform_cross_entropy_apart(s, args.classes)
                               : log_of(s.sum1.all()) - s.total.all() / static_cast<T>(args.classes);
  if (args.label_smoothing == 1) return uniform;
  return (1 - args.label_smoothing) * hard + args.label_smoothing * uniform;
}

// Weights and losses; the loss of a row is before its weight. sum_of_elements() sweeps once more for the divergences
// that are sums over the classes.
template <typename T, typename SumElements>
Vec<T> finish_block(const KDForward<T>& args, const Sweep<T>& sweep, Block<T>& block, SumElements sum_of_elements) {
  Vec<T> loss{};
  block.student.log_sum = log_of(block.student_state.sum.all());
  if (args.divergence == Divergence::dkd) set_targets_apart(args, sweep, block);
  if (args.kd_scale != 0) {
    finish_teachers(args, sweep, block);
    if (args.rule == WeightRule::confidence) confidence_weights(block.teacher, args.teachers);
    if (args.rule == WeightRule::entropy) entropy_weights(block.teacher, args.teachers);
    if (is_elementwise(args.divergence)) sum_of_elements();
    for (int k = 0; k < args.teachers; ++k) {
      const Vec<T> weight = block.teacher[k].weight.all();
      loss += weight == 0 ? Vec<T>{} : args.kd_scale * weight * block.teacher[k].divergence.all();
    }
  }
  if (args.ce_weight != 0) {
    const Vec<T> ce = student_cross_entropy(args, block.student_state);
    block.student.cross_entropy = ce;
    loss += args.ce_weight * ce;
  }
  return loss;
}

template <typename T>
GradientShare<T> gradient_share(const KDArgs<T>& args, const Block<T>& block, int k, Vec<T> per_weight) {
  if (args.divergence == Divergence::dkd) return share_apart(args, block, k, per_weight);
  if (is_elementwise(args.divergence)) return {-per_weight, -per_weight * block.teacher[k].slope.all(), Vec<T>{}};
  return {per_weight / block.teacher_state[k].sum.all(), per_weight, Vec<T>{}};
}

// The factors of the rows' gradients, from their numbers and block.scale.
template <typename T>
void gradient_factors(const KDArgs<T>& args, const Sweep<T>& sweep, Block<T>& block) {
  const Vec<T> f = block.scale.all(), per_logit = f * args.kd_scale * sweep.inv_t,
               sum_s = block.student_state.sum.all();
  const bool reverse = args.divergence == Divergence::reverse_kl, apart = args.divergence == Divergence::dkd;
  Vec<T> used{}, total_weight{}, mean_divergence{}, at_target{};
  Vec<T> soft{};  // summed as the teachers' factors are, so that C = 1 gives 0
  for (int k = 0; k < args.teachers; ++k) {
    TeacherNumbers<T>& teacher = block.teacher[k];
    const Vec<T> w = teacher.weight.all();
    const GradientShare<T> share = gradient_share(args, block, k, Vec<T>(per_logit * w));
    teacher.factor = w == 0 ? Vec<T>{} : share.of_teacher;
    used += w == 0 ? Vec<T>{} : splat(T(1));
    total_weight += w;
    soft += w == 0 ? Vec<T>{} : share.of_student;
    at_target += w == 0 ? Vec<T>{} : share.at_target;
    mean_divergence += w == 0 ? Vec<T>{} : w * teacher.divergence.all();
  }
  StudentNumbers<T>& g = block.student;
  g.used = used;
  g.soft = used == 0 ? Vec<T>{} : (reverse ? per_logit : soft) / sum_s;
  if (apart) g.soft = sum_s == 0 ? (soft == 0 ? Vec<T>{} : number<Vec<T>>(NAN)) : g.soft.all();
  g.label = at_target;
  g.total_weight = total_weight;
  g.mean_divergence = mean_divergence - mean_divergence == 0 ? mean_divergence : number<Vec<T>>(NAN);
  if (args.ce_weight == 0) return;
  g.hard = f * args.ce_weight / block.student_state.sum1.all();
  g.constant = -f * args.ce_weight * args.label_smoothing / static_cast<T>(args.classes);
  if (apart) return hard_factors_apart(args, block, Vec<T>(f * args.ce_weight));
  g.label = f * args.ce_weight * (1 - args.label_smoothing);
}
