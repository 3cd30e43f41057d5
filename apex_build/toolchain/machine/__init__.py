"""What this machine has: CPU, compilers, GPUs."""
