// Kernel calls with their arguments, noted as they run and run again without Python between them.
#pragma once

#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

namespace fastcnn {

class CallList {
 public:
  using Call = std::function<void()>;

  // Where this thread's calls are noted; null: nowhere.
  static CallList*& recording() {
    static thread_local CallList* list = nullptr;
    return list;
  }

  void add(Call call) { calls_.push_back(std::move(call)); }
  // What depends on more than memory, such as a random seed, is not the same when it runs again.
  void refuse() { repeatable_ = false; }

  size_t size() const { return calls_.size(); }
  bool repeatable() const { return repeatable_; }
  void run(size_t first, size_t last) const {
    for (size_t i = first; i < last; ++i) calls_[i]();
  }

 private:
  std::vector<Call> calls_;
  bool repeatable_ = true;
};

}  // namespace fastcnn
