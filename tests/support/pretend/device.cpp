// Copyright 2026 The peft-elastic authors.
//
// Licensed under the Apache License, Version 2.0 (the "License");
// you may not use this file except in compliance with the License.
// You may obtain a copy of the License at
//
//     http://www.apache.org/licenses/LICENSE-2.0
//
// Unless required by applicable law or agreed to in writing, software
// distributed under the License is distributed on an "AS IS" BASIS,
// WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
// See the License for the specific language governing permissions and
// limitations under the License.

// A device of torch that is none: its two "cards" keep their memory in that of the host, at addresses from which no program can
// read, and compute with the operators of the CPU. What a GPU refuses is refused here: operands on different devices, a generator of another
// device, NumPy, operators of other libraries that have no kernel for it. What makes the host wait for a GPU is counted.
//
// torch's own example of such a device (test/cpp_extensions of its sources) is where to read up on what one has to provide.

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

namespace {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex CARDS = 2;

thread_local c10::DeviceIndex current = 0;
std::atomic<int64_t> launched{0};  // operators that compute or copy
std::atomic<int64_t> waited{0};    // times that the host needed a value of a card

// -- memory ---------------------------------------------------------------------------------------------------------

// No x86-64 or AArch64 process has memory at such an address (the latter ignores the eight highest bits): to read there is a
// segmentation fault.
constexpr uintptr_t FAR = uintptr_t{1} << 54;

void* far_of(void* host) { return host ? reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(host) | FAR) : nullptr; }

void* host_of(const void* far) { return far ? reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(far) & ~FAR) : nullptr; }

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* far = bytes ? far_of(c10::alloc_cpu(bytes)) : nullptr;
    if (far) std::memset(host_of(far), 0xA5, bytes);  // what is not filled shows
    return {far, far, &release, c10::Device(TYPE, current)};
  }
  static void release(void* far) {
    if (far) c10::free_cpu(host_of(far));
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(host_of(to), host_of(from), bytes);
  }
};

Allocator allocator;

void resize_storage(const c10::Storage& storage, size_t bytes) {
  const auto before = current;
  current = storage.device().index();
  c10::DataPtr now = allocator.allocate(bytes);
  current = before;
  const auto kept = std::min(bytes, static_cast<size_t>(storage.nbytes()));
  if (kept) std::memcpy(host_of(now.get()), host_of(storage.data()), kept);
  storage.set_data_ptr_noswap(std::move(now));
  storage.set_nbytes(bytes);
}

// -- cards ------------------------------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {TYPE, current}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < CARDS, "there are ", int(CARDS), " cards, got ", device);
    if (device.index() >= 0) current = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return c10::Stream(c10::Stream::DEFAULT, stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return CARDS; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return CARDS; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current = index; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return std::exchange(current, index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return index < 0 ? current : std::exchange(current, index);
  }
  at::Device getDeviceFromPtr(void*) const override { return {TYPE, current}; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override { resize_storage(storage, bytes); }
};

// -- operators --------------------------------------------------------------------------------------------------------

// Apple's has none, either: what is float64 has to be on the host.
void check_dtype(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype != at::kDouble && dtype != at::kComplexDouble, "this device has no float64");
}

