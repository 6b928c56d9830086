// Pixels in the caller's memory → planes, and intensities → display values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "errors.hpp"
#include "manifest.hpp"

namespace medsa {

enum class PixelType { u8, u16, i16, f32 };

/// An image in memory of the caller, who keeps it until the call returns.
struct ImageView {
  const void* data = nullptr;  ///< the first pixel of the top row; need not be aligned
  int width = 0;
  int height = 0;
  PixelType type = PixelType::u8;  ///< u8: display values; others: intensities that need a window
  int channels = 1;                ///< 1, or 3 side by side
  std::ptrdiff_t pitch = 0;        ///< bytes from a row to the next, also negative; 0: no gaps
  bool inverted = false;           ///< low intensities are bright (DICOM MONOCHROME1)
};

namespace detail {

/// (C, H, W) of whole grey levels or of finite floats.
struct Planes {
  std::size_t channels = 0, height = 0, width = 0;
  bool bytes = false;             ///< whether values were 8-bit
  std::vector<float> values;      ///< if not `bytes`
  std::vector<std::uint8_t> levels;  ///< if `bytes`

  std::size_t size() const { return channels * height * width; }
  double at(std::size_t i) const { return bytes ? levels[i] : static_cast<double>(values[i]); }
};

inline std::size_t bytes_of(PixelType type) {
  return type == PixelType::u8 ? 1 : type == PixelType::f32 ? 4 : 2;
}

/// A number as Python's `:g` writes it.
inline std::string in_words(double number) {
  std::ostringstream stream;
  stream.imbue(std::locale::classic());
  stream << number;
  return stream.str();
}

inline void check_view(const ImageView& image) {
  const std::string size = std::to_string(image.width) + "×" + std::to_string(image.height);
  if (image.data == nullptr || image.width < 1 || image.height < 1) {
    throw Error(Code::image, "the image is empty: its size is " + size);
  }
  if (image.channels != 1 && image.channels != 3) {
    throw Error(Code::image, "the image has " + std::to_string(image.channels) +
                                 " channels, expected 1 or 3");
  }
  const auto row = static_cast<std::uint64_t>(image.width) * bytes_of(image.type) *
                   static_cast<std::uint64_t>(image.channels);
  if (image.pitch != 0 && static_cast<std::uint64_t>(std::abs(image.pitch)) < row) {
    throw Error(Code::image, "the image's pitch is " + std::to_string(image.pitch) +
                                 " bytes, but a row has " + std::to_string(row));
  }
  if (static_cast<std::uint64_t>(image.height) > std::numeric_limits<std::ptrdiff_t>::max() / 8 / row) {
    throw Error(Code::image, "an image of " + size + " does not fit the memory: crop it first");
  }
}

template <class Pixel, class Result>
void copy_planes(const ImageView& image, std::vector<Result>& result) {
  const auto width = static_cast<std::size_t>(image.width);
  const auto height = static_cast<std::size_t>(image.height);
  const auto channels = static_cast<std::size_t>(image.channels);
  const auto packed = static_cast<std::ptrdiff_t>(width * channels * sizeof(Pixel));
  const std::ptrdiff_t pitch = image.pitch == 0 ? packed : image.pitch;
  std::vector<Pixel> row(width * channels);
  result.resize(channels * height * width);
  for (std::size_t y = 0; y < height; ++y) {
    const auto* source = static_cast<const std::uint8_t*>(image.data) +
                         static_cast<std::ptrdiff_t>(y) * pitch;
    std::memcpy(row.data(), source, row.size() * sizeof(Pixel));
    for (std::size_t c = 0; c < channels; ++c) {
      Result* plane_row = result.data() + (c * height + y) * width;
      for (std::size_t x = 0; x < width; ++x) {
        plane_row[x] = static_cast<Result>(row[x * channels + c]);
      }
    }
  }
}

/// The caller's pixels as planes; ImageError for another shape, NaN or infinity.
inline Planes planes_of(const ImageView& image) {
  check_view(image);
  Planes planes;
  planes.channels = static_cast<std::size_t>(image.channels);
  planes.height = static_cast<std::size_t>(image.height);
  planes.width = static_cast<std::size_t>(image.width);
  planes.bytes = image.type == PixelType::u8;
  switch (image.type) {
    case PixelType::u8: copy_planes<std::uint8_t>(image, planes.levels); break;
    case PixelType::u16: copy_planes<std::uint16_t>(image, planes.values); break;
    case PixelType::i16: copy_planes<std::int16_t>(image, planes.values); break;
    case PixelType::f32: copy_planes<float>(image, planes.values); break;
  }
  const auto bad = std::count_if(planes.values.begin(), planes.values.end(),
                                 [](float value) { return !std::isfinite(value); });
  if (bad > 0) {
    throw Error(Code::image, "the image has " + std::to_string(bad) +
                                 " NaN or infinite values out of " + std::to_string(planes.size()) +
                                 ": replace them before segmenting");
  }
  return planes;
}

/// ImageError if every pixel is the same.
inline void check_not_constant(const Planes& planes) {
  const std::size_t plane = planes.height * planes.width;
  for (std::size_t c = 0; c < planes.channels; ++c) {
    for (std::size_t i = 1; i < plane; ++i) {
      if (planes.at(c * plane + i) != planes.at(c * plane)) {
        return;
      }
    }
  }
  throw Error(Code::image, "every pixel of the image is " + in_words(planes.at(0)) +
                               ": nothing to segment");
}

/// Lowest and highest value.
inline IntensityWindow value_range(const Planes& planes) {
  IntensityWindow range{planes.at(0), planes.at(0)};
  for (std::size_t i = 1; i < planes.size(); ++i) {
    range.low = std::min(range.low, planes.at(i));
    range.high = std::max(range.high, planes.at(i));
  }
  return range;
}

/// The range that tissue has: a filler such as −2000, far below all other values, is left out.
inline IntensityWindow tissue_range(const Planes& planes) {
  constexpr double highest_filler = -1500, least_gap = 400;
  IntensityWindow range = value_range(planes);
  if (range.low <= highest_filler) {
    double second = std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < planes.size(); ++i) {
      const double value = planes.at(i);
      second = value > range.low ? std::min(second, value) : second;
    }
    if (std::isfinite(second) && second - range.low >= least_gap) {
      range.low = second;
    }
  }
  return range;
}

inline void check_window(const IntensityWindow& window) {
  const double width = window.high - window.low;
  if (!(width > 0 && std::isfinite(width))) {
    throw Error(Code::usage, "the intensity window " + in_words(window.low) + "," +
                                 in_words(window.high) +
                                 " cannot be used: give two finite numbers, the lower first");
  }
}

/// Intensities → display values: the window becomes 0…255, clipped.
inline Planes display_values(const Planes& planes, const IntensityWindow& window, bool inverted) {
  check_window(window);
  Planes result{planes.channels, planes.height, planes.width, false, {}, {}};
  result.values.resize(planes.size());
  for (std::size_t i = 0; i < planes.size(); ++i) {
    const double value = std::clamp(planes.at(i), window.low, window.high);
    const double level = (value - window.low) / (window.high - window.low) * 255;
    result.values[i] = static_cast<float>(inverted ? 255 - level : level);
  }
  return result;
}

/// The values that preprocessing takes, and the window they were mapped with.
///
/// The caller's window comes first, then the bundle's for images that are not 8-bit. Without one,
/// 8-bit images are taken as they are, and others from their lowest to their highest value.
inline Planes intensities(Planes planes, const Conventions& conventions, bool inverted,
                          const std::optional<IntensityWindow>& window,
                          std::optional<IntensityWindow>& used) {
  used = window;
  if (!used && !planes.bytes) {
    used = conventions.intensity_window;
  }
  if (!used && planes.bytes) {
    for (std::uint8_t& level : planes.levels) {
      level = static_cast<std::uint8_t>(inverted ? 255 - level : level);
    }
    return planes;
  }
  if (!used) {
    const IntensityWindow range = tissue_range(planes);
    if (range.low == range.high) {
      return {planes.channels, planes.height, planes.width, true, {},
              std::vector<std::uint8_t>(planes.size())};
    }
    used = range;
  }
  return display_values(planes, *used, inverted);
}

/// ImageError if the window shows the image as one flat grey.
inline void check_not_flat(const Planes& planes, const Planes& shown,
                           const std::optional<IntensityWindow>& window) {
  const IntensityWindow range = value_range(shown);
  if (window && range.low == range.high) {
    const IntensityWindow values = value_range(planes);
    throw Error(Code::image, "the image's values " + in_words(values.low) + "…" +
                                 in_words(values.high) + " lie outside the intensity window " +
                                 in_words(window->low) + "…" + in_words(window->high) +
                                 ", which shows one flat grey: choose another window");
  }
}

}  // namespace detail
}  // namespace medsa
