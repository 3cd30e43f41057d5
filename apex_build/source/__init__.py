"""Where llama.cpp comes from: pins, fetching, the tree as a git repository, and our patches on it."""
