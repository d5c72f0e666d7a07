// Opens _cpu_<isa>.so, which lies beside this library, and asks its table.
#include "peaks.h"

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>

#include "../cpu/kernels.h"
#include "features.h"

namespace ft::machine {
namespace {

std::string folder_of_this_library() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&folder_of_this_library), &info)) {
    throw std::runtime_error("_machine: the loader does not know where this library lies");
  }
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1);
}

const Kernels& kernels(const std::string& isa) {
  const auto names = supported_isas();
  if (std::find(names.begin(), names.end(), isa) == names.end()) {
    std::string accepted;
    for (const auto& name : names) accepted += (accepted.empty() ? "" : ", ") + name;
    throw std::invalid_argument("isa is '" + isa + "'; accepted on this machine: " + accepted);
  }
  const std::string path = folder_of_this_library() + "_cpu_" + isa + ".so";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  const void* table = dlsym(library, "ft_cpu_kernels");
  if (table == nullptr) throw std::runtime_error(dlerror());
  return *static_cast<const Kernels*>(table);
}

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("dtype is '" + name + "'; accepted: float32, bfloat16, float16");
}

}  // namespace

double peak_flops(const std::string& isa, const std::string& dtype) {
  return kernels(isa).peak_flops(dtype_named(dtype));
}
double read_bandwidth(const std::string& isa, int64_t bytes) {
  return kernels(isa).read_bandwidth(bytes);
}
double copy_bandwidth(const std::string& isa, int64_t bytes) {
  return kernels(isa).copy_bandwidth(bytes);
}
double streaming_bandwidth(const std::string& isa, int64_t bytes) {
  return kernels(isa).streaming_bandwidth(bytes);
}

}  // namespace ft::machine
