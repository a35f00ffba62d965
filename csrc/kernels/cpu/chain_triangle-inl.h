// The Jacobian H W of a chain that starts with a wide linear stage W has the singular values of H L, where L is the
// triangle with L L^T = W W^T: Cholesky's factor of the Gram matrix, both in float64. As H L is of the size of H W,
// nothing is lost by rounding L to float32; H (W W^T) H^T in float32 would lose twice the digits.

// Worth it when the products saved outweigh the Gram matrix: a multiplication there costs about four of those.
LIPFAST_INLINE bool triangle_pays(const ChainParams& p, const ChainStage& stage) {
  const double units = static_cast<double>(stage.out.channels), inputs = static_cast<double>(stage.in.channels);
  const double outputs = static_cast<double>(p.out.channels * p.out.height * p.out.width);
  const double rows = static_cast<double>(p.batch) * outputs;
  return p.dtype == Dtype::kFloat32 && inputs > units && rows * (inputs - 0.5 * units) > 4 * units * (inputs + units);
}

inline int64_t triangle_size(int64_t units) {
  return square_size(units) + units + larger(gram_panels_size(units), cholesky_panels_size(units));
}

// The columns of L in panels; zero where W is, NaN where W is not finite.
inline void pack_triangle(const float* w, int64_t units, int64_t inputs, float* packed, double* work,
                          const Parallel* parallel) {
  const int64_t ld = leading_dimension(units);
  double *a = work, *diagonal = a + square_size(units), *panels = diagonal + units;
  gram(w, units, inputs, PowerOfTwo{1, 1}, a, panels, parallel);
  double trace = 0;
  for (int64_t i = 0; i < units; ++i) trace += a[i * ld + i];
  bool done = !(trace > 0 && trace < INFINITY);
  const double fill = trace == 0 ? 0 : NAN;
  for (int64_t i = 0; i < units; ++i) {
    for (int64_t j = i + 1; j < units; ++j) {
      if (done) a[j * ld + i] = fill;
      a[i * ld + j] = -a[i * ld + j];  // cholesky() factors the diagonal minus what lies above
    }
  }
  for (int64_t i = 0; done && i < units; ++i) diagonal[i] = fill;
  // W W^T may be singular: the least shift that the rounding of both steps asks for, relative to its trace.
  for (double shift = 1e-15 * trace; !done; shift *= 8) {
    for (int64_t i = 0; i < units; ++i) diagonal[i] = a[i * ld + i] + shift;
    done = cholesky(a, units, diagonal, panels, parallel);
  }
  for (int64_t j = 0; j < units; j += kColumns<float>) {
    const int64_t width = panel_width<float>(units - j);
    for (int64_t i = 0; i < units; ++i, packed += width) {
      for (int64_t k = 0; k < width; ++k) {
        const double entry = j + k < i ? a[i * ld + j + k] : (j + k == i ? diagonal[i] : 0);
        packed[k] = static_cast<float>(entry);
      }
    }
  }
}
inline void pack_triangle(const double*, int64_t, int64_t, double*, double*, const Parallel*) {}  // never pays
