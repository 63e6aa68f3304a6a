// act(g) * u, elementwise: plain C++ that each translation unit compiles for its instruction set.
//
// Every operation is rounded as written (nothing is contracted, and a fused multiply-add is spelt
// out), so that all paths give the same bits whatever the width of their vectors. In an unnamed
// namespace and without the standard library, as kernel.h asks.
#pragma once

#include <stdint.h>

#include "kernel.h"

namespace tidegate::native {
namespace {

// e^x within 2 units in the last place, x first cut to [-87, 88]; NaN stays NaN.
inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    // x = n ln 2 + r. Adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits.
    const float shifted = __builtin_fmaf(x, 0x1.715476p+0f, 0x1.8p23f);
    const float n = shifted - 0x1.8p23f;
    float r = __builtin_fmaf(n, -0x1.62e4p-1f, x);
    r = __builtin_fmaf(n, -0x1.7f7d1cp-20f, r);
    // The series to r^7 / 7!, which |r| <= ln 2 / 2 leaves 5e-9 of.
    float series = 1.0f / 5040;
    series = __builtin_fmaf(series, r, 1.0f / 720);
    series = __builtin_fmaf(series, r, 1.0f / 120);
    series = __builtin_fmaf(series, r, 1.0f / 24);
    series = __builtin_fmaf(series, r, 1.0f / 6);
    series = __builtin_fmaf(series, r, 0.5f);
    series = __builtin_fmaf(series, r, 1.0f);
    series = __builtin_fmaf(series, r, 1.0f);
    uint32_t bits;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;  // 2^n
    float power;
    __builtin_memcpy(&power, &bits, sizeof power);
    return series * power;
}

// out[i] = act(gates[i]) * ups[i]; see gated_mlp.h.
void gate_rows(bool gelu, const float* __restrict gates, const float* __restrict ups, int64_t count,
               float* __restrict out) {
    if (gelu) {
        for (int64_t i = 0; i < count; ++i) {
            const float g = gates[i];
            const float t = g * __builtin_fmaf(0.07135481627f, g * g, 1.59576912161f);
            out[i] = g / (1.0f + exponential(-t)) * ups[i];
        }
    } else {
        for (int64_t i = 0; i < count; ++i) {
            const float g = gates[i];
            out[i] = g / (1.0f + exponential(-g)) * ups[i];
        }
    }
}

}  // namespace
}  // namespace tidegate::native
