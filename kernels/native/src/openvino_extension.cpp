// `PackedLinear` and `GatedMlp` as operations of OpenVINO, opset `tidegate`.
//
//     PackedLinear   x f32 [..., inputs], tiles u8 [n], and bias f32 [outputs] where there is one
//                    -> f32 [..., outputs]
//     GatedMlp       x f32 [..., inputs], tiles u8 [n] of gate and up, tiles u8 [m] of down
//                    -> f32 [..., outputs]
//
// Attributes are the fields of `Shape`, of the second weight with `down_` before them, and the gate.
//
// The CPU plugin runs an operation that it does not know by calling `evaluate`, inside the task
// arena that holds the threads the model was compiled for, so the work is shared among just those.
#include <algorithm>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include "gated_mlp.h"
#include "packed_linear.h"

namespace tidegate::native {
namespace {

// Tiles that are read elsewhere than where the graph has them, or not at all; see
// `tidegate_openvino_place`.
struct Moved {
    const std::uint8_t* begin;
    const std::uint8_t* end;
    const std::uint8_t* to;
};

std::shared_mutex places_mutex;
std::vector<Moved> places;

// Where to read these tiles; null if they are not to be read.
const std::uint8_t* placed(const std::uint8_t* tiles) {
    const std::shared_lock<std::shared_mutex> lock(places_mutex);
    for (const Moved& place : places) {
        if (tiles >= place.begin && tiles < place.end) {
            return place.to == nullptr ? nullptr : place.to + (tiles - place.begin);
        }
    }
    return tiles;
}

void run_in_arena(void*, std::size_t count, Parallel::Task task, void* argument) {
    tbb::parallel_for(
        tbb::blocked_range<std::size_t>(0, count, 1),
        [&](const tbb::blocked_range<std::size_t>& range) {
            for (std::size_t index = range.begin(); index < range.end(); ++index) {
                task(argument, index);
            }
        },
        tbb::simple_partitioner());
}

Parallel arena() { return {run_in_arena, nullptr, tbb::this_task_arena::max_concurrency()}; }

void visit(ov::AttributeVisitor& visitor, const std::string& prefix, Shape& shape) {
    std::int64_t bits = shape.bits, group = shape.group, zeros = shape.zeros;
    visitor.on_attribute(prefix + "inputs", shape.inputs);
    visitor.on_attribute(prefix + "outputs", shape.outputs);
    visitor.on_attribute(prefix + "bits", bits);
    visitor.on_attribute(prefix + "group", group);
    visitor.on_attribute(prefix + "zeros", zeros);
    shape.bits = static_cast<std::int32_t>(bits);
    shape.group = static_cast<std::int32_t>(group);
    shape.zeros = zeros != 0;
}

// Rows x [..., inputs] become rows [..., outputs]. What is given to an operation is read and
// written without more checks, so all of it is checked here: when a graph is built, and again when
// it runs, for a graph may leave dimensions open.
class Rows : public ov::op::Op {
public:
    using Op::Op;

    bool has_evaluate() const override { return true; }

protected:
    void infer(const Shape& from, const Shape& to) {
        ov::PartialShape found = get_input_partial_shape(0);
        NODE_VALIDATION_CHECK(this, found.rank().is_static() && found.size() > 0 &&
                                        found[found.size() - 1].compatible(from.inputs) &&
                                        get_input_element_type(0).compatible(ov::element::f32),
                              "x must have rows of `inputs` values, f32");
        found[found.size() - 1] = to.outputs;
        set_output_type(0, ov::element::f32, found);
    }

    void expect(std::size_t input, const ov::element::Type& type, std::int64_t length) const {
        NODE_VALIDATION_CHECK(this, get_input_element_type(input) == type &&
                                        get_input_partial_shape(input).compatible({length}),
                              "input ", input, " must be ", type, " [", length, "]");
    }

    void expect_tiles(std::size_t input, const Shape& shape) const {
        expect(input, ov::element::u8, static_cast<std::int64_t>(tiled_bytes(shape)));
    }

    // The number of rows, and room for as many results.
    static std::int64_t prepare(const ov::Tensor& x, std::int64_t inputs, std::int64_t outputs,
                                ov::Tensor& y) {
        ov::Shape found = x.get_shape();
        OPENVINO_ASSERT(!found.empty() && found.back() == static_cast<std::size_t>(inputs) &&
                            x.get_element_type() == ov::element::f32,
                        "x is ", x.get_element_type(), " ", found, ": must be f32 [..., ", inputs,
                        "]");
        found.back() = static_cast<std::size_t>(outputs);
        y.set_shape(found);
        return static_cast<std::int64_t>(x.get_size()) / inputs;
    }

