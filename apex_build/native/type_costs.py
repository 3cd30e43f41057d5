"""How long ggml's quantizers take on a core, to predict times before the work. Part of the plugin API."""

from __future__ import annotations

# type -> microseconds of CPU time on one core of 2024 to quantize a thousand weights with an imatrix, and restore them
_COSTS = {
    "IQ1_S": 130, "IQ1_M": 530, "IQ2_XXS": 260, "IQ2_XS": 470, "IQ2_S": 160, "Q2_K": 100, "IQ3_XXS": 380,
    "IQ3_S": 240, "Q3_K": 34, "IQ4_XS": 170, "IQ4_NL": 170, "Q4_0": 23, "Q4_1": 86, "Q4_K": 87, "Q5_0": 24,
    "Q5_1": 84, "Q5_K": 90, "Q6_K": 27, "Q8_0": 3,
}  # fmt: skip
_OTHER = 200


def quantize_seconds(type_name: str, n_weights: int) -> float:
    """Seconds on one core."""
    return _COSTS.get(type_name.upper(), _OTHER) * 1e-9 * n_weights
