// torch's CUDA library for a CPU torch without a GPU: tensors on cuda:0 and cuda:1 whose memory is the CPU's, and whose
// ops are those of the CPU. Loaded as libtorch_cuda.so, so that lipfast._C_cuda finds in it what it looks for in
// torch's.
//
// As strict as CUDA: operands on two devices are an error, but for numbers without dimensions and for index tensors.
// LIPFAST_STUB_MEMORY: no tensor may be larger, in bytes. No streams, events or graphs.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

constexpr c10::DeviceIndex kDevices = 2;
thread_local c10::DeviceIndex chosen = 0;  // the current device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device getDevice() const override { return {c10::kCUDA, chosen}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) chosen = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kDevices; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex current_device() const override { return chosen; }
  c10::DeviceIndex getCurrentDevice() const override { return chosen; }
};

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr data = c10::GetCPUAllocator()->allocate(bytes);
    data.unsafe_set_device({c10::kCUDA, chosen});
    return data;
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
} allocator;

// The same memory, said to be on another device.
c10::Storage moved(const c10::Storage& storage, c10::Device device) {
  auto* kept = new c10::Storage(storage);
  c10::DataPtr data(
      storage.unsafeGetStorageImpl()->mutable_data(), kept, [](void* held) { delete static_cast<c10::Storage*>(held); },
      device);
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                      device.is_cuda() ? &allocator : c10::GetCPUAllocator(), true);
}

