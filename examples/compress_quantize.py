"""Compress a model to 4 bits: `python compress_quantize.py MODEL OUT [--calibration TEXT]`.

MODEL is a folder, a hub id, a .gguf file, or `demo`. Without a text the model writes its own.
"""

from __future__ import annotations

import argparse

import secateur


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--calibration", default="self", help="A text file like what the model is used for.")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()

    text = secateur.Calibration(args.calibration, samples=args.samples, seq_len=args.seq_len)
    # What `--recipe gptq-4bit` of the command line means. A dict of options, which may be changed one by one.
    recipe = secateur.Recipe(quantize="gptq", quantization={"bits": 4, "group_size": 64}, calibration=text)
    report = secateur.compress(args.model, args.out, recipe)

    worst = max(report.linears, key=lambda linear: linear.error)
    print(f"{len(report.linears)} linears at {report.bits:.2f} bits a weight, in {report.seconds:.0f} s")
    print(f"{report.source_bytes / 1e6:.1f} MB → {report.bytes / 1e6:.1f} MB")
    print(f"largest error: {worst.error:.2e} in {worst.name}")
    for note in report.notes:
        print(f"note: {note}")
    for problem in secateur.verify(args.out):  # [] if every byte is as it was written
        print(f"problem: {problem}")


if __name__ == "__main__":
    main()
