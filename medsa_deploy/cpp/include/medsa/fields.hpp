// Parsed JSON → values of the expected types; BundleError says which field is wrong and how.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "json.hpp"

namespace medsa::detail {

using FieldNames = std::initializer_list<const char*>;

[[noreturn]] inline void refuse(const std::string& place, const std::string& reason) {
  throw Error(Code::bundle, place + " " + reason + "; export the checkpoint again");
}

/// The fields of a JSON object, each read with its type.
class Fields {
 public:
  Fields(const json::Value& value, std::string place, FieldNames known)
      : value_(value), place_(std::move(place)) {
    if (value.kind != json::Value::Kind::object) {
      refuse(place_, "is not an object");
    }
    for (const auto& [key, position] : value.places) {
      bool expected = false;
      for (const char* name : known) {
        expected = expected || key == name;
      }
      if (!expected) {
        refuse(place_, "has the unknown field " + json::in_quotes(key));
      }
    }
  }

  std::string place(const std::string& name) const { return place_ + ": " + name; }

  /// Null for an absent field, and for JSON's null.
  const json::Value* optional(const std::string& name) const {
    const json::Value* field = value_.find(name);
    return field == nullptr || field->kind == json::Value::Kind::null ? nullptr : field;
  }

  const json::Value& required(const std::string& name) const {
    const json::Value* field = value_.find(name);
    if (field == nullptr) {
      refuse(place_, "lacks the field " + json::in_quotes(name));
    }
    return *field;
  }

  std::int64_t integer(const std::string& name, std::int64_t low, std::int64_t high) const {
    return integer(required(name), name, low, high);
  }

  std::int64_t integer(const json::Value& field, const std::string& name, std::int64_t low,
                       std::int64_t high) const {
    if (field.kind != json::Value::Kind::integer || field.integer < low || field.integer > high) {
      refuse(place(name), "is not an integer from " + std::to_string(low) + " to " +
                              std::to_string(high));
    }
    return field.integer;
  }

  double number(const json::Value& field, const std::string& name, double low,
                double high) const {
    const bool number =
        field.kind == json::Value::Kind::number || field.kind == json::Value::Kind::integer;
    if (!number || !(field.number >= low && field.number <= high)) {
      refuse(place(name), "is not a number in its range");
    }
    return field.number;
  }

  std::string text(const std::string& name) const { return text(required(name), name); }

  std::string text(const json::Value& field, const std::string& name) const {
    if (field.kind != json::Value::Kind::string) {
      refuse(place(name), "is not a string");
    }
    return field.string;
  }

  const std::vector<json::Value>& list(const json::Value& field, const std::string& name) const {
    if (field.kind != json::Value::Kind::array) {
      refuse(place(name), "is not a list");
    }
    return field.items;
  }

  /// One of several words; `absent` for an absent field.
  template <class Choice>
  Choice choice(const std::string& name, Choice absent,
                std::initializer_list<std::pair<const char*, Choice>> choices) const {
    const json::Value* field = value_.find(name);
    if (field == nullptr) {
      return absent;
    }
    std::string words;
    for (const auto& [word, meaning] : choices) {
      if (field->kind == json::Value::Kind::string && field->string == word) {
        return meaning;
      }
      words += (words.empty() ? "" : ", ") + std::string(word);
    }
    refuse(place(name), "is none of: " + words);
  }

 private:
  const json::Value& value_;
  std::string place_;
};

}  // namespace medsa::detail
