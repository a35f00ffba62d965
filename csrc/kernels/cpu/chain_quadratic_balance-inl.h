// Powers of two that balance a chain: rows of W_i against columns of W_{i+1}, then each matrix to a norm about 1.
//
// In the inequality that is proved an exponent of a unit only renames its multiplier, and powers of two are exact: they
// are summed as integers and applied once to the weights that were given. The exponents themselves are a choice.
#ifndef LIPFAST_CHAIN_QUADRATIC_BALANCE_INL_H
#define LIPFAST_CHAIN_QUADRATIC_BALANCE_INL_H

#include "chain_quadratic_panels-inl.h"
#include "matrix-inl.h"

constexpr int kBalanceSweeps = 50;
constexpr int32_t kMostExponent = 200;  // of a unit, while sums of squares are balanced
constexpr double kMostEntry = 0x1p50;   // of a scaled weight: what the proof takes

// Squares of a matrix's entries, the largest scaled to about 1; false where one is NaN or infinite. exponent: of the
// largest.
template <class T>
bool scaled_squares(const T* w, int64_t rows, int64_t columns, const Parallel* parallel, double* squares,
                    int* exponent) {
  Matrix<T> matrix;
  if (!examine(w, rows, columns, parallel, matrix)) return false;
  *exponent = matrix.exponent;
  for (int64_t i = 0; i < rows * columns; ++i) {
    const double entry = matrix.scaling(w[i]);
    squares[i] = entry * entry;
  }
  return true;
}

// 4^e
LIPFAST_INLINE double fourth_power(int32_t e) { return ldexp(1.0, 2 * e); }

// squares: of every matrix, one after the other. unit: exponents of all hidden units, zero on entry. room: two
// vectors of the widest layer.
inline void balance_units(const QuadraticProblem& problem, const double* squares, int32_t* const* unit, double* room,
                          int64_t widest) {
  double *before = room, *columns = room + widest;
  const int64_t hidden = problem.layers - 1;
  for (int sweep = 0; sweep < kBalanceSweeps; ++sweep) {
    bool moved = false;
    const double* own = squares;
    for (int64_t i = 0; i < hidden; ++i) {
      const int64_t inputs = problem.sizes[i], n = problem.sizes[i + 1], outputs = problem.sizes[i + 2];
      const double* next = own + n * inputs;
      for (int64_t k = 0; k < inputs; ++k) before[k] = i > 0 ? fourth_power(-unit[i - 1][k]) : 1;
      for (int64_t k = 0; k < n; ++k) columns[k] = 0;
      for (int64_t r = 0; r < outputs; ++r) {
        axpy(i + 1 < hidden ? fourth_power(unit[i + 1][r]) : 1, next + r * n, columns, n);
      }
      for (int64_t j = 0; j < n; ++j) {
        const double row = dot(own + j * inputs, before, inputs);
        if (!(row > 0) || !(columns[j] > 0)) continue;
        const double best = 0.25 * log2(columns[j] / row);  // half of what the norms differ by; a tie stays
        int32_t e = static_cast<int32_t>(ceil(best - 0.5));
        e = larger(-kMostExponent, smaller(kMostExponent, e));
        moved |= e != unit[i][j];
        unit[i][j] = e;
      }
      own = next;
    }
    if (!moved) break;
  }
}

// A matrix's exponent s: 2^-s W is about 1 in size, by its Frobenius norm.
inline int32_t norm_exponent(const double* squares, int64_t rows, int64_t columns, const int32_t* out,
                             const int32_t* in, double* room, int exponent) {
  double sum = 0;
  for (int64_t k = 0; k < columns; ++k) room[k] = in != nullptr ? fourth_power(-in[k]) : 1;
  for (int64_t j = 0; j < rows; ++j) {
    sum += (out != nullptr ? fourth_power(out[j]) : 1) * dot(squares + j * columns, room, columns);
  }
  if (!(sum > 0)) return exponent;
  return exponent + static_cast<int32_t>(round(0.5 * log2(sum / static_cast<double>(smaller(rows, columns)))));
}

// How entries of one matrix are scaled: by 2^(out[j] - in[k] - shift), once.
struct EntryScaling {
  const int32_t *out, *in;  // nullptr: zeros
  int32_t shift;
};

// 2^e for e in [-1022, 1023]
LIPFAST_INLINE double normal_power(int64_t e) {
  const uint64_t bits = static_cast<uint64_t>(e + 1023) << 52;
  double power;
  memcpy(&power, &bits, sizeof(power));
  return power;
}

// Of all rows or columns: exponents of which twice as much is the exponent of a normal number.
LIPFAST_INLINE bool moderate(const int32_t* exponents, int64_t count, int64_t shift) {
  bool right = true;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t e = (exponents != nullptr ? exponents[j] : 0) - shift;
    right &= e >= -500 && e <= 500;
  }
  return right;
}

constexpr int64_t kColumnsTogether = 16;

// Entries of some columns in the rows of a panel, scaled: value 2^own 2^-in. Where the power of two is a normal number,
// one product rounds as ldexp does: only a denormal result, by 2^-1075 at most. all: there are kColumnsTogether of
// them, and `moderate` exponents.
template <class T>
LIPFAST_INLINE void scale_entries(const T* from, int64_t count, int64_t own, const int32_t* in, const double* powers,
                                  bool all, double* to, DoubleVector& largest) {
  if (all) {
    const DoubleVector row = splat(normal_power(own));
    LIPFAST_UNROLL
    for (int64_t k = 0; k < kColumnsTogether; k += kDoubles) {
      const DoubleVector scaled = load_double(from + k) * (row * load(powers + k));
      const DoubleVector size = scaled < 0 ? -scaled : scaled;
      largest = size > largest ? size : largest;
      store(to + k, scaled);
    }
    return;
  }
  for (int64_t k = 0; k < count; ++k) {
    const int64_t e = larger<int64_t>(-5000, smaller<int64_t>(5000, own - (in != nullptr ? in[k] : 0)));
    to[k] = ldexp(static_cast<double>(from[k]), static_cast<int>(e));
    largest[0] = larger(largest[0], fabs(to[k]));
  }
}

// Packs a scaled matrix. Returns its largest entry.
template <class S, class T>
double pack_scaled(const T* w, int64_t rows, int64_t columns, const EntryScaling& scaling, const Panels<S>& to) {
  const bool fast = moderate(scaling.out, rows, scaling.shift) && moderate(scaling.in, columns, 0);
  DoubleVector largest{};
  memset(to.data, 0, sizeof(S) * static_cast<size_t>(to.size()));
  for (int64_t first = 0; first < columns; first += kColumnsTogether) {
    const int64_t count = smaller(kColumnsTogether, columns - first);
    const int32_t* in = scaling.in != nullptr ? scaling.in + first : nullptr;
    const bool all = fast && count == kColumnsTogether;
    double powers[kColumnsTogether], scaled[kColumnsTogether];
    for (int64_t k = 0; all && k < count; ++k) powers[k] = normal_power(in != nullptr ? -in[k] : 0);
    for (int64_t j = 0; j < rows; ++j) {
      const int64_t own = static_cast<int64_t>(scaling.out != nullptr ? scaling.out[j] : 0) - scaling.shift;
      scale_entries(w + j * columns + first, count, own, in, powers, all, scaled, largest);
      S* out = &to.entry(j, first);
      for (int64_t k = 0; k < count; ++k) out[k * kPanelRows<S>] = static_cast<S>(scaled[k]);
    }
  }
  double most = 0;
  for (int lane = 0; lane < kDoubles; ++lane) most = larger(most, static_cast<double>(largest[lane]));
  return most;
}

#endif
