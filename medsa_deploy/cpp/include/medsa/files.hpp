// The files of a bundle → the same, after they were compared with their SHA-256.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "errors.hpp"
#include "json.hpp"
#include "manifest.hpp"
#include "sha256.hpp"

namespace medsa {

namespace detail {

/// A path as UTF-8, for messages.
inline std::string utf8(const std::filesystem::path& path) {
  const auto text = path.u8string();
  return std::string(text.begin(), text.end());
}

/// The path in UTF-8 text.
inline std::filesystem::path utf8_path(const std::string& text) {
#ifdef __cpp_char8_t
  return std::filesystem::path(std::u8string(text.begin(), text.end()));
#else
  return std::filesystem::u8path(text);
#endif
}

constexpr std::uint64_t most_manifest_bytes = 64 << 20;
constexpr std::size_t read_bytes = 1 << 20;

/// The content of a small file; BundleError if it cannot be read or is too large.
inline std::string read_text(const std::filesystem::path& path, std::uint64_t most) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  if (!error && size > most) {
    throw Error(Code::bundle, detail::utf8(path) + " has " + std::to_string(size) +
                                  " bytes, expected at most " + std::to_string(most) +
                                  ": copy the bundle again");
  }
  std::ifstream stream(path, std::ios::binary);
  std::string text(error ? 0 : static_cast<std::size_t>(size), '\0');
  stream.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (error || !stream) {
    throw Error(Code::bundle, detail::utf8(path) + " cannot be read: copy the bundle again");
  }
  return text;
}

/// The SHA-256 of a file's content; empty if it cannot be read.
inline std::string file_sha256(const std::filesystem::path& path) {
  std::ifstream stream;
  stream.rdbuf()->pubsetbuf(nullptr, 0);  // blocks go straight into the buffer below
  stream.open(path, std::ios::binary);
  std::vector<char> buffer(read_bytes);
  Sha256 digest;
  while (stream) {
    stream.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    digest.update(buffer.data(), static_cast<std::size_t>(stream.gcount()));
  }
  return stream.eof() ? digest.hex() : "";
}

/// Whether a path, with its links followed, lies in a folder.
inline bool lies_in(const std::filesystem::path& path, const std::filesystem::path& folder) {
  const auto relative = std::filesystem::weakly_canonical(path).lexically_relative(
      std::filesystem::canonical(folder));
  return !relative.empty() && *relative.begin() != "..";
}

}  // namespace detail

/// The path of one file of a bundle. BundleError if it is missing, changed or outside the bundle.
inline std::filesystem::path check_file(const File& file, const std::filesystem::path& bundle) {
  const std::string name = json::in_quotes(file.path);
  if (file.path.empty() || file.path.find('\0') != std::string::npos) {
    throw Error(Code::bundle, "manifest.json names a file " + name + ", which is no path");
  }
  const auto path = bundle / detail::utf8_path(file.path);
  std::string reason;
  try {
    if (!detail::lies_in(path, bundle)) {
      throw Error(Code::bundle, detail::utf8(bundle) + ": its manifest names a file outside the " +
                                    "bundle, " + name +
                                    ": use only bundles that medsa-deploy has written");
    }
    if (!std::filesystem::is_regular_file(path)) {
      throw Error(Code::bundle, detail::utf8(bundle) + " lacks " + name + ", which its manifest " +
                                    "lists: copy the bundle again or export it again");
    }
    const auto size = std::filesystem::file_size(path);
    if (size != file.bytes) {
      reason = std::to_string(size) + " bytes, expected " + std::to_string(file.bytes);
    } else if (detail::file_sha256(path) != file.sha256) {
      reason = "its SHA-256 differs";
    }
  } catch (const std::filesystem::filesystem_error& e) {
    throw Error(Code::bundle, detail::utf8(bundle) + ": " + name + " cannot be read (" +
                                  e.code().message() + "): copy the bundle again");
  }
  if (!reason.empty()) {
    throw Error(Code::bundle, detail::utf8(path) + " is not the file the manifest describes (" +
                                  reason + "): copy the bundle again or export it again");
  }
  return path;
}

/// The text of a bundle's manifest. BundleError if there is none, or if its SHA-256 is not
/// `sha256`, unless that is empty.
inline std::string read_manifest(const std::filesystem::path& bundle, const std::string& sha256) {
  std::error_code error;
  if (!std::filesystem::is_directory(bundle, error)) {
    throw Error(Code::bundle, detail::utf8(bundle) + " is not a folder: make a bundle with " +
                                  "medsa-deploy export CHECKPOINT");
  }
  const auto path = bundle / "manifest.json";
  if (!std::filesystem::is_regular_file(path, error)) {
    throw Error(Code::bundle, detail::utf8(bundle) + " has no manifest.json: it is not a bundle; " +
                                  "name a folder that medsa-deploy export has written");
  }
  const std::string text = detail::read_text(path, detail::most_manifest_bytes);
  Sha256 digest;
  digest.update(text.data(), text.size());
  if (!sha256.empty() && digest.hex() != sha256) {
    throw Error(Code::bundle, detail::utf8(path) + " is not the manifest that was expected (its "
                                                "SHA-256 differs): use the bundle that was released");
  }
  return text;
}

}  // namespace medsa
