// Runs every native kernel over odd shapes, in buffers of the exact size, for the sanitizers to watch.
// Built and run by scripts/check_native_sanitizers.sh and check_native_arm.sh. That the numbers are the same with
// any number of threads is checked bit for bit; that they are right, against plain.h and from Python.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "checks.h"
#include "embedding.h"
#include "plain.h"
#include "program.h"
#include "runtime.h"
#include "sampling.h"

namespace pelton {

namespace {

void check_linear(std::vector<Runtime*> runtimes, ActivationType activation) {
    for (int index = 0; index < kNumFormats; ++index) {
        const Format format = static_cast<Format>(index);
        for (int num_inputs : {1, 33, 32, 256, 512}) {
            if (num_inputs % traits_of(format).file_block_values != 0) continue;
            for (int num_outputs : {1, 31, 33, 100}) {
                LinearWeight weight(num_inputs);
                add_random_part(weight, format, num_outputs, runtimes.back()->pool());
                const Format other = num_inputs % kGroup == 0 ? Format::Q8_0 : Format::F32;
                const Format beside = traits_of(format).by_channel ? format : other;
                add_random_part(weight, beside, 5, runtimes.back()->pool());
                for (int num_rows : {0, 1, 5, 6, 7, 40}) {
                    auto x = random_floats(static_cast<size_t>(num_rows) * num_inputs);
                    if (num_rows > 4) {
                        x[0] = std::numeric_limits<float>::quiet_NaN();
                        x[num_inputs + 3] = std::numeric_limits<float>::infinity();
                        for (int i = 0; i < num_inputs; ++i) {
                            x[2 * num_inputs + i] *= 1e-40f;
                            x[3 * num_inputs + i] *= 1e30f;
                        }
                    }
                    const auto bias = random_floats(weight.num_outputs);
                    Exact<float> first;
                    for (Runtime* runtime : runtimes) {
                        Exact<float> out(static_cast<size_t>(num_rows) * weight.num_outputs);
                        runtime->linear(weight, x.data(), num_rows, num_rows % 2 ? bias.data() : nullptr, out.data());
                        if (runtime == runtimes.front()) first = out;
                        if (!same_bits(first, out)) fail("linear depends on the threads");
                        check_greatest(*runtime, weight, {x.data(), num_rows}, num_rows % 2 ? bias.data() : nullptr,
                                       out.data());
                    }
                    if (num_rows > 7 || num_outputs != 33) continue;  // slow
                    const bool has_tiles = runtimes.front()->kernels().tiles != nullptr;
                    // bfloat16: tested from Python
                    if (activation == ActivationType::Auto && has_tiles && !traits_of(format).by_channel) continue;
                    if (!plain::is_product(weight, x.data(), num_rows, num_rows % 2 ? bias.data() : nullptr,
                                           activation == ActivationType::F32, first.data())) {
                        fail("a product is wrong, format " + std::to_string(index));
                    }
                }
            }
        }
    }
}

void check_rows(std::vector<Runtime*> runtimes) {
    for (int size : {1, 2, 15, 16, 17, 31, 33, 64, 100, 300}) {
        for (int num_rows : {0, 1, 3}) {
            const size_t count = static_cast<size_t>(num_rows) * size;
            const auto x = random_floats(count), weight = random_floats(size), gate_up = random_floats(2 * count);
            const auto residual = random_floats(count);
            Exact<float> first;
            for (Runtime* runtime : runtimes) {
                Exact<float> out(5 * count), total = residual;
                runtime->rms_norm(x.data(), nullptr, weight.data(), num_rows, size, 1e-6f, out.data());
                runtime->rms_norm(x.data(), total.data(), weight.data(), num_rows, size, 1e-6f, out.data() + count);
                std::copy(total.begin(), total.end(), out.begin() + 2 * count);
                runtime->gated(false, gate_up.data(), num_rows, size, out.data() + 3 * count);
                runtime->gated(true, gate_up.data(), num_rows, size, out.data() + 4 * count);
                if (runtime == runtimes.front()) first = out;
                if (!same_bits(first, out)) fail("a row depends on the threads");
            }
        }
    }
}

// Every filter and edit over vocabularies around the sizes of blocks and mask words.
void check_sampling(std::vector<Runtime*> runtimes) {
    const float infinity = std::numeric_limits<float>::infinity();
    for (int size : {1, 31, 33, 63, 64, 65, 200, 3000, 40000}) {
        std::vector<SamplingRow> rows;
        for (int top_k : {0, 1, 5, size / 2, size + 1}) {
            for (double top_p : {1.0, 0.99, 0.3, 1e-9}) {
                for (double min_p : {0.0, 1e-15, 0.2, 1.0}) {
                    SamplingRow row;
                    row.vocab_size = size;
                    row.temperature = static_cast<double>(rows.size() % 4);
                    row.top_k = top_k;
                    row.top_p = top_p;
                    row.min_p = min_p;
                    row.seed = rows.size();
                    row.num_logprobs = static_cast<int>(rows.size() % 7) - 1;
                    row.repetition_penalty = rows.size() % 5 == 0 ? 1.3f : 1.0f;
                    if (rows.size() % 3 == 0) {
                        const Exact<int32_t> seen = {0, size - 1, 0};
                        row.add_seen(seen, 1.0f);
                        row.bias = {{size - 1, 3.0f}};
                        row.banned = {size / 2};
                        row.stops = {0};
                        row.min_tokens = 5;
                    }
                    rows.push_back(row);
                }
            }
        }
        auto logits = random_floats(rows.size() * size);
        logits[0] = std::numeric_limits<float>::quiet_NaN();
        logits[size] = infinity;
        for (int i = 0; i < size; ++i) {
            logits[2 * size + i] = -infinity;
            logits[3 * size + i] = 1.0f;
            logits[4 * size + i] *= 1e38f;
            logits[5 * size + i] *= 1e-39f;
        }
        const auto mask_bytes = random_bytes((size + 31) / 32 * 4);
        const auto* mask = reinterpret_cast<const uint32_t*>(mask_bytes.data());
        std::vector<SampleTask> first;
        for (Runtime* runtime : runtimes) {
            Sampler sampler(*runtime, size);
            auto edited = logits;
            std::vector<SampleTask> tasks;
            for (const auto& row : rows) tasks.push_back({&row, static_cast<int64_t>(row.seed % 9), row.seed % 4 ? nullptr : mask});
            sampler.sample(edited.data(), tasks);
            if (runtime == runtimes.front()) first = tasks;
            for (size_t i = 0; i < tasks.size(); ++i) {
                if (tasks[i].token_id < kOverflow || tasks[i].token_id >= size) fail("a token is outside the vocabulary");
                if (tasks[i].token_id != first[i].token_id || tasks[i].logprobs.top != first[i].logprobs.top) {
                    fail("sampling depends on the threads");
                }
            }
            const Exact<int64_t> token_ids(3, size - 1);
            std::vector<TokenLogprobs> logprobs(3);
            if (sampler.token_logprobs(logits.data(), token_ids, 20, logprobs)) fail("NaN went unseen");
            if (!sampler.token_logprobs(logits.data() + 6 * size, token_ids, 20, logprobs)) fail("logprobs are missing");
        }
    }
}

void check_attention(std::vector<Runtime*> runtimes, KVType kv_type, AttentionShape shape) {
    shape.kv_type = kv_type;
    // The last shares the blocks of the first.
    const int num_tokens[] = {1, 40, 33, 2, 1}, seq_lens[] = {529, 40, 100, 265, 300};
    const int dim = shape.head_dim, width = (529 + shape.block_size - 1) / shape.block_size;
    const int64_t num_blocks = 4 * width;
    const size_t row = static_cast<size_t>(shape.num_kv_heads) * dim;
    const size_t cache_bytes = num_blocks * shape.block_size * row * (kv_type == KVType::F32 ? 4 : 2);
    Exact<int64_t> tables(5 * width);
    for (int64_t i = 0; i < 5 * width; ++i) tables[i] = num_blocks - 1 - i % num_blocks;

    // Every slot is written, by way of rotate_and_store.
    const int num_slots = static_cast<int>(num_blocks * shape.block_size), half = dim / 2;
    Exact<int64_t> slots(num_slots);
    for (int i = 0; i < num_slots; ++i) slots[i] = num_slots - 1 - i;
    const auto angles = random_floats(static_cast<size_t>(num_slots) * half);
    const int heads = shape.num_heads + 2 * shape.num_kv_heads;
    const auto projection = random_floats(static_cast<size_t>(num_slots) * heads * dim);
    Exact<float> first;
    for (Runtime* runtime : runtimes) {
        Exact<uint8_t> keys(cache_bytes), values(cache_bytes);
        auto states = projection;
        const int64_t ld = static_cast<int64_t>(heads) * dim;
        float* key = states.data() + static_cast<int64_t>(shape.num_heads) * dim;
        runtime->rotate_and_store(shape, {num_slots, slots.data(), angles.data(), angles.data(), half},
                                  {states.data(), ld, key, ld, key + row, ld}, keys.data(), values.data());
        int64_t total = 0;
        for (int n : num_tokens) total += n;
        Exact<float> out(total * shape.num_heads * dim);
        std::vector<AttentionRequest> requests;
        int64_t token = 0;
        for (int i = 0; i < 5; ++i) {
            requests.push_back({states.data() + token * ld, ld, out.data() + token * shape.num_heads * dim,
                                num_tokens[i], seq_lens[i], tables.data() + i * width});
            token += num_tokens[i];
        }
        std::vector<AttentionSchedule::Request> scheduled;
        for (const auto& request : requests) {
            scheduled.push_back({request.num_tokens, request.seq_len, request.block_table});
        }
        runtime->attend(shape, requests, AttentionSchedule(shape, scheduled, runtime->chunk_threads(shape)), keys.data(),
                        values.data());
        if (runtime == runtimes.front()) first = out;
        if (!same_bits(first, out)) fail("attention depends on the threads");
        for (float value : out) {
            if (!std::isfinite(value)) fail("attention is not finite");
        }
        // What is attended by columns lies in the cache in an order that plain.h does not know: tested from Python.
        if (runtime != runtimes.front() || runtime->attends_in_chunks(shape)) continue;
        for (const AttentionRequest& request : requests) {
            if (!plain::is_attention(shape, request, keys.data(), values.data())) fail("attention is wrong");
        }
    }
}

void check_embedding(ThreadPool& pool) {
    const struct { const char* name; int values, bytes; } formats[] = {
        {"F32", 1, 4},      {"F16", 1, 2},      {"BF16", 1, 2},     {"Q4_0", 32, 18},   {"Q4_1", 32, 20},
        {"Q5_0", 32, 22},   {"Q5_1", 32, 24},   {"Q8_0", 32, 34},   {"Q2_K", 256, 84},  {"Q3_K", 256, 110},
        {"Q4_K", 256, 144}, {"Q5_K", 256, 176}, {"Q6_K", 256, 210}, {"IQ4_NL", 32, 18}, {"IQ4_XS", 256, 136}};
    for (const auto& [name, values, bytes] : formats) {
        const auto data = random_bytes(7 * 3 * static_cast<size_t>(bytes));
        const EmbeddingTable table(name, data.data(), data.size(), 7, 3 * values, 2.0f);
        const int64_t token_ids[] = {6, 0, 3};
        Exact<float> out(static_cast<size_t>(3) * table.width);
        embed(table, token_ids, 3, out.data(), pool);
    }
}

// Every op once, over two requests of 2 and 1 tokens.
void check_program(std::vector<Runtime*> runtimes) {
    constexpr int kTokens = 3, kHidden = 32, kHeads = 4, kKVHeads = 2, kDim = 8, kVocabulary = 40;
    const auto table_bytes = random_floats(kVocabulary * kHidden), norm = random_floats(kHidden);
    const EmbeddingTable table("F32", reinterpret_cast<const uint8_t*>(table_bytes.data()), 4 * table_bytes.size(),
                               kVocabulary, kHidden, 1.5f);
    LinearWeight qkv(kHidden), output(kHidden), gate_up(kHidden), down(40);
    add_random_part(qkv, Format::F32, 64, runtimes.back()->pool());
    add_random_part(output, Format::F32, kHidden, runtimes.back()->pool());
    add_random_part(gate_up, Format::F32, 80, runtimes.back()->pool());
    add_random_part(down, Format::F32, kHidden, runtimes.back()->pool());
    const Exact<int64_t> token_ids = {1, 39, 0}, starts = {0, 2, 3}, seq_lens = {2, 1}, slots = {4, 5, 8};
    const Exact<int64_t> tables = {1, 2}, rows = {2, 0};
    const auto angles = random_floats(kTokens * kDim / 2);
    // Of query and value, and of the layer's end; one row of three.
    const auto shrink = random_floats(5 * lora_stride(kHidden)), expand = random_floats(3 * kLoraPanel);
    const Exact<uint16_t> narrow_shrink(3 * lora_stride(40), 0x3c23), narrow_expand(2 * kLoraPanel, 0xbc42);
    LoraAdapter adapter(2);
    adapter.set_site(0, {kHidden, 5, {shrink.data(), false},
                         {{0, 3, 0, kHeads * kDim, 0.5f, {expand.data(), false}},
                          {3, 2, (kHeads + kKVHeads) * kDim, kKVHeads * kDim, 2.0f, {narrow_expand.data(), true}}}});
    adapter.set_site(1, {40, 3, {narrow_shrink.data(), true}, {{0, 3, 0, kHidden, 0.5f, {expand.data(), false}}}});
    const Exact<int64_t> adapted = {1};
    const LoraRows adapters = {&adapter, adapted.data(), 1};
    Exact<float> first;
    for (Runtime* runtime : runtimes) {
        Exact<uint8_t> keys(3 * 4 * kKVHeads * kDim * 2), values(keys.size());
        const CachePair cache = {keys.data(), values.data()};
        Program body(*runtime, {{kHeads, kKVHeads, kDim, 4, 0, 1.0f, 0.0f, KVType::BF16}}, 3);
        for (int width : {kHidden, kHidden, 64, kHidden, 80, 40}) body.add_slot(width);
        const View query = {2, 0}, key = {2, kHeads * kDim}, value = {2, (kHeads + kKVHeads) * kDim};
        body.embedding(table, {1, 0});
        body.rms_norm({1, 0}, 1, norm.data(), kHidden, 1e-6f, {0, 0});
        body.linear(qkv, {0, 0}, nullptr, {2, 0});
        body.adapt(0, {0, 0}, kHidden, {2, 0}, 64);
        body.rms_norm(query, kHeads, norm.data(), kDim, 1e-6f, {3, 0});
        body.rotate_and_store(0, {3, 0}, key, value, cache);
        body.attend(0, {3, 0}, cache, 0.3f, 5.0f, {0, 0});
        body.linear(output, {0, 0}, norm.data(), {3, 0});
        body.add_rms_norm({3, 0}, {1, 0}, norm.data(), kHidden, 1e-6f, {0, 0});
        body.linear(gate_up, {0, 0}, nullptr, {4, 0});
        body.gated(true, {4, 0}, 40, {5, 0});
        body.linear(down, {5, 0}, nullptr, {0, 0});
        body.adapt(1, {5, 0}, 40, {0, 0}, kHidden);
        const GroupInputs group = {slots.data(), angles.data(), angles.data(), kDim / 2, tables.data(), 1};
        ProgramInputs inputs;
        inputs.num_rows = kTokens;
        inputs.token_ids = token_ids.data();
        inputs.num_requests = 2;
        inputs.query_start_loc = starts.data();
        inputs.seq_lens = seq_lens.data();
        inputs.groups = std::span(&group, 1);
        inputs.adapters = std::span(&adapters, 1);
        Exact<float> hidden(kTokens * kHidden), out(2 * kHidden);
        body.run(inputs, hidden.data());

        Program head(*runtime, {}, 0);
        head.add_slot(kHidden);
        head.select_rows(kHidden, {0, 0});
        head.softcap({0, 0}, kHidden, 3.0f);
        inputs = {};
        inputs.num_rows = 2;
        inputs.hidden = hidden.data();
        inputs.num_hidden = kTokens;
        inputs.hidden_width = kHidden;
        inputs.rows = rows.data();
        head.run(inputs, out.data());
        if (runtime == runtimes.front()) first = out;
        if (!same_bits(first, out)) fail("a program depends on the threads");
        for (float number : out) {
            if (!std::isfinite(number)) fail("a program's result is not finite");
        }
    }
}

void check(const char* isa) {
    const KernelTable* kernels = find_kernels(isa);
    if (kernels == nullptr) {
        std::printf("%s does not run here\n", isa);
        return;
    }
    Runtime one(*kernels, 1, {}), three(*kernels, 3, {0});
    const std::vector<Runtime*> runtimes = {&one, &three};
    check_linear(runtimes, ActivationType::Auto);
    // Other activations: {alone, by three threads}.
    std::vector<ActivationType> others = {ActivationType::F32};
    if (kernels->tiles != nullptr) others.push_back(ActivationType::INT8);
    for (ActivationType activation : others) {
        Runtime first(*kernels, 1, {}, activation), second(*kernels, 3, {0}, activation);
        check_linear({&first, &second}, activation);
    }
    check_rows(runtimes);
    check_embedding(three.pool());
    check_rounding(runtimes);
    check_program(runtimes);
    check_products(*kernels);
#if defined(__x86_64__)
    if (kernels->tiles != nullptr) check_one_row(*kernels);
#endif
    check_sampling(runtimes);
    for (KVType kv_type : {KVType::F32, KVType::BF16}) {
        for (int dim : {1, 2, 15, 33, 40, 64, 80, 256}) {
            check_attention(runtimes, kv_type, {4, 2, dim, 16, 0, 0.3f, 0.0f, kv_type});
            check_attention(runtimes, kv_type, {3, 3, dim, 1, 20, 0.3f, 5.0f, kv_type});
        }
        check_attention(runtimes, kv_type, {14, 2, 64, 300, 64, 0.3f, 0.0f, kv_type});
        check_attention(runtimes, kv_type, {9, 1, 24, 5, 1, 0.3f, 0.0f, kv_type});
    }
    std::printf("%s: clean\n", isa);
}

}  // namespace

}  // namespace pelton

// Arguments: the instruction sets to check; none: all.
int main(int count, char** arguments) {
    const std::vector<const char*> chosen(arguments + 1, arguments + count);
    for (const char* isa : {"portable", "neon_dotprod", "avx2", "avx2_vnni", "avx512", "amx"}) {
        const auto is_isa = [isa](const char* name) { return std::string(name) == isa; };
        if (chosen.empty() || std::any_of(chosen.begin(), chosen.end(), is_isa)) pelton::check(isa);
    }
#if defined(__x86_64__)
    if (pelton::find_kernels("avx512") != nullptr && !pelton::check_bf16_attention()) {
        std::fprintf(stderr, "products of bfloat16 pairs are off\n");
        return 1;
    }
#endif
    return 0;
}
