// clang-format off
// spectral_norms: bracket of ||W||_2 for one dense row-major matrix.
//
// Types        float32 or float64 entries; all vectors, the Gram matrix and its factor in float64; the one-pass
//              product W^T W v runs in the entries' own type (certify = false only).
// Lower        || W^T u || / || u || at the final vector, in float64, less its own rounding, rounded down:
//              never above the truth.
// Upper        sqrt(t + rounding terms) for a shift t at which t I - G was factored: never below the truth,
//              whatever the first estimate was. Without memory for G: Hoelder's bound. Not asked for: +inf.
// Derivations  docs/bounds.md.
// Errors       no exceptions; a NaN or infinite entry is reported through SpectralResult::finite.
// Threads      none: one matrix is one thread's. Results depend on the matrix, the options and the capability only.
// clang-format on
#pragma once

#include "../params.h"

namespace lipfast {

using SpectralNormsKernel = void (*)(const SpectralProblem&, SpectralResult&, double* workspace);

SpectralNormsKernel spectral_norms_kernel(Dtype dtype);

// Doubles of workspace that a problem needs, for every capability.
int64_t spectral_norms_workspace(const SpectralProblem& problem);

// Whether Lanczos takes blocks of vectors: W is larger than the cache and every pass over it counts.
bool spectral_norms_uses_blocks(const SpectralProblem& problem);

// Whether all threads should share this one matrix.
bool spectral_norms_is_large(const SpectralProblem& problem);

// Whether the Gram matrix of the smaller side is formed (and factored, when certifying).
bool spectral_norms_uses_gram(const SpectralProblem& problem);

}  // namespace lipfast
