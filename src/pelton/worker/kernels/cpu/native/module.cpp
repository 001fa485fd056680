// Python's view of `Runtime`. Tensors come as addresses: a call then costs a fraction of a microsecond,
// and nothing here links to torch. `cpu/backend.py` is the only caller and checks shapes and types.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "runtime.h"
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
                                                "Q6_K", "INT4", "INT8", "BF16", "F16",  "F32"};

ActivationType activation_of(const std::string& name) {
    if (name == "auto") return ActivationType::Auto;
    if (name == "int8") return ActivationType::INT8;
    if (name == "float32") return ActivationType::F32;
    throw std::invalid_argument("no products of " + name + " activations with these kernels");
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

// Adds a matrix of `num_outputs` rows, repacked from the file's blocks at `data` to `offset` of `memory`, if given.
void add_part(LinearWeight& weight, Runtime& runtime, const std::string& format_name, int num_outputs, Address data,
              size_t num_bytes, const std::shared_ptr<WeightMemory>& memory, size_t offset) {
    const Format format = checked_format(format_name, num_outputs, weight.num_inputs);
    const FormatTraits traits = traits_of(format);
    const size_t expected = static_cast<size_t>(num_outputs) * (weight.num_inputs / traits.file_block_values) *
                            traits.file_block_bytes;
    if (num_bytes != expected) throw std::invalid_argument("the matrix has the wrong number of bytes");
    PackedMatrix matrix{format, num_outputs, weight.num_inputs, nullptr};
    if (memory == nullptr) {
        matrix = make_packed_matrix(format, num_outputs, weight.num_inputs);
    } else {
        matrix.data = part_of(memory, offset, matrix.num_bytes());
    }
    repack(matrix, at<const uint8_t>(data), runtime.pool());
    add_matrix(weight, std::move(matrix));
}

// One request as Python has it: first row of query and out, tokens, length, its row of the block tables.
using RequestTuple = std::tuple<int64_t, int, int, int64_t>;

struct AttentionPlan {
    AttentionShape shape;
    std::vector<int64_t> block_tables;  // owned: tensors of a step come and go
    std::vector<RequestTuple> requests;
    int64_t num_columns;
    int64_t num_tokens = 0;  // query rows that the requests need
    int64_t num_blocks = 0;  // blocks that a cache must have for these tables
};

// Whatever a step was made of, nothing outside its tensors is touched.
void check_plan(AttentionPlan& plan, int64_t num_rows) {
    for (const auto& [first_row, num_tokens, seq_len, table_row] : plan.requests) {
        if (first_row < 0 || num_tokens < 1 || num_tokens > seq_len || table_row < 0 || table_row >= num_rows ||
            seq_len > plan.num_columns * plan.shape.block_size) {
            throw std::out_of_range("a request does not fit its block table");
        }
        plan.num_tokens = std::max(plan.num_tokens, first_row + num_tokens);
        const int64_t* table = plan.block_tables.data() + table_row * plan.num_columns;
        for (int64_t column = 0; column <= (seq_len - 1) / plan.shape.block_size; ++column) {
            if (table[column] < 0) throw std::out_of_range("a block table has a negative block");
            plan.num_blocks = std::max(plan.num_blocks, table[column] + 1);
        }
    }
}

void attend(Runtime& runtime, const AttentionPlan& plan, int64_t num_tokens, int64_t num_blocks, float scale, float softcap,
            Address query, int64_t ld_query, Address keys, Address values, Address out) {
    if (num_tokens < plan.num_tokens) throw std::out_of_range("a request has more tokens than the step");
    if (num_blocks < plan.num_blocks) throw std::out_of_range("a block table has a block that does not exist");
    AttentionShape shape = plan.shape;
    shape.scale = scale;
    shape.softcap = softcap;
    const int64_t ld_out = static_cast<int64_t>(shape.num_heads) * shape.head_dim;
    std::vector<AttentionRequest> requests;
    requests.reserve(plan.requests.size());
    for (const auto& [first_row, num_tokens, seq_len, table_row] : plan.requests) {
        requests.push_back({at<const float>(query) + first_row * ld_query, ld_query, at<float>(out) + first_row * ld_out,
                            num_tokens, seq_len, plan.block_tables.data() + table_row * plan.num_columns});
    }
    runtime.attend(shape, requests, at<const void>(keys), at<const void>(values));
}

// heads: N, K, D and whether the caches are bfloat16; tokens: T, slots, cos, sin, half of the rotated
// dimensions; rows: address and stride of queries, keys, values.
void rotate_and_store(Runtime& runtime, std::tuple<int, int, int, bool> heads,
                      std::tuple<int, Address, Address, Address, int> tokens,
                      std::tuple<Address, int64_t, Address, int64_t, Address, int64_t> rows, Address key_cache,
                      Address value_cache, int64_t num_slots) {
    const auto [num_heads, num_kv_heads, head_dim, bf16] = heads;
    const auto [num_tokens, slots, cos, sin, half] = tokens;
    const auto [queries, ld_queries, keys, ld_keys, values, ld_values] = rows;
    for (int token = 0; token < num_tokens; ++token) {
        const int64_t slot = at<const int64_t>(slots)[token];
        if (slot < 0 || slot >= num_slots) throw std::out_of_range("a slot does not exist");
    }
    if (half < 0 || 2 * half > head_dim) throw std::invalid_argument("more dimensions are rotated than there are");
    const AttentionShape shape = {num_heads, num_kv_heads, head_dim, 0, 0, 1.0f, 0.0f,
                                  bf16 ? KVType::BF16 : KVType::F32};
    runtime.rotate_and_store(shape,
                             {num_tokens, at<const int64_t>(slots), at<const float>(cos), at<const float>(sin), half},
                             {at<float>(queries), ld_queries, at<float>(keys), ld_keys, at<const float>(values), ld_values},
                             at<void>(key_cache), at<void>(value_cache));
}

}  // namespace

}  // namespace pelton

