// Body of chain_jacobian_norms, once per instruction set.

#include "tridiagonal-inl.h"
#include "lanczos-inl.h"
#include "matrix-inl.h"
#include "symmetric_top-inl.h"
#include "reduce-inl.h"

constexpr int kRowTile = 5;              // rows of a Jacobian in registers: 5 x 2 accumulators, 2 + 1 operands
constexpr int64_t kMaxTile = 8;          // samples of one tile: they share the forward pass's reads of W
constexpr int64_t kTileBytes = 1 << 20;  // of Jacobians kept per thread

template <class T>
constexpr int64_t kColumns = 2 * Simd<T>::kLanes;  // columns of a packed panel

LIPFAST_INLINE int64_t widest(const ChainParams& p) {
  int64_t width = 0;
  for (int64_t l = 0; l <= p.layers; ++l) width = larger(width, p.widths[l]);
  return width;
}

// Packed weights of one network: first W_l^T of every layer for the forward pass (rows: inputs), then W_l of every
// layer but the last for the products (rows: outputs); columns in panels.
template <class T>
int64_t forward_size(const ChainParams& p, int64_t l) {
  return p.widths[l] * round_up(p.widths[l + 1], kColumns<T>);
}
template <class T>
int64_t product_size(const ChainParams& p, int64_t l) {
  return p.widths[l + 1] * round_up(p.widths[l], kColumns<T>);
}
template <class T>
int64_t packed_size(const ChainParams& p) {
  int64_t size = 0;
  for (int64_t l = 0; l < p.layers; ++l) size += forward_size<T>(p, l) + (l + 1 < p.layers ? product_size<T>(p, l) : 0);
  return size;
}

// Buffers of one thread. Rows of Jacobians are padded to whole panels.
template <class T>
struct ChainBuffers {
  int64_t tile, stride, units;
  T *activations, *derivatives, *rows, *product, *jacobians;
  int32_t* active;
  double* reduce;

  static int64_t tile_for(const ChainParams& p) {
    const int64_t bytes = sizeof(T) * p.widths[p.layers] * p.widths[0];
    const int64_t fit = kTileBytes / larger<int64_t>(bytes, 1);
    // Whole groups of lanes, so that the reduction is the same wherever a tile ends.
    return fit >= kMaxTile ? kMaxTile : larger<int64_t>(fit / kDoubles * kDoubles, 1);
  }

  // Lays the buffers out from `base` (nullptr: only measures). Returns the bytes taken.
  int64_t place(const ChainParams& p, char* base) {
    tile = tile_for(p);
    stride = round_up(widest(p), kColumns<T>);
    units = 0;
    for (int64_t l = 1; l <= p.layers; ++l) units += p.widths[l];
    int64_t used = 0;
    const auto take = [&](int64_t bytes) {
      char* at = base + used;
      used += round_up(bytes, 64);
      return at;
    };
    activations = reinterpret_cast<T*>(take(sizeof(T) * 2 * tile * stride));
    derivatives = reinterpret_cast<T*>(take(sizeof(T) * tile * units));
    rows = reinterpret_cast<T*>(take(sizeof(T) * p.widths[p.layers] * stride));
    product = reinterpret_cast<T*>(take(sizeof(T) * p.widths[p.layers] * stride));
    jacobians = reinterpret_cast<T*>(take(sizeof(T) * tile * p.widths[p.layers] * p.widths[0]));
    active = reinterpret_cast<int32_t*>(take(sizeof(int32_t) * stride));
    reduce = reinterpret_cast<double*>(take(sizeof(double) * reduce_size(p.widths[p.layers], p.widths[0])));
    return used;
  }
};

// A rows x cols matrix in panels [row][kColumns], zero-padded; entry (i, j) lies at w[i * row_step + j * col_step].
template <class T>
T* pack_panels(const T* w, int64_t rows, int64_t cols, int64_t row_step, int64_t col_step, T* packed) {
  for (int64_t j0 = 0; j0 < cols; j0 += kColumns<T>) {
    const int64_t count = smaller(kColumns<T>, cols - j0);
    for (int64_t i = 0; i < rows; ++i, packed += kColumns<T>) {
      const T* from = w + i * row_step + j0 * col_step;
      for (int64_t j = 0; j < count; ++j) packed[j] = from[j * col_step];
      for (int64_t j = count; j < kColumns<T>; ++j) packed[j] = 0;
    }
  }
  return packed;
}

template <class T>
void pack_chain(const ChainParams& p, int64_t network, T* packed) {
  for (int64_t l = 0; l < p.layers; ++l) {
    const T* w = static_cast<const T*>(p.weights[network * p.layers + l]);
    packed = pack_panels(w, p.widths[l], p.widths[l + 1], 1, p.widths[l], packed);
  }
  for (int64_t l = 0; l + 1 < p.layers; ++l) {
    const T* w = static_cast<const T*>(p.weights[network * p.layers + l]);
    packed = pack_panels(w, p.widths[l + 1], p.widths[l], p.widths[l], 1, packed);
  }
}

