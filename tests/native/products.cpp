// Products of weights by channel of rows with outliers, gated layers in one piece, adapters.

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "checks.h"
#include "float16.h"
#include "lora.h"
#include "plain.h"
#include "runtime.h"

namespace pelton {

namespace {

std::vector<Runtime*> runtimes_of(std::vector<std::unique_ptr<Runtime>>& owners, const KernelTable& kernels,
                                  ActivationType activation) {
    owners.push_back(std::make_unique<Runtime>(kernels, 1, std::vector<int>{}, activation));
    owners.push_back(std::make_unique<Runtime>(kernels, 3, std::vector<int>{0}, activation));
    return {owners.end()[-2].get(), owners.end()[-1].get()};
}

// Every third row has a value that would leave nothing of 8 bits to the others.
Exact<float> rows_with_outliers(int num_rows, int num_inputs) {
    auto x = random_floats(static_cast<size_t>(num_rows) * num_inputs);
    for (int row = 0; row < num_rows; row += 3) x[static_cast<size_t>(row) * num_inputs + row % num_inputs] = 3000.0f;
    return x;
}

// The same bits, or no number in both: which of several a sum ends in is nobody's business.
bool same_number(float a, float b) { return float_to_bits(a) == float_to_bits(b) || (std::isnan(a) && std::isnan(b)); }

// Whether rows by themselves come out as they do among all, for a few of them.
template <typename Run>
bool stands_alone(const Exact<float>& x, int num_rows, int num_inputs, const Exact<float>& out, const Run& run) {
    const size_t width = out.size() / num_rows;
    for (int row : {0, num_rows / 2, num_rows - 1}) {
        const auto from = x.begin() + static_cast<int64_t>(row) * num_inputs, expected = out.begin() + row * width;
        const Exact<float> alone(from, from + num_inputs);
        Exact<float> result(width);
        run(alone.data(), 1, result.data());
        if (!std::equal(result.begin(), result.end(), expected, same_number)) return false;
    }
    return true;
}

// Sizes: one chunk of inputs and one and a half, several strips of them, several passes over the rows.
void check_channels(const std::vector<Runtime*>& runtimes) {
    const struct { int num_inputs, num_outputs; std::vector<int> num_rows; } sizes[] = {
        {32, 1, {1, 4}}, {512, 33, {1, 2, 11, 12, 13, 22, 25, 40}}, {1056, 70, {1, 3, 24, 50}}, {4096, 33, {250}}};
    for (const auto& [num_inputs, num_outputs, rows] : sizes) {
        LinearWeight weight(num_inputs);
        add_random_part(weight, Format::INT4_CHANNEL, num_outputs, runtimes.back()->pool());
        add_random_part(weight, Format::INT8_CHANNEL, 5, runtimes.back()->pool());
        const auto bias = random_floats(weight.num_outputs);
        for (int num_rows : rows) {
            const auto x = rows_with_outliers(num_rows, num_inputs);
            const float* offsets = num_rows % 2 ? bias.data() : nullptr;
            Exact<float> first;
            for (Runtime* runtime : runtimes) {
                Exact<float> out(static_cast<size_t>(num_rows) * weight.num_outputs);
                runtime->linear(weight, x.data(), num_rows, offsets, out.data());
                if (runtime == runtimes.front()) first = out;
                if (!same_bits(first, out)) fail("a product by channel depends on the threads");
                check_greatest(*runtime, weight, {x.data(), num_rows}, offsets, out.data());
            }
            const auto run = [&](const float* row, int count, float* out) {
                runtimes.front()->linear(weight, row, count, offsets, out);
            };
            if (!stands_alone(x, num_rows, num_inputs, first, run)) fail("a product by channel depends on other rows");
            const int num_checked = std::min(num_rows, 4);  // the plain loops are slow
            if (!plain::is_product(weight, x.data(), num_checked, offsets, false, first.data())) {
                fail("a product by channel is wrong");
            }
        }
    }
}

void check_gated_mlp(const std::vector<Runtime*>& runtimes) {
    for (Format format : {Format::Q4_0, Format::Q8_0, Format::INT8_CHANNEL, Format::INT4_CHANNEL, Format::BF16, Format::F32}) {
        // The last two with more rows than one pass takes, which threads share out.
        const struct { int num_inputs, size; std::vector<int> num_rows; } sizes[] = {
            {32, 32, {1, 5}}, {96, 288, {1, 16, 17, 33, 70}}, {96, 64, {521}}, {2048, 64, {300}}};
        for (const auto& [num_inputs, size, rows] : sizes) {
            LinearWeight gate_up(num_inputs), down(size);
            for (int side = 0; side < 2; ++side) add_random_part(gate_up, format, size, runtimes.back()->pool());
            add_random_part(down, format, 37, runtimes.back()->pool());
            const auto wide_bias = random_floats(2 * size), narrow_bias = random_floats(37);
            for (int num_rows : rows) {
                const bool has_bias = num_rows % 2;
                const GatedWeights weights = {&gate_up, has_bias ? wide_bias.data() : nullptr, &down,
                                              has_bias ? narrow_bias.data() : nullptr, num_rows % 3 == 0};
                const auto x = rows_with_outliers(num_rows, num_inputs);
                Exact<float> first;
                for (Runtime* runtime : runtimes) {
                    Exact<float> out(static_cast<size_t>(num_rows) * 37);
                    runtime->gated_mlp(weights, x.data(), num_rows, out.data());
                    if (runtime == runtimes.front()) first = out;
                    if (!same_bits(first, out)) fail("a gated layer depends on the threads");
                }
                const auto run = [&](const float* row, int count, float* out) {
                    runtimes.front()->gated_mlp(weights, row, count, out);
                };
                if (!stands_alone(x, num_rows, num_inputs, first, run)) fail("a gated layer depends on other rows");
            }
        }
    }
}

// An adapter's matrices in buffers of the exact size: bfloat16 where `bf16`, else float32.
struct Matrices {
    Exact<float> floats;
    Exact<uint16_t> halves;

