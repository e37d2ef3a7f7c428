// The package is built for the baseline instruction set; small hot loops are compiled several times and the fastest
// version that the processor supports is bound at load time.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define PEFTKERNELS_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PEFTKERNELS_MULTIVERSION
#endif
