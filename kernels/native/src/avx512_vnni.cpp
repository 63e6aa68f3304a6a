// AVX-512 with VNNI: a tile is one vector wide.
#include <immintrin.h>

#include "vector_kernel.h"

namespace tidegate::native {
namespace {

struct Avx512Vnni {
    using Ints = __m512i;
    using Floats = __m512;
    static constexpr int lanes = 16;

    // Two tiles: 12 or 16 sums are enough to keep the multipliers busy, and with more the totals
    // leave the registers, which costs more. Two streams also read memory fastest, before one,
    // three and four (interleaved variants of this file, Zen 4).
    static constexpr int rows = 8;
    static constexpr int tiles = 2;

    static Ints load(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
    static Ints splat(int32_t value) { return _mm512_set1_epi32(value); }
    static Floats splat(float value) { return _mm512_set1_ps(value); }
    static Ints splat_quad(const int8_t* q) {
        int32_t quad;
        memcpy(&quad, q, sizeof quad);
        return _mm512_set1_epi32(quad);
    }
    template <int Bits>
    static Ints low(Ints packed) {
        return Bits == 4 ? _mm512_and_si512(packed, _mm512_set1_epi8(15)) : packed;
    }
    static Ints high(Ints packed) {
        return _mm512_and_si512(_mm512_srli_epi16(packed, 4), _mm512_set1_epi8(15));
    }
    template <int Bits>
    static Ints dot(Ints sums, Ints values, Ints q) {
        // Given the intrinsic, GCC 12 copies and spills the sums between steps: half the speed.
        asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(values), "v"(q));
        return sums;
    }
    template <int Bits, int Rows, int Tiles>
    static void dot_group(Ints (&sums)[Rows][Tiles], const Records<Tiles>& values, const int8_t* q,
                          int inputs) {
        dot_quads<Avx512Vnni, Bits, Rows, Tiles>(sums, values, q, inputs);
    }
    static Floats scales_of(const uint8_t* halves) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
    }
    template <int Bits, bool Zeros>
    static Ints zero_points(const uint8_t* bytes) {
        return Zeros
                   ? _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)))
                   : splat(Bits == 4 ? 8 : 128);
    }
    // Both fit 16 bits, so their product is one multiply-add of pairs: the upper half is times 0.
    static Ints minus_sums(Ints zeros, Ints sums) { return _mm512_madd_epi16(zeros, sums); }
    static Floats to_float(Ints sums) { return _mm512_cvtepi32_ps(sums); }
    static Floats zero_floats() { return _mm512_setzero_ps(); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static void store(float* y, Floats totals) { _mm512_storeu_ps(y, totals); }

    static int32_t largest_magnitude(const float* x, int count) {
        __m512i largest = _mm512_setzero_si512();
        for (int i = 0; i < count; i += 16) {
            const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(x + i));
            largest =
                _mm512_max_epi32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
        }
        return _mm512_reduce_max_epi32(largest);
    }
    static int32_t round_quads(const float* x, float inverse, int count, int8_t* q, size_t stride) {
        __m512i sum = _mm512_setzero_si512();
        for (int i = 0; i < count; i += 16, q += 4 * stride) {
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse));
            const __m512i rounded = _mm512_cvtps_epi32(scaled);
            sum = _mm512_add_epi32(sum, rounded);
            alignas(16) int32_t quads[4];
            _mm_store_si128(reinterpret_cast<__m128i*>(quads), _mm512_cvtepi32_epi8(rounded));
            for (int k = 0; k < 4; ++k) {
                memcpy(q + static_cast<size_t>(k) * stride, &quads[k], 4);
            }
        }
        return _mm512_reduce_add_epi32(sum);
    }
};

}  // namespace

const Kernel avx512_vnni_kernel = {"avx512-vnni",        Avx512Vnni::rows,     Avx512Vnni::tiles,
                                   quantise<Avx512Vnni>, multiply<Avx512Vnni>, gate_rows};

}  // namespace tidegate::native
