// Every operator of the package. Tensors named out and weights are in the accumulation type of the
// first argument (float32 for half and float32, float64 for float64), lse is float64: at the size of a
// large score a float32 would not resolve exp(score - lse). [K] axes are present
// when the query or the scores have them. An empty bag has out = 0, lse = -inf, weights = 0.
// weights, and gradients that were not asked for, are empty tensors of shape [0].
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fusefeat, m) {
  m.def(
      "attention_pool(Tensor x, Tensor query, Tensor? mask, Tensor? cu_seqlens, float scale, bool need_weights) "
      "-> (Tensor out, Tensor lse, Tensor weights)");
  m.def(
      "attention_pool_backward(Tensor grad_out, Tensor? grad_weights, Tensor x, Tensor query, Tensor? mask, "
      "Tensor? cu_seqlens, float scale, Tensor out, Tensor lse, Tensor weights, bool need_grad_x, "
      "bool need_grad_query) -> (Tensor grad_x, Tensor grad_query)");
  m.def(
      "softmax_pool(Tensor values, Tensor scores, Tensor? mask, Tensor? cu_seqlens, bool need_weights) "
      "-> (Tensor out, Tensor lse, Tensor weights)");
  m.def(
      "softmax_pool_backward(Tensor grad_out, Tensor? grad_weights, Tensor values, Tensor scores, Tensor? mask, "
      "Tensor? cu_seqlens, Tensor out, Tensor lse, Tensor weights, bool need_grad_values, bool need_grad_scores) "
      "-> (Tensor grad_values, Tensor grad_scores)");
}
