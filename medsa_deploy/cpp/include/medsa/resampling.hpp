// An image → the image at another size, with the filters of `medsa_deploy/transforms/resampling.py`.
//
// Each filter is written as taps: for every output sample of an axis, the input samples it reads and
// their weights. Taps compose, so two resizes cost as much as one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace medsa::detail {

/// The input samples, of n on an axis, that each of m output samples reads.
struct Taps {
  std::size_t count = 0;         ///< m
  std::size_t reads = 0;         ///< t
  std::vector<int> indices;      ///< (m, t), each 0…n−1; an index may occur more than once in a row
  std::vector<double> weights;   ///< (m, t); every row sums to 1, or to 0 outside of the input

  Taps(std::size_t samples, std::size_t taps)
      : count(samples), reads(taps), indices(samples * taps), weights(samples * taps) {}

  void set(std::size_t sample, std::size_t tap, int index, double weight) {
    indices[sample * reads + tap] = index;
    weights[sample * reads + tap] = weight;
  }
};

/// Taps with each row's equal indices added up, in ascending order.
template <class Weight>
struct Operator {
  std::vector<std::size_t> first;  ///< (m + 1): where each output sample's taps start
  std::vector<int> indices;
  std::vector<Weight> weights;

  std::size_t outputs() const { return first.size() - 1; }
};

template <class Weight>
Operator<Weight> merged(const Taps& taps) {
  Operator<Weight> result;
  result.first.push_back(0);
  std::map<int, double> sums;
  for (std::size_t row = 0; row < taps.count; ++row) {
    sums.clear();
    for (std::size_t tap = row * taps.reads; tap < (row + 1) * taps.reads; ++tap) {
      sums[taps.indices[tap]] += taps.weights[tap];
    }
    for (const auto& [index, weight] : sums) {
      if (weight != 0) {
        result.indices.push_back(index);
        result.weights.push_back(static_cast<Weight>(weight));
      }
    }
    result.first.push_back(result.indices.size());
  }
  return result;
}

/// One output row of `rows @ image`: image (n, width), result (width,).
template <class Weight, class Pixel>
void combine_rows(const Operator<Weight>& rows, std::size_t output, const Pixel* image,
                  std::size_t width, Weight* result) {
  std::fill(result, result + width, Weight{0});
  for (std::size_t tap = rows.first[output]; tap < rows.first[output + 1]; ++tap) {
    const Pixel* source = image + static_cast<std::size_t>(rows.indices[tap]) * width;
    const Weight weight = rows.weights[tap];
    for (std::size_t x = 0; x < width; ++x) {
      result[x] += weight * static_cast<Weight>(source[x]);
    }
  }
}

/// rows @ image: image (n, width) → (m, width).
template <class Weight, class Pixel>
std::vector<Weight> combined(const Operator<Weight>& rows, const Pixel* image, std::size_t width) {
  std::vector<Weight> result(rows.outputs() * width);
  for (std::size_t output = 0; output < rows.outputs(); ++output) {
    combine_rows(rows, output, image, width, result.data() + output * width);
  }
  return result;
}

/// (height, width) → (width, height), in tiles that stay in the cache.
template <class Pixel>
std::vector<Pixel> transposed(const Pixel* image, std::size_t height, std::size_t width) {
  constexpr std::size_t tile = 32;
  std::vector<Pixel> result(height * width);
  for (std::size_t top = 0; top < height; top += tile) {
    for (std::size_t left = 0; left < width; left += tile) {
      for (std::size_t y = top; y < std::min(top + tile, height); ++y) {
        for (std::size_t x = left; x < std::min(left + tile, width); ++x) {
          result[x * height + y] = image[y * width + x];
        }
      }
    }
  }
  return result;
}

inline double centre(double n, std::size_t m, std::size_t i) {
  return (static_cast<double>(i) + 0.5) * (n / static_cast<double>(m)) - 0.5;
}

/// Linear interpolation between sample centres, held at the ends, without antialiasing. `extent`:
/// the part of the axis that the output covers, in samples.
inline Taps bilinear_taps(int n, std::size_t m, double extent) {
  Taps taps(m, 2);
  for (std::size_t i = 0; i < m; ++i) {
    const double position = std::max(centre(extent, m, i), 0.0);
    const int left = static_cast<int>(std::min(std::floor(position), n - 1.0));
    const double right = position - left;
    taps.set(i, 0, left, 1 - right);
    taps.set(i, 1, std::min(left + 1, n - 1), right);
  }
  return taps;
}

