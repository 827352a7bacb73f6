// What Python asks of the binaries besides the operators: how they were built, what the processor can do,
// and which instruction set the CPU kernels use. Needs neither torch nor, to be imported, the operator libraries.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace {

constexpr const char* kIsaNames[] = {"generic", "avx2", "avx512"};

const char* build_info() {
  return
#include "build_info.h"
      ;
}

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> features;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define FUSEFEAT_FEATURE(name) features[name] = __builtin_cpu_supports(name)
  FUSEFEAT_FEATURE("avx2");
  FUSEFEAT_FEATURE("fma");
  FUSEFEAT_FEATURE("f16c");
  FUSEFEAT_FEATURE("avx512f");
  FUSEFEAT_FEATURE("avx512bw");
  FUSEFEAT_FEATURE("avx512dq");
  FUSEFEAT_FEATURE("avx512vl");
  FUSEFEAT_FEATURE("avx512bf16");
#undef FUSEFEAT_FEATURE
#endif
  return features;
}

// The library beside this module, and only when torch has loaded it: a second copy would have its own state.
void* cpu_library() {
  Dl_info self;
  if (dladdr(reinterpret_cast<const void*>(&cpu_features), &self) == 0) throw std::runtime_error("dladdr failed");
  const std::string path = self.dli_fname;
  const std::string sibling = path.substr(0, path.rfind('/') + 1) + "libfusefeat_cpu.so";
  void* handle = dlopen(sibling.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) throw std::runtime_error("fusefeat: libfusefeat_cpu.so is not loaded");
  return handle;
}

template <class Function>
Function* cpu_function(const char* name) {
  void* symbol = dlsym(cpu_library(), name);
  if (symbol == nullptr) throw std::runtime_error(std::string("fusefeat: libfusefeat_cpu.so lacks ") + name);
  return reinterpret_cast<Function*>(symbol);
}

std::string isa_best() {
  return kIsaNames[cpu_function<int()>("fusefeat_isa_best")()];
}

std::string isa_current() {
  return kIsaNames[cpu_function<int()>("fusefeat_isa_current")()];
}

void isa_set(const std::string& name) {
  for (int isa = 0; isa < 3; ++isa) {
    if (name != kIsaNames[isa]) continue;
    if (cpu_function<int(int)>("fusefeat_isa_set")(isa) == 0)
      throw pybind11::value_error("fusefeat: this machine cannot run " + name);
    return;
  }
  throw pybind11::value_error("fusefeat: no instruction set '" + name + "'; there are generic, avx2 and avx512");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "The build facts as JSON text.");
  m.def("cpu_features", &cpu_features, "Which of the processor features that the kernels use are there.");
  m.def("isa_best", &isa_best);
  m.def("isa_current", &isa_current);
  m.def("isa_set", &isa_set, pybind11::arg("name"));
}
