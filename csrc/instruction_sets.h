// Compiles the file MTKD_ROWS once per instruction set, each into a namespace of its own: mtkd_fast::avx512, ::avx2,
// ::baseline. Which one runs is chosen at run time (cpu_capability.h). Elsewhere than on x86-64: the baseline alone.

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define MTKD_ISA avx512
#define MTKD_VEC_BYTES 64
#include MTKD_ROWS
#undef MTKD_ISA
#undef MTKD_VEC_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define MTKD_ISA avx2
#define MTKD_VEC_BYTES 32
#include MTKD_ROWS
#undef MTKD_ISA
#undef MTKD_VEC_BYTES
#pragma GCC pop_options

#endif

#define MTKD_ISA baseline
#define MTKD_VEC_BYTES 16
#include MTKD_ROWS
#undef MTKD_ISA
#undef MTKD_VEC_BYTES
