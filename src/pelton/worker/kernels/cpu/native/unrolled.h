// Loops without a loop.
#pragma once

#include <utility>

namespace pelton {

// body(0), ..., body(kCount - 1), with numbers that are constants. Arrays that it indexes become registers early: gcc
// copies those of a loop that it unrolls later once or twice in every round of the loop around it.
template <int kCount, typename Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
    [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) __attribute__((always_inline)) {
        (body(std::integral_constant<int, kIndices>{}), ...);
    }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace pelton