/// Cubic convolution with a = −0.75, ends repeated, without antialiasing (Keys 1981).
inline Taps bicubic_taps(int n, std::size_t m, double extent) {
  const auto inner = [](double x) { return ((2 - 0.75) * x - (3 - 0.75)) * x * x + 1; };
  const auto outer = [](double x) { return -0.75 * (((x - 5) * x + 8) * x - 4); };
  Taps taps(m, 4);
  for (std::size_t i = 0; i < m; ++i) {
    const double position = centre(extent, m, i);
    const double left = std::floor(position), t = position - left;
    const double weights[4] = {outer(t + 1), inner(t), inner(1 - t), outer(2 - t)};
    for (int k = 0; k < 4; ++k) {
      const double index = std::clamp(left - 1 + k, 0.0, n - 1.0);
      taps.set(i, static_cast<std::size_t>(k), static_cast<int>(index), weights[k]);
    }
  }
  return taps;
}

/// Taps that read one sample each; `position` (0…m−1) → its sample, cut to 0…n−1.
template <class Position>
Taps selecting_taps(int n, std::size_t m, Position position) {
  Taps taps(m, 1);
  for (std::size_t i = 0; i < m; ++i) {
    const double index = std::clamp(static_cast<double>(position(i)), 0.0, n - 1.0);
    taps.set(i, 0, static_cast<int>(index), 1);
  }
  return taps;
}

/// The sample at or before each output sample's start, in float32 arithmetic, as torch selects.
inline Taps nearest_taps(int n, std::size_t m, double extent) {
  const float scale = static_cast<float>(extent / static_cast<double>(m));
  return selecting_taps(n, m, [&](std::size_t i) {
    const float product = static_cast<float>(i) * scale;
    return std::floor(product);
  });
}

/// The sample at or before each output sample's start, as OpenCV's `INTER_NEAREST` selects.
inline Taps opencv_nearest_taps(int n, std::size_t m) {
  const double step = 1 / (static_cast<double>(m) / n);
  return selecting_taps(n, m, [&](std::size_t i) { return std::floor(static_cast<double>(i) * step); });
}

/// The position of an output sample, first and last samples of the two axes on each other.
inline double aligned(int n, std::size_t m, std::size_t i) {
  return static_cast<double>(i) * ((n - 1) / static_cast<double>(std::max<std::size_t>(m - 1, 1)));
}

/// Taps without those of positions beyond the last sample, which become 0 as SciPy makes them.
inline Taps within(Taps taps, int n) {
  for (std::size_t i = 0; i < taps.count; ++i) {
    if (aligned(n, taps.count, i) > n - 1) {
      for (std::size_t tap = 0; tap < taps.reads; ++tap) {
        taps.weights[i * taps.reads + tap] = 0;
      }
    }
  }
  return taps;
}

/// The nearest sample, corners aligned; halves go to the later one.
inline Taps aligned_nearest_taps(int n, std::size_t m) {
  return within(
      selecting_taps(n, m, [&](std::size_t i) { return std::floor(aligned(n, m, i) + 0.5); }), n);
}

/// Mean over the extent of each output sample, as OpenCV's `INTER_AREA`; also for enlarging.
inline Taps area_taps(int n, std::size_t m) {
  const double scale = n / static_cast<double>(m);
  Taps taps(m, static_cast<std::size_t>(std::ceil(scale)) + 1);
  for (std::size_t i = 0; i < m; ++i) {
    const double start = static_cast<double>(i) * scale, first = std::floor(start);
    double sum = 0;
    for (std::size_t tap = 0; tap < taps.reads; ++tap) {
      const double index = first + static_cast<double>(tap);
      const double overlap = std::min(index + 1, start + scale) - std::max(index, start);
      const double covered = index < n ? std::max(overlap, 0.0) : 0.0;
      taps.set(i, tap, static_cast<int>(std::min(index, n - 1.0)), covered);
      sum += covered;
    }
    for (std::size_t tap = 0; tap < taps.reads; ++tap) {
      taps.weights[i * taps.reads + tap] /= sum;
    }
  }
  return taps;
}

/// (2r+1,) normalised Gaussian, r = 4 sigma rounded; [1] when sigma is 0.
inline std::vector<double> gaussian(double sigma) {
  const int reach = static_cast<int>(4 * sigma + 0.5);
  if (reach == 0) {
    return {1.0};
  }
  std::vector<double> kernel;
  double sum = 0;
  for (int i = -reach; i <= reach; ++i) {
    kernel.push_back(std::exp(-0.5 * (i / sigma) * (i / sigma)));
    sum += kernel.back();
  }
  for (double& weight : kernel) {
    weight /= sum;
  }
  return kernel;
}

/// The filter that turns samples into cubic B-spline coefficients (Unser, Aldroubi and Eden 1993).
inline std::vector<double> inverse_spline() {
  constexpr int reach = 28;  // samples after which a weight is below the precision of doubles
  const double z = std::sqrt(3.0) - 2;
  std::vector<double> kernel;
  for (int i = -reach; i <= reach; ++i) {
    kernel.push_back(-6 * z / (1 - z * z) * std::pow(z, std::abs(i)));
  }
  return kernel;
}

