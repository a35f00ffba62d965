// Block Lanczos: kBlockVectors products per pass over a matrix that does not fit the cache, where the pass is what
// costs. Full orthogonalisation, and Rayleigh-Ritz on the whole basis.

constexpr int kBlockVectors = 4;
constexpr int64_t kBlockBasis = 192;  // vectors kept before a restart: 48 passes

inline int64_t block_lanczos_size(int64_t n) {
  return (kBlockBasis + kBlockVectors) * n + kBlockBasis * (kBlockBasis + kBlockVectors + 1) +
         lanczos_size(kBlockBasis);
}

// c[i][k] = q_i . z_k; n in pieces, so that the pieces of z stay in L1 while the basis passes by once.
inline void project_block(const double* basis, int64_t count, const double* z, int64_t n, double* c) {
  constexpr int64_t kPiece = 512;
  for (int64_t i = 0; i < count * kBlockVectors; ++i) c[i] = 0;
  for (int64_t j = 0; j < n; j += kPiece) {
    const int64_t width = smaller(kPiece, n - j);
    for (int64_t i = 0; i < count; ++i) {
      for (int k = 0; k < kBlockVectors; ++k) c[i * kBlockVectors + k] += dot(basis + i * n + j, z + k * n + j, width);
    }
  }
}

// z_k -= sum_i c[i][k] q_i
inline void subtract_block(const double* basis, int64_t count, const double* c, double* z, int64_t n) {
  constexpr int64_t kPiece = 512;
  for (int64_t j = 0; j < n; j += kPiece) {
    const int64_t width = smaller(kPiece, n - j);
    for (int64_t i = 0; i < count; ++i) {
      for (int k = 0; k < kBlockVectors; ++k) axpy(-c[i * kBlockVectors + k], basis + i * n + j, z + k * n + j, width);
    }
  }
}

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

// As lanczos. apply: kBlockVectors vectors at a time. work: block_lanczos_size(n).
template <class Operator>
LanczosResult block_lanczos(Operator& apply, int64_t n, int32_t max_passes, double tolerance, double* x, double* work) {
  constexpr int64_t b = kBlockVectors;
  const int64_t limit = smaller(kBlockBasis, n / b * b);
  double* basis = work;
  double* z = basis + kBlockBasis * n;
  double* h = z + b * n;  // the projected operator, kBlockBasis x kBlockBasis
  double* c = h + kBlockBasis * kBlockBasis;
  double* ritz = c + kBlockBasis * b;
  double* rest = ritz + kBlockBasis;
  LanczosResult result{0, 0, 0, 0};
  for (bool done = false; !done;) {
    memcpy(basis, x, sizeof(double) * n);
    for (int64_t k = 1; k < b; ++k) {
      random_vector(static_cast<uint64_t>(k + result.passes), basis + k * n, n);
      orthogonalize(basis, k, basis + k * n, n);
      normalize(basis + k * n, n);
    }
    int64_t size = 0;
    while (!done && size < limit) {
      apply(basis + size * n, z);
      ++result.passes;
      const int64_t begin = size;
      size += b;
      double top = 0;
      for (int64_t k = 0; k < b; ++k) top = larger(top, sqrt(dot(z + k * n, z + k * n, n)));
      project_block(basis, size, z, n, c);
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t k = 0; k < b; ++k) {
          h[i * kBlockBasis + begin + k] = h[(begin + k) * kBlockBasis + i] = c[i * b + k];
        }
      }
      subtract_block(basis, size, c, z, n);
      project_block(basis, size, z, n, c);
      subtract_block(basis, size, c, z, n);
      double r[kBlockVectors][kBlockVectors];
      factor_block_vectors(basis, size, z, n, top, r);
      const bool last = size + b > limit || result.passes >= max_passes;

      // Looking costs about as much as a tenth of a pass over a large matrix: at the start of a warm run, then rarely.
      if (last || result.passes <= 4 || result.passes % 3 == 0) {
        const auto projected = [&](const double* in, double* out) {
          for (int64_t i = 0; i < size; ++i) out[i] = dot(h + i * kBlockBasis, in, size);
        };
        random_vector(static_cast<uint64_t>(size), ritz, size);
        normalize(ritz, size);
        const LanczosResult found = lanczos(projected, size, 200, 1e-13, ritz, rest);
        result.value = found.value;
        double squares = 0;
        for (int64_t l = 0; l < b; ++l) {
          double entry = 0;
          for (int64_t k = l; k < b; ++k) entry += r[l][k] * ritz[begin + k];
          squares += entry * entry;
        }
        const double residual = sqrt(squares);
        result.error = smaller(residual, residual * residual / larger(found.gap, 1e-300));
        done = result.error <= tolerance * result.value || result.passes >= max_passes || !(result.value > 0);
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
