// Which of the builds of cpu/vec/ runs. The state lives in the CPU operator library; the C functions are
// how the Python module, which does not link to it, reaches it.
#pragma once

namespace fusefeat {

// Ordered: a machine that runs one runs all before it. Only generic exists off x86-64.
enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2 };

}  // namespace fusefeat

extern "C" {
int fusefeat_isa_best();        // the best this machine and its operating system run
int fusefeat_isa_current();     // FUSEFEAT_ISA of the environment when it can be had, else the best
int fusefeat_isa_set(int isa);  // 1, or 0 when this machine cannot run it; not while an operator runs
}

namespace fusefeat {

inline Isa current_isa() {
  return static_cast<Isa>(fusefeat_isa_current());
}

}  // namespace fusefeat
