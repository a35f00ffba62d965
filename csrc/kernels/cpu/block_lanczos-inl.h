// Block Lanczos: kBlockVectors products per pass over a matrix that does not fit the cache, where the pass is what
// costs. Full orthogonalisation, and Rayleigh-Ritz on the whole basis.
#ifndef LIPFAST_BLOCK_LANCZOS_INL_H
#define LIPFAST_BLOCK_LANCZOS_INL_H

#include "lanczos-inl.h"

constexpr int kBlockVectors = 4;
constexpr int64_t kBlockBasis = 192;  // vectors kept before a restart: 48 passes

// Columns that one item of work takes: the basis passes by piece by piece, and the sums of the pieces are added in
// order, so that the result does not depend on the number of threads.
constexpr int64_t kPiece = 512;
inline int64_t pieces(int64_t n) { return (n + kPiece - 1) / kPiece; }

inline int64_t block_lanczos_size(int64_t n) {
  return (kBlockBasis + kBlockVectors) * n + kBlockBasis * (kBlockBasis + kBlockVectors * (2 + pieces(n)) + 1) +
         lanczos_size(kBlockBasis);
}

// The block z minus its projections on `count` basis vectors; c[i][k] = q_i . z_k are added to h. c: of one piece each.
struct Orthogonalization {
  const double* basis;
  int64_t n;
  double* c;
  const Parallel* parallel;

  void operator()(int64_t first, int64_t count, double* z, double* h) const {
    for_items(parallel, pieces(n), [&](int64_t piece) { project(first, count, piece, z, c + piece * kSize); });
    double* total = c + pieces(n) * kSize;
    for (int64_t i = 0; i < count * kBlockVectors; ++i) {
      total[i] = 0;
      for (int64_t piece = 0; piece < pieces(n); ++piece) total[i] += c[piece * kSize + i];
      h[first * kBlockVectors + i] += total[i];
    }
    for_items(parallel, pieces(n), [&](int64_t piece) { subtract(first, count, piece, total, z); });
  }

 private:
  static constexpr int64_t kSize = kBlockBasis * kBlockVectors;

  // Two basis vectors and the whole block at a time, in registers.
  void project(int64_t first, int64_t count, int64_t piece, const double* z, double* sums) const {
    const int64_t begin = piece * kPiece, end = smaller(n, begin + kPiece), whole = end - (end - begin) % kDoubles;
    for (int64_t i = 0; i < count; i += 2) {
      const double *q0 = basis + (first + i) * n, *q1 = i + 1 < count ? q0 + n : q0;
      DoubleVector s[2][kBlockVectors] = {};
      for (int64_t j = begin; j < whole; j += kDoubles) {
        const DoubleVector e0 = load(q0 + j), e1 = load(q1 + j);
        LIPFAST_UNROLL
        for (int k = 0; k < kBlockVectors; ++k) {
          const DoubleVector zk = load(z + k * n + j);
          s[0][k] += e0 * zk;
          s[1][k] += e1 * zk;
        }
      }
      for (int k = 0; k < kBlockVectors; ++k) {
        double t0 = horizontal_sum<double>(s[0][k]), t1 = horizontal_sum<double>(s[1][k]);
        for (int64_t j = whole; j < end; ++j) {
          t0 += q0[j] * z[k * n + j];
          t1 += q1[j] * z[k * n + j];
        }
        sums[i * kBlockVectors + k] = t0;
        if (i + 1 < count) sums[(i + 1) * kBlockVectors + k] = t1;
      }
    }
  }

  void subtract(int64_t first, int64_t count, int64_t piece, const double* factors, double* z) const {
    const int64_t begin = piece * kPiece, end = smaller(n, begin + kPiece);
    int64_t j = begin;
    for (; j + 2 * kDoubles <= end; j += 2 * kDoubles) {
      DoubleVector s[kBlockVectors][2];
      load_tile(z + j, n, s);
      for (int64_t i = 0; i < count; ++i) {
        const double* q = basis + (first + i) * n + j;
        const DoubleVector e0 = load(q), e1 = load(q + kDoubles);
        LIPFAST_UNROLL
        for (int k = 0; k < kBlockVectors; ++k) {
          const DoubleVector factor = splat(factors[i * kBlockVectors + k]);
          s[k][0] -= factor * e0;
          s[k][1] -= factor * e1;
        }
      }
      store_tile(z + j, n, s);
    }
    for (; j < end; ++j) {
      for (int64_t i = 0; i < count; ++i) {
        for (int k = 0; k < kBlockVectors; ++k) {
          z[k * n + j] -= factors[i * kBlockVectors + k] * basis[(first + i) * n + j];
        }
      }
    }
  }
};

// Orthonormal z with z r = the old z; columns that vanish become random ones orthogonal to everything, with r = 0.
inline void factor_block_vectors(const double* basis, int64_t count, double* z, int64_t n, double scale_of_z,
                                 double (*r)[kBlockVectors]) {
  for (int k = 0; k < kBlockVectors; ++k) {
    for (int l = 0; l < kBlockVectors; ++l) r[l][k] = 0;
    for (int pass = 0; pass < 2; ++pass) {
      for (int l = 0; l < k; ++l) {
        const double product = dot(z + l * n, z + k * n, n);
        r[l][k] += product;
        axpy(-product, z + l * n, z + k * n, n);
      }
    }
    const double norm = sqrt(dot(z + k * n, z + k * n, n));
    if (norm > 1e-14 * scale_of_z) {
      r[k][k] = norm;
      scale(1 / norm, z + k * n, n);
      continue;
    }
    random_vector(static_cast<uint64_t>(count + k), z + k * n, n);
    orthogonalize(basis, count, z + k * n, n);
    orthogonalize(z, k, z + k * n, n);
    normalize(z + k * n, n);
  }
}

