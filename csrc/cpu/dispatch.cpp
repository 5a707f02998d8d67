// Chooses an instruction set once, when the module loads: FASTCNN_ISA, or the fastest that the machine has.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastcnn {

// Those that multiply matrices, for which AMX has instructions, and the others (cmake/FastcnnIsa.cmake).
#define FASTCNN_PRODUCT_KERNELS(apply)                                                                     \
  apply(gemm_pack) apply(pointwise_forward) apply(pointwise_backward) apply(conv2d) apply(conv2d_backward) \
      apply(separable) apply(inverted_residual)
#define FASTCNN_OTHER_KERNELS(apply)                                                                         \
  apply(group_conv2d) apply(depthwise_forward) apply(depthwise_backward) apply(max_pool2d) apply(avg_pool2d) \
      apply(affine_act) apply(affine_act_backward) apply(dropout) apply(squash) apply(capsule_forward)       \
          apply(capsule_backward) apply(local_response_norm)

#define FASTCNN_DECLARE_KERNEL(name) void register_##name(Kernels&);
#define FASTCNN_REGISTER_KERNEL(name) register_##name(k);
#define FASTCNN_DECLARE_ISA(isa)                     \
  namespace isa {                                    \
  FASTCNN_PRODUCT_KERNELS(FASTCNN_DECLARE_KERNEL)    \
  FASTCNN_OTHER_KERNELS(FASTCNN_DECLARE_KERNEL)      \
  static Kernels make() {                            \
    Kernels k;                                       \
    FASTCNN_PRODUCT_KERNELS(FASTCNN_REGISTER_KERNEL) \
    FASTCNN_OTHER_KERNELS(FASTCNN_REGISTER_KERNEL)   \
    return k;                                        \
  }                                                  \
  }

FASTCNN_DECLARE_ISA(portable)
#ifdef FASTCNN_HAS_avx2
FASTCNN_DECLARE_ISA(avx2)
#endif
#ifdef FASTCNN_HAS_avx512
FASTCNN_DECLARE_ISA(avx512)
#endif
#ifdef FASTCNN_HAS_avx512_bf16
FASTCNN_DECLARE_ISA(avx512_bf16)
#endif
#ifdef FASTCNN_HAS_amx
namespace amx {
FASTCNN_PRODUCT_KERNELS(FASTCNN_DECLARE_KERNEL)
static Kernels make() {
  Kernels k = avx512_bf16::make();
  FASTCNN_PRODUCT_KERNELS(FASTCNN_REGISTER_KERNEL)
  return k;
}
}  // namespace amx
#endif

namespace {

bool always() { return true; }

#ifdef __x86_64__
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
[[maybe_unused]] bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Intel's vdpbf16ps has half the rate of its float32 FMA, AMD's twice: on an Emerald Rapids a bf16 training
// step of ResNet-50 takes 1.5 times as long as with bf16 widened on load. With AMX the question does not
// arise.
[[maybe_unused]] bool bf16_pays() { return !__builtin_cpu_is("intel"); }

// AMX state is off until a process asks the kernel for it; without the permission the first tile load is
// fatal.
[[maybe_unused]] bool has_amx() {
#if defined(FASTCNN_EMULATE_AMX)
  return has_avx512_bf16();
#elif defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
  const bool tile = d & (1u << 24), bf16 = d & (1u << 22);
  return has_avx512_bf16() && tile && bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Isa {
  const char* name;
  bool (*supported)();
  Kernels (*make)();
  bool (*pays)() = always;  // whether to choose it unasked
};

const Isa kIsas[] = {
    {"portable", always, portable::make},
#ifdef FASTCNN_HAS_avx2
    {"avx2", has_avx2, avx2::make},
#endif
#ifdef FASTCNN_HAS_avx512
    {"avx512", has_avx512, avx512::make},
#endif
#ifdef FASTCNN_HAS_avx512_bf16
    {"avx512_bf16", has_avx512_bf16, avx512_bf16::make, bf16_pays},
#endif
#ifdef FASTCNN_HAS_amx
    {"amx", has_amx, amx::make},
#endif
};

std::string supported_names() {
  std::string names;
  for (int i = 0; i < isa_count(); ++i)
    if (isa_supported(i)) names += (names.empty() ? "" : ", ") + std::string(isa_name(i));
  return names;
}

int initial() {
  const char* wanted = std::getenv("FASTCNN_ISA");
  if (!wanted || !*wanted) {
    int fastest = 0;
    for (int i = 0; i < isa_count(); ++i)
      if (isa_supported(i) && kIsas[i].pays()) fastest = i;
    return fastest;
  }
  for (int i = 0; i < isa_count(); ++i)
    if (!std::strcmp(wanted, isa_name(i)) && isa_supported(i)) return i;
  throw std::runtime_error("FASTCNN_ISA: got '" + std::string(wanted) + "', expected one of " +
                           supported_names());
}

struct Active {
  int index = initial();
  Kernels table = kIsas[index].make();
};

Active& active() {
  static Active instance;
  return instance;
}

}  // namespace

const Kernels& kernels() { return active().table; }
#ifdef FASTCNN_HAS_avx512
const Kernels& avx512_kernels() {
  static const Kernels table = avx512::make();
  return table;
}
#endif
int isa_count() { return sizeof(kIsas) / sizeof(kIsas[0]); }
const char* isa_name(int index) { return kIsas[index].name; }
bool isa_supported(int index) { return kIsas[index].supported(); }
int isa_active() { return active().index; }

void isa_activate(int index) {
  if (!isa_supported(index))
    throw std::runtime_error("this machine has no " + std::string(isa_name(index)) + ", it has " +
                             supported_names());
  active().index = index;
  active().table = kIsas[index].make();
}

}  // namespace fastcnn
