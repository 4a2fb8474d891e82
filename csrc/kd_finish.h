// From the sums of a block's rows to their numbers: divergences, weights, losses, factors of the gradient; a row in
// each lane. Included once per instruction set.

// Divergences, and the numbers that computed weights come from. A teacher that was not read has 0.
template <typename T>
void finish_teachers(const KDForward<T>& args, const Sweep<T>& sweep, Block<T>& block) {
  const Vec<T> sum_s = block.student_state.sum.all(), log_s = log_of(sum_s);
  for (int k = 0; k < args.teachers; ++k) {
    const States<T>& state = block.teacher_state[k];
    TeacherNumbers<T>& numbers = block.teacher[k];
    const Vec<T> sum = state.sum.all(), log_t = log_of(sum), cross = state.cross.all();
    const Vec<T> divergence = args.divergence == Divergence::forward_kl
                                  ? kl_from_sums(cross, sum, log_t, sum_s, log_s, sweep.inv_t)
                                  : kl_from_sums(cross, sum_s, log_s, sum, log_t, sweep.inv_t);
    numbers.divergence = block.skips_zero_weights && numbers.weight.all() == 0 ? Vec<T>{} : divergence;
    if (args.rule == WeightRule::confidence)
      numbers.signal = cross_entropy(state.sum1.all(), state.max.all(), state.label.all());
    if (args.rule == WeightRule::entropy) numbers.signal = entropy(state.sum1.all(), state.dot1.all());
  }
}

// (1 − softmax_k CE_k)/(K−1).
template <typename T>
void confidence_weights(TeacherNumbers<T>* teachers, int n_teachers) {
  Vec<T> max = teachers[0].signal.all(), sum{};
  for (int k = 1; k < n_teachers; ++k) max = teachers[k].signal.all() > max ? teachers[k].signal.all() : max;
  for (int k = 0; k < n_teachers; ++k) sum += relative_exp(teachers[k].signal.all(), max);
  for (int k = 0; k < n_teachers; ++k)
    teachers[k].weight =
        n_teachers == 1 ? sum : (1 - relative_exp(teachers[k].signal.all(), max) / sum) / T(n_teachers - 1);
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
  const Vec<T> hard = cross_entropy(s.sum1.all(), s.max.all(), s.label.all());
  if (args.label_smoothing == 0) return hard;
  const Vec<T> uniform = log_of(s.sum1.all()) - s.total.all() / static_cast<T>(args.classes);
  if (args.label_smoothing == 1) return uniform;
  return (1 - args.label_smoothing) * hard + args.label_smoothing * uniform;
}

// Weights and losses; the loss of a row is before its weight.
template <typename T>
Vec<T> finish_block(const KDForward<T>& args, const Sweep<T>& sweep, Block<T>& block) {
  Vec<T> loss{};
  if (args.kd_scale != 0) {
    finish_teachers(args, sweep, block);
    if (args.rule == WeightRule::confidence) confidence_weights(block.teacher, args.teachers);
    if (args.rule == WeightRule::entropy) entropy_weights(block.teacher, args.teachers);
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

// The factors of the rows' gradients, from their numbers and block.scale.
template <typename T>
void gradient_factors(const KDArgs<T>& args, const Sweep<T>& sweep, Block<T>& block) {
  const Vec<T> f = block.scale.all(), per_logit = f * args.kd_scale * sweep.inv_t,
               sum_s = block.student_state.sum.all();
  const bool forward = args.divergence == Divergence::forward_kl;
  Vec<T> used{}, total_weight{}, mean_divergence{};
  Vec<T> soft{};  // summed as the teachers' factors are, so that C = 1 gives 0
  for (int k = 0; k < args.teachers; ++k) {
    TeacherNumbers<T>& teacher = block.teacher[k];
    const Vec<T> w = teacher.weight.all(), sum_t = block.teacher_state[k].sum.all();
    teacher.log_sum = log_of(sum_t);
    teacher.factor = w == 0 ? Vec<T>{} : per_logit * w / sum_t;
    used += w == 0 ? Vec<T>{} : splat(T(1));
    total_weight += w;
    soft += per_logit * w;
    mean_divergence += w == 0 ? Vec<T>{} : w * teacher.divergence.all();
  }
  StudentNumbers<T>& g = block.student;
  g.used = used;
  g.log_sum = log_of(sum_s);
  g.soft = used == 0 ? Vec<T>{} : (forward ? soft : per_logit) / sum_s;
  g.total_weight = total_weight;
  g.mean_divergence = mean_divergence - mean_divergence == 0 ? mean_divergence : number<Vec<T>>(NAN);
  if (args.ce_weight == 0) return;
  g.hard = f * args.ce_weight / block.student_state.sum1.all();
  g.constant = -f * args.ce_weight * args.label_smoothing / static_cast<T>(args.classes);
  g.label = f * args.ce_weight * (1 - args.label_smoothing);
}
