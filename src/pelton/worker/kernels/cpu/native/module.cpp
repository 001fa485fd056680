// Python's view of `Runtime`. Arrays come as addresses: a call then costs a fraction of a microsecond,
// and nothing here links to numpy. `cpu/backend.py` is the only caller and checks shapes and types.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "attention_plan.h"
#include "ceilings.h"
#include "channel_rounding.h"
#include "embedding.h"
#include "program_module.h"
#include "released_gil.h"
#include "runtime.h"
#include "sampling.h"
#include "weight_memory.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace pelton {

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

constexpr const char* kFormatNames[kNumFormats] = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K",
                                                "Q6_K", "INT4", "INT8", "INT8_CHANNEL", "INT4_CHANNEL",
                                                "BF16", "F16", "F32"};

ActivationType activation_of(const std::string& name) {
    if (name == "auto") return ActivationType::Auto;
    if (name == "int8") return ActivationType::INT8;
    if (name == "bfloat16") return ActivationType::BF16;
    if (name == "float32") return ActivationType::F32;
    throw std::invalid_argument("no products of " + name + " activations");
}

Format format_of(const std::string& name) {
    for (int i = 0; i < kNumFormats; ++i) {
        if (name == kFormatNames[i]) return static_cast<Format>(i);
    }
    throw std::invalid_argument("format " + name + " has no native kernel");
}

Format checked_format(const std::string& name, int num_outputs, int num_inputs) {
    const Format format = format_of(name);
    if (num_outputs <= 0 || num_inputs <= 0 || num_inputs % traits_of(format).file_block_values != 0) {
        throw std::invalid_argument("the inputs are no multiple of a block of " + name);
    }
    return format;
}

size_t packed_num_bytes(const std::string& format_name, int num_outputs, int num_inputs) {
    return PackedMatrix{checked_format(format_name, num_outputs, num_inputs), num_outputs, num_inputs, nullptr}.num_bytes();
}

void add_matrix(LinearWeight& weight, PackedMatrix matrix) {
    const auto by_channel = [](const PackedMatrix& part) { return traits_of(part.format).by_channel; };
    if (!weight.parts.empty() && by_channel(weight.parts.front()) != by_channel(matrix)) {
        throw std::invalid_argument("a format by channel stands beside no other kind");
    }
    weight.num_outputs += matrix.num_outputs;
    weight.parts.push_back(std::move(matrix));
}

// Adds a matrix that lies repacked at `offset` of `memory`.
void add_packed(LinearWeight& weight, const std::string& format_name, int num_outputs,
                const std::shared_ptr<WeightMemory>& memory, size_t offset) {
    PackedMatrix matrix{checked_format(format_name, num_outputs, weight.num_inputs), num_outputs, weight.num_inputs, nullptr};
    matrix.data = part_of(memory, offset, matrix.num_bytes());
    add_matrix(weight, std::move(matrix));
}

// In memory of its own, or at `offset` of `memory`.
PackedMatrix unwritten_matrix(const LinearWeight& weight, Format format, int num_outputs,
                              const std::shared_ptr<WeightMemory>& memory, size_t offset) {
    if (memory == nullptr) return make_packed_matrix(format, num_outputs, weight.num_inputs);
    PackedMatrix matrix{format, num_outputs, weight.num_inputs, nullptr};
    matrix.data = part_of(memory, offset, matrix.num_bytes());
    return matrix;
}

// Adds a matrix of `num_outputs` rows, repacked from the file's blocks at `data` to `offset` of `memory`, if given.
void add_part(LinearWeight& weight, Runtime& runtime, const std::string& format_name, int num_outputs, Address data,
              size_t num_bytes, const std::shared_ptr<WeightMemory>& memory, size_t offset) {
    const Format format = checked_format(format_name, num_outputs, weight.num_inputs);
    PackedMatrix matrix = unwritten_matrix(weight, format, num_outputs, memory, offset);
    if (num_bytes != num_outputs * matrix.file_row_bytes()) {
        throw std::invalid_argument("the matrix has the wrong number of bytes");
    }
    repack(matrix, at<const uint8_t>(data), runtime.pool());
    add_matrix(weight, std::move(matrix));
}

