// AVX-VNNI: the dot product of AVX-512 on 256 bits, for client CPUs that have no AVX-512.
#include "avx256.h"

namespace tidegate::native {
namespace {

struct AvxVnni : Avx256 {
    // 12 sums, 2 vectors of values, 1 of activations and a mask are the 16 registers; a tenth
    // faster than 4 rows.
    static constexpr int rows = 6;

    template <int Bits>
    static Ints dot(Ints sums, Ints values, Ints q) {
#if defined(TIDEGATE_AVX_VNNI_AS_EVEX)
        // The same operation in AVX-512's encoding: how this path is tested on CPUs without its own.
        asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(values), "v"(q));
#else
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(values), "x"(q));
#endif
        return sums;
    }
    template <int Bits, int Rows, int Tiles>
    static void dot_group(Ints (&sums)[Rows][Tiles * 2], const Records<Tiles>& values,
                          const int8_t* q, int inputs) {
        dot_quads<AvxVnni, Bits, Rows, Tiles>(sums, values, q, inputs);
    }
};

}  // namespace

const Kernel avx_vnni_kernel = {"avx-vnni", AvxVnni::rows, 1, quantise<AvxVnni>, multiply<AvxVnni>, gate_rows};

}  // namespace tidegate::native
