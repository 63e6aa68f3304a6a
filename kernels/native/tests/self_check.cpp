// Every path this CPU can run against the portable one, bit for bit, over shapes with odd edges.
//
// Prints a digest of the portable results of each case, so that runs on different CPUs can be
// compared; exits 1 and names the case where two paths differ. Needs nothing but this library,
// hence it also runs under an emulator and with sanitizers.
//
//     self_check [most inputs]
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#include "gated_mlp.h"
#include "packed_linear.h"
#include "threads.h"

namespace {

using namespace tidegate::native;

struct Case {
    Shape shape;
    std::int64_t rows;
    bool bias;
    int kind;  // of activations; see `activation`
};

// The same numbers on every machine: a 64-bit linear congruential generator (Knuth, MMIX).
struct Numbers {
    std::uint64_t state;
    std::uint32_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<std::uint32_t>(state >> 33);
    }
    float centred() { return static_cast<float>(next() % 20001) / 10000.0f - 1.0f; }
};

struct Weight {
    std::vector<std::uint8_t> values, zeros;
    std::vector<std::uint16_t> scales;
    std::vector<float> bias;
};

Weight make_weight(const Shape& shape, Numbers& numbers) {
    const std::int64_t count = groups(shape);
    Weight weight;
    weight.values.resize(shape.outputs * count * shape.group * shape.bits / 8);
    weight.scales.resize(shape.outputs * count);
    weight.zeros.resize(shape.zeros ? shape.outputs * ((count * shape.bits + 7) / 8) : 0);
    weight.bias.resize(shape.outputs);
    for (auto* bytes : {&weight.values, &weight.zeros}) {
        for (std::uint8_t& byte : *bytes) {
            // Whole runs of the largest value, where 16-bit sums would overflow first.
            byte = numbers.next() % 4 == 0 ? 255 : static_cast<std::uint8_t>(numbers.next());
        }
    }
    for (std::uint16_t& scale : weight.scales) {
        // Either sign, and one in eight a half-precision denormal.
        const std::uint32_t exponent = numbers.next() % 8 == 0 ? 0 : 8 + numbers.next() % 8;
        scale = static_cast<std::uint16_t>((numbers.next() % 2) << 15 | exponent << 10 |
                                           numbers.next() % 1024);
    }
    for (float& value : weight.bias) {
        value = numbers.centred();
    }
    return weight;
}

float activation(int kind, Numbers& numbers) {
    const float value = numbers.centred();
    switch (kind) {
        case 1:  // the largest magnitude everywhere
            return value < 0 ? -3.0f : 3.0f;
        case 2:  // none
            return value < 0 ? -0.0f : 0.0f;
        case 3:  // denormals and what is just above the least that counts
            return value * (numbers.next() % 2 ? 0x1p-140f : 0x1p-60f);
        case 4:  // some that are no numbers
            return numbers.next() % 50 != 0 ? value
                   : value < 0              ? std::numeric_limits<float>::infinity()
                                            : std::numeric_limits<float>::quiet_NaN();
        case 5:  // outliers
            return numbers.next() % 30 == 0 ? value * 1e6f : value;
        default:
            return value;
    }
}

// NaNs compare equal whatever their payload, which IEEE 754 leaves open.
std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return value == value ? bits : 0x7fc00000u;
}

std::uint64_t digest(const std::vector<float>& y) {
    std::uint64_t hash = 14695981039346656037u;  // FNV-1a
    for (const float value : y) {
        hash = (hash ^ bits_of(value)) * 1099511628211u;
    }
    return hash;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    for (std::size_t i = 0; i < a.size(); ++i) {
        if (bits_of(a[i]) != bits_of(b[i])) {
            return false;
        }
    }
    return true;
}

