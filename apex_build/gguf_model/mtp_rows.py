"""Which hidden rows a draft head was trained on: the trunk's rows before its final norm, or after it.

A GGUF file does not record it, and a head fed the wrong ones still drafts, only worse: the norms at its input even
out the scale, but not the weights of the missing or additional norm. This is the one place for what is known, with
sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apex_build.errors import ParameterUnknown
from apex_build.native.arguments import options_of

Rows = Literal["pre_norm", "post_norm", "streams"]  # as imatrix.mtp_hidden names them; streams: of hyper-connections
CHOICES: Mapping[str, Rows] = {"pre": "pre_norm", "post": "post_norm"}  # --mtp-rows of the tools
CHOICE_OF: Mapping[str | None, str] = {rows: choice for choice, rows in CHOICES.items()}


@dataclass(frozen=True)
class TrainedOn:
    """`basis`: 'measured' on released models, read in 'source' that runs them, or by 'inference' from those."""

    rows: Rows
    basis: Literal["measured", "source", "inference"]
    source: str

    @property
    def choice(self) -> str | None:
        """The value of --mtp-rows for these rows."""
        return CHOICE_OF.get(self.rows)


_OCTOBER = "llama.cpp of October 2026 (0c1e57098bba)"

# architecture in GGUF -> known rows
TRAINED_ON: Mapping[str, TrainedOn] = {
    "qwen35": TrainedOn(
        "post_norm",
        "measured",
        "llama.cpp #24025 (merged June 2026; #23198: acceptance 75 -> 80 % at drafts of 4), LightLLM #1402 (accepted "
        "length "
        "1.80 -> 2.74 on a 0.8B), kekzl/imp #1800 (acceptance 71 -> 76 % on a 27B); vLLM's qwen3_next_mtp is fed what "
        "the trunk "
        "returns, which is normed. Two say the opposite: turbo-tan/llama.cpp-tq3 #33, vllm-mlx #660 (without a "
        "measurement)",
    ),
    "qwen35moe": TrainedOn(
        "post_norm", "source", "as qwen35: llama.cpp #24025 changed the two together; vLLM's qwen3_next_mtp"
    ),
    "qwen3next": TrainedOn(
        "post_norm", "source", f"vLLM's qwen3_next_mtp; {_OCTOBER}, qwen3next.cpp; llama.cpp #25589"
    ),
    "step35": TrainedOn("pre_norm", "source", f"llama.cpp #24340 ('before the output norm'); {_OCTOBER}, step35.cpp"),
    "mimo2": TrainedOn(
        "pre_norm",
        "source",
        f"{_OCTOBER}, mimo2.cpp; exllamav3 #238 for MiMo-7B, where drafts after the first stay pre-norm too",
    ),
    "deepseek4": TrainedOn(
        "streams", "source", f"{_OCTOBER}, deepseek4.cpp: the flattened streams of its hyper-connections"
    ),
    "glm4moe": TrainedOn(
        "post_norm",
        "source",
        f"{_OCTOBER}, glm4-moe.cpp; against it the author of llama.cpp #24025, who takes GLM's for pre-norm",
    ),
    "glm-dsa": TrainedOn("post_norm", "source", f"vLLM #47448 (merged) and #46075 for GLM-5; {_OCTOBER}, glm-dsa.cpp"),
    "deepseek2": TrainedOn(
        "post_norm",
        "source",
        f"{_OCTOBER}, deepseek2.cpp, the head of GLM-4.7-Flash; of DeepSeek's own nothing was measured",
    ),
    "deepseek32": TrainedOn(
        "post_norm",
        "source",
        f"{_OCTOBER}, deepseek32.cpp. Against it: by vLLM #46075 DeepSeek's heads carry rows from before the norm from "
        "draft "
        "to draft, and the author of llama.cpp #24025 takes them for pre-norm",
    ),
    "hy_v3": TrainedOn("post_norm", "source", f"{_OCTOBER}, hy-v3.cpp, after vLLM's HYV3MultiTokenPredictorLayer"),
    "cohere2moe": TrainedOn("post_norm", "source", f"{_OCTOBER}, cohere2moe.cpp"),
    "bailingmoe3": TrainedOn("post_norm", "source", f"{_OCTOBER}, bailingmoe3.cpp"),
    "nemotron_h_moe": TrainedOn(
        "post_norm",
        "source",
        f"{_OCTOBER}, nemotron-h.cpp; a LayerNorm of its own for the head's rows: nemotron-h-moe.cpp",
    ),
}


AUTO = "auto"  # a further choice for users, besides CHOICES: as known for the architecture


def tool_arguments(choice: str, architecture: str, program: Path | None = None) -> list[str]:
    """Arguments for the tools that run the head: the user's choice; empty if nothing is known, for the tool's
    default.

    Also empty if `program` has no choice: its llama.cpp uses the rows that it has for the architecture. Raises
    ParameterUnknown if others are asked for.
    """
    known = trained_on(architecture)
    if program is not None and not rows_can_be_chosen(program):
        if choice != AUTO and not (known and known.choice == choice):
            raise ParameterUnknown(
                f"--mtp-rows {choice}: this {program.name} takes the rows that its llama.cpp has for {architecture}, "
                "and no others",
                hint="leave it out; the tools of the pin pr-22673 have the choice: apex build --pin pr-22673",
            )
        return []
    wanted = choice if choice != AUTO else known.choice if known else None
    return ["--mtp-rows", wanted] if wanted else []


def rows_can_be_chosen(program: Path) -> bool:
    """Whether a tool has --mtp-rows."""
    return "--mtp-rows" in options_of(program)


def trained_on(architecture: str) -> TrainedOn | None:
    """None: nothing is known about this architecture, and the tools' default is as good a guess as any."""
    return TRAINED_ON.get(architecture)
