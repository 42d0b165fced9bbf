// specfx::greedy_walk; the specification is greedy_walk_reference in ../greedy_walk.py.
#pragma once

#include "common.h"

namespace specfx {

inline std::tuple<Tensor, Tensor, Tensor> greedy_walk(const Tensor& input_ids, const Tensor& chosen, const std::optional<Tensor>& tree_mask,
                                                      const Tensor& page_table, const Tensor& lengths, const Tensor& row_starts, int64_t page_size) {
  TORCH_CHECK(input_ids.is_contiguous() && chosen.is_contiguous(), "specfx::greedy_walk: input_ids and chosen must be contiguous");
  const Batch b = view(tree_mask, page_table, lengths, row_starts);
  const int64_t rows_of_all = input_ids.size(1);
  Tensor leaf = at::empty(lengths.sizes(), input_ids.options()), length = at::empty(lengths.sizes(), lengths.options());
  Tensor moves = at::empty({2, rows_of_all}, input_ids.options());
  const int64_t *token = input_ids.const_data_ptr<int64_t>(), *choice = chosen.const_data_ptr<int64_t>();
  int64_t *from = moves.mutable_data_ptr<int64_t>(), *to = from + rows_of_all;
  std::fill_n(from, 2 * rows_of_all, -1);
  for (int64_t s = 0; s < b.sequences; ++s) {
    const int64_t begin = b.starts[s], rows = b.starts[s + 1] - begin;
    const auto slot = [&](int64_t row) {
      const int64_t position = b.lengths[s] + row;
      return static_cast<int64_t>(b.table[s * b.pages_a_sequence + position / page_size]) * page_size + position % page_size;
    };
    int64_t last = 0, walked = 1;
    for (int64_t row = 1; row < rows; ++row) {
      const int64_t parent = b.parent(begin + row, row, rows);
      if (parent != last || token[begin + row] != choice[begin + parent]) continue;
      last = row;
      if (walked != row) from[begin + row] = slot(row), to[begin + row] = slot(walked);
      ++walked;
    }
    leaf.mutable_data_ptr<int64_t>()[s] = begin + last;
    length.mutable_data_ptr<int32_t>()[s] = b.lengths[s] + static_cast<int32_t>(walked);
  }
  return {leaf, length, moves};
}

}  // namespace specfx
