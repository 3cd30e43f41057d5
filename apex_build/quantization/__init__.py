"""From a plan to a file: what can be refused is refused first, llama-quantize writes, the result is checked, then put
in place.
"""
