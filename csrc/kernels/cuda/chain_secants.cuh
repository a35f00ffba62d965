// Bodies of chain_secants; the contract is in chain_secants.h.
#pragma once

#include "secant_lines.cuh"
#include "secant_quotients.cuh"
