// Widths of chains, and the addresses of many networks' weights and biases, launch by launch.
#pragma once

#include "../../kernels/cuda/chain_maps.h"

#include <algorithm>
#include <limits>

#include "device.h"

namespace lipfast {

// Units of a layer as kernels count them.
inline int32_t narrow_width(int64_t width, const char* op) {
  STD_TORCH_CHECK(width < int64_t{1} << 31, op, ": a layer of ", width, " units is too wide");
  return static_cast<int32_t>(width);
}

class NetworksOnDevice {
 public:
  // Checked tensors, network by network, `layers` of each; all must be on the device of `like`.
  NetworksOnDevice(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, int64_t layers,
                   const Tensor& like, const std::string& op)
      : layers_(layers), weights_(addresses(weights)), biases_(addresses(biases)) {
    for (size_t i = 0; i < weights.size(); ++i) {
      check_device(weights[i], like, op + ": weight " + std::to_string(i));
      if (biases[i].numel() > 0) check_device(biases[i], like, op + ": bias " + std::to_string(i));
    }
    spaced_ = is_spaced(weights_) && is_spaced(biases_);
  }

  int64_t count() const { return static_cast<int64_t>(weights_.size()) / layers_; }

  // Sets the maps of networks from `first` on; returns how many networks that are.
  int64_t take(int64_t first, cuda::ChainMaps& weights, cuda::ChainMaps& biases) const {
    const int64_t most = spaced_ ? std::numeric_limits<int32_t>::max() : cuda::kMaxChainMaps / layers_;
    const int64_t networks = std::min(most, count() - first);
    set(weights_, first, networks, weights);
    set(biases_, first, networks, biases);
    return networks;
  }

 private:
  static uintptr_t number(const void* address) { return reinterpret_cast<uintptr_t>(address); }
  uintptr_t step(const std::vector<const void*>& all, size_t layer) const {
    return count() < 2 ? 0 : number(all[static_cast<size_t>(layers_) + layer]) - number(all[layer]);
  }

  // Rows of stacked tensors are, and one network is.
  bool is_spaced(const std::vector<const void*>& all) const {
    const auto layers = static_cast<size_t>(layers_);
    for (size_t i = 0; i < all.size(); ++i) {
      if (number(all[i]) != number(all[i % layers]) + i / layers * step(all, i % layers)) return false;
    }
    return true;
  }

  void set(const std::vector<const void*>& all, int64_t first, int64_t networks, cuda::ChainMaps& maps) const {
    maps.spaced = spaced_;
    const int64_t listed = spaced_ ? layers_ : networks * layers_;
    std::copy_n(all.begin() + first * layers_, listed, maps.at);
    for (int64_t l = 0; spaced_ && l < layers_; ++l) {
      maps.at[cuda::kMaxChainMaps / 2 + l] = reinterpret_cast<const void*>(step(all, static_cast<size_t>(l)));
    }
  }

  int64_t layers_;
  std::vector<const void*> weights_, biases_;
  bool spaced_ = false;
};

}  // namespace lipfast
