// `PackedLinear` as an operation of OpenVINO, opset `tidegate`.
//
//     inputs   x f32 [..., inputs], tiles u8 [n], and bias f32 [outputs] where there is one
//     output   f32 [..., outputs]
//     attributes inputs, outputs, bits, group, zeros: `Shape`
//
// The CPU plugin runs an operation that it does not know by calling `evaluate`, inside the task
// arena that holds the threads the model was compiled for, so the work is shared among just those.
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include "packed_linear.h"

namespace tidegate::native {
namespace {

// Results of weights whose tiles lie between are zeros; see `tidegate_openvino_rehearse`.
std::atomic<const std::uint8_t*> rehearsed_begin{nullptr};
std::atomic<const std::uint8_t*> rehearsed_end{nullptr};

void run_in_arena(void*, std::size_t count, Parallel::Task task, void* argument) {
    // One task at a time to whoever is free: a thread that other processes hold up takes fewer.
    tbb::parallel_for(
        tbb::blocked_range<std::size_t>(0, count, 1),
        [&](const tbb::blocked_range<std::size_t>& range) {
            for (std::size_t index = range.begin(); index < range.end(); ++index) {
                task(argument, index);
            }
        },
        tbb::simple_partitioner());
}

}  // namespace

class PackedLinear : public ov::op::Op {
public:
    OPENVINO_OP("PackedLinear", "tidegate");

    PackedLinear() = default;
    PackedLinear(const ov::OutputVector& arguments, const Shape& shape)
        : Op(arguments), shape_(shape) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        check(shape_);
        NODE_VALIDATION_CHECK(this, get_input_size() == 2 || get_input_size() == 3,
                              "inputs are x, tiles and maybe bias");
        ov::PartialShape found = get_input_partial_shape(0);
        const auto columns = ov::Dimension(shape_.inputs);
        NODE_VALIDATION_CHECK(this, found.rank().is_static() && found.size() > 0 &&
                                        found[found.size() - 1].compatible(columns) &&
                                        get_input_element_type(0).compatible(ov::element::f32),
                              "x must have rows of `inputs` values, f32");
        expect(1, ov::element::u8, static_cast<std::int64_t>(tiled_bytes(shape_)));
        if (get_input_size() == 3) {
            expect(2, ov::element::f32, shape_.outputs);
        }
        found[found.size() - 1] = shape_.outputs;
        set_output_type(0, ov::element::f32, found);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& given) const override {
        return std::make_shared<PackedLinear>(given, shape_);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        std::int64_t bits = shape_.bits, group = shape_.group, zeros = shape_.zeros;
        visitor.on_attribute("inputs", shape_.inputs);
        visitor.on_attribute("outputs", shape_.outputs);
        visitor.on_attribute("bits", bits);
        visitor.on_attribute("group", group);
        visitor.on_attribute("zeros", zeros);
        shape_.bits = static_cast<std::int32_t>(bits);
        shape_.group = static_cast<std::int32_t>(group);
        shape_.zeros = zeros != 0;
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        ov::Shape found = inputs[0].get_shape();
        const auto* tiles = static_cast<const std::uint8_t*>(inputs[1].data());
        // A graph may leave dimensions open, and the rows are read and written without more checks.
        OPENVINO_ASSERT(!found.empty() && found.back() == static_cast<std::size_t>(shape_.inputs) &&
                            inputs[0].get_element_type() == ov::element::f32,
                        "x is ", inputs[0].get_element_type(), " ", found, ": must be f32 [..., ",
                        shape_.inputs, "]");
        OPENVINO_ASSERT(inputs[1].get_byte_size() == tiled_bytes(shape_), "tiles are ",
                        inputs[1].get_byte_size(), " bytes: must be ", tiled_bytes(shape_));
        OPENVINO_ASSERT(reinterpret_cast<std::uintptr_t>(tiles) % tile_alignment == 0,
                        "tiles must be aligned to ", tile_alignment, " bytes");
        OPENVINO_ASSERT(inputs.size() == 2 ||
                            inputs[2].get_size() == static_cast<std::size_t>(shape_.outputs),
                        "bias has ", inputs.back().get_size(), " values: must be ", shape_.outputs);
        found.back() = static_cast<std::size_t>(shape_.outputs);
        outputs[0].set_shape(found);
        if (tiles >= rehearsed_begin.load() && tiles < rehearsed_end.load()) {
            auto* values = static_cast<float*>(outputs[0].data());
            std::fill(values, values + outputs[0].get_size(), 0.0f);
            return true;
        }
        const auto rows = static_cast<std::int64_t>(inputs[0].get_size()) / shape_.inputs;
        const auto* bias =
            inputs.size() == 3 ? static_cast<const float*>(inputs[2].data()) : nullptr;
        const Parallel parallel{run_in_arena, nullptr, tbb::this_task_arena::max_concurrency()};
        linear(shape_, tiles, bias, static_cast<const float*>(inputs[0].data()), rows,
               static_cast<float*>(outputs[0].data()), parallel);
        return true;
    }

private:
    // The bytes behind `tiles` are read without further checks, so they are checked here.
    void expect(std::size_t input, const ov::element::Type& type, std::int64_t length) const {
        NODE_VALIDATION_CHECK(this, get_input_element_type(input) == type &&
                                        get_input_partial_shape(input).compatible({length}),
                              "input ", input, " must be ", type, " [", length, "]");
    }

    Shape shape_;
};

}  // namespace tidegate::native

#if defined(_WIN32)
#define TIDEGATE_EXPORT extern "C" __declspec(dllexport)
#else
#define TIDEGATE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// From now on products with tiles from `begin` to before `end` are not computed, so that a model can
// take the memory of its largest steps at the price of the smallest. Nulls end it. One at a time.
TIDEGATE_EXPORT void tidegate_openvino_rehearse(const void* begin, const void* end) {
    using namespace tidegate::native;
    rehearsed_end = nullptr;
    rehearsed_begin = static_cast<const std::uint8_t*>(begin);
    rehearsed_end = static_cast<const std::uint8_t*>(end);
}

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<tidegate::native::PackedLinear>>()}));