// The same of blocks of another format, the first of two, which are rounded to the second, one by channel.
void add_rounded(LinearWeight& weight, Runtime& runtime, std::pair<std::string, std::string> formats, int num_outputs,
                 Address data, size_t num_bytes, const std::shared_ptr<WeightMemory>& memory, size_t offset) {
    const Format format = checked_format(formats.second, num_outputs, weight.num_inputs);
    if (!traits_of(format).by_channel) throw std::invalid_argument("nothing is rounded to " + formats.second);
    const BlockRows source(formats.first, at<const uint8_t>(data), num_bytes, num_outputs, weight.num_inputs);
    PackedMatrix matrix = unwritten_matrix(weight, format, num_outputs, memory, offset);
    round_channels(matrix, source, runtime.kernels(), runtime.pool());
    add_matrix(weight, std::move(matrix));
}

void attend(Runtime& runtime, const AttentionPlan& plan, int64_t num_tokens, int64_t num_blocks, float scale, float softcap,
            Address query, int64_t ld_query, Address keys, Address values, Address out) {
    plan.check(num_tokens, num_blocks);
    AttentionShape shape = plan.shape();
    shape.scale = scale;
    shape.softcap = softcap;
    runtime.attend(shape, plan.requests(at<const float>(query), ld_query, at<float>(out)), plan.schedule(),
                   at<const void>(keys), at<const void>(values));
}

// heads: N, K, D, block size and whether the caches are bfloat16; tokens: T, slots, cos, sin, half of the rotated
// dimensions; rows: address and stride of queries, keys, values.
void rotate_and_store(Runtime& runtime, std::tuple<int, int, int, int, bool> heads,
                      std::tuple<int, Address, Address, Address, int> tokens,
                      std::tuple<Address, int64_t, Address, int64_t, Address, int64_t> rows, Address key_cache,
                      Address value_cache, int64_t num_slots) {
    const auto [num_heads, num_kv_heads, head_dim, block_size, bf16] = heads;
    const auto [num_tokens, slots, cos, sin, half] = tokens;
    const auto [queries, ld_queries, keys, ld_keys, values, ld_values] = rows;
    for (int token = 0; token < num_tokens; ++token) {
        const int64_t slot = at<const int64_t>(slots)[token];
        if (slot < 0 || slot >= num_slots) throw std::out_of_range("a slot does not exist");
    }
    if (half < 0 || 2 * half > head_dim) throw std::invalid_argument("more dimensions are rotated than there are");
    const AttentionShape shape = {num_heads, num_kv_heads, head_dim, block_size, 0, 1.0f, 0.0f,
                                  bf16 ? KVType::BF16 : KVType::F32};
    runtime.rotate_and_store(shape,
                             {num_tokens, at<const int64_t>(slots), at<const float>(cos), at<const float>(sin), half},
                             {at<float>(queries), ld_queries, at<float>(keys), ld_keys, at<const float>(values), ld_values},
                             at<void>(key_cache), at<void>(value_cache));
}

std::vector<std::tuple<std::string, double, double>> ceiling_tuples(int num_threads, size_t dram_bytes) {
    if (num_threads < 1) throw std::invalid_argument("at least one thread is needed");
    std::vector<std::tuple<std::string, double, double>> tuples;
    for (const Ceiling& ceiling : measure_ceilings(num_threads, dram_bytes)) {
        tuples.emplace_back(ceiling.name, ceiling.one_thread, ceiling.all_threads);
    }
    return tuples;
}

using Ids = std::vector<int64_t>;

std::vector<int32_t> within(const Ids& ids, int64_t vocab_size) {
    std::vector<int32_t> kept;
    for (int64_t id : ids) {
        if (id >= 0 && id < vocab_size) kept.push_back(static_cast<int32_t>(id));
    }
    return kept;
}

