// Runs one kernel body on a CPU: harness KERNEL INPUT OUTPUT. INPUT and OUTPUT are flat files: the numbers of the case
// as int64, then its arrays; harness.py writes and reads them.
#define LIPFAST_CUDA_ON_CPU
#include "case_chain_jacobian_norms.h"
#include "case_chain_secants.h"
#include "case_cholesky_bounds.h"
#include "case_hermitian_residual.h"
#include "case_jacobian_reduction.h"
#include "case_mma.h"
#include "case_planted.h"
#include "case_shifted_grams.h"
#include "case_spectral_norms.h"
#include "case_stack.h"
#include "case_symbol_grams.h"
#include "case_tap_products.h"

int main(int argc, char** argv) {
  if (argc != 4 || lipfast::cases().count(argv[1]) == 0) {
    std::fprintf(stderr, "usage: %s KERNEL INPUT OUTPUT, with KERNEL one of:", argv[0]);
    for (const auto& entry : lipfast::cases()) std::fprintf(stderr, " %s", entry.first.c_str());
    std::fprintf(stderr, "\n");
    return 2;
  }
  lipfast::Input input(argv[2]);
  lipfast::Output output(argv[3]);
  lipfast::cases()[argv[1]](input, output);
  return 0;
}
