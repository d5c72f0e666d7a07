// Which instruction sets this processor, under this operating system, can run.
#pragma once
#include <string>
#include <vector>

namespace ft::machine {

std::vector<std::string> cpu_features();
std::vector<std::string> supported_isas();  // best last; names as in setup.py

}  // namespace ft::machine
