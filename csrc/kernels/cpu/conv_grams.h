// The Gram matrices G(theta) of a convolution's symbol, and how far they are from the true ones.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "conv_cells.h"
#include "conv_kernels.h"
#include "workspace.h"

namespace lipfast {

// body(item) for every item in [0, count), on the given threads.
template <class Body>
void each_item(const Parallel* parallel, int64_t count, const Body& body) {
  if (parallel == nullptr || count <= 1) {
    for (int64_t item = 0; item < count; ++item) body(item);
    return;
  }
  parallel->run(
      count, [](void* argument, int64_t item) { (*static_cast<const Body*>(argument))(item); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Scratch memory that the items of one loop hand on to each other.
class WorkspacePool {
 public:
  explicit WorkspacePool(int64_t doubles) : bytes_(doubles * static_cast<int64_t>(sizeof(double))) {}
  class Lease {
   public:
    explicit Lease(WorkspacePool& pool) : pool_(pool), workspace_(pool.take()) {}
    ~Lease() { pool_.give(std::move(workspace_)); }
    double* get() const { return workspace_.as<double>(); }

   private:
    WorkspacePool& pool_;
    Workspace workspace_;
  };

 private:
  Workspace take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return Workspace(bytes_);
    Workspace workspace = std::move(free_.back());
    free_.pop_back();
    return workspace;
  }
  void give(Workspace workspace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(workspace));
  }
  int64_t bytes_;
  std::mutex mutex_;
  std::vector<Workspace> free_;
};

class ConvGrams {
 public:
  explicit ConvGrams(const ConvProblem& problem);

  double bytes() const;  // that form() and tests of cells take
  // Of the taps times 2^-exponent. Before anything below is called.
  void form(int exponent);

  GramTable table(int64_t group) const;
  // Differences of two taps that are lexicographically positive, zero first: 3 numbers each.
  const std::vector<int64_t>& offsets() const { return offsets_; }
  int64_t count() const { return count_; }  // of offsets
  std::vector<double> phases(const Frequency& p) const;
  double trace(int64_t group, const double* phases) const;

  // Norm of what a Gram matrix of the group, its trace and its Frobenius norm may be off by.
  double error(int64_t group) const { return error_[static_cast<size_t>(group)]; }
  double mass(int64_t group) const { return mass_[static_cast<size_t>(group)]; }  // at least ||P||_F^2, P = sum_k |W_k|
  // Whether a computed trace proves that the largest eigenvalue is at most `bound`.
  bool is_below(double trace, int64_t group, double bound) const;
  // The shift t at which a factor of sign (t I - G) proves lambda_max(G) <= bound (sign > 0), or lambda_min(G) >=
  // bound.
  double shift(int64_t group, double bound, double sign) const;
  // The computed ||G||_F^2 that proves lambda_max(G) <= bound; negative: none.
  double limit(int64_t group, double bound) const;

 private:
  const ConvProblem& problem_;
  const ConvKernels& kernels_;
  std::vector<int64_t> offsets_;
  int64_t count_;
  std::unique_ptr<Workspace> even_, odd_;
  std::vector<double> traces_, error_, mass_;
};

}  // namespace lipfast
