"""Train an adapter on packed weights: `python lora_on_packed.py OUT TEXT ADAPTER`. Needs `pip install peft`.

The weights stay packed while the adapter trains: a backward pass unpacks one piece after another and keeps none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import peft
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import secateur  # noqa: F401 - with it transformers reads secateur's folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("text", type=Path)
    parser.add_argument("adapter")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seq-len", type=int, default=256)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    ids = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    windows = [window for window in ids.split(args.seq_len) if len(window) == args.seq_len]
    if not windows:
        parser.error(f"{args.text} has {len(ids)} tokens, which is less than one window of {args.seq_len}")

    model = AutoModelForCausalLM.from_pretrained(args.folder)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    settings = TrainingArguments(
        output_dir=f"{args.adapter}-checkpoints",
        max_steps=args.steps,
        per_device_train_batch_size=1,
        learning_rate=2e-4,
        save_strategy="no",
        logging_steps=max(args.steps // 5, 1),
        report_to=[],
    )
    rows = [{"input_ids": window, "labels": window} for window in windows]
    Trainer(model, settings, train_dataset=rows).train()
    model.save_pretrained(args.adapter)
    print(f"adapter in {args.adapter}: peft.PeftModel.from_pretrained(model, {args.adapter!r}) puts it on again")


if __name__ == "__main__":
    main()