// Exactly as many bytes as are allowed to be touched, so that a sanitizer sees one too many.
struct Tiles {
    explicit Tiles(std::size_t bytes)
        : data(static_cast<std::uint8_t*>(std::aligned_alloc(tile_alignment, bytes))) {}
    ~Tiles() { std::free(data); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
    std::uint8_t* data;
};

void fill_tiles(const Shape& shape, const Weight& weight, const Tiles& tiles) {
    tile(shape, weight.values.data(), weight.scales.data(),
         shape.zeros ? weight.zeros.data() : nullptr, tiles.data);
}

bool check_case(const Case& one, std::uint64_t seed) {
    Numbers numbers{seed};
    const Weight weight = make_weight(one.shape, numbers);
    const Tiles tiles(tiled_bytes(one.shape));
    fill_tiles(one.shape, weight, tiles);
    std::vector<float> x(one.rows * one.shape.inputs);
    for (float& value : x) {
        value = activation(one.kind, numbers);
    }
    const auto run = [&](const std::string& path, std::int64_t first, std::int64_t rows,
                         std::int32_t threads) {
        force_path(path);
        std::vector<float> y(rows * one.shape.outputs);
        linear(one.shape, tiles.data, one.bias ? weight.bias.data() : nullptr,
               x.data() + first * one.shape.inputs, rows, y.data(), thread_pool(threads));
        return y;
    };
    const std::vector<float> expected = run("portable", 0, one.rows, 1);
    std::printf("%lld %lld %d %d %d %lld %d %d %016llx\n", (long long)one.shape.inputs,
                (long long)one.shape.outputs, one.shape.bits, one.shape.group, one.shape.zeros,
                (long long)one.rows, one.bias, one.kind, (unsigned long long)digest(expected));
    const std::int64_t last = one.rows - 1;
    const std::vector<float> alone(expected.begin() + last * one.shape.outputs, expected.end());
    for (const std::string& path : paths()) {
        if (!same(run(path, 0, one.rows, 1), expected) ||
            !same(run(path, 0, one.rows, 3), expected) || !same(run(path, last, 1, 1), alone)) {
            std::fprintf(stderr, "%s differs from portable in the case above\n", path.c_str());
            return false;
        }
    }
    return true;
}

// A gated MLP; its inner width is `width` tiles.
bool check_mlp(const Shape& like, std::int64_t width, std::int64_t outputs, std::int64_t rows,
               int kind, std::uint64_t seed) {
    Numbers numbers{seed};
    Mlp mlp{like, like, numbers.next() % 2 == 0 ? Gate::silu : Gate::gelu_tanh};
    mlp.gate_up.outputs = 2 * width * tile_outputs;
    mlp.down.inputs = width * tile_outputs;
    mlp.down.outputs = outputs;
    const Weight first = make_weight(mlp.gate_up, numbers), second = make_weight(mlp.down, numbers);
    const Tiles gate_up(tiled_bytes(mlp.gate_up)), down(tiled_bytes(mlp.down));
    fill_tiles(mlp.gate_up, first, gate_up);
    fill_tiles(mlp.down, second, down);
    std::vector<float> x(rows * like.inputs);
    for (float& value : x) {
        value = activation(kind, numbers);
    }
    const auto run = [&](const std::string& path, std::int32_t threads) {
        force_path(path);
        std::vector<float> y(rows * outputs);
        gated_mlp(mlp, gate_up.data, down.data, x.data(), rows, y.data(), thread_pool(threads));
        return y;
    };
    const std::vector<float> expected = run("portable", 1);
    std::printf("mlp %lld %lld %lld %d %d %d %lld %d %016llx\n", (long long)like.inputs,
                (long long)mlp.down.inputs, (long long)outputs, like.bits, like.group, like.zeros,
                (long long)rows, kind, (unsigned long long)digest(expected));
    for (const std::string& path : paths()) {
        if (!same(run(path, 1), expected) || !same(run(path, 3), expected)) {
            std::fprintf(stderr, "%s differs from portable in the case above\n", path.c_str());
            return false;
        }
    }
    return true;
}

}  // namespace

int main(int count, char** arguments) {
    const std::int64_t most = count > 1 ? std::atoll(arguments[1]) : 700;
    std::string names;
    for (const std::string& path : paths()) {
        names += " " + path;
    }
    std::fprintf(stderr, "paths:%s\n", names.c_str());
    Numbers numbers{2026};
    std::uint64_t seed = 0;
    for (const std::int32_t bits : {4, 8}) {
        for (const std::int32_t group : {16, 32, 48, 64, 80, 128, 256, 2048}) {
            for (const bool zeros : {false, true}) {
                for (int kind = 0; kind < 6; ++kind) {
                    const std::int64_t inputs = 1 + numbers.next() % most;
                    const std::int64_t outputs = 1 + numbers.next() % 150;
                    const std::int64_t rows = 1 + numbers.next() % (kind == 0 ? 21 : 9);
                    const Shape shape{inputs, outputs, bits, group, zeros};
                    if (!check_case({shape, rows, numbers.next() % 2 == 0, kind}, ++seed)) {
                        return 1;
                    }
                    if (group <= 128 && !check_mlp(shape, 1 + numbers.next() % 40, outputs, rows,
                                                   kind, ++seed)) {
                        return 1;
                    }
                }
            }
        }
    }
    return 0;
}
