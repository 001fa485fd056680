// Python's view of `Program`. Weights and caches come as addresses, and stay their owner's; the arrays of a
// step are checked here. `cpu/program.py` is the only caller.

#include "program_module.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "program.h"
#include "released_gil.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace pelton {

namespace {

using Address = uintptr_t;
using Ints = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntTable = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ViewPair = std::pair<int, int>;  // slot, column
// N, K, D, block size, window (0: none), whether the cache is bfloat16.
using ShapeTuple = std::tuple<int, int, int, int, int, bool>;
// Slot mapping, cos, sin, block tables.
using GroupTuple = std::tuple<Ints, Floats, Floats, IntTable>;

// An adapter and the rows that it changes.
using AdapterPair = std::pair<const LoraAdapter*, Ints>;
// First rank, ranks, column, outputs, scale, address, whether it is bfloat16.
using LoraPartTuple = std::tuple<int, int, int, int, float, Address, bool>;

View view_of(ViewPair pair) { return {pair.first, pair.second}; }

CachePair caches_of(Address keys, Address values) {
    return {reinterpret_cast<void*>(keys), reinterpret_cast<void*>(values)};
}

const float* floats_of(Address address) { return reinterpret_cast<const float*>(address); }

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

std::vector<LoraRows> rows_of(const std::vector<AdapterPair>& adapters) {
    std::vector<LoraRows> groups;
    for (const auto& [adapter, rows] : adapters) {
        require(adapter != nullptr, "an adapter is missing");
        groups.push_back({adapter, rows.data(), static_cast<int64_t>(rows.shape(0))});
    }
    return groups;
}

void set_site(LoraAdapter& adapter, int index, int num_inputs, int num_ranks, std::pair<Address, bool> shrink,
              const std::vector<LoraPartTuple>& parts) {
    LoraSite site = {num_inputs, num_ranks, {reinterpret_cast<const void*>(shrink.first), shrink.second}, {}};
    for (const auto& [first_rank, ranks, column, num_outputs, scale, address, bf16] : parts) {
        site.parts.push_back(
            {first_rank, ranks, column, num_outputs, scale, {reinterpret_cast<const void*>(address), bf16}});
    }
    adapter.set_site(index, std::move(site));
}

// out [S, O] += what the adapters add at `site` for x [S, I].
void add_lora(Runtime& runtime, const std::vector<AdapterPair>& adapters, int site, Floats x, Result out) {
    const std::vector<LoraRows> groups = rows_of(adapters);
    require(x.shape(0) == out.shape(0), "input and output differ in rows");
    for (const auto& group : groups) {
        const LoraSite* here = group.adapter->site(site);
        require(here == nullptr || here->fits(static_cast<int>(x.shape(1)), static_cast<int>(out.shape(1))),
                "an adapter does not fit the model");
        for (int64_t i = 0; i < group.num_rows; ++i) {
            require(group.rows[i] >= 0 && group.rows[i] < static_cast<int64_t>(x.shape(0)), "a row does not exist");
        }
    }
    const float* from = x.data();
    float* to = out.data();
    const auto ld_x = static_cast<int64_t>(x.shape(1)), ld_out = static_cast<int64_t>(out.shape(1));
    ReleasedGil released;
    LoraProducts().add(runtime, groups, site, from, ld_x, to, ld_out);
}

void run(Program& program, const ProgramInputs& inputs, Result& result) {
    require(result.shape(0) == static_cast<size_t>(inputs.num_rows) &&
                result.shape(1) == static_cast<size_t>(program.result_width()),
            "the result has the wrong shape");
    float* data = result.data();
    ReleasedGil released;
    program.run(inputs, data);
}

void run_step(Program& program, Ints token_ids, Ints query_start_loc, Ints seq_lens, std::vector<GroupTuple> groups,
              Result result, const std::vector<AdapterPair>& adapters) {
    const size_t num_tokens = token_ids.shape(0), num_requests = seq_lens.shape(0);
    require(query_start_loc.shape(0) == num_requests + 1 && groups.size() == program.num_groups(),
            "a step's arrays do not fit together");
    std::vector<GroupInputs> group_inputs;
    for (const auto& [slots, cos, sin, tables] : groups) {
        require(slots.shape(0) == num_tokens && cos.shape(0) == num_tokens && sin.shape(0) == num_tokens &&
                    sin.shape(1) == cos.shape(1) && tables.shape(0) == num_requests,
                "a step's arrays do not fit together");
        group_inputs.push_back({slots.data(), cos.data(), sin.data(), static_cast<int>(cos.shape(1)), tables.data(),
                                static_cast<int64_t>(tables.shape(1))});
    }
    ProgramInputs inputs;
    inputs.num_rows = static_cast<int>(num_tokens);
    inputs.token_ids = token_ids.data();
    inputs.num_requests = static_cast<int64_t>(num_requests);
    inputs.query_start_loc = query_start_loc.data();
    inputs.seq_lens = seq_lens.data();
    inputs.groups = group_inputs;
    const std::vector<LoraRows> adapter_rows = rows_of(adapters);
    inputs.adapters = adapter_rows;
    run(program, inputs, result);
}

void run_rows(Program& program, Floats hidden, Ints rows, Result result, const std::vector<AdapterPair>& adapters) {
    ProgramInputs inputs;
    inputs.num_rows = static_cast<int>(rows.shape(0));
    inputs.hidden = hidden.data();
    inputs.num_hidden = static_cast<int64_t>(hidden.shape(0));
    inputs.hidden_width = static_cast<int>(hidden.shape(1));
    inputs.rows = rows.data();
    const std::vector<LoraRows> adapter_rows = rows_of(adapters);
    inputs.adapters = adapter_rows;
    run(program, inputs, result);
}

}  // namespace

