// The rules by which a row weighs its teachers. kernels/weights.py is the Triton twin.
#pragma once

namespace mtkd_fast {

enum class WeightRule : int { uniform = 0, given = 1, confidence = 2, entropy = 3 };

struct NamedWeightRule {
  const char* name;
  WeightRule value;
};
constexpr NamedWeightRule kWeightRules[] = {{"uniform", WeightRule::uniform},
                                            {"given", WeightRule::given},
                                            {"confidence", WeightRule::confidence},
                                            {"entropy", WeightRule::entropy}};

}  // namespace mtkd_fast
