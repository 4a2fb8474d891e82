// The passes of the distance "attention" on tensors; their autograd is that of the op `hint`.
#include "attention.h"
#include "pairs.h"

namespace mtkd_fast {
namespace {

bool lies_channels_last(const Tensor& f) { return f.movedim(1, -1).is_contiguous(); }

// A map that lies neither way is copied. One position is one row of channels, either way.
Tensor laid_out(const Tensor& f) { return lies_channels_last(f) ? f : f.contiguous(); }

int64_t positions_of(const Tensor& f) {
  int64_t positions = 1;
  for (int64_t d = 2; d < f.dim(); ++d) positions *= f.size(d);
  return positions;
}

// One side of the pairs, and the tensors that it points into.
template <typename T>
struct Side : AttentionMaps<T> {
  std::vector<Tensor> features;
  OptionalTensor weights_kept;

  Side(TensorList maps, TensorList of_positions, const OptionalTensor& given) {
    this->samples = maps[0].size(0);
    this->pairs = static_cast<int>(maps.size());
    for (size_t k = 0; k < maps.size(); ++k) add(maps[k], of_positions[k]);
    weights_kept = in_compute_dtype(given, dtype_as<T>());
    this->weights = pair_weights<T>(weights_kept, this->pairs, this->samples);
  }

 private:
  void add(const Tensor& map, const Tensor& of_positions) {
    TORCH_CHECK_VALUE(map.dim() > 2 && map.size(0) == this->samples && map.device() == of_positions.device(),
                      "features must be maps [N, C, ...] of one N, on one device");
    const Tensor f = laid_out(map);
    const int64_t positions = positions_of(f);
    TORCH_CHECK_VALUE(positions > 0, "features must be maps [N, C, ...] of one or more positions, got ", map.sizes());
    TORCH_CHECK_VALUE(of_positions.scalar_type() == dtype_as<T>() && of_positions.is_contiguous() &&
                          of_positions.numel() == this->samples * positions,
                      "slopes must be what the forward returned");
    T* numbers = const_cast<T*>(of_positions.const_data_ptr<T>());  // written by the energy pass alone
    this->map[features.size()] = {f.const_data_ptr(),   nullptr, numbers, f.size(1), positions, dtype_of(f),
                                  lies_channels_last(f)};
    features.push_back(f);
  }
};

using Forward = std::tuple<Tensor, std::vector<Tensor>>;

template <typename T>
Forward forward(TensorList student, TensorList teacher, const OptionalTensor& weights) {
  const at::Device device = student[0].device();
  const auto options = student[0].options().dtype(dtype_as<T>());
  const int64_t samples = student[0].size(0), elements = mean_elements(student);
  std::vector<Tensor> slopes;
  for (TensorList side : {student, teacher})
    for (const Tensor& f : side) slopes.push_back(at::empty({samples, positions_of(f)}, options));

  const TensorList all(slopes);
  const Side<T> f(student, all.slice(0, student.size()), weights), g(teacher, all.slice(student.size()), weights);
  const int64_t units = f.pairs * samples;
  run<AttentionMaps<T>>(device, f, {units, elements}, attention_energy_cpu, MTKD_CUDA_LAUNCHER(attention_energy_cuda));
  run<AttentionMaps<T>>(device, g, {units, elements}, attention_energy_cpu, MTKD_CUDA_LAUNCHER(attention_energy_cuda));

  Tensor distance = at::empty({f.pairs, samples}, options);
  AttentionPairs<T> both{samples, f.pairs, {}, f.weights, distance.template mutable_data_ptr<T>()};
  for (int k = 0; k < f.pairs; ++k) {
    TORCH_CHECK_VALUE(f.map[k].positions == g.map[k].positions, "the maps of a pair must have the same positions");
    both.pair[k] = {f.map[k].of_positions, g.map[k].of_positions, f.map[k].positions};
  }
  run<AttentionPairs<T>>(device, both, {units, 6 * mean_elements(slopes)}, attention_distance_cpu,
                         MTKD_CUDA_LAUNCHER(attention_distance_cuda));
  return {distance, slopes};
}

Forward attention_forward(TensorList student, TensorList teacher, const OptionalTensor& weights) {
  check_pairs(student, teacher);
  return with_compute_type(dtype_of_pairs(student, teacher),
                           [&](auto zero) { return forward<decltype(zero)>(student, teacher, weights); });
}

std::vector<Tensor> attention_backward(TensorList features, TensorList slopes, const Tensor& weights,
                                       c10::List<bool> needs) {
  check_pairs(features, slopes);
  return with_compute_type(slopes[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Side<T> side(features, slopes, weights);
    std::vector<Tensor> gradients;
    for (int k = 0; k < side.pairs; ++k) {
      const Tensor& f = side.features[k];
      gradients.push_back(needs[k] ? at::empty_like(f) : at::empty({0}, f.options()));
      if (f.is_cpu()) ask_for_huge_pages(gradients[k]);
      side.map[k].gradient = needs[k] ? gradients[k].mutable_data_ptr() : nullptr;
    }
    run<AttentionMaps<T>>(features[0].device(), side, {side.pairs * side.samples, 2 * mean_elements(features)},
                          attention_gradient_cpu, MTKD_CUDA_LAUNCHER(attention_gradient_cuda));
    return gradients;
  });
}

}  // namespace

MTKD_PASSES(m) {
  m.impl("attention_forward", attention_forward);
  m.impl("attention_backward", attention_backward);
}

}  // namespace mtkd_fast
