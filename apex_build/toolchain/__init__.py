"""Building the native tools: compilers, backends, CMake, the cache of finished builds."""
