// The text of a manifest → values. A strict reader with limits: it reads files from anywhere.
//
// Refused beyond malformed JSON: invalid UTF-8, duplicate keys, lone surrogates, nesting beyond
// `json::most_depth`. A failure is a BundleError.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <locale>
#include <map>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "errors.hpp"

namespace medsa::json {

constexpr std::size_t most_depth = 64;

/// A JSON value. An integer is a number without fraction and exponent that fits 64 bits.
struct Value {
  enum class Kind { null, boolean, integer, number, string, array, object };

  Kind kind = Kind::null;
  bool boolean = false;
  std::int64_t integer = 0;
  double number = 0;  ///< also of an integer
  std::string string;
  std::vector<Value> items;                   ///< of an array or an object
  std::map<std::string, std::size_t> places;  ///< key of an object → its place in `items`

  /// The value of a key, or null if it is absent.
  const Value* find(const std::string& key) const {
    const auto place = places.find(key);
    return place == places.end() ? nullptr : &items[place->second];
  }
};

/// A string in quotes for a message, cut to 40 bytes, without control characters.
inline std::string in_quotes(std::string_view text) {
  std::string result = "'";
  for (const char c : text.substr(0, 40)) {
    result += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  }
  return result + (text.size() > 40 ? "…'" : "'");
}

namespace detail {

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Value document() {
    check_utf8();
    Value value = parse(0);
    skip_space();
    if (at_ != text_.size()) {
      fail("text after the end");
    }
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& reason) const {
    throw Error(Code::bundle, "it is not JSON (" + reason + " at byte " + std::to_string(at_) +
                                  "): copy the bundle again or export it again");
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool accept(char expected) {
    if (at_ >= text_.size() || text_[at_] != expected) {
      return false;
    }
    ++at_;
    return true;
  }

  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != std::string::npos) {
      ++at_;
    }
  }

  Value parse(std::size_t depth) {
    if (depth > most_depth) {
      fail("nested more than " + std::to_string(most_depth) + " deep");
    }
    skip_space();
    switch (peek()) {
      case '{': return object(depth);
      case '[': return array(depth);
      case '"': {
        Value value;
        value.kind = Value::Kind::string;
        value.string = string();
        return value;
      }
      case 't': return word("true", Value::Kind::boolean, true);
      case 'f': return word("false", Value::Kind::boolean, false);
      case 'n': return word("null", Value::Kind::null, false);
      default: return number();
    }
  }

  Value word(std::string_view expected, Value::Kind kind, bool boolean) {
    if (text_.substr(at_, expected.size()) != expected) {
      fail("no value");
    }
    at_ += expected.size();
    Value value;
    value.kind = kind;
    value.boolean = boolean;
    return value;
  }

  Value object(std::size_t depth) {
    Value value;
    value.kind = Value::Kind::object;
    ++at_;
    skip_space();
    if (accept('}')) {
      return value;
    }
    do {
      skip_space();
      if (peek() != '"') {
        fail("no key");
      }
      std::string key = string();
      skip_space();
      if (!accept(':')) {
        fail("no colon");
      }
      if (!value.places.emplace(key, value.items.size()).second) {
        fail("the key " + in_quotes(key) + " twice");
      }
      value.items.push_back(parse(depth + 1));
      skip_space();
    } while (accept(','));
    if (!accept('}')) {
      fail("an object without an end");
    }
    return value;
  }

  Value array(std::size_t depth) {
    Value value;
    value.kind = Value::Kind::array;
    ++at_;
    skip_space();
    if (accept(']')) {
      return value;
    }
    do {
      value.items.push_back(parse(depth + 1));
      skip_space();
    } while (accept(','));
    if (!accept(']')) {
      fail("an array without an end");
    }
    return value;
  }

  bool digits() {
    const std::size_t start = at_;
    while (peek() >= '0' && peek() <= '9') {
      ++at_;
    }
    return at_ > start;
  }

  Value number() {
    const std::size_t start = at_;
    accept('-');
    const bool zero = peek() == '0';
    const std::size_t whole = at_;
    if (!digits() || (zero && at_ - whole > 1)) {
      fail("no value");
    }
    const bool integer = peek() != '.' && peek() != 'e' && peek() != 'E';
    if (accept('.') && !digits()) {
      fail("a number without a fraction");
    }
    if (accept('e') || accept('E')) {
      if (!accept('+')) {
        accept('-');
      }
      if (!digits()) {
        fail("a number without an exponent");
      }
    }
    return number_of(std::string(text_.substr(start, at_ - start)), integer);
  }

