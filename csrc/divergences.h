// The divergences, p the teacher, q the student: KL(p‖q) and KL(q‖p). kernels/divergences.py is the Triton twin.
#pragma once

namespace mtkd_fast {

enum class Divergence : int { forward_kl = 0, reverse_kl = 1 };

struct NamedDivergence {
  const char* name;
  Divergence value;
};
constexpr NamedDivergence kDivergences[] = {{"forward_kl", Divergence::forward_kl},
                                            {"reverse_kl", Divergence::reverse_kl}};

}  // namespace mtkd_fast
