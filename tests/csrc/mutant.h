// Which of the planted changes of mutations.py is in force, chosen when the program starts: one build holds them all.
#pragma once

#include <cstdlib>

// Set before any kernel runs, so that reading it is no race.
inline const int active_mutant =
    std::getenv("LIPFAST_MUTANT") != nullptr ? std::atoi(std::getenv("LIPFAST_MUTANT")) : 0;

inline bool mutant(int number) { return number == active_mutant; }
