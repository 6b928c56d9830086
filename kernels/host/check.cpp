// Runs every entry on random frames, logits and tables for the sanitizers to watch:
//
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -ffp-contract=off
//       -Wno-unknown-pragmas -include cuda_host.h check.cpp -o check && ./check ROUNDS [SHORT]
//
// Every array is allocated at exactly its size, so that a read or write beside it is found. What comes
// out is compared with nothing here. SHORT: elements that outputs are too short by, to see that the
// sanitizers are on.
#include "../postprocess.cu"
#include "../preprocess.cu"

#include <cstdio>
#include <cstdlib>

namespace {

std::mt19937 generator(1);
std::size_t too_short = 0;

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

template <typename T>
std::vector<T> noise(std::size_t length) {
    std::vector<T> values(length);
    for (T& value : values) value = static_cast<T>(between(-1000, 1000));
    return values;
}

// A random table: `first` never decreases, and weights add up to `sum`.
template <typename Weight>
struct Table {
    std::vector<int> first;
    std::vector<Weight> weights;
    Axis axis;

    Table(int inputs, int outputs, Weight sum) : first(outputs) {
        const int taps = between(1, min(inputs, 40));
        for (int& one : first) one = between(0, inputs - taps);
        std::sort(first.begin(), first.end());
        weights.assign(static_cast<std::size_t>(taps) * outputs, sum / taps);
        axis = {first.data(), weights.data(), inputs, outputs, taps};
    }
};

using Entry = void (*)(Preprocess);

unsigned tiles_of(int length) { return static_cast<unsigned>((length + 31) / 32); }

template <typename Parameters>
void run(void (*entry)(Parameters), const Parameters& p, dim3 grid) {
    if (host::launch(entry, p, grid, {WARP, WARPS, 1}, generator()) == host::FINISHED) return;
    std::fprintf(stderr, "threads were left waiting\n");
    std::exit(1);
}

template <typename Element, typename PreprocessWeight, typename ResizeWeight>
void preprocess_both(Entry entry, Entry resize_entry, PreprocessWeight sum) {
    Preprocess p{};
    p.height = between(1, 120), p.width = between(1, 120), p.channels = between(0, 1) ? 3 : 1;
    p.size = between(1, 80);
    const int h = between(1, p.size), w = between(1, p.size);
    const int row = p.width * p.channels, padding = between(0, 5);
    // the last row has no padding
    auto frame = noise<Element>(static_cast<std::size_t>(row + padding) * (p.height - 1) + row);
    const bool upwards = between(0, 1);
    p.pitch = static_cast<long long>(row + padding) * sizeof(Element) * (upwards ? -1 : 1);
    p.frame = frame.data() + (upwards ? static_cast<std::size_t>(row + padding) * (p.height - 1) : 0);
    p.flip = between(0, 1) * 255;
    p.low = -100, p.remainder = 0.5f, p.scale = 0.1f, p.least = 0, p.most = 255;
    p.rounding = between(TRUNCATE, HALF_UP);
    for (int c = 0; c < 3; ++c) p.mean[c] = 100.0f + c, p.std[c] = 50.0f + c;

    const Table<PreprocessWeight> rows(p.height, h, sum), columns(p.width, w, sum);
    p.rows = rows.axis, p.columns = columns.axis;
    p.half = between(0, 1);
    const std::size_t pixels = static_cast<std::size_t>(3) * p.size * p.size;
    std::vector<unsigned short> output(pixels * (p.half ? 1 : 2) - too_short);
    p.output = output.data();
    const unsigned side = tiles_of(p.size), channels = static_cast<unsigned>(p.channels);
    run(entry, p, {side, side, channels});

    const Table<ResizeWeight> resize_rows(p.height, h, 1), resize_columns(p.width, w, 1);
    p.rows = resize_rows.axis, p.columns = resize_columns.axis;
    std::vector<float> content(static_cast<std::size_t>(p.channels) * h * w);
    std::vector<unsigned> extremes(4);
    p.content = content.data(), p.extremes = extremes.data();
    run(resize_entry, p, {tiles_of(w), tiles_of(h), channels});
    run<Preprocess>(normalise, p, {side, side, channels});
}

void postprocess_both() {
    Postprocess p{};
    const int height = between(1, 120), width = between(1, 120), h = between(1, 40), w = between(1, 40);
    p.exclusive = between(0, 1), p.probabilities = between(0, 1);
    p.count = between(1, 5), p.channels = p.count + p.exclusive;
    p.threshold = static_cast<float>(between(-1000, 1000));
    const auto logits = noise<float>(static_cast<std::size_t>(p.channels) * h * w);
    const Table<float> rows(h, height, 1), columns(w, width, 1);
    std::vector<unsigned> masks(static_cast<std::size_t>(p.count) * height * tiles_of(width) - too_short);
    std::vector<unsigned> tally(static_cast<std::size_t>(p.count) * FIGURES);
    std::vector<unsigned char> labels(static_cast<std::size_t>(height) * width - too_short);
    p.logits = logits.data(), p.rows = rows.axis, p.columns = columns.axis;
    p.masks = masks.data(), p.labels = labels.data(), p.tally = tally.data();
    run(threshold_masks, p, {tiles_of(width), tiles_of(height), static_cast<unsigned>(p.count)});
    std::fill(tally.begin(), tally.end(), 0u);
    p.only = p.exclusive ? between(0, p.count) : 0;
    run(label_map, p, {tiles_of(width), tiles_of(height), 1});
}

} // namespace

int main(int count, char** arguments) {
    const int rounds = count > 1 ? std::atoi(arguments[1]) : 100;
    if (count > 2) too_short = static_cast<std::size_t>(std::atoi(arguments[2]));
    for (int round = 0; round < rounds; ++round) {
        preprocess_both<unsigned char, int, double>(preprocess_levels, resize_levels, 1 << 22);
        preprocess_both<unsigned char, float, float>(preprocess_u8, resize_u8, 1);
        preprocess_both<unsigned short, float, float>(preprocess_u16, resize_u16, 1);
        preprocess_both<short, float, float>(preprocess_i16, resize_i16, 1);
        preprocess_both<float, float, float>(preprocess_f32, resize_f32, 1);
        postprocess_both();
    }
    std::printf("%d rounds of 13 entries\n", rounds);
}
