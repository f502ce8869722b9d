// Losses by name, and how many numbers the target of a sample has.
//
//   mse                     outputs          cross_entropy                  1 label
//   policy_gradient         A + 1            categorical_policy_gradient    2
//   likelihood_ratio        A + 2            categorical_likelihood_ratio   3
//   gaussian_kl             outputs + 1      categorical_kl                 outputs + 1
//
// where A = outputs / 2; math/policy.h says what they are made of.
#pragma once

#include "program/program.h"

namespace fm {

// Throws for a name or reduction that does not exist.
LossKind loss_kind(const LossSpec& loss);
index_t loss_target_size(LossKind loss, index_t outputs);

}  // namespace fm