// filters: top_k, top_p, min_p; penalties: repetition, presence, frequency; stops: min_tokens and what is banned
// until then. Ids outside the vocabulary are ignored.
void make_sampling_row(SamplingRow* self, int64_t vocab_size, double temperature,
                       std::tuple<int64_t, double, double> filters, uint64_t seed,
                       std::tuple<float, float, float> penalties, const std::vector<std::pair<int64_t, float>>& bias,
                       const std::optional<Ids>& allowed, const Ids& banned, const std::pair<int64_t, Ids>& stops,
                       int num_logprobs) {
    SamplingRow row;
    row.vocab_size = vocab_size;
    row.temperature = temperature;
    std::tie(row.top_k, row.top_p, row.min_p) = filters;
    row.seed = seed;
    std::tie(row.repetition_penalty, row.presence_penalty, row.frequency_penalty) = penalties;
    for (const auto& [id, value] : bias) {
        if (id >= 0 && id < vocab_size) row.bias.emplace_back(static_cast<int32_t>(id), value);
    }
    if (allowed) {
        row.allowed.resize(static_cast<size_t>((vocab_size + 31) / 32));
        for (int32_t id : within(*allowed, vocab_size)) row.allowed[id / 32] |= uint32_t{1} << (id % 32);
    }
    row.banned = within(banned, vocab_size);
    row.min_tokens = stops.first;
    row.stops = within(stops.second, vocab_size);
    row.num_logprobs = num_logprobs;
    new (self) SamplingRow(std::move(row));
}

void add_seen(SamplingRow& row, const Ids& ids, float count) {
    const bool is_needed = count > 0.0f ? row.has_penalty() : row.repetition_penalty != 1.0f;
    if (is_needed) row.add_seen(within(ids, row.vocab_size), count);
}

// Token, logprob, rank, and the most likely ones.
using Logprobs = std::tuple<int64_t, double, int64_t, std::vector<std::pair<int64_t, double>>>;

Logprobs as_tuple(int64_t token_id, TokenLogprobs& logprobs) {
    return {token_id, logprobs.logprob, logprobs.rank, std::move(logprobs.top)};
}

// Token ids, or what is wrong as a negative number, of logits [S, V] and rows [S]; and the logprobs of those rows
// that want them. `masks` [S] are addresses of [ceil(V / 32)] words, or 0; or the list is empty.
std::pair<Ids, std::vector<std::pair<size_t, Logprobs>>> sample(Sampler& sampler, Address logits,
                                                                const std::vector<SamplingRow*>& rows,
                                                                const Ids& positions,
                                                                const std::vector<Address>& masks) {
    if (positions.size() != rows.size() || (!masks.empty() && masks.size() != rows.size())) {
        throw std::invalid_argument("rows, positions and masks differ in number");
    }
    std::vector<SampleTask> tasks;
    tasks.reserve(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
        if (rows[i] == nullptr || rows[i]->vocab_size != sampler.vocab_size()) {
            throw std::invalid_argument("a row has another vocabulary");
        }
        tasks.push_back({rows[i], positions[i], masks.empty() ? nullptr : at<const uint32_t>(masks[i])});
    }
    {
        ReleasedGil released;
        sampler.sample(at<float>(logits), tasks);
    }
    Ids token_ids;
    std::vector<std::pair<size_t, Logprobs>> logprobs;
    token_ids.reserve(tasks.size());
    for (size_t i = 0; i < tasks.size(); ++i) {
        token_ids.push_back(tasks[i].token_id);
        if (rows[i]->num_logprobs >= 0 && tasks[i].token_id >= 0) {
            logprobs.emplace_back(i, as_tuple(tasks[i].token_id, tasks[i].logprobs));
        }
    }
    return {std::move(token_ids), std::move(logprobs)};
}

// Of raw logits [S, V] and token_ids [S]; none where a row is not finite.
std::optional<std::vector<Logprobs>> token_logprobs(Sampler& sampler, Address logits, const Ids& token_ids, int num_top) {
    for (int64_t id : token_ids) {
        if (id < 0 || id >= sampler.vocab_size()) throw std::out_of_range("a token is outside the vocabulary");
    }
    std::vector<TokenLogprobs> found(token_ids.size());
    {
        ReleasedGil released;
        if (!sampler.token_logprobs(at<const float>(logits), token_ids, num_top, found)) return std::nullopt;
    }
    std::vector<Logprobs> logprobs;
    logprobs.reserve(found.size());
    for (size_t i = 0; i < found.size(); ++i) logprobs.push_back(as_tuple(token_ids[i], found[i]));
    return logprobs;
}

}  // namespace

}  // namespace pelton