struct OnCard {  // `empty` and its like allocate on the current card
  explicit OnCard(std::optional<c10::Device> device) : before(current) {
    if (device && device->index() >= 0) {
      TORCH_CHECK(device->index() < CARDS, "there are ", int(CARDS), " cards, got ", *device);
      current = device->index();
    }
  }
  ~OnCard() { current = before; }
  c10::DeviceIndex before;
};

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout, std::optional<at::Device> device,
    std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "only memory of the host can be pinned");
  TORCH_CHECK(layout.value_or(at::kStrided) == at::kStrided, "no sparse tensors here");
  check_dtype(c10::dtype_or_default(dtype));
  OnCard here(device);
  return at::detail::empty_generic(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool> pinned) {
  TORCH_CHECK(!pinned.value_or(false), "only memory of the host can be pinned");
  check_dtype(c10::dtype_or_default(dtype));
  OnCard here(device);
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU. A tensor of the CPU is itself.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.device().is_cpu()) return tensor;
  TORCH_CHECK(tensor.device().type() == TYPE, "no way to ", tensor.device());
  at::Tensor plain = at::from_blob(
      host_of(tensor.data_ptr()), tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.scalar_type()));
  if (tensor.is_conj()) plain.unsafeGetTensorImpl()->_set_conj(true);
  if (tensor.is_neg()) plain.unsafeGetTensorImpl()->_set_neg(true);
  return plain;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool) {
  ++launched;
  if (target.device().is_cpu() || self.device().is_cpu()) ++waited;  // for memory that is not pinned
  on_host(target).copy_(on_host(self));
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  if (target.sizes() != self.sizes()) target.resize_(self.sizes());
  return copy_from(self, target, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  ++waited;
  return on_host(self).item();
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Preserve) tensor->empty_tensor_restride(*format);
  const size_t needed = (tensor->storage_offset() + tensor->numel()) * tensor->dtype().itemsize();
  if (tensor->storage().nbytes() < needed) resize_storage(tensor->storage(), needed);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  TORCH_CHECK(storage.device().type() == TYPE, "a tensor of ", self.device(), " cannot have memory of ", storage.device());
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(storage));
  tensor->set_storage_offset(offset);
  if (stride.size() == size.size()) {
    tensor->set_sizes_and_strides(size, stride);
  } else {
    tensor->set_sizes_contiguous(size);
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, c10::Storage storage) {
  const auto size = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(storage), 0, {size}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

bool takes_indices_of_host(const std::string& name) { return name.rfind("aten::index.", 0) == 0 || name.find("index_put") != name.npos; }

bool waits(const std::string& name) {
  for (const char* each : {"aten::nonzero", "aten::masked_select", "aten::_unique", "aten::unique", "aten::equal", "aten::is_nonzero"})
    if (name.rfind(each, 0) == 0) return true;
  return false;
}

// As on a GPU: all operands on one device, but for scalars of the host, and indices of the host where torch takes them.
void check_devices(const std::string& name, const c10::FunctionSchema& schema, const torch::jit::Stack& stack) {
  std::optional<c10::Device> card;
  std::vector<std::pair<at::Tensor, size_t>> operands;
  const size_t first = stack.size() - schema.arguments().size();
  for (size_t i = first; i < stack.size(); ++i) {
    const c10::IValue& value = stack[i];
    if (value.isTensor() && value.toTensor().defined()) {
      operands.emplace_back(value.toTensor(), i - first);
    } else if (value.isTensorList()) {
      for (const at::Tensor& each : value.toTensorVector()) operands.emplace_back(each, i - first);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& each : value.toOptionalTensorList())
        if (each && each->defined()) {
          operands.emplace_back(*each, i - first);
          if (each->scalar_type() == at::kBool && each->device().type() == TYPE) ++waited;
        }
    } else if (value.isGenerator() && value.toGenerator().defined()) {
      TORCH_CHECK(
          value.toGenerator().device().type() == TYPE, "Expected a '", c10::DeviceTypeName(TYPE, true),
          "' device type for generator but found '", value.toGenerator().device(), "' in ", name);
    }
  }
  for (const auto& [tensor, argument] : operands)
    if (tensor.device().type() == TYPE && !(card && argument)) card = tensor.device();
  for (const auto& [tensor, argument] : operands) {
    if (tensor.device() == card) continue;
    const bool scalar = tensor.device().is_cpu() && tensor.dim() == 0;
    const bool index = tensor.device().is_cpu() && argument > 0 && takes_indices_of_host(name);
    TORCH_CHECK(
        scalar || index, "Expected all tensors to be on the same device, but found at least two devices, ", *card, " and ",
        tensor.device(), " in ", name, " (argument ", argument, ")");
  }
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string name = toString(op.operator_name());
  TORCH_CHECK_NOT_IMPLEMENTED(name.rfind("aten::", 0) == 0, "Could not run '", name, "': it has no kernel for this device");
  check_devices(name, op.schema(), *stack);
  const int64_t launched_before = launched, waited_before = waited;
  at::native::cpu_fallback(op, stack);
  launched = launched_before + 1;  // its copies to and fro are none of a GPU's
  waited = waited_before + waits(name);
}

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
}

TORCH_LIBRARY(pretend, m) {
  m.def("current_device() -> int", []() -> int64_t { return current; });
  m.def("set_device(int index) -> ()", [](int64_t index) {
    TORCH_CHECK(0 <= index && index < CARDS, "there are ", int(CARDS), " cards, got ", index);
    current = static_cast<c10::DeviceIndex>(index);
  });
  m.def("launched() -> int", []() -> int64_t { return launched; });
  m.def("waited() -> int", []() -> int64_t { return waited; });
}

static const bool ready = [] {
  c10::SetAllocator(TYPE, &allocator);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();
