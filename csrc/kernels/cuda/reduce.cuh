// Spectral and Frobenius norm of one Jacobian by one block: Gram matrix of the smaller side in float64, largest
// eigenvalue of that.
#pragma once

#include "tridiagonal.cuh"

namespace lipfast::cuda {

constexpr int kGramColumns = 32;         // columns of the Jacobian that lie in shared memory at a time
constexpr int64_t kSharedSide = 64;      // Gram matrices up to here lie in shared memory, larger ones in global memory
constexpr int64_t kReduceThreads = 256;  // of a block, at most

// A K x D Jacobian; entry (i, j) lies at data[i * row_step + j * col_step], one of the steps is 1.
template <class T>
struct JacobianView {
  const T* data;
  int64_t outputs, inputs, row_step, col_step;
};

// How the memory of one reduction is cut, in doubles.
struct ReduceLayout {
  int64_t side, padded, stride;  // smaller side; the same in whole 2 x 2 tiles; row stride of the Gram matrix

  __host__ __device__ ReduceLayout(int64_t outputs, int64_t inputs)
      : side(smaller(outputs, inputs)), padded(round_up(side, 2)), stride(padded + 1) {}
  __host__ __device__ int64_t gram() const { return padded * stride; }
  __host__ __device__ bool gram_is_shared() const { return side <= kSharedSide; }
  __host__ __device__ int64_t columns() const { return padded * (kGramColumns + 1); }
  // Shared: scratch, four vectors, columns of the Jacobian, and the Gram matrix if it is small. Beyond kSharedSide the
  // columns and vectors follow the Gram matrix in global memory.
  __host__ __device__ int64_t shared() const {
    return kMaxWarps + (gram_is_shared() ? 4 * padded + columns() + gram() : 0);
  }
  __host__ __device__ int64_t global() const { return gram_is_shared() ? 0 : 4 * padded + columns() + gram(); }
  // One thread per 2 x 2 tile of the Gram matrix, in whole warps.
  int64_t block() const {
    const int64_t half = padded / 2;
    return smaller(kReduceThreads, round_up(half * (half + 1) / 2, kWarp));
  }
};

// Largest magnitude, the same in every thread; NaN among the entries does not matter here.
template <class T>
__device__ double largest_magnitude(const JacobianView<T>& j, double* scratch) {
  double top = 0;
  for (int64_t at = thread(); at < j.outputs * j.inputs; at += threads()) {
    const int64_t minor = j.col_step == 1 ? j.inputs : j.outputs;
    const int64_t offset = at / minor * larger(j.row_step, j.col_step) + at % minor;
    top = larger(top, fabs(static_cast<double>(j.data[offset])));
  }
  return block_max(top, scratch);
}

// Columns [first, first + kGramColumns) along the longer side, scaled, rows of the smaller side; zeros beyond the ends.
template <class T>
__device__ void load_columns(const JacobianView<T>& j, const ReduceLayout& layout, int64_t first, PowerOfTwo scaling,
                             double* columns) {
  const bool wide = j.outputs <= j.inputs;
  const int64_t longer = wide ? j.inputs : j.outputs;
  const int64_t side_step = wide ? j.row_step : j.col_step, long_step = wide ? j.col_step : j.row_step;
  const int64_t count = layout.padded * kGramColumns;
  for (int64_t at = thread(); at < count; at += threads()) {
    // Neighbouring threads read neighbouring addresses.
    const int64_t i = long_step == 1 ? at / kGramColumns : at % layout.padded;
    const int64_t k = long_step == 1 ? at % kGramColumns : at / layout.padded;
    const bool inside = i < layout.side && first + k < longer;
    columns[i * (kGramColumns + 1) + k] =
        inside ? scaling(static_cast<double>(j.data[i * side_step + (first + k) * long_step])) : 0;
  }
}

// gram += columns columns^T, both triangles, in 2 x 2 tiles; the first call sets it.
__device__ inline void accumulate_gram(const double* columns, const ReduceLayout& layout, bool set, double* gram) {
  constexpr int64_t kStride = kGramColumns + 1;
  const int64_t half = layout.padded / 2, stride = layout.stride;
  int64_t row = 0, start = 0;  // tiles of the upper triangle, row by row: tile `start` is (row, row)
  for (int64_t tile = thread(); tile < half * (half + 1) / 2; tile += threads()) {
    while (tile >= start + half - row) start += half - row++;
    const int64_t i = 2 * row, j = 2 * (row + tile - start);
    const double *a = columns + i * kStride, *b = columns + j * kStride;
    double s00 = 0, s01 = 0, s10 = 0, s11 = 0;
    for (int64_t k = 0; k < kGramColumns; ++k) {
      const double a0 = a[k], a1 = a[kStride + k], b0 = b[k], b1 = b[kStride + k];
      s00 += a0 * b0;
      s01 += a0 * b1;
      s10 += a1 * b0;
      s11 += a1 * b1;
    }
    if (!set) {
      s00 += gram[i * stride + j];
      s01 += gram[i * stride + j + 1];
      s10 += gram[(i + 1) * stride + j];
      s11 += gram[(i + 1) * stride + j + 1];
    }
    if (i == j) s10 = s01;
    gram[i * stride + j] = s00;
    gram[i * stride + j + 1] = gram[(j + 1) * stride + i] = s01;
    gram[(i + 1) * stride + j] = gram[j * stride + i + 1] = s10;
    gram[(i + 1) * stride + j + 1] = gram[(j + 1) * stride + i + 1] = s11;
    if (i != j) gram[j * stride + i] = s00;
  }
}

// The norms, in every thread. shared, global: layout.shared() and layout.global() doubles, global for this block alone.
// The Jacobian's last write and other uses of `shared` must lie before a barrier; one reduction may follow another
// without, since every part of the memory that is written first was read last before one of the barriers within.
template <class T>
__device__ void reduce_jacobian(const JacobianView<T>& j, double* shared, double* global, double* spectral,
                                double* frobenius) {
  const ReduceLayout layout(j.outputs, j.inputs);
  double* scratch = shared;
  double* gram = layout.gram_is_shared() ? shared + kMaxWarps : global;
  double* columns = gram + layout.gram();
  double *diagonal = columns + layout.columns(), *off = diagonal + layout.padded, *v = off + layout.padded,
         *w = v + layout.padded;
  // Squares of float32 fit float64 as they are.
  const int exponent = sizeof(T) == sizeof(double) ? binary_exponent(largest_magnitude(j, scratch)) : 0;
  const PowerOfTwo scaling = power_of_two(-exponent);
  const int64_t longer = larger(j.outputs, j.inputs);
  for (int64_t first = 0; first < longer; first += kGramColumns) {
    load_columns(j, layout, first, scaling, columns);
    __syncthreads();
    accumulate_gram(columns, layout, first == 0, gram);
    __syncthreads();
  }
  const int n = static_cast<int>(layout.side);
  double trace = 0;
  for (int64_t i = thread(); i < n; i += threads()) trace += gram[i * layout.stride + i];
  trace = block_sum(trace, scratch);
  tridiagonalize(gram, n, layout.stride, diagonal, off, v, w, scratch);
  const double top = largest_eigenvalue(diagonal, off, n, 2e-16);
  const bool finite = trace < INFINITY;
  // top <= trace holds exactly; rounding may break it for matrices of rank one.
  *spectral = finite ? ldexp(sqrt(larger(0.0, smaller(top, trace))), exponent) : NAN;
  *frobenius = finite ? ldexp(sqrt(trace), exponent) : NAN;
}

}  // namespace lipfast::cuda
