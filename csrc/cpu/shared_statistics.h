// The statistics of the assignment and their gradients, as the operators on them are built.
#pragma once

#include <optional>

#include "shared_phases.h"

namespace fusefeat::cpu {

struct SharedStatistics {
  Tensor row_entropy, lse, prob_sum, row_excess, fired, kept;  // empty where not asked for
};

SharedStatistics shared_statistics(
    const SharedProblem& problem, const Tensor& input, const OptionalTensor& row_weight, bool with_excess,
    bool with_fired, int64_t keep_rows, ScalarType kept_type);

// Whether float16 is fine enough for the logits that matter, those near lse, of rows [begin, begin + rows).
bool stand_rounding(const Buffer& lse, int64_t begin, int64_t rows);

// What comes in for the statistics, of the rows that take part, the rows' times margin; absent where nothing does.
struct StatisticsGradients {
  std::optional<Buffer> row_entropy, lse, prob_sum, row_excess;
};

// Runs the backward for the outputs named in `wishes`; sum_k P_k grad_prob_sum_k of the rows goes to row_dots.
void shared_statistics_backward(
    const SharedProblem& problem, StatisticsGradients incoming, const Tensor& input, const OptionalTensor& row_weight,
    const Tensor& row_entropy, const Tensor& lse, const Tensor& kept, Buffer& row_dots, BackwardWishes& wishes);

}  // namespace fusefeat::cpu
