#include "launch.cuh"
#include "tap_products.cuh"

namespace lipfast::cuda {
namespace {

template <int kEach>
void launch_tiles(const TapProductsParams& p, void* stream) {
  const int64_t across = tiles_across(p.rows, kTileAcross * kEach);
  launch_in_turn("tap_products", &tap_products_kernel<kEach>,
                 {p.symbols * p.axes.differences() * across * across, kTileThreads, sizeof(TilePanels<double, kEach>)},
                 stream, p);
}

}  // namespace

void launch_tap_products_cuda(const TapProductsParams& p, void* stream) {
  p.rows <= kSmallSide ? launch_tiles<2>(p, stream) : launch_tiles<4>(p, stream);
}

}  // namespace lipfast::cuda
