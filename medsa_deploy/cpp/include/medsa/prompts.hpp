// Prompts in pixels of the image → points and labels in the network's coordinates.
#pragma once

#include <cmath>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "image.hpp"
#include "manifest.hpp"

namespace medsa {

/// A click, in pixels of the image.
struct Point {
  float x = 0;
  float y = 0;
  int label = 1;  ///< 1 foreground, 0 background
};

/// A box, in pixels of the image; x1 and y1 may be the image's size.
struct Box {
  float x0 = 0;
  float y0 = 0;
  float x1 = 0;
  float y1 = 0;
};

/// One prompt set: it is decoded to its own masks.
struct Prompt {
  std::vector<Point> points;
  std::optional<Box> box;
  std::vector<float> mask;  ///< (4g, 4g) low-resolution logits of an earlier prediction, or empty

  bool empty() const { return points.empty() && !box && mask.empty(); }
};

namespace detail {

/// The decoder's `point_coords` (N, 2) and `point_labels` (N,).
struct NetworkPrompt {
  std::vector<float> coords;
  std::vector<float> labels;
};

inline std::string size_of(const Frame& frame) {
  return std::to_string(frame.width) + "×" + std::to_string(frame.height) + " image";
}

inline void check_points(const Prompt& prompt, const Frame& frame) {
  for (std::size_t i = 0; i < prompt.points.size(); ++i) {
    const Point& point = prompt.points[i];
    const std::string name = "point " + std::to_string(i + 1) + " (" + in_words(point.x) + ", " +
                             in_words(point.y) + ")";
    if (!(point.x >= 0 && point.x < static_cast<float>(frame.width) && point.y >= 0 &&
          point.y < static_cast<float>(frame.height))) {
      throw Error(Code::prompt, name + " lies outside the " + size_of(frame) + " (x 0…" +
                                    std::to_string(frame.width - 1) + ", y 0…" +
                                    std::to_string(frame.height - 1) + ")");
    }
    if (point.label != 0 && point.label != 1) {
      throw Error(Code::prompt, name + " has the label " + std::to_string(point.label) +
                                    ": give 1 for foreground, 0 for background");
    }
  }
}

inline void check_box(const Box& box, const Frame& frame) {
  const std::string name = "the box (" + in_words(box.x0) + ", " + in_words(box.y0) + ", " +
                           in_words(box.x1) + ", " + in_words(box.y1) + ")";
  if (!(box.x0 < box.x1 && box.y0 < box.y1)) {
    throw Error(Code::prompt,
                name + " is empty or inverted: give x0, y0, x1, y1 with x0 < x1, y0 < y1");
  }
  if (!(box.x0 >= 0 && box.y0 >= 0 && box.x1 <= static_cast<float>(frame.width) &&
        box.y1 <= static_cast<float>(frame.height))) {
    throw Error(Code::prompt, name + " lies outside the " + size_of(frame) + " (x 0…" +
                                  std::to_string(frame.width) + ", y 0…" +
                                  std::to_string(frame.height) + ")");
  }
}

/// `mask_size`: 4g; 0 for a network without mask prompts.
inline void check_mask(const std::vector<float>& mask, int mask_size) {
  if (mask_size == 0) {
    throw Error(Code::prompt, "this network takes no mask prompt: give points or a box");
  }
  const auto side = static_cast<std::size_t>(mask_size);
  if (mask.size() != side * side) {
    throw Error(Code::prompt, "the mask prompt has " + std::to_string(mask.size()) +
                                  " values, expected " + std::to_string(side) + "×" +
                                  std::to_string(side) +
                                  ": give the low-resolution logits of an earlier prediction");
  }
  for (const float value : mask) {
    if (!std::isfinite(value)) {
      throw Error(Code::prompt, "the mask prompt has NaN or infinite values");
    }
  }
}

/// How many padding points follow, and their coordinates.
inline std::pair<std::size_t, double> padding_of(const Prompt& prompt, std::size_t points,
                                                 const std::optional<int>& pad_points) {
  if (!pad_points) {
    // SAM pads points without a box, but not a mask alone; another token changes the masks
    return {!prompt.points.empty() && !prompt.box ? 1 : 0, 0.0};
  }
  const auto most = static_cast<std::size_t>(*pad_points);
  if (most > 0 && points > most) {
    throw Error(Code::prompt, "the prompt has " + std::to_string(points) +
                                  " points (a box counts as two), but this network takes at most " +
                                  std::to_string(most) + ": give fewer clicks");
  }
  return {most > points ? most - points : 0, -1.0};
}

/// A prompt set as the decoder takes it: points, the box's corners, padding; see Python's
/// `network_prompt`.
inline NetworkPrompt network_prompt(const Prompt& prompt, const Frame& frame,
                                    const Conventions& conventions, int mask_size) {
  check_points(prompt, frame);
  if (prompt.box) {
    check_box(*prompt.box, frame);
  }
  if (!prompt.mask.empty()) {
    check_mask(prompt.mask, mask_size);
  }
  const bool scaled = conventions.point_frame == PointFrame::network;
  const double across = scaled ? static_cast<double>(frame.content_width) / frame.width : 1;
  const double down = scaled ? static_cast<double>(frame.content_height) / frame.height : 1;
  NetworkPrompt result;
  const auto add = [&](double x, double y, float label) {
    const bool swapped = conventions.point_order == PointOrder::yx;
    result.coords.push_back(static_cast<float>(swapped ? y : x));
    result.coords.push_back(static_cast<float>(swapped ? x : y));
    result.labels.push_back(label);
  };
  const auto add_pixel = [&](double x, double y, float label) {
    add(x * across * conventions.point_scale, y * down * conventions.point_scale, label);
  };
  for (const Point& point : prompt.points) {
    add_pixel(point.x, point.y, static_cast<float>(point.label));
  }
  if (prompt.box) {
    add_pixel(prompt.box->x0, prompt.box->y0, 2);
    add_pixel(prompt.box->x1, prompt.box->y1, 3);
  }
  const auto [padding, value] = padding_of(prompt, result.labels.size(), conventions.pad_points);
  for (std::size_t i = 0; i < padding; ++i) {
    add(value, value, -1);
  }
  return result;
}

}  // namespace detail
}  // namespace medsa
