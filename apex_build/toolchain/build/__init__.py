"""Building the tools: CMake, Ninja, the compiler cache, the build cache."""
