// Low-resolution logits → masks at the image's size, each in the way of the network's own code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "image.hpp"
#include "manifest.hpp"
#include "resampling.hpp"

namespace medsa {
namespace detail {

/// Of n logits that cover the network's side S, of which `content` samples are the image, and the
/// image's size m: which logits each pixel of the axis reads.
inline Taps axis_taps(Postprocessing postprocess, int n, int network, int content, int m) {
  const auto pixels = static_cast<std::size_t>(m);
  const double extent = static_cast<double>(n) * content / network;
  const auto framed = [&] {
    return crop(bilinear_taps(n, static_cast<std::size_t>(network), n),
                static_cast<std::size_t>(content));
  };
  switch (postprocess) {
    case Postprocessing::sam: return compose(framed(), bilinear_taps(content, pixels, content));
    case Postprocessing::medsam: return bilinear_taps(n, pixels, extent);
    case Postprocessing::efficientsam: return bicubic_taps(n, pixels, extent);
    case Postprocessing::finetune_sam: return nearest_taps(n, pixels, extent);
    case Postprocessing::samed: return compose(framed(), aligned_nearest_taps(content, pixels));
  }
  throw Error(Code::usage, "unknown postprocessing");
}

/// The weights between logits (4g, 4g) and an image's pixels (H, W).
struct MaskOperators {
  Operator<float> rows;
  Operator<float> columns;
};

inline MaskOperators mask_operators(Postprocessing postprocess, int side, const Frame& frame) {
  const int network = frame.network_size;
  return {merged<float>(
              axis_taps(postprocess, side, network, frame.content_height, frame.height)),
          merged<float>(axis_taps(postprocess, side, network, frame.content_width, frame.width))};
}

/// How logits become masks; see `MaskRule` in Python.
struct MaskRule {
  Postprocessing postprocess = Postprocessing::sam;
  double probability = 0.5;
  bool exclusive = false;  ///< masks compete: a pixel belongs to the highest, mask 0 is background

  bool probabilities() const { return postprocess == Postprocessing::medsam; }

  /// The value that a mask's pixels exceed.
  float threshold() const {
    const double logit = std::log(probability) - std::log1p(-probability);
    const auto value = static_cast<float>(probabilities() ? probability : logit);
    // a pixel on EfficientSAM's threshold belongs to the mask
    return postprocess == Postprocessing::efficientsam
               ? std::nextafter(value, -std::numeric_limits<float>::infinity())
               : value;
  }
};

inline void check_probability(double probability) {
  if (!(probability > 0 && probability < 1)) {
    throw Error(Code::usage, "the threshold " + in_words(probability) +
                                 " is not a probability between 0 and 1");
  }
}

/// Logit → probability; no logit overflows.
inline float sigmoid(float logit) {
  const float decay = std::exp(-std::abs(logit));
  return (logit < 0 ? decay : 1.0f) / (1 + decay);
}

/// Low-resolution logits (4g, 4g) of one mask → its pixels' values, row by row.
class PixelRows {
 public:
  PixelRows(const float* logits, std::size_t side, const MaskOperators& operators,
            const MaskRule& rule)
      : rows_(operators.rows), width_(operators.columns.outputs()) {
    std::vector<float> values = transposed(logits, side, side);
    if (rule.probabilities()) {
      std::transform(values.begin(), values.end(), values.begin(), sigmoid);
    }
    // columns first: there are fewer rows of logits than of pixels
    const std::vector<float> wide = combined(operators.columns, values.data(), side);
    wide_ = transposed(wide.data(), width_, side);
  }

  /// The values (W,) of a row of the image.
  void read(std::size_t row, float* result) const {
    combine_rows(rows_, row, wide_.data(), width_, result);
  }

 private:
  const Operator<float>& rows_;
  std::size_t width_;
  std::vector<float> wide_;  ///< (4g, W)
};

/// The first of the highest values of each pixel: values (K, W) → labels (W,).
inline void highest(const std::vector<float>& values, std::size_t width, std::uint8_t* labels) {
  for (std::size_t x = 0; x < width; ++x) {
    std::size_t best = 0;
    for (std::size_t k = 1; k * width < values.size(); ++k) {
      best = values[k * width + x] > values[best * width + x] ? k : best;
    }
    labels[x] = static_cast<std::uint8_t>(best);
  }
}

/// Logits of one prompt set's masks (K, 4g, 4g) → masks (n, H, W) of 0 and 1.
///
/// n is K, or K − 1 of masks that exclude each other: those of the classes, without background.
inline void image_masks(const float* logits, std::size_t count, std::size_t side,
                        const MaskOperators& operators, const MaskRule& rule,
                        std::uint8_t* masks) {
  const std::size_t height = operators.rows.outputs(), width = operators.columns.outputs();
  if (!rule.exclusive) {
    const float threshold = rule.threshold();
    std::vector<float> values(width);
    for (std::size_t k = 0; k < count; ++k) {
      const PixelRows rows(logits + k * side * side, side, operators, rule);
      for (std::size_t y = 0; y < height; ++y) {
        rows.read(y, values.data());
        std::uint8_t* row = masks + (k * height + y) * width;
        for (std::size_t x = 0; x < width; ++x) {
          row[x] = values[x] > threshold ? 1 : 0;
        }
      }
    }
    return;
  }
  std::vector<PixelRows> classes;
  for (std::size_t k = 0; k < count; ++k) {
    classes.emplace_back(logits + k * side * side, side, operators, rule);
  }
  std::vector<float> values(count * width);
  std::vector<std::uint8_t> labels(width);
  for (std::size_t y = 0; y < height; ++y) {
    for (std::size_t k = 0; k < count; ++k) {
      classes[k].read(y, values.data() + k * width);
    }
    highest(values, width, labels.data());
    for (std::size_t k = 1; k < count; ++k) {
      std::uint8_t* row = masks + ((k - 1) * height + y) * width;
      std::transform(labels.begin(), labels.end(), row,
                     [k](std::uint8_t label) { return label == k ? 1 : 0; });
    }
  }
}

}  // namespace detail

/// A mask's pixels: how many, and the box around them, x1 and y1 exclusive; all 0 if empty.
struct Region {
  std::size_t area = 0;
  int x0 = 0, y0 = 0, x1 = 0, y1 = 0;
};

/// The region of a mask (H, W) of 0 and 1.
inline Region region(const std::uint8_t* mask, int width, int height) {
  Region result{0, width, height, 0, 0};
  for (int y = 0; y < height; ++y) {
    const std::uint8_t* row = mask + static_cast<std::size_t>(y) * static_cast<std::size_t>(width);
    int left = 0, right = width;
    while (left < width && row[left] == 0) {
      ++left;
    }
    if (left == width) {
      continue;
    }
    while (row[right - 1] == 0) {
      --right;
    }
    result.area += static_cast<std::size_t>(std::count(row + left, row + right, 1));
    result.x0 = std::min(result.x0, left);
    result.x1 = std::max(result.x1, right);
    result.y0 = std::min(result.y0, y);
    result.y1 = y + 1;
  }
  return result.area == 0 ? Region{} : result;
}

}  // namespace medsa