// out[r][0 .. kColumns) = sum_a g[r][active[a]] panel[active[a]] for kRows rows: the inner kernel.
template <class T, int kRows>
LIPFAST_INLINE void rows_times_panel(const T* g, int64_t g_stride, const int32_t* active, int64_t count, const T* panel,
                                     T* out, int64_t out_stride) {
  typedef typename Simd<T>::Vector Vector;
  constexpr int kLanes = Simd<T>::kLanes;
  Vector sum[kRows][2] = {};
  for (int64_t a = 0; a < count; ++a) {
    const int64_t unit = active[a];
    const T* row = panel + unit * kColumns<T>;
    const Vector w0 = load(row), w1 = load(row + kLanes);
    LIPFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vector factor = splat(g[r * g_stride + unit]);
      sum[r][0] += factor * w0;
      sum[r][1] += factor * w1;
    }
  }
  LIPFAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    store(out + r * out_stride, sum[r][0]);
    store(out + r * out_stride + kLanes, sum[r][1]);
  }
}

template <class T>
void all_rows_times_panel(const T* g, int64_t rows, int64_t g_stride, const int32_t* active, int64_t count,
                          const T* panel, T* out, int64_t out_stride) {
  int64_t k = 0;
  for (; k + kRowTile <= rows; k += kRowTile) {
    rows_times_panel<T, kRowTile>(g + k * g_stride, g_stride, active, count, panel, out + k * out_stride, out_stride);
  }
  g += k * g_stride;
  out += k * out_stride;
  switch (rows - k) {
    case 4:
      rows_times_panel<T, 4>(g, g_stride, active, count, panel, out, out_stride);
      break;
    case 3:
      rows_times_panel<T, 3>(g, g_stride, active, count, panel, out, out_stride);
      break;
    case 2:
      rows_times_panel<T, 2>(g, g_stride, active, count, panel, out, out_stride);
      break;
    case 1:
      rows_times_panel<T, 1>(g, g_stride, active, count, panel, out, out_stride);
      break;
    default:
      break;
  }
}

// Activations and derivatives of every layer for `count` samples.
template <class T>
void forward(const ChainParams& p, int64_t network, const T* packed, int64_t first, int64_t count,
             ChainBuffers<T>& buffers) {
  const int64_t stride = buffers.stride;
  const T* h = static_cast<const T*>(p.x) + first * p.widths[0];
  int64_t h_stride = p.widths[0];
  T *z = buffers.activations, *spare = z + buffers.tile * stride;
  T* derivatives = buffers.derivatives;
  for (int64_t i = 0; i < stride; ++i) buffers.active[i] = static_cast<int32_t>(i);
  for (int64_t l = 0; l < p.layers; ++l) {
    const T* b = static_cast<const T*>(p.biases[network * p.layers + l]);
    const int64_t outputs = p.widths[l + 1], inputs = p.widths[l];
    const T slope = static_cast<T>(p.slopes[l]);
    for (int64_t j = 0; j < outputs; j += kColumns<T>, packed += inputs * kColumns<T>) {
      all_rows_times_panel(h, count, h_stride, buffers.active, inputs, packed, z + j, stride);
    }
    for (int64_t t = 0; t < count; ++t) {
      T* out = z + t * stride;
      T* d = derivatives + t * outputs;
      for (int64_t o = 0; o < outputs; ++o) {
        const T value = out[o] + (b != nullptr ? b[o] : 0);
        const T derivative = value > 0 ? T(1) : slope + (value - value);  // NaN stays NaN
        d[o] = derivative;
        out[o] = value * derivative;
      }
    }
    derivatives += buffers.tile * outputs;
    h = z;
    h_stride = stride;
    T* swap = z;
    z = spare;
    spare = swap;
  }
}

// Indices of the units with a derivative other than zero. Returns how many.
template <class T>
int64_t find_active(const T* derivative, int64_t units, int32_t* active) {
  int64_t count = 0;
  for (int64_t i = 0; i < units; ++i) {
    active[count] = static_cast<int32_t>(i);
    count += derivative[i] != 0;
  }
  return count;
}

// Rows [0, rows) of g times the derivatives, in `out`.
template <class T>
void scale_columns(const T* g, int64_t rows, int64_t g_stride, const T* derivative, int64_t units, T* out,
                   int64_t out_stride) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t k = 0; k < rows; ++k) {
    int64_t i = 0;
    for (; i + kLanes <= units; i += kLanes) {
      store(out + k * out_stride + i, load(g + k * g_stride + i) * load(derivative + i));
    }
    for (; i < units; ++i) out[k * out_stride + i] = g[k * g_stride + i] * derivative[i];
  }
}

