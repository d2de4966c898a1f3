// The least of a CUDA runtime that lets autograd trace fake CUDA tensors in a CPU build of PyTorch:
// a device guard that does nothing, and hooks that answer "CUDA is built".
//
// fake_h100.py compiles this file into a shared library and calls pretend_cuda() once.

#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstring>

namespace {

using c10::Device;
using c10::DeviceType;
using c10::Stream;

// The autograd engine asks the guard for the current device and stream. There is one of each.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }  // what at::getAccelerator() asks
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};

}  // namespace

// 0: the pretence is in place. 1: there is a device guard already, of a real CUDA build or of an
// earlier call. 2: PyTorch still sees no accelerator.
extern "C" int pretend_cuda() {
  if (c10::impl::hasDeviceGuardImpl(DeviceType::CUDA)) return 1;
  c10::impl::registerDeviceGuard(DeviceType::CUDA, new Guard());

  // The import of torch has made the default hooks object already, so registering another class of
  // hooks comes too late. The existing object gets our table of virtual functions instead.
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  static Hooks* ours = new Hooks();
  auto* theirs = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  std::memcpy(static_cast<void*>(theirs), static_cast<void*>(ours), sizeof(void*));
  return at::accelerator::getAccelerator().has_value() ? 0 : 2;
}