// z orthogonal to the basis; h[i][k] = q_i . z_k. The last two blocks hold nearly all of z's projection (the block
// tridiagonal recurrence); against the whole basis one more pass is then enough unless much is taken away again.
inline void orthogonalize_block(const Orthogonalization& from, int64_t size, double* z, double* h) {
  const int64_t n = from.n, recent = smaller<int64_t>(size, 2 * kBlockVectors);
  for (int64_t i = 0; i < size * kBlockVectors; ++i) h[i] = 0;
  from(size - recent, recent, z, h);
  for (int pass = 0; pass < 2; ++pass) {
    double before[kBlockVectors];
    for (int64_t k = 0; k < kBlockVectors; ++k) before[k] = dot(z + k * n, z + k * n, n);
    from(0, size, z, h);
    bool enough = true;
    for (int64_t k = 0; k < kBlockVectors; ++k) enough = enough && dot(z + k * n, z + k * n, n) > 0.5 * before[k];
    if (enough) return;
  }
}

// Largest eigenvalue of the projected operator, block tridiagonal, size x size; ritz: its eigenvector (a guess on
// entry where `guess`).
inline LanczosResult project_top(const double* h, int64_t size, bool guess, double* ritz, double* work) {
  constexpr int64_t kBand = 2 * kBlockVectors;
  const auto projected = [&](const double* in, double* out) {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t first = larger<int64_t>(0, i - kBand), end = smaller(size, i + kBand);
      out[i] = dot(h + i * kBlockBasis + first, in + first, end - first);
    }
  };
  random_vector(static_cast<uint64_t>(size), work, size);
  if (guess) {
    axpy(1e-3 / sqrt(dot(work, work, size)), work, ritz, size);
  } else {
    memcpy(ritz, work, sizeof(double) * size);
  }
  normalize(ritz, size);
  return lanczos(projected, size, 200, 1e-13, ritz, work);
}

// Passes before convergence is believed where nothing proves it: x may be another eigenvector, which its residual does
// not tell from the first, and the random vectors beside it need as many to say so.
constexpr int32_t kUnprovedPasses = 8;

// As lanczos. apply: kBlockVectors vectors at a time. work: block_lanczos_size(n). proved: the caller finds out whether
// a larger eigenvalue was missed.
template <class Operator>
LanczosResult block_lanczos(Operator& apply, int64_t n, int32_t max_passes, double tolerance, double* x, double* work,
                            bool proved) {
  constexpr int64_t b = kBlockVectors;
  const int64_t limit = smaller(kBlockBasis, n / b * b);
  double* basis = work;
  double* z = basis + kBlockBasis * n;
  double* h = z + b * n;  // the projected operator, kBlockBasis x kBlockBasis
  double* column = h + kBlockBasis * kBlockBasis;
  double* ritz = column + kBlockBasis * b;
  double* rest = ritz + kBlockBasis;
  const Orthogonalization from{basis, n, rest + lanczos_size(kBlockBasis), apply.parallel};
  LanczosResult result{0, 0, 0, 0};
  for (bool done = false; !done;) {
    memcpy(basis, x, sizeof(double) * n);
    for (int64_t k = 1; k < b; ++k) {
      random_vector(static_cast<uint64_t>(k + result.passes), basis + k * n, n);
      orthogonalize(basis, k, basis + k * n, n);
      normalize(basis + k * n, n);
    }
    int64_t size = 0, looked = 0;
    while (!done && size < limit) {
      apply(basis + size * n, z);
      ++result.passes;
      const int64_t begin = size;
      size += b;
      double top = 0;
      for (int64_t k = 0; k < b; ++k) top = larger(top, sqrt(dot(z + k * n, z + k * n, n)));
      orthogonalize_block(from, size, z, column);
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t k = 0; k < b; ++k) {
          h[i * kBlockBasis + begin + k] = h[(begin + k) * kBlockBasis + i] = column[i * b + k];
        }
      }
      double r[kBlockVectors][kBlockVectors];
      factor_block_vectors(basis, size, z, n, top, r);
      const bool last = size + b > limit || result.passes >= max_passes;

      // At the start of a warm run, then rarely, and after every pass near the end.
      if (last || result.passes <= 4 || result.passes % 3 == 0 || result.error < 30 * tolerance * result.value) {
        for (int64_t i = looked; i < size; ++i) ritz[i] = 0;
        const LanczosResult found = project_top(h, size, looked > 0, ritz, rest);
        looked = size;
        result.value = found.value;
        double squares = 0;
        for (int64_t l = 0; l < b; ++l) {
          double entry = 0;
          for (int64_t k = l; k < b; ++k) entry += r[l][k] * ritz[begin + k];
          squares += entry * entry;
        }
        const double residual = sqrt(squares);
        result.error = smaller(residual, residual * residual / larger(found.gap, 1e-300));
        const bool believed = proved || result.passes >= kUnprovedPasses;
        done = (believed && result.error <= tolerance * result.value) || result.passes >= max_passes ||
               !(result.value > 0);
      }
      if (!last && !done) memcpy(basis + size * n, z, sizeof(double) * b * n);
      if (last) break;
    }
    for (int64_t i = 0; i < n; ++i) x[i] = 0;
    for (int64_t i = 0; i < size; ++i) axpy(ritz[i], basis + i * n, x, n);
    normalize(x, n);
  }
  return result;
}

#endif
