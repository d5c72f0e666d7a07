// The driver of matmul.h for few rows of A.
#pragma once
#include "matmul.h"

namespace ft::FT_ISA {

// size.of: what decides in which order sums are made, see Size. Every A is rows along k, every k
// positive.
template <typename D>
void multiply_few_rows(const Parallel& parallel, const Size& size, std::span<const Product<D>> sum,
                       const Finish& finish);

}  // namespace ft::FT_ISA
