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
  // The product of two matrices, float32 or float64, the same for any number of threads. CPU only.
  m.def("mm(Tensor a, Tensor b) -> Tensor");

  // Rows are those of context (when given), then those of input, addressed in place; logits are
  // z = margin * (row . weight^T + bias). operand: 0 multiplies the operands as they are, 1 rounds them to
  // bfloat16 first, 2 to float16 (autocast). Rows whose row_weight is 0 are not read: their row results are 0.
  // Results are in the accumulation type of input; gradients have the dtype of what they belong to, and are
  // empty when needs, in the order of the results, does not ask for them. keep_rows: how many rows' logits the
  // forward leaves in kept [keep_rows,F] for its backward.
  // row_excess = sum_k max(z_k - margin, 0); fired [F] int64 counts the rows with z > margin; both are empty
  // without with_clamp.
  m.def(
      "shared_penalty(Tensor? context, Tensor input, Tensor weight, Tensor? bias, float margin, Tensor? row_weight, "
      "int operand, bool with_clamp, SymInt keep_rows) "
      "-> (Tensor row_entropy, Tensor lse, Tensor prob_sum, Tensor row_excess, Tensor fired, Tensor kept)");
  m.def(
      "shared_penalty_backward(Tensor? grad_row_entropy, Tensor? grad_lse, Tensor? grad_prob_sum, "
      "Tensor? grad_row_excess, Tensor? context, Tensor input, Tensor weight, Tensor? bias, float margin, "
      "Tensor? row_weight, int operand, Tensor row_entropy, Tensor lse, Tensor kept, bool[] needs) "
      "-> (Tensor grad_context, Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_row_weight)");
  m.def(
      "clamped_reg(Tensor? context, Tensor input, Tensor weight, Tensor? bias, float margin, Tensor? row_weight, "
      "int operand) -> (Tensor row_excess, Tensor fired)");
  m.def(
      "clamped_reg_backward(Tensor grad_row_excess, Tensor? context, Tensor input, Tensor weight, Tensor? bias, "
      "float margin, Tensor? row_weight, int operand, bool[] needs) "
      "-> (Tensor grad_context, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");

  // Scalars of all rows with weight 1 each: penalty = entropy_weight mean(row_entropy) + balance_weight
  // KL(prob_sum / N || uniform), and reg = reg_scale sum(row_excess) + reg_shift, empty without with_reg. CPU only.
  m.def(
      "shared_loss(Tensor? context, Tensor input, Tensor weight, Tensor? bias, float margin, int operand, "
      "float entropy_weight, float balance_weight, bool with_reg, float reg_scale, float reg_shift, SymInt keep_rows) "
      "-> (Tensor penalty, Tensor reg, Tensor row_entropy, Tensor lse, Tensor prob_sum, Tensor kept)");
  m.def(
      "shared_loss_backward(Tensor? grad_penalty, Tensor? grad_reg, Tensor? context, Tensor input, Tensor weight, "
      "Tensor? bias, float margin, int operand, float entropy_weight, float balance_weight, bool with_reg, "
      "float reg_scale, float reg_shift, Tensor row_entropy, Tensor lse, Tensor prob_sum, Tensor kept, bool[] needs) "
      "-> (Tensor grad_context, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "clamped_loss(Tensor? context, Tensor input, Tensor weight, Tensor? bias, float margin, int operand, "
      "float scale, float shift) -> Tensor");
  m.def(
      "clamped_loss_backward(Tensor grad, Tensor? context, Tensor input, Tensor weight, Tensor? bias, float margin, "
      "int operand, float scale, float shift, bool[] needs) "
      "-> (Tensor grad_context, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");

  m.def(
      "shared_assignment(Tensor? context, Tensor input, Tensor weight, Tensor? bias, float margin, int operand) "
      "-> Tensor");
  m.def(
      "shared_assignment_backward(Tensor grad, Tensor? context, Tensor input, Tensor weight, Tensor? bias, "
      "float margin, int operand, Tensor assignment, bool[] needs) "
      "-> (Tensor grad_context, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "clamped_activation(Tensor? context, Tensor input, Tensor weight, Tensor? bias, float margin, int operand) "
      "-> Tensor");
  m.def(
      "clamped_activation_backward(Tensor grad, Tensor? context, Tensor input, Tensor weight, Tensor? bias, "
      "float margin, int operand, bool[] needs) "
      "-> (Tensor grad_context, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}
