#!/bin/sh
# Measures what draft-head.md shows. From a checkout, with `apex` in PATH:  sh docs/results/measure.sh FOLDER
# Interrupted, it goes on where it was. Then:  python docs/results/draft_head.py FOLDER
set -eu
TESTBED=$PWD/tests/testbed
MODEL=$TESTBED/testbed-f16.gguf
mkdir -p "$1"/chunks "$1"/domains
cd "$1"
set -- --threads 1 --only draft-head
for domain in chat code reasoning tool-calling; do
    set -- "$@" --text "$TESTBED/heldout/$domain.txt"
done

# Calibration: all of the default set, its first chunks, and single domains of it
apex calibrate "$MODEL" -o im-full.gguf
for n in 5 10 25 50 100 200; do apex calibrate "$MODEL" -o im-$n.gguf --chunks $n; done
for domain in chat code reasoning tool-calling; do apex calibrate "$MODEL" -o im-$domain.gguf --domain $domain --chunks 45; done

# 1. One type for the whole head, with its calibration data and without
apex sweep "$MODEL" --over draft_head=Q8_0,Q6_K,Q5_K,Q4_K,IQ4_XS,Q3_K,IQ3_XXS,Q2_K,IQ2_S,IQ2_XXS,IQ1_M --imatrix im-full.gguf -o types --keep "$@"
FILES=types/files/testbed-f16-draft_head
for type in Q8_0 Q6_K Q5_K Q4_K IQ4_XS Q3_K Q2_K; do
    apex evaluate $FILES-$type-with-head-data.gguf --reference $FILES-$type-without-head-data.gguf --results gains.jsonl "$@"
done

# 2. Parts of the head, and mixtures
Q8=$FILES-Q8_0-with-head-data.gguf
for part in eh_proj attention routed shared; do
    apex sweep "$MODEL" --set draft_head=Q8_0 --over draft_head.$part=IQ2_XXS --with-head --reference $Q8 --imatrix im-full.gguf -o part-$part "$@"
done
apex sweep "$MODEL" --over draft_head.routed=IQ2_XXS,IQ1_M,IQ1_S,IQ2_S,IQ3_XXS --over draft_head.other=Q4_K --with-head --reference $Q8 \
    --imatrix im-full.gguf -o mixtures --keep "$@"
apex sweep "$MODEL" --over draft_head.routed=IQ2_XXS,IQ1_S --over draft_head.other=Q6_K --with-head --reference $Q8 \
    --imatrix im-full.gguf -o mixtures-q6 --keep "$@"
apex sweep "$MODEL" --policy i-nano --set edge=1 --set near=1 --set attention_edge=1 --over draft_head=Q8_0,tier,quarter --with-head \
    --imatrix im-full.gguf -o nano "$@"

# 4. How much text, and of which domain
for n in 5 10 25 50 100 200 full; do
    apex quantize "$MODEL" --policy draft-head-only --set draft_head=IQ2_XXS --imatrix im-$n.gguf -o chunks/IQ2_XXS-$n.gguf
done
for n in 5 25 100 full; do
    apex quantize "$MODEL" --policy draft-head-only --set draft_head.routed=IQ2_XXS --set draft_head.other=Q4_K --imatrix im-$n.gguf \
        -o chunks/mixture-$n.gguf
done
for domain in chat code reasoning tool-calling; do
    apex quantize "$MODEL" --policy draft-head-only --set draft_head=IQ2_XXS --imatrix im-$domain.gguf -o domains/IQ2_XXS-$domain.gguf
done
apex evaluate chunks/*.gguf domains/*.gguf --reference $Q8 --set draft-head.depth=1 --results chunks.jsonl "$@"

# 5. Acceptance in llama-server
apex evaluate $FILES-Q8_0-with-head-data.gguf $FILES-Q3_K-with-head-data.gguf $FILES-IQ3_XXS-with-head-data.gguf $FILES-Q2_K-with-head-data.gguf \
    $FILES-IQ2_XXS-with-head-data.gguf $FILES-IQ1_M-with-head-data.gguf $FILES-Q2_K-without-head-data.gguf chunks/mixture-full.gguf \
    --only draft-acceptance --prompts "$TESTBED/heldout/prompts-40.jsonl" --set draft-acceptance.lengths=1 --set draft-acceptance.temperature=0 \
    --threads 1 --results acceptance.jsonl
