// Spectral and Frobenius norms of Jacobians whose smaller side is at most 32: several per warp, the Gram matrix in
// registers, a row per lane; no barriers of the block. Householder's reduction to tridiagonal form, then a multisection
// with a shift per lane, as in tridiagonal.cuh.
#pragma once

#include "reduce.cuh"

namespace lipfast::cuda {

constexpr int kWarpSide = 32;      // largest side
constexpr int kGroupColumns = 16;  // columns of a Jacobian in shared memory at a time

// Two neighbours that move together.
struct alignas(16) Pair {
  double first, second;
};

// The lanes of a warp that share a Jacobian with a smaller side of at most kWidth. All lanes of a warp run together.
template <int kWidth>
struct Group {
  static_assert(kWidth % 2 == 0 && kWidth <= kWarpSide);
  static constexpr int kLanes = kWidth <= 4 ? 4 : kWidth <= 8 ? 8 : kWidth <= 16 ? 16 : 32;
  static constexpr int kCount = kWarp / kLanes;  // groups of a warp
  static constexpr int kStride = kWidth + 2;     // of a column in shared memory: whole Pairs, few bank conflicts
  // Doubles of shared memory: columns, then three vectors and the tridiagonal matrix in their place.
  static constexpr int kDoubles = kGroupColumns * kStride > 5 * kLanes ? kGroupColumns * kStride : 5 * kLanes;

  __device__ static int index() { return lane() / kLanes; }
  __device__ static int row() { return lane() % kLanes; }
  __device__ static double sum(double value) {
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
    return value;
  }
  __device__ static double max(double value) {
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) value = larger(value, __shfl_xor_sync(kAllLanes, value, lanes));
    return value;
  }
};

// The fixed number of rounds in which kLanes shifts each narrow [low, kWidth low] to 2^-bits of low: one that depended
// on the values would let a Jacobian's result depend on its neighbours in the warp.
template <int kWidth>
__host__ __device__ constexpr int multisection_rounds(int bits) {
  double width = kWidth;
  for (; bits > 0; --bits) width *= 2;
  int rounds = 0;
  for (; width > 1; width /= Group<kWidth>::kLanes + 1) ++rounds;
  return rounds;
}

// Columns [first, first + kGroupColumns) along the longer side, scaled, rows of the smaller side; zeros beyond the
// ends.
template <int kWidth, int kUnroll, class T>
__device__ void load_group(const JacobianView<T>& j, bool given, int64_t first, PowerOfTwo scaling, double* columns) {
  using G = Group<kWidth>;
  const bool wide = j.outputs <= j.inputs;
  const int64_t side = smaller(j.outputs, j.inputs), longer = given ? larger(j.outputs, j.inputs) : 0;
  const int64_t side_step = wide ? j.row_step : j.col_step, long_step = wide ? j.col_step : j.row_step;
  const auto entry = [&](const T* from) {
    const auto value = static_cast<double>(*from);
    return sizeof(T) == sizeof(double) ? scaling(value) : value;
  };
  // Neighbouring lanes read neighbouring addresses.
  if (long_step == 1) {
    constexpr int kAcross = G::kLanes < kGroupColumns ? G::kLanes : kGroupColumns, kDown = G::kLanes / kAcross;
#pragma unroll 1
    for (int column = G::row() % kAcross; column < kGroupColumns; column += kAcross) {
      const int64_t rows = first + column < longer ? side : 0;
      const T* from = j.data + G::row() / kAcross * side_step + first + column;
#pragma unroll(kUnroll + 1)
      for (int row = G::row() / kAcross; row < kWidth; row += kDown, from += kDown * side_step) {
        columns[column * G::kStride + row] = row < rows ? entry(from) : 0.0;
      }
    }
  } else if (G::row() < kWidth) {
    const T* from = j.data + G::row() * side_step + first * long_step;
    const int64_t count = G::row() < side ? longer - first : 0;
#pragma unroll(kUnroll)
    for (int column = 0; column < kGroupColumns; ++column, from += long_step) {
      columns[column * G::kStride + G::row()] = column < count ? entry(from) : 0.0;
    }
  }
}

// The tridiagonal matrix of a Gram matrix of which every lane holds a row, scaled by 2^exponent: its diagonal, and the
// squares beside it. row, v, w: kLanes doubles of shared memory each.
template <int kWidth>
__device__ void tridiagonalize_group(double (&gram)[kWidth], int n, int exponent, double* row, double* v, double* w,
                                     Pair* out) {
  using G = Group<kWidth>;
  // One factor holds it: the entries come from squares of float32, or of float64 that was scaled.
  const double scaling = ldexp(1.0, exponent);
  const int i = G::row();
#pragma unroll 1
  for (int k = 0; k < n; ++k) {
    if (i == k) {
#pragma unroll
      for (int j = 0; j < kWidth; j += 2) *reinterpret_cast<Pair*>(row + j) = {gram[j], gram[j + 1]};
    }
    __syncwarp();
    const double diagonal = row[k], head = k + 1 < n ? row[k + 1] : 0, entry = i > k && i < n ? row[i] : 0;
    double off = head;
    if (k + 2 < n) {
      const double squares = G::sum(entry * entry), norm = sqrt(squares);
      off = head > 0 ? -norm : norm;
      const double half = squares - off * head;  // |v|^2 / 2 of the reflector
      const double beta = half > 0 ? 1 / half : half;
      const double own = i == k + 1 ? head - off : entry;
      v[i] = own;
      __syncwarp();
      double even = 0, odd = 0;
#pragma unroll
      for (int j = 0; j < kWidth; j += 2) {
        const Pair pair = *reinterpret_cast<const Pair*>(v + j);
        even += gram[j] * pair.first;
        odd += gram[j + 1] * pair.second;
      }
      const double product = i > k && i < n ? beta * (even + odd) : 0;
      const double half_inner = 0.5 * beta * G::sum(product * own), change = product - half_inner * own;
      w[i] = change;
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kWidth; j += 2) {
        const Pair vs = *reinterpret_cast<const Pair*>(v + j), ws = *reinterpret_cast<const Pair*>(w + j);
        gram[j] -= own * ws.first + change * vs.first;
        gram[j + 1] -= own * ws.second + change * vs.second;
      }
    } else {
      __syncwarp();  // all have read this row
    }
    if (i == 0) out[k] = {scaling * diagonal, scaling * off * (scaling * off)};
  }
  __syncwarp();
}