  Value number_of(const std::string& text, bool integer) const {
    Value value;
    std::istringstream stream(text);
    stream.imbue(std::locale::classic());  // the host's locale may write 0,5
    stream >> value.number;
    if (!std::isfinite(value.number) || (stream.fail() && std::abs(value.number) > 1)) {
      fail("a number beyond the range of doubles");
    }
    value.kind = Value::Kind::number;
    if (integer && text.size() < 19) {
      value.kind = Value::Kind::integer;
      value.integer = std::stoll(text);
    }
    return value;
  }

  std::string string() {
    std::string result;
    ++at_;
    while (true) {
      if (at_ >= text_.size()) {
        fail("a string without an end");
      }
      const char c = text_[at_++];
      if (c == '"') {
        return result;
      }
      if (static_cast<unsigned char>(c) < 0x20) {
        fail("a control character in a string");
      }
      if (c == '\\') {
        escape(result);
      } else {
        result += c;
      }
    }
  }

  void escape(std::string& result) {
    const char c = peek();
    ++at_;
    constexpr std::string_view names = "\"\\/bfnrt";
    constexpr std::string_view characters = "\"\\/\b\f\n\r\t";
    if (const std::size_t place = names.find(c); c != '\0' && place != std::string_view::npos) {
      result += characters[place];
      return;
    }
    if (c != 'u') {
      fail("an unknown escape");
    }
    std::uint32_t point = four_digits();
    if (point >= 0xD800 && point < 0xDC00 && accept('\\') && accept('u')) {
      const std::uint32_t low = four_digits();
      point = low >= 0xDC00 && low < 0xE000 ? 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00)
                                            : point;
    }
    if (point >= 0xD800 && point < 0xE000) {
      fail("half a surrogate pair");
    }
    append_utf8(result, point);
  }

  std::uint32_t four_digits() {
    std::uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = peek();
      const std::size_t digit = std::string_view("0123456789abcdef").find(c);
      const std::size_t upper = std::string_view("0123456789ABCDEF").find(c);
      if (c == '\0' || (digit == std::string_view::npos && upper == std::string_view::npos)) {
        fail("an escape without four digits");
      }
      value = value * 16 + static_cast<std::uint32_t>(digit < 16 ? digit : upper);
      ++at_;
    }
    return value;
  }

  static void append_utf8(std::string& text, std::uint32_t point) {
    const auto byte = [&text](std::uint32_t value) { text += static_cast<char>(value); };
    if (point < 0x80) {
      byte(point);
    } else if (point < 0x800) {
      byte(0xC0 | (point >> 6));
      byte(0x80 | (point & 0x3F));
    } else if (point < 0x10000) {
      byte(0xE0 | (point >> 12));
      byte(0x80 | ((point >> 6) & 0x3F));
      byte(0x80 | (point & 0x3F));
    } else {
      byte(0xF0 | (point >> 18));
      byte(0x80 | ((point >> 12) & 0x3F));
      byte(0x80 | ((point >> 6) & 0x3F));
      byte(0x80 | (point & 0x3F));
    }
  }

  void check_utf8() {
    for (at_ = 0; at_ < text_.size();) {
      const std::size_t start = at_;
      const auto lead = static_cast<unsigned char>(text_[at_++]);
      const int more = lead < 0x80 ? 0 : lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
      std::uint32_t point = lead < 0x80 ? lead : lead & (0x3Fu >> more);
      bool valid = lead < 0x80 || (lead >= 0xC2 && lead <= 0xF4);
      for (int i = 0; i < more && valid; ++i) {
        const auto next = at_ < text_.size() ? static_cast<unsigned char>(text_[at_]) : 0u;
        valid = (next & 0xC0) == 0x80;
        point = (point << 6) | (next & 0x3F);
        at_ += valid ? 1 : 0;
      }
      const bool overlong = (more == 2 && point < 0x800) || (more == 3 && point < 0x10000);
      if (!valid || overlong || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) {
        at_ = start;
        fail("invalid UTF-8");
      }
    }
    at_ = 0;
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

}  // namespace detail

/// The value of a JSON document; BundleError with the place of a fault.
inline Value parse(std::string_view text) { return detail::Parser(text).document(); }

}  // namespace medsa::json