// D_L W_L of one sample: W_L itself where every derivative is 1, else a scaled copy in `rows`. Sets the stride.
template <class T>
const T* first_rows(const ChainParams& p, const T* w, const T* derivatives, T* rows, int64_t* stride) {
  const int64_t outputs = p.widths[p.layers], units = p.widths[p.layers - 1];
  bool identity = true;
  for (int64_t k = 0; k < outputs; ++k) identity = identity && derivatives[k] == 1;
  if (identity) {
    *stride = units;
    return w;
  }
  for (int64_t k = 0; k < outputs; ++k) {
    for (int64_t j = 0; j < units; ++j) rows[k * *stride + j] = derivatives[k] * w[k * units + j];
  }
  return rows;
}

// The Jacobian of sample t of the tile, dense K x D, in `jacobian`. The products alternate between two buffers.
template <class T>
void chain_product(const ChainParams& p, int64_t network, const T* panels, int64_t t, ChainBuffers<T>& buffers,
                   T* jacobian) {
  const int64_t outputs = p.widths[p.layers], inputs = p.widths[0], last = p.layers - 1;
  const T* derivatives = buffers.derivatives + buffers.tile * (buffers.units - outputs);
  T *rows = buffers.rows, *product = buffers.product;
  int64_t g_stride = buffers.stride;
  const T* g = first_rows(p, static_cast<const T*>(p.weights[network * p.layers + last]), derivatives + t * outputs,
                          rows, &g_stride);
  for (int64_t l = last - 1; l >= 0; --l) {
    const int64_t units = p.widths[l + 1], columns = round_up(p.widths[l], kColumns<T>);
    derivatives -= buffers.tile * units;
    panels -= units * columns;
    const T* derivative = derivatives + t * units;
    const int64_t active = find_active(derivative, units, buffers.active);
    if (p.slopes[l] != 0) {  // with ReLU the active derivatives are all 1
      scale_columns(g, outputs, g_stride, derivative, units, rows, buffers.stride);
      g = rows;
      g_stride = buffers.stride;
    }
    for (int64_t j = 0; j < columns; j += kColumns<T>) {
      all_rows_times_panel(g, outputs, g_stride, buffers.active, active, panels + j * units, product + j,
                           buffers.stride);
    }
    T* swap = rows;
    rows = product;
    product = swap;
    g = rows;
    g_stride = buffers.stride;
  }
  for (int64_t k = 0; k < outputs; ++k) memcpy(jacobian + k * inputs, g + k * g_stride, sizeof(T) * inputs);
}

template <class T>
void chain_tile_of(const ChainParams& p, int64_t network, const T* packed, int64_t first, int64_t count,
                   char* workspace) {
  ChainBuffers<T> buffers;
  buffers.place(p, workspace);
  const int64_t outputs = p.widths[p.layers], inputs = p.widths[0];
  forward(p, network, packed, first, count, buffers);
  for (int64_t t = 0; t < count; ++t) {
    chain_product(p, network, packed + packed_size<T>(p), t, buffers, buffers.jacobians + t * outputs * inputs);
  }
  T* spectral = static_cast<T*>(p.spectral) + network * p.batch + first;
  T* frobenius = static_cast<T*>(p.frobenius) + network * p.batch + first;
  for (int64_t t = 0; t < count; t += kDoubles) {
    reduce(buffers.jacobians + t * outputs * inputs, smaller<int64_t>(kDoubles, count - t), outputs, inputs,
           spectral + t, frobenius + t, buffers.reduce);
  }
}

ChainLayout chain_layout(const ChainParams& p) {
  if (p.dtype == Dtype::kFloat32) {
    ChainBuffers<float> buffers;
    return {packed_size<float>(p), ChainBuffers<float>::tile_for(p), buffers.place(p, nullptr)};
  }
  ChainBuffers<double> buffers;
  return {packed_size<double>(p), ChainBuffers<double>::tile_for(p), buffers.place(p, nullptr)};
}

void chain_pack(const ChainParams& p, int64_t network, void* packed) {
  if (p.dtype == Dtype::kFloat32) {
    pack_chain(p, network, static_cast<float*>(packed));
  } else {
    pack_chain(p, network, static_cast<double*>(packed));
  }
}

void chain_tile(const ChainParams& p, int64_t network, const void* packed, int64_t first, int64_t count,
                void* workspace) {
  if (p.dtype == Dtype::kFloat32) {
    chain_tile_of(p, network, static_cast<const float*>(packed), first, count, static_cast<char*>(workspace));
  } else {
    chain_tile_of(p, network, static_cast<const double*>(packed), first, count, static_cast<char*>(workspace));
  }
}
