// What a case of the harness reads and writes, and the table of cases.
#pragma once

#include <cstdint>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace lipfast {

class Input {
 public:
  explicit Input(const char* path) : file_(path, std::ios::binary) {
    if (!file_) throw std::runtime_error("cannot read the input");
  }
  int64_t number() { return array<int64_t>(1)[0]; }
  // Exactly as long as the kernel may read: the address sanitizer sees the ends. The values begin at `offset`, as those
  // of a sliced tensor.
  template <class T>
  std::vector<T> array(int64_t size, int64_t offset = 0) {
    std::vector<T> values(offset + size);
    file_.read(reinterpret_cast<char*>(values.data() + offset), static_cast<std::streamsize>(sizeof(T) * size));
    if (!file_) throw std::runtime_error("the input is too short");
    return values;
  }

 private:
  std::ifstream file_;
};

class Output {
 public:
  explicit Output(const char* path) : file_(path, std::ios::binary) {}
  template <class T>
  void array(const std::vector<T>& values) {
    file_.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(sizeof(T) * values.size()));
  }

 private:
  std::ofstream file_;
};

using Case = void (*)(Input&, Output&);

inline std::map<std::string, Case>& cases() {
  static std::map<std::string, Case> table;
  return table;
}
struct RegisterCase {
  RegisterCase(const char* name, Case run) { cases()[name] = run; }
};

}  // namespace lipfast
