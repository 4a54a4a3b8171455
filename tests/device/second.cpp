// A second device, "second", whose memory is the processor's and whose operations are the processor's: it shows on any
// machine what a program assumes about devices. As a GPU, it has a random stream of its own, and it refuses operations
// that mix its tensors with the processor's (numbers without dimensions are allowed, and indices).

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/op_registration/adaption.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <cstdlib>
#include <unordered_map>

namespace {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device SECOND(TYPE, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<TYPE> {
  c10::Device exchangeDevice(c10::Device) const override { return SECOND; }
  c10::Device getDevice() const override { return SECOND; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, SECOND); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, SECOND); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, SECOND); }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = std::aligned_alloc(64, (bytes / 64 + 1) * 64);
    return {data, data, &std::free, SECOND};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(TYPE, &memory)

at::Generator& generator() {
  static at::Generator it = at::make_generator<at::CPUGeneratorImpl>(0);
  return it;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator(); }
};

void drop(void* held) { delete static_cast<c10::Storage*>(held); }

c10::DataPtr adopted(const c10::Storage& cpu) {
  return {const_cast<void*>(cpu.data()), new c10::Storage(cpu), &drop, SECOND};
}

at::Tensor shaped(const c10::Storage& storage, c10::DispatchKeySet keys, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys, like.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  return made;
}

// One call: tensors of the device as the processor sees them, on the same memory, and back.
struct Call {
  std::unordered_map<c10::StorageImpl*, c10::Storage> inner, outer;  // of the device -> of the processor, and back
  std::vector<std::pair<at::Tensor, at::Tensor>> seen;               // of the device, of the processor
  bool on_device = false, joining = false;  // whether tensors are joined, where even numbers must be on the device
  std::string elsewhere;

  at::Tensor in(const at::Tensor& t) {
    if (!t.defined()) return t;
    if (t.device().type() != TYPE) {
      if (t.dim() > 0 || joining) elsewhere = t.device().str();
      return t;
    }
    on_device = true;
    for (auto& [mine, its] : seen)
      if (mine.is_same(t)) return its;
    auto* key = t.storage().unsafeGetStorageImpl();
    if (!inner.count(key)) {
      c10::DataPtr data(const_cast<void*>(t.storage().data()), c10::Device(c10::kCPU));
      c10::Storage cpu(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), c10::GetAllocator(c10::kCPU), true);
      outer.emplace(cpu.unsafeGetStorageImpl(), t.storage());
      inner.emplace(key, std::move(cpu));
    }
    seen.emplace_back(t, shaped(inner.at(key), c10::DispatchKeySet(c10::DispatchKey::CPU), t));
    return seen.back().second;
  }

  at::Tensor out(const at::Tensor& t) {
    if (!t.defined() || t.device().type() == TYPE) return t;
    for (auto& [mine, its] : seen)
      if (its.is_same(t)) return mine;
    auto found = outer.find(t.storage().unsafeGetStorageImpl());
    if (found != outer.end()) return shaped(found->second, KEYS, t);  // a view
    c10::Storage made(c10::Storage::use_byte_size_t(), t.storage().nbytes(), adopted(t.storage()), &memory, true);
    return shaped(made, KEYS, t);
  }

  void resized() {
    for (auto& [mine, its] : seen) {
      if (its.storage().data() != mine.storage().data()) {
        mine.storage().set_data_ptr_noswap(adopted(its.storage()));
        mine.storage().set_nbytes(its.storage().nbytes());
      }
      if (mine.sizes() != its.sizes() || mine.strides() != its.strides())
        mine.unsafeGetTensorImpl()->set_sizes_and_strides(its.sizes(), its.strides());
    }
  }

  c10::IValue in(const c10::IValue& value) {
    if (value.isTensor()) return in(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(in(t));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (std::optional<at::Tensor> t : value.toOptionalTensorList())
        list.push_back(t ? std::optional<at::Tensor>(in(*t)) : std::nullopt);
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == TYPE) return c10::Device(c10::kCPU);
    return value;
  }

  c10::IValue out(const c10::IValue& value) {
    if (value.isTensor()) return out(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(out(t));
      return list;
    }
    return value;
  }
};

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const auto count = schema.arguments().size();
  const auto first = stack->size() - count;
  Call call;
  call.joining = name == "aten::cat" || name == "aten::stack";
  std::vector<c10::IValue> given;
  for (size_t i = 0; i < count; ++i) {
    c10::IValue value = call.in((*stack)[first + i]);
    if (schema.arguments()[i].type()->str() == "Generator?") {
      TORCH_CHECK(value.isNone(), "Expected a 'second' device type for generator but found 'cpu'");
      value = generator();
    }
    given.push_back(std::move(value));
  }
  TORCH_CHECK(
      !call.on_device || call.elsewhere.empty() || name == "aten::index" || name.find("index_put") != std::string::npos,
      name, ": expected all tensors to be on the same device, but found at least two devices, second:0 and ",
      call.elsewhere);
  torch::jit::drop(*stack, count);
  for (auto& value : given) stack->push_back(value);
  given.clear();
  op.callBoxed(stack);
  call.resized();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) (*stack)[i] = call.out((*stack)[i]);
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  Call call;
  call.in(to).copy_(call.in(from));
  return to;
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_storage_offset(offset);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, {size}, {1});
}

// Assignment to .data across devices, which PyTorch allows between the processor and a GPU.
struct Open : c10::TensorImpl {
  using c10::TensorImpl::copy_tensor_metadata;
};

void move_data(const at::Tensor& self, const at::Tensor& data) {
  auto* to = self.unsafeGetTensorImpl();
  Open::copy_tensor_metadata(data.unsafeGetTensorImpl(), to, to->version_counter(), true);
  if (auto* meta = torch::autograd::impl::get_autograd_meta(self)) meta->grad_accumulator_.reset();
}

at::Tensor state() { return generator().get_state(); }
void set_state(const at::Tensor& state) { generator().set_state(state.cpu()); }
void seed(int64_t value) { generator().set_current_seed(static_cast<uint64_t>(value)); }

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
}

TORCH_LIBRARY(second, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("state", &state);
  m.def("set_state", &set_state);
  m.def("seed", &seed);
  m.def("move_data(Tensor self, Tensor data) -> ()", torch::dispatch(c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(move_data)));
}
