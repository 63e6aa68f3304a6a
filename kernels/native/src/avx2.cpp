// AVX2: products of bytes are added in pairs to 16 bits, which must not overflow.
#include "avx256.h"

namespace tidegate::native {
namespace {

struct Avx2 : Avx256 {
    // 8 sums, 4 vectors of values, 2 of activations and 2 constants are the 16 registers.
    static constexpr int rows = 4;

    static Ints pairs(Ints values, Ints q) { return _mm256_maddubs_epi16(values, q); }

    // At 4 bits a pair is at most 2 * 15 * 127 = 3810, so four of them still fit 16 bits.
    static Ints four_quads(Ints sums, const Ints (&values)[4], const int8_t* q, size_t stride) {
        const Ints first = _mm256_add_epi16(pairs(values[0], splat_quad(q)),
                                            pairs(values[1], splat_quad(q + stride)));
        const Ints second = _mm256_add_epi16(pairs(values[2], splat_quad(q + 2 * stride)),
                                             pairs(values[3], splat_quad(q + 3 * stride)));
        return _mm256_add_epi32(
            sums, _mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1)));
    }

    // At 8 bits two products overflow 16: the nibbles apart, then the high ones weighed by 16.
    template <int Bits>
    static Ints dot(Ints sums, Ints values, Ints q) {
        static_assert(Bits == 8, "4 bits take four_quads");
        const Ints low = pairs(Avx256::low<4>(values), q);
        const Ints upper = pairs(high(values), q);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
        return _mm256_add_epi32(sums, _mm256_madd_epi16(upper, _mm256_set1_epi16(16)));
    }

    template <int Bits, int Rows, int Tiles>
    static void dot_group(Ints (&sums)[Rows][Tiles * 2], const Records<Tiles>& values,
                          const int8_t* q, int inputs) {
        if constexpr (Bits == 8) {
            dot_quads<Avx2, Bits, Rows, Tiles>(sums, values, q, inputs);
        } else {
            const int8_t* end = q + static_cast<size_t>(inputs) * Rows;
            size_t offset = 0;
            do {
                TIDEGATE_UNROLL
                for (int v = 0; v < Tiles * 2; ++v) {
                    const uint8_t* bytes = values.of(v / 2) + offset + v % 2 * 32;
                    const Ints one = load(bytes);
                    const Ints two = load(bytes + 64);
                    const Ints quads[4] = {low<4>(one), high(one), low<4>(two), high(two)};
                    TIDEGATE_UNROLL
                    for (int row = 0; row < Rows; ++row) {
                        sums[row][v] = four_quads(sums[row][v], quads, q + row * 4, Rows * 4);
                    }
                    // Activations are read again for each vector: there is no register to keep them.
                    asm("" : "+r"(q));
                }
                offset += 128;
                q += Rows * 16;
            } while (q != end);
        }
    }
};

}  // namespace

const Kernel avx2_kernel = {"avx2", Avx2::rows, 1, quantise<Avx2>, multiply<Avx2>, gate_rows};

}  // namespace tidegate::native