    Matrices(size_t count, bool bf16) : floats(count), halves(bf16 ? count : 0) {}

    void set(size_t at, float value) {
        const uint16_t half = float_to_bfloat16(value);
        if (!halves.empty()) halves[at] = half;
        floats[at] = halves.empty() ? value : bfloat16_to_float(half);
    }
    LoraMatrix matrix() const {
        if (!halves.empty()) return {halves.data(), true};
        return {floats.data(), false};
    }
};

// Two parts: of all ranks but one, and of one alone; the columns between them are nobody's.
struct RandomSite {
    int num_inputs, num_ranks;
    Matrices shrink;
    std::vector<Matrices> expand;
    LoraSite site;

    static constexpr int kGap = 3;

    RandomSite(int inputs, int ranks, const std::vector<int>& num_outputs, bool bf16)
        : num_inputs(inputs), num_ranks(ranks), shrink(ranks * lora_stride(inputs), bf16) {
        std::normal_distribution<float> normal;
        for (int rank = 0; rank < ranks; ++rank) {
            for (int i = 0; i < inputs; ++i) shrink.set(rank * lora_stride(inputs) + i, normal(generator));
        }
        int column = 0, first_rank = 0;
        for (size_t part = 0; part < num_outputs.size(); ++part) {
            const int width = num_outputs[part], own = part + 1 < num_outputs.size() ? ranks - 1 : ranks - first_rank;
            Matrices& matrix = expand.emplace_back(static_cast<size_t>(width + kLoraPanel - 1) / kLoraPanel * own * kLoraPanel, bf16);
            for (int output = 0; output < width; ++output) {
                for (int rank = 0; rank < own; ++rank) matrix.set(place(output, rank, own), normal(generator));
            }
            site.parts.push_back({first_rank, own, column, width, part ? -2.0f : 0.5f, {}});
            first_rank += own;
            column += width + kGap;
        }
        for (size_t part = 0; part < expand.size(); ++part) site.parts[part].expand = expand[part].matrix();
        site.num_inputs = inputs;
        site.num_ranks = ranks;
        site.shrink = shrink.matrix();
    }

    static size_t place(int output, int rank, int num_ranks) {
        return (static_cast<size_t>(output / kLoraPanel) * num_ranks + rank) * kLoraPanel + output % kLoraPanel;
    }

