// An image → the input of the network's image encoder, and the place of the image in that frame.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "manifest.hpp"
#include "pixels.hpp"
#include "resampling.hpp"

namespace medsa {

/// How an image lies in the network's square frame.
struct Frame {
  int width = 0, height = 0;                  ///< of the caller's image
  int network_size = 0;                       ///< S
  int content_width = 0, content_height = 0;  ///< of the frame that the image covers, from the top
                                              ///< left; the rest is padding
};

namespace detail {

enum class Fit { stretch, longest_side };
enum class Filter { bilinear, cubic, area, linear, nearest, spline };

/// How an image becomes the network's input; see `PreprocessingSpec` in Python.
struct PreprocessingSpec {
  Fit fit;
  Filter filter;
  bool min_max;  ///< intensities of any range: the image's own minimum becomes 0, maximum 1
  std::array<float, 3> mean{};
  std::array<float, 3> deviation{};  ///< divisor of the differences from `mean`
};

inline PreprocessingSpec spec_of(Preprocessing name) {
  const std::array<float, 3> zero = {0, 0, 0}, white = {255, 255, 255};
  const std::array<float, 3> mean = {123.675f, 116.28f, 103.53f};
  const std::array<float, 3> deviation = {58.395f, 57.12f, 57.375f};
  switch (name) {
    case Preprocessing::medsa: return {Fit::stretch, Filter::bilinear, false, zero, white};
    case Preprocessing::sam: return {Fit::longest_side, Filter::bilinear, false, mean, deviation};
    case Preprocessing::medsam: return {Fit::stretch, Filter::cubic, true, {}, {}};
    case Preprocessing::litemedsam: return {Fit::longest_side, Filter::area, true, {}, {}};
    case Preprocessing::efficientsam: return {Fit::stretch, Filter::linear, false, mean, deviation};
    case Preprocessing::sam_med2d: return {Fit::stretch, Filter::nearest, false, mean, deviation};
    case Preprocessing::finetune_sam: return {Fit::stretch, Filter::bilinear, false, mean, deviation};
    case Preprocessing::samed: return {Fit::stretch, Filter::spline, false, zero, white};
  }
  throw Error(Code::usage, "unknown preprocessing");
}

/// The place of an image in the network's frame.
inline Frame frame_of(int width, int height, Preprocessing preprocessing, int network_size) {
  Frame frame{width, height, network_size, network_size, network_size};
  if (spec_of(preprocessing).fit == Fit::longest_side) {
    // the order of operations is SAM's ResizeLongestSide's, so that ties round alike
    const double scale = static_cast<double>(network_size) / std::max(width, height);
    frame.content_width = std::max(1, static_cast<int>(width * scale + 0.5));
    frame.content_height = std::max(1, static_cast<int>(height * scale + 0.5));
  }
  return frame;
}

/// Pillow's resize of an axis in its 8-bit arithmetic: weights are whole 2⁻²² parts.
inline std::vector<std::uint8_t> pillow_pass(const std::vector<std::uint8_t>& image, int n,
                                             std::size_t m, std::size_t width) {
  constexpr int bits = 22;
  const Operator<double> exact = merged<double>(pillow_taps(n, m));
  Operator<std::int32_t> rows{exact.first, exact.indices, {}};
  for (const double weight : exact.weights) {
    rows.weights.push_back(static_cast<std::int32_t>(0.5 + weight * (1 << bits)));
  }
  std::vector<std::int32_t> sums(width);
  std::vector<std::uint8_t> result(m * width);
  for (std::size_t output = 0; output < m; ++output) {
    combine_rows(rows, output, image.data(), width, sums.data());
    for (std::size_t x = 0; x < width; ++x) {
      const std::int32_t level = (sums[x] + (1 << (bits - 1))) >> bits;
      result[output * width + x] = static_cast<std::uint8_t>(std::clamp(level, 0, 255));
    }
  }
  return result;
}

/// Pillow's resize of an axis in its float mode: sums are doubles.
inline std::vector<float> pillow_pass(const std::vector<float>& image, int n, std::size_t m,
                                      std::size_t width) {
  const Operator<double> rows = merged<double>(pillow_taps(n, m));
  std::vector<double> sums(width);
  std::vector<float> result(m * width);
  for (std::size_t output = 0; output < m; ++output) {
    combine_rows(rows, output, image.data(), width, sums.data());
    std::transform(sums.begin(), sums.end(), result.begin() + static_cast<std::ptrdiff_t>(output * width),
                   [](double sum) { return static_cast<float>(sum); });
  }
  return result;
}

/// (H, W) → (h, w): Pillow resizes the width first, and rounds in between.
template <class Pixel>
std::vector<double> pillow_bilinear(const Pixel* plane, std::size_t height, std::size_t width,
                                    std::size_t h, std::size_t w) {
  std::vector<Pixel> image(plane, plane + height * width);
  if (w != width) {
    image = pillow_pass(transposed(plane, height, width), static_cast<int>(width), w, height);
    image = transposed(image.data(), w, height);
  }
  if (h != height) {
    image = pillow_pass(image, static_cast<int>(height), h, w);
  }
  return std::vector<double>(image.begin(), image.end());
}

inline Taps filter_taps(Filter filter, int n, std::size_t m) {
  switch (filter) {
    case Filter::cubic: return cubic_taps(n, m);
    case Filter::area: return area_taps(n, m);
    case Filter::linear: return bilinear_taps(n, m, n);
    case Filter::nearest: return opencv_nearest_taps(n, m);
    case Filter::spline: return aligned_spline_taps(n, m);
    case Filter::bilinear: break;
  }
  throw Error(Code::usage, "Pillow's filter has no exact taps");
}

/// (H, W) → (h, w): rows @ image @ columns.T in float64.
template <class Pixel>
std::vector<double> resample(const Pixel* plane, std::size_t height, std::size_t width,
                             const Operator<double>& rows, const Operator<double>& columns) {
  static_cast<void>(height);
  const std::vector<double> tall = combined(rows, plane, width);
  const std::vector<double> turned = transposed(tall.data(), rows.outputs(), width);
  const std::vector<double> result = combined(columns, turned.data(), rows.outputs());
  return transposed(result.data(), columns.outputs(), rows.outputs());
}

/// Whole grey levels, as the libraries or their callers round them.
inline void round_levels(std::vector<double>& content, Filter filter, bool halving) {
  for (double& value : content) {
    if (filter == Filter::cubic) {
      value = std::floor(value + 1e-9);  // round-off must not cost a flat region a grey level
    } else {
      value = halving ? std::floor(value + 0.5) : std::nearbyint(value);
    }
  }
}

/// (C, H, W) → (C, h, w); see `resize` in Python.
inline std::vector<double> resized(const Planes& planes, std::size_t h, std::size_t w,
                                   Filter filter) {
  const std::size_t plane = planes.height * planes.width;
  const bool pillow = filter == Filter::bilinear;
  Operator<double> rows, columns;
  if (!pillow) {
    rows = merged<double>(filter_taps(filter, static_cast<int>(planes.height), h));
    columns = merged<double>(filter_taps(filter, static_cast<int>(planes.width), w));
  }
  const auto resize = [&](const auto* pixels) {
    return pillow ? pillow_bilinear(pixels, planes.height, planes.width, h, w)
                  : resample(pixels, planes.height, planes.width, rows, columns);
  };
  std::vector<double> content;
  for (std::size_t c = 0; c < planes.channels; ++c) {
    const std::vector<double> part = planes.bytes ? resize(planes.levels.data() + c * plane)
                                                  : resize(planes.values.data() + c * plane);
    content.insert(content.end(), part.begin(), part.end());
  }
  if (filter == Filter::cubic || filter == Filter::area) {
    const IntensityWindow range = value_range(planes);
    for (double& value : content) {
      value = std::clamp(value, range.low, range.high);
    }
    if (planes.bytes) {
      round_levels(content, filter, planes.height == 2 * h && planes.width == 2 * w);
    }
  }
  return content;
}

/// Display values → the image encoder's input (3, S, S), and how the image lies in it.
///
/// One channel is repeated to three. Padding is zero, after the intensities are scaled.
inline std::pair<std::vector<float>, Frame> preprocess(const Planes& planes,
                                                       Preprocessing preprocessing,
                                                       int network_size) {
  const PreprocessingSpec spec = spec_of(preprocessing);
  const Frame frame = frame_of(static_cast<int>(planes.width), static_cast<int>(planes.height),
                               preprocessing, network_size);
  const auto h = static_cast<std::size_t>(frame.content_height);
  const auto w = static_cast<std::size_t>(frame.content_width);
  const auto side = static_cast<std::size_t>(network_size);
  const std::vector<double> content = resized(planes, h, w, spec.filter);
  const auto [lowest, highest] = std::minmax_element(content.begin(), content.end());
  const double low = *lowest, divisor = std::max(*highest - low, 1e-8);
  std::vector<float> image(3 * side * side);
  for (std::size_t c = 0; c < 3; ++c) {
    const double* plane = content.data() + (planes.channels == 3 ? c * h * w : 0);
    for (std::size_t y = 0; y < h; ++y) {
      float* row = image.data() + (c * side + y) * side;
      for (std::size_t x = 0; x < w; ++x) {
        const double value = plane[y * w + x];
        row[x] = spec.min_max ? static_cast<float>((value - low) / divisor)
                              : (static_cast<float>(value) - spec.mean[c]) / spec.deviation[c];
      }
    }
  }
  return {std::move(image), frame};
}

}  // namespace detail
}  // namespace medsa
