"""From a plan to a file: check first, let llama-quantize write, verify the result, then put it in place."""