at::Tensor tensor_over(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key) {
  c10::DispatchKeySet keys(key);
  for (const auto also : {c10::DispatchKey::Conjugate, c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor}) {
    if (like.key_set().has(also)) keys = keys.add(also);
  }
  at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys, like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// One call of an op on CPU tensors over the memory of the arguments.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), stack_(stack), name_(op.schema().name()) {}

  void run() {
    const size_t arguments = op_.schema().arguments().size();
    const size_t begin = stack_->size() - arguments;
    for (size_t i = begin; i < stack_->size(); ++i) look((*stack_)[i], i == begin);
    check();
    for (size_t i = begin; i < stack_->size(); ++i) (*stack_)[i] = on_cpu((*stack_)[i]);
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    for (size_t i = stack_->size() - op_.schema().returns().size(); i < stack_->size(); ++i) {
      (*stack_)[i] = on_device((*stack_)[i]);
    }
    for (auto& entry : aliases_) resize(entry.second.first, entry.second.second);
  }

 private:
  template <class Visit>
  static c10::IValue each_tensor(const c10::IValue& value, const Visit& visit) {
    if (value.isTensor()) return visit(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& entry : value.toTensorVector()) list.push_back(visit(entry));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& entry : value.toOptionalTensorVector()) {
        list.push_back(entry.has_value() ? std::optional<at::Tensor>(visit(*entry)) : std::nullopt);
      }
      return list;
    }
    return value;
  }

  void look(const c10::IValue& value, bool first) {
    each_tensor(value, [&](const at::Tensor& tensor) {
      if (!tensor.defined()) return tensor;
      if (tensor.is_cuda()) {
        TORCH_CHECK(device_.index() < 0 || device_ == tensor.device() || name_ == "aten::copy_",
                    mixed(tensor.device()));
        device_ = tensor.device();
      } else {
        plain_ = plain_ || tensor.dim() > 0;
        plain_first_ = plain_first_ || first;
      }
      return tensor;
    });
    if (value.isDevice() && value.toDevice().is_cuda()) {
      const c10::Device asked = value.toDevice();
      device_ = {c10::kCUDA, asked.has_index() ? asked.index() : chosen};
    }
  }

  std::string mixed(c10::Device other) const {
    return "Expected all tensors to be on the same device, but found at least two devices, " + device_.str() + " and " +
           other.str() + "! (" + name_ + ")";
  }

  void check() const {
    if (!plain_ || device_.index() < 0 || name_ == "aten::copy_" || name_ == "aten::_to_copy") return;
    static const std::unordered_set<std::string> indexing{"aten::index", "aten::index_put_", "aten::_index_put_impl_",
                                                          "aten::_unsafe_index", "aten::index_put"};
    TORCH_CHECK(indexing.count(name_) > 0 && !plain_first_, mixed(c10::kCPU));
  }

  c10::IValue on_cpu(const c10::IValue& value) {
    if (value.isDevice()) return c10::Device(c10::kCPU);
    return each_tensor(value, [&](const at::Tensor& tensor) {
      if (!tensor.defined() || !tensor.is_cuda()) return tensor;
      c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
      auto found = storages_.find(storage);
      if (found == storages_.end()) {
        found = storages_.emplace(storage, moved(tensor.storage(), c10::kCPU)).first;
        originals_.emplace(found->second.unsafeGetStorageImpl(), tensor.storage());
      }
      at::Tensor alias = tensor_over(found->second, tensor, c10::DispatchKey::CPU);
      aliases_.emplace(alias.unsafeGetTensorImpl(), std::pair(alias, tensor));
      return alias;
    });
  }

  c10::IValue on_device(const c10::IValue& value) {
    return each_tensor(value, [&](const at::Tensor& tensor) {
      if (!tensor.defined() || tensor.is_cuda()) return tensor;
      const auto argument = aliases_.find(tensor.unsafeGetTensorImpl());
      if (argument != aliases_.end()) return argument->second.second;
      if (plain_first_ && name_ == "aten::copy_") return tensor;
      limit(tensor);
      const auto known = originals_.find(tensor.storage().unsafeGetStorageImpl());
      const c10::Storage storage = known != originals_.end() ? known->second : moved(tensor.storage(), device_);
      return tensor_over(storage, tensor, c10::DispatchKey::CUDA);
    });
  }

  static void limit(const at::Tensor& tensor) {
    const char* most = std::getenv("LIPFAST_STUB_MEMORY");
    if (most != nullptr && tensor.storage().nbytes() > static_cast<size_t>(std::atoll(most))) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", tensor.storage().nbytes(),
                       " bytes.");
    }
  }

  // What an op with an `out` has made of it.
  void resize(const at::Tensor& alias, const at::Tensor& original) {
    c10::TensorImpl* impl = original.unsafeGetTensorImpl();
    const c10::Storage& storage = alias.storage();
    if (storage.data() != original.storage().data()) {
      c10::Storage made = moved(storage, original.device());
      impl->unsafe_storage().set_data_ptr_noswap(std::move(made.unsafeGetStorageImpl()->mutable_data_ptr()));
      impl->unsafe_storage().set_nbytes(storage.nbytes());
    }
    if (alias.sizes() != original.sizes() || alias.strides() != original.strides()) {
      impl->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
    }
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  const std::string name_;
  c10::Device device_{c10::kCUDA, -1};
  bool plain_ = false, plain_first_ = false;  // CPU tensors among the arguments
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages_, originals_;
  std::unordered_map<c10::TensorImpl*, std::pair<at::Tensor, at::Tensor>> aliases_;
};

void on_the_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) { Call(op, stack).run(); }

at::Tensor& set(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef sizes,
                c10::SymIntArrayRef strides) {
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(c10::asIntArrayRefSlow(sizes, __FILE__, __LINE__),
                              c10::asIntArrayRefSlow(strides, __FILE__, __LINE__), offset.expect_int());
  return self;
}

const auto kBoxed = [] { return torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>(); };

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(kBoxed()); }

// Made of other ops, but in a way that asks which device it is.
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  for (const char* op : {"copy_", "convolution", "convolution_backward"}) m.impl(op, kBoxed());
  m.impl("set_.source_Storage_storage_offset", &set);
}

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks);
}
REGISTER_ALLOCATOR(c10::kCUDA, &allocator)

extern "C" __attribute__((visibility("default"))) int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}
