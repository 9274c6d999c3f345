"""Load what secateur wrote and let it speak: `python load_and_generate.py OUT "Why is the sky blue?"`."""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur  # with it transformers reads secateur's folders; this is all that a script has to add


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--backend", default="auto", help="auto computes on packed weights; dense unpacks them first.")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    with secateur.backend(args.backend):
        model = AutoModelForCausalLM.from_pretrained(args.folder).eval()
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": args.prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(f"{model.get_memory_footprint() / 1e6:.0f} MB of weights in memory")


if __name__ == "__main__":
    main()