inline std::vector<double> convolved(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> result(a.size() + b.size() - 1);
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (std::size_t j = 0; j < b.size(); ++j) {
      result[i + j] += a[i] * b[j];
    }
  }
  return result;
}

/// An index reflected into 0…n−1 about the first and last sample, which are not repeated.
inline int mirrored(std::int64_t index, int n) {
  if (n == 1) {
    return 0;
  }
  const std::int64_t period = 2 * std::int64_t{n} - 2;
  const std::int64_t folded = ((index % period) + period) % period;
  return static_cast<int>(std::min(folded, period - folded));
}

/// The spline whose coefficients are the samples filtered with `kernel`, at `position` (0…m−1).
template <class Position>
Taps spline_taps(const std::vector<double>& kernel, int n, std::size_t m, Position position) {
  const auto reach = static_cast<std::int64_t>(kernel.size() / 2);
  Taps taps(m, kernel.size() + 3);
  for (std::size_t i = 0; i < m; ++i) {
    const double at = position(i), left = std::floor(at), t = at - left, u = 1 - t;
    const double weights[4] = {u * u * u / 6, 2.0 / 3 - t * t * (2 - t) / 2,
                               2.0 / 3 - u * u * (2 - u) / 2, t * t * t / 6};
    for (std::size_t k = 0; k < 4; ++k) {
      for (std::size_t j = 0; j < kernel.size(); ++j) {
        taps.weights[i * taps.reads + k + j] += weights[k] * kernel[j];
      }
    }
    const std::int64_t start = static_cast<std::int64_t>(left) - 1 - reach;
    for (std::size_t tap = 0; tap < taps.reads; ++tap) {
      taps.indices[i * taps.reads + tap] = mirrored(start + static_cast<std::int64_t>(tap), n);
    }
  }
  return taps;
}

/// Every sample as it is.
inline Taps identity_taps(int n) {
  return selecting_taps(n, static_cast<std::size_t>(n), [](std::size_t i) { return i; });
}

/// Cubic B-spline interpolation with mirrored ends, after a Gaussian when reducing: scikit-image.
inline Taps cubic_taps(int n, std::size_t m) {
  if (static_cast<std::size_t>(n) == m) {
    return identity_taps(n);
  }
  const double sigma = std::max(0.0, (n / static_cast<double>(m) - 1) / 2);
  return spline_taps(convolved(gaussian(sigma), inverse_spline()), n, m,
                     [&](std::size_t i) { return centre(n, m, i); });
}

/// Cubic B-spline interpolation with mirrored ends, corners aligned: SciPy.
inline Taps aligned_spline_taps(int n, std::size_t m) {
  if (static_cast<std::size_t>(n) == m) {
    return identity_taps(n);
  }
  return within(
      spline_taps(inverse_spline(), n, m, [&](std::size_t i) { return aligned(n, m, i); }), n);
}

/// The first `m` output samples.
inline Taps crop(const Taps& taps, std::size_t m) {
  Taps result(m, taps.reads);
  std::copy_n(taps.indices.begin(), m * taps.reads, result.indices.begin());
  std::copy_n(taps.weights.begin(), m * taps.reads, result.weights.begin());
  return result;
}

/// One resize that equals `first` followed by `second`.
inline Taps compose(const Taps& first, const Taps& second) {
  Taps result(second.count, second.reads * first.reads);
  for (std::size_t i = 0; i < second.count * second.reads; ++i) {
    const std::size_t source = static_cast<std::size_t>(second.indices[i]) * first.reads;
    for (std::size_t tap = 0; tap < first.reads; ++tap) {
      result.indices[i * first.reads + tap] = first.indices[source + tap];
      result.weights[i * first.reads + tap] = second.weights[i] * first.weights[source + tap];
    }
  }
  return result;
}

/// Pillow's antialiased bilinear filter on one axis; weights are not rounded yet.
inline Taps pillow_taps(int n, std::size_t m) {
  const double scale = n / static_cast<double>(m), support = std::max(scale, 1.0);
  Taps taps(m, static_cast<std::size_t>(std::ceil(support)) * 2 + 1);
  for (std::size_t i = 0; i < m; ++i) {
    const double middle = (static_cast<double>(i) + 0.5) * scale;
    const int low = std::max(static_cast<int>(middle - support + 0.5), 0);
    const int high = std::min(static_cast<int>(middle + support + 0.5), n);
    double sum = 0;
    for (int k = 0; k < high - low; ++k) {
      const double distance = std::abs((k + low - middle + 0.5) * (1 / support));
      const double weight = distance < 1 ? 1 - distance : 0;
      taps.set(i, static_cast<std::size_t>(k), low + k, weight);
      sum += weight;
    }
    for (std::size_t tap = 0; tap < taps.reads && sum != 0; ++tap) {
      taps.weights[i * taps.reads + tap] *= 1 / sum;
    }
  }
  return taps;
}

}  // namespace medsa::detail