    // Adds the same to a row, one number at a time.
    void add(const float* x, double* out, double* size) const {
        for (size_t index = 0; index < expand.size(); ++index) {
            const LoraPart& part = site.parts[index];
            for (int rank = 0; rank < part.num_ranks; ++rank) {
                double sum = 0.0, terms = 0.0;
                for (int i = 0; i < num_inputs; ++i) {
                    const double term = double{shrink.floats[(part.first_rank + rank) * lora_stride(num_inputs) + i]} * x[i];
                    sum += term;
                    terms += std::abs(term);
                }
                for (int output = 0; output < part.num_outputs; ++output) {
                    const double weight = double{part.scale} * expand[index].floats[place(output, rank, part.num_ranks)];
                    out[part.column + output] += weight * sum;
                    size[part.column + output] += std::abs(weight) * terms;
                }
            }
        }
    }
};

// Two adapters in turn and rows of none, `spare` floats between rows.
void check_lora_rows(const std::vector<Runtime*>& runtimes, const RandomSite (&sites)[2], int num_outputs, int num_rows) {
    constexpr int kSpare = 5;
    const int64_t ld_x = sites[0].num_inputs + kSpare, ld_out = num_outputs + kSpare;
    const auto x = random_floats(num_rows * ld_x - kSpare), before = random_floats(num_rows * ld_out - kSpare);
    std::vector<LoraAdapter> adapters(2, LoraAdapter(2));
    std::vector<int64_t> rows[2];
    for (int i = 0; i < 2; ++i) {
        adapters[i].set_site(1, sites[i].site);
        if (!sites[i].site.fits(sites[i].num_inputs, num_outputs)) fail("an adapter does not fit");
    }
    for (int row = 0; row < num_rows; ++row) {
        if (row % 7 != 6) rows[row % 3 == 2].push_back(row);
    }
    const std::vector<LoraRows> groups = {{&adapters[0], rows[0].data(), static_cast<int64_t>(rows[0].size())},
                                          {&adapters[1], rows[1].data(), static_cast<int64_t>(rows[1].size())}};
    Exact<float> first;
    for (Runtime* runtime : runtimes) {
        LoraProducts products;
        auto out = before;
        products.add(*runtime, groups, 0, x.data(), ld_x, out.data(), ld_out);
        if (!same_bits(before, out)) fail("an adapter changes a product that is not its own");
        products.add(*runtime, groups, 1, x.data(), ld_x, out.data(), ld_out);
        if (runtime == runtimes.front()) first = out;
        if (!same_bits(first, out)) fail("adapters depend on the threads");
        // Law 3: each row alone, in the order that is least like a batch's.
        out = before;
        for (int i : {1, 0}) {
            for (size_t row = rows[i].size(); row-- > 0;) {
                const LoraRows alone = {&adapters[i], &rows[i][row], 1};
                products.add(*runtime, std::span(&alone, 1), 1, x.data(), ld_x, out.data(), ld_out);
            }
        }
        if (!same_bits(first, out)) fail("adapters depend on other rows");
    }
    std::vector<double> expected(before.begin(), before.end()), size(before.size());
    for (int i = 0; i < 2; ++i) {
        for (int64_t row : rows[i]) sites[i].add(&x[row * ld_x], &expected[row * ld_out], &size[row * ld_out]);
    }
    for (size_t i = 0; i < before.size(); ++i) {
        if (size[i] == 0.0 ? first[i] != before[i] : !plain::near(first[i], expected[i], size[i] + std::abs(before[i]))) {
            fail("an adapter's product is wrong");
        }
    }
}

void check_lora(const std::vector<Runtime*>& runtimes) {
    for (int num_inputs : {1, 15, 16, 33, 100}) {
        for (int num_ranks : {2, 3, 9, 17, 40}) {
            for (int width : {1, 63, 64, 65, 600}) {
                const int num_outputs = width + RandomSite::kGap + 20;
                const bool bf16 = num_ranks % 2;
                const RandomSite sites[2] = {{num_inputs, num_ranks, {width, 20}, bf16},
                                             {num_inputs, num_ranks, {num_outputs}, !bf16}};
                for (int num_rows : {1, 4, 9}) check_lora_rows(runtimes, sites, num_outputs, num_rows);
            }
        }
    }
}

}  // namespace

void check_products(const KernelTable& kernels) {
    std::vector<std::unique_ptr<Runtime>> owners;
    const auto runtimes = runtimes_of(owners, kernels, ActivationType::Auto);
    check_channels(runtimes);
    check_gated_mlp(runtimes);
    check_lora(runtimes);
    if (kernels.tiles != nullptr) check_gated_mlp(runtimes_of(owners, kernels, ActivationType::INT8));
}

}  // namespace pelton
