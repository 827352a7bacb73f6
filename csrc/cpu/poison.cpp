#include "../common/poison.h"

// For tests: whether FUSEFEAT_POISON=1 was seen.
extern "C" __attribute__((visibility("default"))) int fusefeat_poison() {
  return fusefeat::kPoison ? 1 : 0;
}
