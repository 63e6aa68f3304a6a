// NEON with the dot product of signed bytes (Armv8.2 and later): a quarter of a tile to a vector.
#include <arm_neon.h>

#include "vector_kernel.h"

namespace tidegate::native {
namespace {

struct NeonDotprod {
    using Ints = int32x4_t;
    using Floats = float32x4_t;
    static constexpr int lanes = 4;
    // 4 rows by 1 tile are 16 sums of 32 registers.
    static constexpr int rows = 4;
    static constexpr int tiles = 1;

    static Ints load(const uint8_t* bytes) { return vreinterpretq_s32_u8(vld1q_u8(bytes)); }
    static Ints splat(int32_t value) { return vdupq_n_s32(value); }
    static Floats splat(float value) { return vdupq_n_f32(value); }
    static Ints splat_quad(const int8_t* q) {
        int32_t quad;
        memcpy(&quad, q, sizeof quad);
        return vdupq_n_s32(quad);
    }
    // Values must be signed here: those of 8 bits have 128 taken off, as have their zero-points.
    template <int Bits>
    static Ints low(Ints packed) {
        const uint8x16_t bytes = vreinterpretq_u8_s32(packed);
        return vreinterpretq_s32_u8(Bits == 4 ? vandq_u8(bytes, vdupq_n_u8(15))
                                              : veorq_u8(bytes, vdupq_n_u8(128)));
    }
    static Ints high(Ints packed) {
        return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(packed), 4));
    }
    template <int Bits>
    static Ints dot(Ints sums, Ints values, Ints q) {
        return vdotq_s32(sums, vreinterpretq_s8_s32(values), vreinterpretq_s8_s32(q));
    }
    template <int Bits, int Rows, int Tiles>
    static void dot_group(Ints (&sums)[Rows][Tiles * 4], const Records<Tiles>& values,
                          const int8_t* q, int inputs) {
        dot_quads<NeonDotprod, Bits, Rows, Tiles>(sums, values, q, inputs);
    }
    static Floats scales_of(const uint8_t* halves) {
        return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(halves)));
    }
    template <int Bits, bool Zeros>
    static Ints zero_points(const uint8_t* bytes) {
        if (!Zeros) {
            return vdupq_n_s32(Bits == 4 ? 8 : 0);
        }
        uint32_t four;
        memcpy(&four, bytes, sizeof four);
        const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
        const Ints zeros = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
        return Bits == 4 ? zeros : vsubq_s32(zeros, vdupq_n_s32(128));
    }
    static Ints minus_sums(Ints zeros, Ints sums) { return vmulq_s32(zeros, sums); }
    static Floats to_float(Ints sums) { return vcvtq_f32_s32(sums); }
    static Floats zero_floats() { return vdupq_n_f32(0.0f); }
    static Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
    static Floats fused(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static void store(float* y, Floats totals) { vst1q_f32(y, totals); }

    static int32_t largest_magnitude(const float* x, int count) {
        int32x4_t largest = vdupq_n_s32(0);
        for (int i = 0; i < count; i += 4) {
            const int32x4_t bits = vreinterpretq_s32_f32(vabsq_f32(vld1q_f32(x + i)));
            largest = vmaxq_s32(largest, bits);
        }
        return vmaxvq_s32(largest);
    }
    static int32_t round_quads(const float* x, float inverse, int count, int8_t* q, size_t stride) {
        int32x4_t sum = vdupq_n_s32(0);
        for (int i = 0; i < count; i += 4, q += stride) {
            const int32x4_t rounded = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), inverse));
            sum = vaddq_s32(sum, rounded);
            const int16x4_t words = vmovn_s32(rounded);
            const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
            const int32_t quad = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
            memcpy(q, &quad, sizeof quad);
        }
        return vaddvq_s32(sum);
    }
};

}  // namespace

const Kernel neon_dotprod_kernel = {"neon-dotprod", NeonDotprod::rows, 1, quantise<NeonDotprod>,
                                    multiply<NeonDotprod>, gate_rows};

}  // namespace tidegate::native
