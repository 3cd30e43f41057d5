"""Many files from one model: planned, made, measured, the knee."""
