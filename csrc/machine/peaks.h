// The limits of one core, measured with the code of one instruction set (csrc/cpu/peak.cpp).
#pragma once
#include <cstdint>
#include <string>

namespace ft::machine {

double peak_flops(const std::string& isa, const std::string& dtype);
double read_bandwidth(const std::string& isa, int64_t bytes);
double copy_bandwidth(const std::string& isa, int64_t bytes);
double streaming_bandwidth(const std::string& isa, int64_t bytes);

}  // namespace ft::machine
