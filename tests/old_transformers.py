"""Run by the tests in an environment of its own, with a release of transformers as others have it.

python old_transformers.py make SPECS FOLDER      random models, one folder for each name in the JSON file SPECS
python old_transformers.py logits OUT FOLDER …    the logits of models on the same ids, as a safetensors file
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

IDS = torch.arange(2, 50)[None] * 7 % 250


def build(spec, where):
    """A random model of one class, in the dtype that is asked for, as this release writes it."""
    torch.manual_seed(0)
    config = getattr(transformers, spec["config"])(**spec["options"])
    model = getattr(transformers, spec["model"])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.1 * noise if parameter.ndim == 1 else 0.15 * noise)
    model.to(getattr(torch, spec["dtype"]))
    (model.base_model if spec.get("base") else model).save_pretrained(where)
    if spec.get("base"):  # names without the first part in a model that has a head, as GPT-2 was published
        content = json.loads((where / "config.json").read_text())
        (where / "config.json").write_text(json.dumps({**content, "architectures": [spec["model"]]}))


def logits(folder):
    """The logits of a folder, with nothing missing and nothing left over."""
    name = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    model, found = getattr(transformers, name).from_pretrained(folder, torch_dtype="auto", output_loading_info=True)
    strange = {key: value for key, value in found.items() if value}
    assert not strange, f"{folder}: {strange}"
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def tokens(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return torch.tensor(tokenizer((Path(folder) / "config.json").read_text()).input_ids)


def main():
    command, *arguments = sys.argv[1:]
    if command == "make":
        specs, where = arguments
        for name, spec in json.loads(Path(specs).read_text()).items():
            build(spec, Path(where) / name)
    else:
        out, *folders = arguments
        found = {"logits": logits, "tokens": tokens}[command]
        save_file({folder: found(folder).clone().contiguous() for folder in folders}, out)


main()