// Whether all eigenvalues lie below x: the leading minors of x - T are positive. Only their signs matter, so that small
// ones are scaled up. The matrix's norm is about 1.
__device__ inline bool exceeds_all(const Pair* matrix, int n, double x) {
  double before = 1, minor = x - matrix[0].first;
  bool positive = minor > 0;
  for (int i = 1; i < n; ++i) {
    const double next = (x - matrix[i].first) * minor - matrix[i - 1].second * before;
    const double scale = next < 0x1p-300 ? 0x1p300 : 1.0;
    before = minor * scale;
    minor = next * scale;
    positive = positive && next > 0;
  }
  return positive;
}

template <int kWidth>
__device__ double largest_eigenvalue_of_group(const Pair* matrix, int n, int rounds) {
  using G = Group<kWidth>;
  constexpr uint32_t kMembers = G::kLanes == kWarp ? kAllLanes : (1u << G::kLanes % kWarp) - 1;
  double low = matrix[0].first, high = 0;
  for (int i = 0; i < n; ++i) {
    low = larger(low, matrix[i].first);
    high += matrix[i].first;
  }
  high += 64 * 2.3e-16 * high;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const double step = (high - low) * (1.0 / (G::kLanes + 1));
    const bool inside = !exceeds_all(matrix, n, low + step * (G::row() + 1));
    const uint32_t votes = __ballot_sync(kAllLanes, inside) >> (G::index() * G::kLanes) & kMembers;
    const int below = __popc(votes);
    high = below < G::kLanes ? low + step * (below + 1) : high;
    low += step * below;
  }
  return 0.5 * (low + high);
}

// The norms, in every lane of the group; the square of the spectral one to 2^-kBits. given: whether the group has a
// Jacobian; the sizes are alike in the whole warp. shared: Group::kDoubles doubles for this group alone, aligned to 16
// bytes. What was written to the Jacobian must lie before a barrier. Ends with __syncwarp. kUnroll: steps of a loop
// that are taken together, 4 where registers allow it.
template <int kWidth, int kBits, int kUnroll, class T>
__device__ void reduce_in_warp(const JacobianView<T>& j, bool given, double* shared, double* spectral,
                               double* frobenius) {
  using G = Group<kWidth>;
  const int n = static_cast<int>(smaller(j.outputs, j.inputs)), row = G::row();
  const int64_t longer = larger(j.outputs, j.inputs);
  int exponent = 0;
  if (sizeof(T) == sizeof(double)) {  // squares of float32 fit float64 as they are
    const int64_t step = larger(j.row_step, j.col_step), minor = j.col_step == 1 ? j.inputs : j.outputs;
    double top = 0;
    for (int64_t major = 0; major < (given ? j.outputs * j.inputs / minor : 0); ++major) {
      for (int64_t at = row; at < minor; at += G::kLanes) {
        top = larger(top, fabs(static_cast<double>(j.data[major * step + at])));
      }
    }
    exponent = binary_exponent(G::max(top));
  }
  const PowerOfTwo scaling = power_of_two(-exponent);
  double gram[kWidth] = {};
  const int own = row < kWidth ? row : 0;  // lanes without a row repeat the first
#pragma unroll 1
  for (int64_t first = 0; first < longer; first += kGroupColumns) {
    load_group<kWidth, kUnroll>(j, given, first, scaling, shared);
    __syncwarp();
#pragma unroll((kUnroll + 1) / 2)
    for (int column = 0; column < kGroupColumns; ++column) {
      const double* entries = shared + column * G::kStride;
      const double factor = entries[own];
#pragma unroll
      for (int i = 0; i < kWidth; i += 2) {
        const Pair pair = *reinterpret_cast<const Pair*>(entries + i);
        gram[i] += factor * pair.first;
        gram[i + 1] += factor * pair.second;
      }
    }
    __syncwarp();  // before the columns are overwritten
  }
  double diagonal = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) diagonal = i == row && i < n ? gram[i] : diagonal;
  const double trace = G::sum(diagonal);
  const int size = binary_exponent(trace);
  auto* matrix = reinterpret_cast<Pair*>(shared + 3 * G::kLanes);
  tridiagonalize_group<kWidth>(gram, n, -size, shared, shared + G::kLanes, shared + 2 * G::kLanes, matrix);
  const double top = ldexp(largest_eigenvalue_of_group<kWidth>(matrix, n, multisection_rounds<kWidth>(kBits)), size);
  const bool finite = trace < INFINITY;
  // top <= trace holds exactly; rounding may break it for matrices of rank one.
  *spectral = finite ? ldexp(sqrt(larger(0.0, smaller(top, trace))), exponent) : NAN;
  *frobenius = finite ? ldexp(sqrt(trace), exponent) : NAN;
  __syncwarp();  // before the memory is used again
}

}  // namespace lipfast::cuda