void bind_program(nb::module_& m) {
    nb::class_<LoraAdapter>(m, "LoraAdapter")
        .def(nb::init<int>(), "num_sites"_a)
        .def("set_site", &set_site, "index"_a, "num_inputs"_a, "num_ranks"_a, "shrink"_a, "parts"_a);
    m.attr("LORA_ALIGN") = kLoraAlign;
    m.attr("LORA_PANEL") = kLoraPanel;
    m.def("add_lora", &add_lora, "runtime"_a, "adapters"_a, "site"_a, "x"_a.noconvert(), "out"_a.noconvert());

    nb::class_<Program>(m, "Program")
        .def("__init__",
             [](Program* self, Runtime& runtime, const std::vector<ShapeTuple>& groups, int64_t num_blocks) {
                 std::vector<AttentionShape> shapes;
                 for (const auto& [num_heads, num_kv_heads, head_dim, block_size, window, bf16] : groups) {
                     shapes.push_back({num_heads, num_kv_heads, head_dim, block_size, window, 1.0f, 0.0f,
                                       bf16 ? KVType::BF16 : KVType::F32});
                 }
                 new (self) Program(runtime, std::move(shapes), num_blocks);
             },
             nb::keep_alive<1, 2>(), "runtime"_a, "groups"_a, "num_blocks"_a)
        .def("add_slot", &Program::add_slot, "width"_a)
        .def_prop_ro("slot_widths", &Program::slot_widths)
        .def("select_rows", [](Program& self, int size, ViewPair out) { self.select_rows(size, view_of(out)); })
        .def("embedding",
             [](Program& self, const EmbeddingTable& table, ViewPair out) { self.embedding(table, view_of(out)); },
             nb::keep_alive<1, 2>())
        .def("linear",
             [](Program& self, const LinearWeight& weight, ViewPair x, Address bias, ViewPair out) {
                 self.linear(weight, view_of(x), floats_of(bias), view_of(out));
             },
             nb::keep_alive<1, 2>())
        .def("adapt",
             [](Program& self, int site, ViewPair x, int num_inputs, ViewPair out, int num_outputs) {
                 self.adapt(site, view_of(x), num_inputs, view_of(out), num_outputs);
             })
        .def("rms_norm",
             [](Program& self, ViewPair x, int num_heads, Address weight, int size, float eps, ViewPair out) {
                 self.rms_norm(view_of(x), num_heads, floats_of(weight), size, eps, view_of(out));
             })
        .def("add_rms_norm",
             [](Program& self, ViewPair x, ViewPair residual, Address weight, int size, float eps, ViewPair out) {
                 self.add_rms_norm(view_of(x), view_of(residual), floats_of(weight), size, eps, view_of(out));
             })
        .def("gated_mlp",
             [](Program& self, bool gelu, const LinearWeight& gate_up, Address gate_up_bias, const LinearWeight& down,
                Address down_bias, std::pair<int, int> sites, ViewPair x, ViewPair out) {
                 self.gated_mlp({&gate_up, floats_of(gate_up_bias), &down, floats_of(down_bias), gelu}, sites,
                                view_of(x), view_of(out));
             },
             nb::keep_alive<1, 3>(), nb::keep_alive<1, 5>())
        .def("gated",
             [](Program& self, bool gelu, ViewPair gate_up, int size, ViewPair out) {
                 self.gated(gelu, view_of(gate_up), size, view_of(out));
             })
        .def("softcap",
             [](Program& self, ViewPair x, int size, float cap) { self.softcap(view_of(x), size, cap); })
        .def("rotate_and_store",
             [](Program& self, int group, ViewPair query, ViewPair key, ViewPair value, Address keys,
                Address values) {
                 self.rotate_and_store(group, view_of(query), view_of(key), view_of(value), caches_of(keys, values));
             })
        .def("attend",
             [](Program& self, int group, ViewPair query, Address keys, Address values, float scale, float softcap,
                ViewPair out) {
                 self.attend(group, view_of(query), caches_of(keys, values), scale, softcap, view_of(out));
             })
        .def("time_ops", &Program::time_ops)
        .def("take_times", &Program::take_times)
        .def("run_step", &run_step, "token_ids"_a.noconvert(), "query_start_loc"_a.noconvert(), "seq_lens"_a.noconvert(),
             "groups"_a.noconvert(), "result"_a.noconvert(), "adapters"_a = nb::list())
        .def("run_rows", &run_rows, "hidden"_a.noconvert(), "rows"_a.noconvert(), "result"_a.noconvert(),
             "adapters"_a = nb::list());
}

}  // namespace pelton
