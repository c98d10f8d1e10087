// Checks that the tensors of a call do not share memory. Threads read and write in no fixed order, so if memory that is
// written overlaps with other memory of the call, the result depends on that order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

namespace sparsekern {

// Bytes from `begin` to before `end`.
struct Span {
  uintptr_t begin, end;

  static Span of(const void* address, int64_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    return {begin, begin + static_cast<uintptr_t>(bytes)};
  }

  // An empty span overlaps with nothing.
  bool overlaps(const Span& other) const {
    return begin < end && other.begin < other.end && begin < other.end && other.begin < end;
  }
  bool operator<(const Span& other) const { return begin < other.begin; }
  bool operator==(const Span& other) const { return begin == other.begin && end == other.end; }
};

using Spans = std::vector<Span>;

// Compares every pair; for the few tensors of a normalisation or of the channels.
inline bool any_overlap(const Spans& written, const Spans& read) {
  for (size_t i = 0; i < written.size(); ++i) {
    for (size_t j = i + 1; j < written.size(); ++j)
      if (written[i].overlaps(written[j])) return true;
    for (const Span& other : read)
      if (written[i].overlaps(other)) return true;
  }
  return false;
}

// The same check for the lists of a step, which are at the same addresses in most calls. Spans that were disjoint in
// the last call are only compared with those of this call, which takes a hundredth of the time.
class Disjoint {
 public:
  bool holds(const Spans& written, const Spans& read) {
    const bool same = written == written_;
    if (same && read == read_) return true;
    if (!same && !sort(written)) return false;
    for (const Span& span : read)
      if (is_written(span)) return false;
    read_ = read;
    return true;
  }

 private:
  bool sort(const Spans& written) {
    written_.clear();
    read_.clear();
    sorted_ = written;
    std::sort(sorted_.begin(), sorted_.end());
    for (size_t i = 1; i < sorted_.size(); ++i)
      if (sorted_[i].begin < sorted_[i - 1].end) return false;
    written_ = written;
    return true;
  }

  // The sorted spans do not overlap, so their ends are sorted as well.
  bool is_written(const Span& span) const {
    const auto first_behind = std::lower_bound(sorted_.begin(), sorted_.end(), Span{span.end, span.end});
    return first_behind != sorted_.begin() && std::prev(first_behind)->end > span.begin;
  }

  Spans written_, sorted_, read_;
};

}  // namespace sparsekern
