#!/bin/sh
# Measures what draft-head.md shows. From a checkout, with `apex` in PATH:  sh docs/results/measure.sh FOLDER
# Interrupted, it resumes when it is run again. Then:  python docs/results/draft_head.py FOLDER
set -eu
TESTBED=$PWD/tests/testbed
mkdir -p "$1"
cd "$1"
set -- --threads 1 --only draft-head --set draft-head.chunks=24 --set draft-head.depth=${DEPTH:-3}
for domain in chat code reasoning tool-calling; do
    set -- "$@" --text "$TESTBED/heldout/$domain.txt"
done
TYPES=Q8_0,Q6_K,Q5_K,Q4_K,Q3_K,IQ3_S,IQ3_XXS,Q2_K,IQ2_XS,IQ2_XXS,IQ1_M
MIXTURES=Q8_0,Q4_K+Q5_K,Q3_K+Q5_K,IQ3_XXS+Q5_K,IQ2_S+Q5_K,IQ2_XXS+Q4_K

for kind in f16 dense-f16; do
    MODEL=$TESTBED/testbed-$kind.gguf
    apex calibrate "$MODEL" -o im-$kind.gguf --threads 1
    # 1. One type for the whole head, with its calibration data and without
    apex sweep "$MODEL" --over draft_head=$TYPES --imatrix im-$kind.gguf -o types-$kind --keep "$@"
    # 2. Mixtures: the routed experts (of the dense head: its feed-forward) of one type, the rest of another
    apex sweep "$MODEL" --policy i-quality --over draft_head=$MIXTURES --with-head --imatrix im-$kind.gguf -o mixtures-$kind "$@"
done

MODEL=$TESTBED/testbed-f16.gguf
kept() { echo types-f16/files/testbed-draft_head-$1-*.gguf; } # the sweep's files, kept
Q8=$(kept Q8_0-with-head-data)
# 2. One part of the head at a low type; mixtures on a trunk of 2 and 3 bits
for part in eh_proj attention routed shared; do
    apex sweep "$MODEL" --set draft_head=Q8_0 --over draft_head.$part=IQ2_XS --with-head --reference $Q8 --imatrix im-f16.gguf \
        -o part-$part "$@"
done
apex sweep "$MODEL" --policy i-nano --set edge=1 --set near=1 --set attention_edge=1 --over draft_head=Q8_0,tier,Q3_K+Q5_K,quarter \
    --with-head --imatrix im-f16.gguf -o nano "$@"

# 4. How much text, and of which domain
mkdir -p chunks
for n in 5 25 100; do apex calibrate "$MODEL" -o im-$n.gguf --chunks $n --threads 1; done
for domain in chat code reasoning tool-calling; do
    apex calibrate "$MODEL" -o im-$domain.gguf --domain $domain --chunks 45 --threads 1
done
for of in 5 25 100 f16 chat code reasoning tool-calling; do
    apex quantize "$MODEL" --policy draft-head-only --set draft_head=IQ2_XS --imatrix im-$of.gguf -o chunks/IQ2_XS-$of.gguf --threads 1
done
apex evaluate chunks/*.gguf --reference $Q8 --results chunks.jsonl "$@"

# 5. Acceptance in llama-server
apex evaluate $Q8 $(kept Q4_K-with-head-data) $(kept IQ3_S-with-head-data) $(kept IQ2_XS-with-head-data) $(kept IQ1_M-with-head-data) \
    $(kept Q2_K-without-head-data) \
    --only draft-acceptance --prompts "$TESTBED/heldout/prompts-40.jsonl" --set draft-acceptance.lengths=1 \
    --set draft-acceptance.temperature=0 --threads 1 --results acceptance.jsonl
