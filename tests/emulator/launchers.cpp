// The launchers of the ops' headers under names that ctypes finds, and the sizes of what they are handed.
#include "attention.h"
#include "hint.h"
#include "kd.h"
#include "kd_variants.h"
#include "mixture.h"
#include "mutual.h"
#include "relation.h"

using namespace mtkd_fast;

extern "C" {

int64_t size_of_kd_forward() { return sizeof(KDForward<float>); }
int64_t size_of_kd_backward() { return sizeof(KDBackward<float>); }
int64_t size_of_kd_rescale() { return sizeof(KDRescale<float>); }
int64_t size_of_mutual_forward() { return sizeof(MutualForward<float>); }
int64_t size_of_mutual_backward() { return sizeof(MutualBackward<float>); }
int64_t size_of_hint() { return sizeof(HintArgs<float>); }
int64_t size_of_hint_fused() { return sizeof(HintFused<float>); }
int64_t size_of_relation_planes() { return sizeof(RelationPlanes); }
int64_t size_of_relation_angle() { return sizeof(RelationAngle); }
int64_t size_of_relation_distance() { return sizeof(RelationDistance); }
int64_t size_of_mixture_forward() { return sizeof(MixtureForward<float>); }
int64_t size_of_mixture_backward() { return sizeof(MixtureBackward<float>); }
int64_t size_of_mixture_divergence() { return sizeof(MixtureDivergence<float>); }
int64_t size_of_attention_maps() { return sizeof(AttentionMaps<float>); }
int64_t size_of_attention_pairs() { return sizeof(AttentionPairs<float>); }

void placement(const KDForward<float>* args, KDPlacement* found) { *found = kd_placement(*args, 0); }
int fits_on_chip(const KDForward<float>* args) { return kd_fits_on_chip(*args, args->rule, 0); }

const char* kd_forward(const KDForward<float>* args) { return kd_forward_cuda(*args, 0, nullptr); }
const char* kd_forward_registers(const KDForward<float>* args) { return kd_forward_in_registers(*args, 0, nullptr); }
const char* kd_forward_short(const KDForward<float>* args) {
  return kd_forward_in_shared_memory(*args, {1, true, 1}, 0, nullptr);
}
const char* kd_forward_shared(const KDForward<float>* args) {
  return kd_forward_in_shared_memory(*args, {1, false, 2}, 0, nullptr);
}
const char* kd_forward_pairs(const KDForward<float>* args) {
  return kd_forward_in_shared_memory(*args, {2, false, 2}, 0, nullptr);
}
const char* kd_forward_clusters(const KDForward<float>* args) {
  return kd_forward_in_shared_memory(*args, {16, false, 1}, 0, nullptr);
}
const char* kd_forward_stream(const KDForward<float>* args) { return kd_forward_streaming(*args, 0, nullptr); }
const char* kd_forward_pixels(const KDForward<float>* args) { return kd_forward_of_pixels(*args, 0, nullptr); }
const char* kd_forward_stream_of_pixels(const KDForward<float>* args) {
  return kd_forward_streaming_of_pixels(*args, 0, nullptr);
}
const char* kd_backward(const KDBackward<float>* args) { return kd_backward_cuda(*args, 0, nullptr); }
const char* kd_rescale(const KDRescale<float>* args) { return kd_rescale_cuda(*args, 0, nullptr); }
const char* hint_forward(const HintArgs<float>* args) { return hint_forward_cuda(*args, 0, nullptr); }
const char* hint_fused(const HintFused<float>* args) { return hint_fused_cuda(*args, 0, nullptr); }
const char* hint_backward(const HintArgs<float>* args) { return hint_backward_cuda(*args, 0, nullptr); }
const char* relation_planes(const RelationPlanes* args) { return relation_planes_cuda(*args, 0, nullptr); }
const char* relation_angle(const RelationAngle* args) { return relation_angle_cuda(*args, 0, nullptr); }
const char* relation_distance(const RelationDistance* args) { return relation_distance_cuda(*args, 0, nullptr); }
const char* mixture_forward(const MixtureForward<float>* args) { return mixture_forward_cuda(*args, 0, nullptr); }
const char* mixture_backward(const MixtureBackward<float>* args) { return mixture_backward_cuda(*args, 0, nullptr); }
const char* mixture_divergence(const MixtureDivergence<float>* args) {
  return mixture_divergence_cuda(*args, 0, nullptr);
}
int mutual_on_chip(const MutualForward<float>* args) { return mutual_fits_on_chip(*args); }
const char* mutual_forward(const MutualForward<float>* args) { return mutual_forward_cuda(*args, 0, nullptr); }
const char* mutual_backward(const MutualBackward<float>* args) { return mutual_backward_cuda(*args, 0, nullptr); }
const char* attention_energy(const AttentionMaps<float>* args) { return attention_energy_cuda(*args, 0, nullptr); }
const char* attention_distance(const AttentionPairs<float>* args) { return attention_distance_cuda(*args, 0, nullptr); }
const char* attention_gradient(const AttentionMaps<float>* args) { return attention_gradient_cuda(*args, 0, nullptr); }
}
