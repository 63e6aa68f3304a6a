// What the two 256-bit paths share: half a tile to a vector.
#pragma once

#include <immintrin.h>

#include "vector_kernel.h"

namespace tidegate::native {
namespace {

struct Avx256 {
    using Ints = __m256i;
    using Floats = __m256;
    static constexpr int lanes = 8;
    static constexpr int tiles = 1;

    static Ints load(const uint8_t* bytes) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    }
    static Ints splat(int32_t value) { return _mm256_set1_epi32(value); }
    static Floats splat(float value) { return _mm256_set1_ps(value); }
    static Ints splat_quad(const int8_t* q) {
        int32_t quad;
        memcpy(&quad, q, sizeof quad);
        return _mm256_set1_epi32(quad);
    }
    static Ints high(Ints packed) {
        return _mm256_and_si256(_mm256_srli_epi16(packed, 4), _mm256_set1_epi8(15));
    }
    template <int Bits>
    static Ints low(Ints packed) {
        return Bits == 4 ? _mm256_and_si256(packed, _mm256_set1_epi8(15)) : packed;
    }
    static Floats scales_of(const uint8_t* halves) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
    }
    template <int Bits, bool Zeros>
    static Ints zero_points(const uint8_t* bytes) {
        return Zeros
                   ? _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)))
                   : splat(Bits == 4 ? 8 : 128);
    }
    // Both fit 16 bits, so their product is one multiply-add of pairs: the upper half is times 0.
    static Ints minus_sums(Ints zeros, Ints sums) { return _mm256_madd_epi16(zeros, sums); }
    static Floats to_float(Ints sums) { return _mm256_cvtepi32_ps(sums); }
    static Floats zero_floats() { return _mm256_setzero_ps(); }
    static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static void store(float* y, Floats totals) { _mm256_storeu_ps(y, totals); }

    static int32_t largest_magnitude(const float* x, int count) {
        const __m256i mask = _mm256_set1_epi32(0x7fffffff);
        __m256i largest = _mm256_setzero_si256();
        for (int i = 0; i < count; i += 8) {
            const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i));
            largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, mask));
        }
        alignas(32) int32_t each[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(each), largest);
        int32_t most = each[0];
        for (int lane = 1; lane < 8; ++lane) {
            most = each[lane] > most ? each[lane] : most;
        }
        return most;
    }
    static int32_t round_quads(const float* x, float inverse, int count, int8_t* q, size_t stride) {
        __m256i sum = _mm256_setzero_si256();
        for (int i = 0; i < count; i += 8, q += 2 * stride) {
            const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(inverse));
            const __m256i rounded = _mm256_cvtps_epi32(scaled);
            sum = _mm256_add_epi32(sum, rounded);
            const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded),
                                                  _mm256_extracti128_si256(rounded, 1));
            alignas(16) int32_t quads[4];
            _mm_store_si128(reinterpret_cast<__m128i*>(quads), _mm_packs_epi16(words, words));
            memcpy(q, &quads[0], 4);
            memcpy(q + stride, &quads[1], 4);
        }
        alignas(32) int32_t each[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(each), sum);
        int32_t total = 0;
        for (const int32_t one : each) {
            total += one;
        }
        return total;
    }
};

}  // namespace
}  // namespace tidegate::native
