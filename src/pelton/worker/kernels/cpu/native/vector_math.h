// Exponential and hyperbolic tangent of vectors.
#pragma once

#include "vector.h"

namespace pelton::PELTON_ISA {

// exp(x) for x <= 0, to about 1 ulp; exactly 1 at 0 and 0 below -87.
inline Floats exp_negative(Floats x) {
    const Ints tiny = x < splat(-87.0f);
    const Floats clamped = select(tiny, splat(-87.0f), x);
    const Floats n = round(clamped * splat(1.44269504f));
    Floats r = multiply_add(n, splat(-0.693359375f), clamped);
    r = multiply_add(n, splat(2.12194440e-4f), r);
    Floats p = splat(1.9875691500e-4f);
    p = multiply_add(p, r, splat(1.3981999507e-3f));
    p = multiply_add(p, r, splat(8.3334519073e-3f));
    p = multiply_add(p, r, splat(4.1665795894e-2f));
    p = multiply_add(p, r, splat(1.6666665459e-1f));
    p = multiply_add(p, r, splat(5.0000001201e-1f));
    p = multiply_add(r * r, p, r + splat(1.0f));
    // The low bits of n + 1.5 * 2^23 are those of the integer: no conversion, which NaN would not survive.
    const Words exponent = (bits_as<Words>(n + splat(12582912.0f)) << 23) + (127u << 23);
    return select(tiny, Floats{}, p * bits_as<Floats>(exponent));
}

inline Floats tanh_of(Floats x) {
    // (1 - e) / (1 + e) with e = exp(-2|x|).
    const Floats e = exp_negative(abs(x) * splat(-2.0f));
    const Floats t = (splat(1.0f) - e) / (splat(1.0f) + e);
    return bits_as<Floats>(bits_as<Ints>(t) | (bits_as<Ints>(x) & bits_as<Ints>(splat(-0.0f))));
}

}  // namespace pelton::PELTON_ISA