NB_MODULE(pelton_cpu, m) {
    using namespace pelton;
    const auto no_gil = nb::call_guard<nb::gil_scoped_release>();

    m.attr("FORMATS") = nb::cast(std::vector<std::string>(kFormatNames, kFormatNames + kNumFormats));

    m.def("packed_num_bytes", &packed_num_bytes, "format"_a, "num_outputs"_a, "num_inputs"_a);

    nb::class_<WeightMemory>(m, "WeightMemory")
        .def(nb::init<size_t>(), "num_bytes"_a)
        .def_static(
            "map", [](int file, size_t num_bytes) { return std::make_shared<WeightMemory>(file, num_bytes); }, "file"_a,
            "num_bytes"_a)
        .def_prop_ro("address", [](const WeightMemory& self) { return reinterpret_cast<Address>(self.data()); })
        .def_prop_ro("num_bytes", &WeightMemory::num_bytes)
        .def("replace_with", &WeightMemory::replace_with, "file"_a, "num_bytes"_a, no_gil)
        .def("prefetch", &WeightMemory::prefetch, no_gil);

    nb::class_<LinearWeight>(m, "LinearWeight")
        .def("__init__",
             [](LinearWeight* self, int num_inputs) {
                 if (num_inputs <= 0) throw std::invalid_argument("a weight without inputs");
                 new (self) LinearWeight(num_inputs);
             })
        .def("add", &add_part, "runtime"_a, "format"_a, "num_outputs"_a, "data"_a, "num_bytes"_a,
             "memory"_a.none() = nb::none(), "offset"_a = 0, no_gil)
        .def("add_packed", &add_packed, "format"_a, "num_outputs"_a, "memory"_a, "offset"_a)
        .def_ro("num_inputs", &LinearWeight::num_inputs)
        .def_ro("num_outputs", &LinearWeight::num_outputs)
        .def_prop_ro("num_bytes", &LinearWeight::num_bytes);

    nb::class_<AttentionPlan>(m, "AttentionPlan")
        .def("__init__", [](AttentionPlan* self, int num_heads, int num_kv_heads, int head_dim, int block_size,
                            int sliding_window, bool bf16, std::vector<RequestTuple> requests, Address block_tables,
                            int64_t num_rows, int64_t num_columns) {
            const auto* tables = at<const int64_t>(block_tables);
            AttentionPlan plan{{num_heads, num_kv_heads, head_dim, block_size, sliding_window, 1.0f, 0.0f,
                                bf16 ? KVType::BF16 : KVType::F32},
                               std::vector<int64_t>(tables, tables + num_rows * num_columns),
                               std::move(requests),
                               num_columns};
            check_plan(plan, num_rows);
            new (self) AttentionPlan(std::move(plan));
        });

    nb::class_<Runtime>(m, "Runtime")
        .def("__init__",
             [](Runtime* self, std::optional<std::string> isa, int num_threads, const std::vector<int>& cpus,
                const std::string& activation_dtype) {
                 const KernelTable* kernels = find_kernels(isa ? isa->c_str() : nullptr);
                 if (kernels == nullptr) throw std::invalid_argument("no kernels " + *isa + " on this processor");
                 if (num_threads < 1) throw std::invalid_argument("at least one thread is needed");
                 new (self) Runtime(*kernels, num_threads, cpus, activation_of(activation_dtype));
             },
             "isa"_a.none(), "num_threads"_a, "cpus"_a, "activation_dtype"_a = "auto")
        .def_prop_ro("isa", [](const Runtime& self) { return self.kernels().name; })
        .def_prop_ro("num_threads", [](Runtime& self) { return self.pool().num_threads(); })
        .def("linear",
             [](Runtime& self, const LinearWeight& weight, Address x, int num_rows, Address bias, Address out) {
                 self.linear(weight, at<const float>(x), num_rows, at<const float>(bias), at<float>(out));
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
        .def("attend", &attend, no_gil)
        .def("argmax",
             [](Runtime& self, Address logits, int num_rows, int64_t size, Address out) {
                 self.argmax(at<const float>(logits), num_rows, size, at<int64_t>(out));
             },
             no_gil);
}