    // Where to read the tiles; null in a rehearsal.
    static const std::uint8_t* tiles_in(const ov::Tensor& tensor, const Shape& shape) {
        const auto* tiles = static_cast<const std::uint8_t*>(tensor.data());
        OPENVINO_ASSERT(tensor.get_byte_size() == tiled_bytes(shape), "tiles are ",
                        tensor.get_byte_size(), " bytes: must be ", tiled_bytes(shape));
        OPENVINO_ASSERT(reinterpret_cast<std::uintptr_t>(tiles) % tile_alignment == 0,
                        "tiles must be aligned to ", tile_alignment, " bytes");
        return placed(tiles);
    }

    static void fill_zeros(ov::Tensor& y) {
        auto* values = static_cast<float*>(y.data());
        std::fill(values, values + y.get_size(), 0.0f);
    }
};

}  // namespace

class PackedLinear : public Rows {
public:
    OPENVINO_OP("PackedLinear", "tidegate");

    PackedLinear() = default;
    PackedLinear(const ov::OutputVector& arguments, const Shape& shape)
        : Rows(arguments), shape_(shape) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        check(shape_);
        NODE_VALIDATION_CHECK(this, get_input_size() == 2 || get_input_size() == 3,
                              "inputs are x, tiles and maybe bias");
        expect_tiles(1, shape_);
        if (get_input_size() == 3) {
            expect(2, ov::element::f32, shape_.outputs);
        }
        infer(shape_, shape_);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& given) const override {
        return std::make_shared<PackedLinear>(given, shape_);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visit(visitor, "", shape_);
        return true;
    }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const auto rows = prepare(inputs[0], shape_.inputs, shape_.outputs, outputs[0]);
        const std::uint8_t* tiles = tiles_in(inputs[1], shape_);
        OPENVINO_ASSERT(inputs.size() == 2 ||
                            inputs[2].get_size() == static_cast<std::size_t>(shape_.outputs),
                        "bias has ", inputs.back().get_size(), " values: must be ", shape_.outputs);
        if (tiles == nullptr) {
            fill_zeros(outputs[0]);
            return true;
        }
        const auto* bias =
            inputs.size() == 3 ? static_cast<const float*>(inputs[2].data()) : nullptr;
        linear(shape_, tiles, bias, static_cast<const float*>(inputs[0].data()), rows,
               static_cast<float*>(outputs[0].data()), arena());
        return true;
    }

private:
    Shape shape_;
};

class GatedMlp : public Rows {
public:
    OPENVINO_OP("GatedMlp", "tidegate");

    GatedMlp() = default;
    GatedMlp(const ov::OutputVector& arguments, const Mlp& mlp) : Rows(arguments), mlp_(mlp) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        check(mlp_);
        NODE_VALIDATION_CHECK(this, get_input_size() == 3,
                              "inputs are x and the tiles of two weights");
        expect_tiles(1, mlp_.gate_up);
        expect_tiles(2, mlp_.down);
        infer(mlp_.gate_up, mlp_.down);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& given) const override {
        return std::make_shared<GatedMlp>(given, mlp_);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visit(visitor, "", mlp_.gate_up);
        visit(visitor, "down_", mlp_.down);
        auto gate = static_cast<std::int64_t>(mlp_.gate);
        visitor.on_attribute("gate", gate);
        mlp_.gate = static_cast<Gate>(gate);
        return true;
    }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const auto rows = prepare(inputs[0], mlp_.gate_up.inputs, mlp_.down.outputs, outputs[0]);
        const std::uint8_t* gate_up = tiles_in(inputs[1], mlp_.gate_up);
        const std::uint8_t* down = tiles_in(inputs[2], mlp_.down);
        if (gate_up == nullptr || down == nullptr) {
            fill_zeros(outputs[0]);
            return true;
        }
        gated_mlp(mlp_, gate_up, down, static_cast<const float*>(inputs[0].data()), rows,
                  static_cast<float*>(outputs[0].data()), arena());
        return true;
    }

private:
    Mlp mlp_;
};

}  // namespace tidegate::native

#if defined(_WIN32)
#define TIDEGATE_EXPORT extern "C" __declspec(dllexport)
#else
#define TIDEGATE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// From now on operations whose tiles lie from `begin` to before `end` read them at `to`, where they
// must lie in the same order, for as long as any such operation runs. With `to` null they compute
// zeros instead, so that a model can take the memory of its largest steps at the price of the
// smallest. With `to` = `begin` they read what the graph has again.
TIDEGATE_EXPORT void tidegate_openvino_place(const void* begin, const void* end, const void* to) {
    using namespace tidegate::native;
    const auto byte = [](const void* address) { return static_cast<const std::uint8_t*>(address); };
    const std::unique_lock<std::shared_mutex> lock(places_mutex);
    places.erase(std::remove_if(places.begin(), places.end(),
                                [&](const Moved& place) { return place.begin == byte(begin); }),
                 places.end());
    if (to != begin) {
        places.push_back({byte(begin), byte(end), byte(to)});
    }
}

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<tidegate::native::PackedLinear>>(),
     std::make_shared<ov::OpExtension<tidegate::native::GatedMlp>>()}));
