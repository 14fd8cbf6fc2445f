// The module eqcvt._native: every launcher as a Python function of plain numbers, in which a
// pointer is an address. The only file that knows pybind11.
//
// cpu_<name>(dtype, ..., threads) and, where CUDA was built, cuda_<name>(dtype, ..., workspace,
// stream) return the launcher's status; cuda_<name>_workspace(dtype, ...) returns it and the bytes
// of workspace needed. All let other Python threads run meanwhile.
#include <pybind11/pybind11.h>

#if EQCVT_AMX && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <string>
#include <tuple>
#include <utility>

#include "conv_attention.h"
#include "cpu/parallel.h"
#include "eqcvt.h"
#include "lift.h"
#include "mlp_block.h"
#include "token_embed.h"

namespace py = pybind11;

namespace {

#define EQCVT_TEXT2(words) #words
#define EQCVT_TEXT(words) EQCVT_TEXT2(words)

enum Isa { PORTABLE, AVX2, AVX512, AMX };
constexpr const char* NAMES[] = {"portable", "avx2", "avx512", "amx"};
constexpr int BUILT = EQCVT_AMX ? AMX : EQCVT_X86 ? AVX512 : PORTABLE; // and those before it

// Whether there is a matrix unit for bfloat16 that this process may use: Linux has to be asked
// once, since a thread's state grows by 8 kB.
bool has_matrix_unit() {
#if EQCVT_AMX && defined(__linux__)
    unsigned a, b, c, d, bf16;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
    bf16 = a >> 5 & 1; // AVX512_BF16
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    bf16 &= d >> 22 & d >> 24 & 1;                  // AMX-BF16, AMX-TILE
    constexpr int REQUEST = 0x1023, TILE_DATA = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return bf16 && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}

bool runs(int isa) {
#if EQCVT_X86
    // These ask the operating system too, which has to save the wide registers.
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return isa == PORTABLE || (isa == AVX2 && avx2) || (isa == AVX512 && avx512) ||
           (isa == AMX && avx512 && has_matrix_unit());
#else
    return isa == PORTABLE;
#endif
}

// The widest instruction set that runs here, or the one that EQCVT_ISA names.
int choose_isa() {
    const char* value = std::getenv("EQCVT_ISA");
    std::string wish = value ? value : "", usable;
    int widest = PORTABLE;
    for (int isa = PORTABLE; isa <= BUILT; ++isa) {
        if (!runs(isa)) continue;
        if (wish == NAMES[isa]) return isa;
        usable += (usable.empty() ? "" : ", ") + std::string(NAMES[isa]);
        widest = isa;
    }
    if (wish.empty()) return widest;
    throw py::import_error("EQCVT_ISA must be one of " + usable + " on this machine, got '" + wish +
                           "'");
}

// What Python passes for an argument: an address for a pointer, else the number itself.
template <class T> struct Passed {
    using type = T;
    static T get(T value) { return value; }
};
template <class T> struct Passed<T*> {
    using type = uintptr_t;
    static T* get(uintptr_t address) { return reinterpret_cast<T*>(address); }
};
template <class T> using passed = typename Passed<T>::type;

using Release = py::call_guard<py::gil_scoped_release>;

template <class... A> void add_cpu(py::module_& m, const std::string& name, int (*f)(A...)) {
    m.def(("cpu_" + name).c_str(), [f](passed<A>... a) { return f(Passed<A>::get(a)...); },
          Release());
}

// The last three arguments are a workspace, where to write its size, and a stream.
template <class... A, size_t... I>
void add_cuda(py::module_& m, const std::string& name, int (*f)(A...), std::index_sequence<I...>) {
    using All = std::tuple<A...>;
    m.def(("cuda_" + name).c_str(),
          [f](passed<std::tuple_element_t<I, All>>... a, uintptr_t workspace, uintptr_t stream) {
              return f(Passed<std::tuple_element_t<I, All>>::get(a)...,
                       reinterpret_cast<void*>(workspace), nullptr,
                       reinterpret_cast<void*>(stream));
          },
          Release());
    m.def(("cuda_" + name + "_workspace").c_str(),
          [f](passed<std::tuple_element_t<I, All>>... a) {
              int64_t bytes = 0;
              int status =
                  f(Passed<std::tuple_element_t<I, All>>::get(a)..., nullptr, &bytes, nullptr);
              return std::make_pair(status, bytes);
          },
          Release());
}

template <class... A> void add_cuda(py::module_& m, const std::string& name, int (*f)(A...)) {
    add_cuda(m, name, f, std::make_index_sequence<sizeof...(A) - 3>());
}

// The variants of a launcher by instruction set; not all are compiled for the widest.
#if EQCVT_X86
#define EQCVT_WIDE(name, widest)                                                                   \
    , eqcvt_cpu_##name##_avx2, eqcvt_cpu_##name##_avx512, eqcvt_cpu_##name##_##widest
#else
#define EQCVT_WIDE(name, widest)
#endif
#if EQCVT_AMX
#define EQCVT_WIDEST amx
#else
#define EQCVT_WIDEST avx512
#endif
#define EQCVT_ADD_CPU(name, widest)                                                                \
    {                                                                                              \
        decltype(&eqcvt_cpu_##name##_portable) variants[] = {                                      \
            eqcvt_cpu_##name##_portable EQCVT_WIDE(name, widest)};                                 \
        add_cpu(m, #name, variants[isa]);                                                          \
    }
#if defined(EQCVT_CUDA)
#define EQCVT_ADD_CUDA(name) add_cuda(m, #name, eqcvt_cuda_##name);
#else
#define EQCVT_ADD_CUDA(name)
#endif
#define LAUNCHER(name, widest) EQCVT_ADD_CPU(name, widest) EQCVT_ADD_CUDA(name)

} // namespace

#if defined(EQCVT_CUDA)
EQCVT_API const char* eqcvt_cuda_error_string(int status);
EQCVT_API int eqcvt_cuda_set_device(int device);
#endif

PYBIND11_MODULE(_native, m) {
    const int isa = choose_isa();
    LAUNCHER(lift_moments, avx512)
    LAUNCHER(lift_moments_input, avx512)
    LAUNCHER(lift_apply, avx512)
    LAUNCHER(lift_apply_backward, avx512)
    LAUNCHER(conv_attention_project, EQCVT_WIDEST)
    LAUNCHER(conv_attention_project_backward, EQCVT_WIDEST)
    LAUNCHER(conv_attention_attend, EQCVT_WIDEST)
    LAUNCHER(conv_attention_attend_backward, EQCVT_WIDEST)
    LAUNCHER(mlp_block_forward, EQCVT_WIDEST)
    LAUNCHER(mlp_block_backward, EQCVT_WIDEST)
    LAUNCHER(token_embed_forward, EQCVT_WIDEST)
    LAUNCHER(token_embed_backward, EQCVT_WIDEST)

    py::dict build;
    py::list built, usable;
    for (int i = PORTABLE; i <= BUILT; ++i) {
        built.append(NAMES[i]);
        if (runs(i)) usable.append(NAMES[i]);
    }
    build["version"] = EQCVT_TEXT(EQCVT_VERSION);
#if defined(__clang__)
    build["compiler"] = "clang " __clang_version__;
#else
    build["compiler"] = "gcc " __VERSION__;
#endif
    build["instruction_sets"] = py::tuple(built);
    build["instruction_sets_here"] = py::tuple(usable);
    build["instruction_set"] = NAMES[isa];
#if defined(EQCVT_CUDA)
    build["cuda"] = EQCVT_TEXT(EQCVT_CUDA);
    build["cuda_archs"] = EQCVT_TEXT(EQCVT_CUDA_ARCHS);
    m.def("cuda_error_string", eqcvt_cuda_error_string);
    m.def("cuda_set_device", eqcvt_cuda_set_device);
#else
    build["cuda"] = py::none();
    build["cuda_archs"] = py::none();
#endif
    m.attr("build") = build;
    m.def("share_openmp", [](const std::string& path) { return eqcvt_share_openmp(path.c_str()); });
}