NB_MODULE(pelton_cpu, m) {
    using namespace pelton;
    // What a background thread still holds when the interpreter ends is not worth a page on standard error.
    nb::set_leak_warnings(false);
    const auto no_gil = nb::call_guard<ReleasedGil>();

    m.attr("FORMATS") = nb::cast(std::vector<std::string>(kFormatNames, kFormatNames + kNumFormats));
    m.attr("BLOCK_FORMATS") = nb::cast(block_row_formats());
    m.def("dram_buffer_bytes", &dram_buffer_bytes);
    m.def("l2_cache_bytes", &l2_cache_bytes);
    m.def(
        "take_pages", [](Address data, size_t num_bytes) { take_pages(at<uint8_t>(data), num_bytes); }, "data"_a,
        "num_bytes"_a, no_gil);
    m.def("l3_cache_bytes", &l3_cache_bytes);
    m.def("measure_ceilings", &ceiling_tuples, "num_threads"_a, "dram_bytes"_a, no_gil);

    m.def("packed_num_bytes", &packed_num_bytes, "format"_a, "num_outputs"_a, "num_inputs"_a);

    nb::class_<WeightMemory>(m, "WeightMemory")
        .def(nb::init<size_t>(), "num_bytes"_a)
        .def_static(
            "map", [](int file, size_t num_bytes) { return std::make_shared<WeightMemory>(file, num_bytes); }, "file"_a,
            "num_bytes"_a)
        .def_prop_ro("address", [](const WeightMemory& self) { return reinterpret_cast<Address>(self.data()); })
        .def_prop_ro("num_bytes", &WeightMemory::num_bytes)
        .def_prop_ro("num_mapped_bytes", &WeightMemory::num_mapped_bytes)
        .def("copy_file", &WeightMemory::copy_file, no_gil);

    nb::class_<LinearWeight>(m, "LinearWeight")
        .def("__init__",
             [](LinearWeight* self, int num_inputs) {
                 if (num_inputs <= 0) throw std::invalid_argument("a weight without inputs");
                 new (self) LinearWeight(num_inputs);
             })
        .def("add", &add_part, "runtime"_a, "format"_a, "num_outputs"_a, "data"_a, "num_bytes"_a,
             "memory"_a.none() = nb::none(), "offset"_a = 0, no_gil)
        .def("add_rounded", &add_rounded, "runtime"_a, "formats"_a, "num_outputs"_a, "data"_a, "num_bytes"_a,
             "memory"_a.none() = nb::none(), "offset"_a = 0, no_gil)
        .def("add_packed", &add_packed, "format"_a, "num_outputs"_a, "memory"_a, "offset"_a)
        .def_ro("num_inputs", &LinearWeight::num_inputs)
        .def_ro("num_outputs", &LinearWeight::num_outputs)
        .def_prop_ro("num_bytes", &LinearWeight::num_bytes);

    nb::class_<EmbeddingTable>(m, "EmbeddingTable")
        .def("__init__",
             [](EmbeddingTable* self, const std::string& format, Address data, size_t num_bytes, int64_t num_rows,
                int width, float scale) {
                 new (self) EmbeddingTable(format, at<const uint8_t>(data), num_bytes, num_rows, width, scale);
             })
        .def_ro("width", &EmbeddingTable::width);

    nb::class_<AttentionPlan>(m, "AttentionPlan")
        .def("__init__", [](AttentionPlan* self, const Runtime& runtime, int num_heads, int num_kv_heads, int head_dim,
                            int block_size, int sliding_window, bool bf16, Address query_start_loc, Address seq_lens,
                            int64_t num_requests, Address block_tables, int64_t num_columns) {
            const AttentionShape shape = {num_heads, num_kv_heads, head_dim, block_size, sliding_window, 1.0f, 0.0f,
                                          bf16 ? KVType::BF16 : KVType::F32};
            new (self) AttentionPlan(shape, at<const int64_t>(query_start_loc), at<const int64_t>(seq_lens),
                                     num_requests, at<const int64_t>(block_tables), num_columns,
                                     runtime.chunk_threads(shape));
        })
        .def_prop_ro("num_positions_read", [](const AttentionPlan& plan) { return plan.schedule().num_positions_read; });

    m.attr("NO_COLUMN") = kNoColumn;
    nb::class_<Runtime>(m, "Runtime")
        .def("__init__",
             [](Runtime* self, std::optional<std::string> isa, int num_threads, const std::vector<int>& cpus,
                const std::string& activation_dtype) {
                 const KernelTable* kernels = find_kernels(isa ? isa->c_str() : nullptr);
                 if (kernels == nullptr) throw std::invalid_argument("no kernels " + *isa + " on this processor");
                 if (num_threads < 1) throw std::invalid_argument("at least one thread is needed");
                 const ActivationType activation = activation_of(activation_dtype);
                 if (activation == ActivationType::BF16 && kernels->tiles == nullptr) {
                     throw std::invalid_argument("products of bfloat16 need AMX, which kernels " +
                                                 std::string(kernels->name) + " do not have: use int8 or float32");
                 }
                 new (self) Runtime(*kernels, num_threads, cpus, activation);
             },
             "isa"_a.none(), "num_threads"_a, "cpus"_a, "activation_dtype"_a = "auto")
        .def_prop_ro("isa", [](const Runtime& self) { return self.kernels().name; })
        .def_prop_ro("num_threads", [](Runtime& self) { return self.pool().num_threads(); })
        .def("linear",
             [](Runtime& self, const LinearWeight& weight, Address x, int num_rows, Address bias, Address out) {
                 self.linear(weight, at<const float>(x), num_rows, at<const float>(bias), at<float>(out));
             },
             no_gil)
        .def("greatest_columns",
             [](Runtime& self, const LinearWeight& weight, Address x, int num_rows, Address bias) {
                 std::vector<int64_t> columns(num_rows);
                 ReleasedGil released;
                 self.greatest_columns(weight, at<const float>(x), num_rows, at<const float>(bias), columns.data());
                 return columns;
             })
        .def("embedding",
             [](Runtime& self, const EmbeddingTable& table, Address token_ids, int num_tokens, Address out) {
                 embed(table, at<const int64_t>(token_ids), num_tokens, at<float>(out), self.pool());
             },
             no_gil)
        .def("softcap",
             [](Runtime& self, Address x, int num_rows, int64_t size, float cap) {
                 self.pool().run(num_rows, [&](int row, int) {
                     self.kernels().softcap_row(at<float>(x) + row * size, size, cap);
                 });
             },
             no_gil)
        .def("rms_norm",
             [](Runtime& self, Address x, Address residual, Address weight, int num_rows, int size, float eps,
                Address out) {
                 self.rms_norm(at<const float>(x), at<float>(residual), at<const float>(weight), num_rows, size, eps,
                               at<float>(out));
             },
             no_gil)
        .def("gated",
             [](Runtime& self, bool gelu, Address gate_up, int num_rows, int size, Address out) {
                 self.gated(gelu, at<const float>(gate_up), num_rows, size, at<float>(out));
             },
             no_gil)
        .def("rotate_and_store", &rotate_and_store, no_gil)
        .def("attend", &attend, no_gil);

    nb::class_<SamplingRow>(m, "SamplingRow")
        .def("__init__", &make_sampling_row, "vocab_size"_a, nb::kw_only(), "temperature"_a, "filters"_a, "seed"_a,
             "penalties"_a, "bias"_a, "allowed"_a.none(), "banned"_a, "stops"_a, "num_logprobs"_a)
        .def("add_prompt", [](SamplingRow& self, const std::vector<int64_t>& ids) { add_seen(self, ids, 0.0f); })
        .def("add_output", [](SamplingRow& self, const std::vector<int64_t>& ids) { add_seen(self, ids, 1.0f); });

    nb::class_<Sampler>(m, "Sampler")
        .def(nb::init<Runtime&, int64_t>(), nb::keep_alive<1, 2>())
        .def("sample", &sample, "logits"_a, "rows"_a, "positions"_a, "masks"_a)
        .def("token_logprobs", &token_logprobs, "logits"_a, "token_ids"_a, "num_top"_a);

    bind_program(m);
}
