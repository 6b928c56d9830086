// The decoder's logits of P prompt sets → masks, scores and regions.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "decoding.hpp"
#include "errors.hpp"
#include "image.hpp"
#include "manifest.hpp"
#include "masks.hpp"

namespace medsa {

/// Masks of P prompt sets, K each: one per class, or SAM's candidates.
struct Prediction {
  std::size_t sets = 0;   ///< P
  std::size_t count = 0;  ///< K; of classes that exclude each other there is no background
  int width = 0;
  int height = 0;
  std::vector<std::uint8_t> masks;  ///< (P, K, H, W) of 0 and 1, at the image's size
  std::vector<float> scores;        ///< (P, K) predicted IoU
  /// (P, K, 4g, 4g); one of them can be the mask prompt of a further call. If classes exclude each
  /// other, the background's come first: (P, K + 1, 4g, 4g).
  std::vector<float> low_res_logits;
  std::size_t side = 0;  ///< 4g
  bool classes = false;  ///< whether K counts classes; otherwise they are candidates for one object
  double decode_ms = 0;
  double postprocess_ms = 0;
  detail::MaskRule rule;
  std::shared_ptr<const detail::MaskOperators> operators;

  std::size_t pixels() const {
    return static_cast<std::size_t>(width) * static_cast<std::size_t>(height);
  }

  /// The mask (H, W) of a set and a class or candidate; UsageError for one that does not exist.
  const std::uint8_t* mask(std::size_t set = 0, std::size_t k = 0) const {
    check(set, k);
    return masks.data() + (set * count + k) * pixels();
  }

  float score(std::size_t set = 0, std::size_t k = 0) const {
    check(set, k);
    return scores[set * count + k];
  }

  Region region(std::size_t set = 0, std::size_t k = 0) const {
    return medsa::region(mask(set, k), width, height);
  }

  /// The logits (4g, 4g) of a mask, for the mask prompt of a further call.
  std::vector<float> logits(std::size_t set = 0, std::size_t k = 0) const {
    check(set, k);
    const std::size_t layers = count + (rule.exclusive ? 1 : 0);
    const std::size_t layer = set * layers + k + (rule.exclusive ? 1 : 0);
    const auto first = low_res_logits.begin() + static_cast<std::ptrdiff_t>(layer * side * side);
    return {first, first + static_cast<std::ptrdiff_t>(side * side)};
  }

  /// The candidate of a set with the highest score.
  std::size_t best(std::size_t set = 0) const {
    check(set, 0);
    const auto first = scores.begin() + static_cast<std::ptrdiff_t>(set * count);
    const auto last = first + static_cast<std::ptrdiff_t>(count);
    return static_cast<std::size_t>(std::max_element(first, last) - first);
  }

  /// (H, W): 0 for background, else a number from 1; the highest value wins an overlap.
  ///
  /// If K counts several classes, numbers are classes, over all prompt sets. Otherwise numbers are
  /// prompt sets, each with its best candidate.
  std::vector<std::uint8_t> label_map() const;

 private:
  void check(std::size_t set, std::size_t k) const {
    if (set >= sets || k >= count) {
      throw Error(Code::usage, "mask " + std::to_string(k) + " of set " + std::to_string(set) +
                                   " was asked for, but there are " + std::to_string(count) +
                                   " masks for each of " + std::to_string(sets) + " sets");
    }
  }
};

namespace detail {

/// Rows of each label's values: the highest over its layers of logits.
inline std::vector<std::uint8_t> labels_of(const Prediction& prediction,
                                           const std::vector<std::vector<std::size_t>>& layers) {
  if (layers.size() > 255 + (prediction.rule.exclusive ? 1u : 0u)) {
    throw Error(Code::usage, "a label map holds 1 to 255 classes, not " +
                                 std::to_string(layers.size()));
  }
  const auto width = static_cast<std::size_t>(prediction.width);
  const auto height = static_cast<std::size_t>(prediction.height);
  const std::size_t values_of_layer = prediction.side * prediction.side;
  std::vector<std::vector<PixelRows>> rows(layers.size());
  for (std::size_t k = 0; k < layers.size(); ++k) {
    for (const std::size_t layer : layers[k]) {
      rows[k].emplace_back(prediction.low_res_logits.data() + layer * values_of_layer,
                           prediction.side, *prediction.operators, prediction.rule);
    }
  }
  const float threshold = prediction.rule.threshold();
  std::vector<std::uint8_t> labels(width * height);
  std::vector<float> values(layers.size() * width), other(width);
  for (std::size_t y = 0; y < height; ++y) {
    for (std::size_t k = 0; k < layers.size(); ++k) {
      float* row = values.data() + k * width;
      rows[k][0].read(y, row);
      for (std::size_t i = 1; i < rows[k].size(); ++i) {
        rows[k][i].read(y, other.data());
        std::transform(row, row + width, other.begin(), row,
                       [](float a, float b) { return std::max(a, b); });
      }
    }
    std::uint8_t* result = labels.data() + y * width;
    highest(values, width, result);
    for (std::size_t x = 0; x < width && !prediction.rule.exclusive; ++x) {
      const bool above = values[result[x] * width + x] > threshold;
      result[x] = static_cast<std::uint8_t>(above ? result[x] + 1 : 0);
    }
  }
  return labels;
}

}  // namespace detail

inline std::vector<std::uint8_t> Prediction::label_map() const {
  std::vector<std::vector<std::size_t>> layers;
  const std::size_t decoded = count + (rule.exclusive ? 1 : 0);
  if (rule.exclusive || (classes && count > 1)) {
    layers.resize(decoded);
    for (std::size_t set = 0; set < sets; ++set) {
      for (std::size_t k = 0; k < decoded; ++k) {
        layers[k].push_back(set * decoded + k);
      }
    }
  } else {
    for (std::size_t set = 0; set < sets; ++set) {
      layers.push_back({set * count + best(set)});
    }
  }
  return detail::labels_of(*this, layers);
}

}  // namespace medsa
