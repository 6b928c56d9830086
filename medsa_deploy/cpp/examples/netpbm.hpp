// Binary PGM and PPM files ⇄ pixels.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "medsa.hpp"

namespace example {

/// A file's pixels, grey or RGB, 8 or 16 bits.
struct Picture {
  std::vector<std::uint8_t> bytes;  ///< 16-bit values are in the machine's byte order
  int width = 0, height = 0, channels = 1;
  bool deep = false;

  medsa::ImageView view() const {
    medsa::ImageView image;
    image.data = bytes.data();
    image.width = width;
    image.height = height;
    image.channels = channels;
    image.type = deep ? medsa::PixelType::u16 : medsa::PixelType::u8;
    return image;
  }
};

namespace detail {

[[noreturn]] inline void refuse_picture(const std::string& path, const std::string& reason) {
  throw medsa::Error(medsa::Code::image,
                     path + " " + reason + ": give a binary PGM (P5) or PPM (P6)");
}

/// The next number of a header, after blanks and comments.
inline int header_number(std::istream& stream, const std::string& path) {
  int c = stream.get();
  while (c == '#' || c == ' ' || c == '\t' || c == '\n' || c == '\r') {
    if (c == '#') {
      stream.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
    }
    c = stream.get();
  }
  int value = 0, digits = 0;
  for (; c >= '0' && c <= '9' && digits < 9; c = stream.get(), ++digits) {
    value = value * 10 + (c - '0');
  }
  if (digits == 0 || !(c == ' ' || c == '\t' || c == '\n' || c == '\r')) {
    refuse_picture(path, "has a damaged header");
  }
  return value;
}

}  // namespace detail

/// Read a PGM or PPM; ImageError for any other or damaged file.
inline Picture read_picture(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) {
    detail::refuse_picture(path, "cannot be opened");
  }
  const int p = stream.get(), kind = stream.get();
  if (p != 'P' || (kind != '5' && kind != '6')) {
    detail::refuse_picture(path, "is another kind of file");
  }
  Picture picture;
  picture.channels = kind == '5' ? 1 : 3;
  picture.width = detail::header_number(stream, path);
  picture.height = detail::header_number(stream, path);
  const int most = detail::header_number(stream, path);
  if (picture.width < 1 || picture.height < 1 || most < 1 || most > 65535) {
    detail::refuse_picture(path, "has an impossible size or maximum");
  }
  picture.deep = most > 255;
  const auto start = stream.tellg();
  stream.seekg(0, std::ios::end);
  const auto stored = static_cast<std::uint64_t>(stream.tellg() - start);
  const std::uint64_t expected = std::uint64_t{1} * static_cast<unsigned>(picture.width) *
                                 static_cast<unsigned>(picture.height) *
                                 static_cast<unsigned>(picture.channels) * (picture.deep ? 2 : 1);
  if (stored < expected) {  // before the memory is allocated
    detail::refuse_picture(path, "is cut off: it has " + std::to_string(stored) +
                                     " bytes of pixels, expected " + std::to_string(expected));
  }
  stream.seekg(start);
  picture.bytes.resize(static_cast<std::size_t>(expected));
  stream.read(reinterpret_cast<char*>(picture.bytes.data()),
              static_cast<std::streamsize>(expected));
  if (!stream) {
    detail::refuse_picture(path, "cannot be read");
  }
  for (std::size_t i = 0; picture.deep && i + 1 < picture.bytes.size(); i += 2) {
    const auto value =
        static_cast<std::uint16_t>(picture.bytes[i] << 8 | picture.bytes[i + 1]);
    std::memcpy(&picture.bytes[i], &value, sizeof(value));
  }
  return picture;
}

/// Write an 8-bit PGM, whole or not at all; ImageError if it cannot be written.
inline void write_pgm(const std::string& path, const std::vector<std::uint8_t>& pixels, int width,
                      int height) {
  const std::string temporary = path + ".tmp";
  std::ofstream stream(temporary, std::ios::binary);
  stream << "P5\n" << width << ' ' << height << "\n255\n";
  stream.write(reinterpret_cast<const char*>(pixels.data()),
               static_cast<std::streamsize>(pixels.size()));
  stream.close();
  std::error_code error;
  if (stream) {
    std::filesystem::rename(temporary, path, error);
  }
  if (!stream || error) {
    std::error_code ignored;
    std::filesystem::remove(temporary, ignored);
    throw medsa::Error(medsa::Code::image, path + " cannot be written: name another output");
  }
}

}  // namespace example
