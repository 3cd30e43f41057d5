"""What each type does to weights: the size of its error, relative to the weights' own (root of the sums of squares).

Measured on rows of 512 normal weights (sigma 0.02) with ggml_quantize_chunk of the pin pr-22673: without importance,
or, for types that want it, with log-normal importance of sigma 0.5; tests/quantization/test_against.py measures again.
Heavy tails, columns that stand out, and importance that differs by orders of magnitude raise it: over eleven kinds of
weights (normal to t with 1.5 degrees of freedom, spikes, strong columns) and six of importance, matrices came to 0.17
at Q4_K, 0.65 at Q2_K and 1.00 at IQ2_XXS, single rows to 0.65, 2.29 and 1.11; the testbed has rows of 0.99 at IQ2_XXS.
A bound that lets all of these pass would let zeros pass too, which are an error of 1. So what is over `far_over` is
quantized again, and must not be worse than that.
"""

from __future__ import annotations

ERRORS = {
    **{
        "F32": 0.0,
        "F16": 0.0003,
        "BF16": 0.0017,
        "Q8_0": 0.0055,
        "Q6_K": 0.018,
        "Q5_K": 0.036,
        "Q5_1": 0.038,
        "Q5_0": 0.043,
    },
    **{"Q4_K": 0.071, "IQ4_NL": 0.076, "IQ4_XS": 0.077, "Q4_1": 0.078, "Q4_0": 0.086, "NVFP4": 0.103, "MXFP4": 0.114},
    **{
        "Q3_K": 0.150,
        "IQ3_S": 0.167,
        "IQ3_XXS": 0.187,
        "IQ2_S": 0.255,
        "Q2_K": 0.297,
        "IQ2_XS": 0.306,
        "IQ2_XXS": 0.347,
    },
    **{"IQ1_M": 0.469, "IQ1_S": 0.498, "Q1_0": 0.600, "TQ2_0": 0.804, "TQ1_0": 0.810},
}
_TIMES, _TIMES_AT_2_BITS = 1.6, 2.0
_MOST = 0.9  # zeros instead of weights are an error of 1


def far_over(type_name: str) -> float:
    """The relative error above which a row of this type is examined closely."""
    error = ERRORS.get(type_name, _MOST)
    return min(_MOST, error * (_TIMES_AT_2_BITS if error > 0.25 else _TIMES))
