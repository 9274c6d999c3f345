"""Models as GPTQ, AWQ and MLX store them, by encoders that go bit by bit, and what their codes stand for, one by one."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

AWQ_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]


def words(rows, bits):
    """Rows of codes as int32 words: each row is a number whose lowest bits are its first code."""
    found = []
    for row in rows.tolist():
        number = sum(code << bits * i for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        found.append([(number >> 32 * i) % 2**32 for i in range(count)])
    return torch.tensor(found, dtype=torch.int64).to(torch.uint32)


def random_codes(O, I, group, bits, seed, symmetric=False):
    draw = torch.Generator().manual_seed(seed)
    code_OI = torch.randint(0, 2**bits, (O, I), generator=draw)
    # From 1 on: 0 has no place in GPTQ's version 1 but by a borrow.
    zero_OG = torch.randint(1, 2**bits, (O, I // group), generator=draw)
    if symmetric:
        zero_OG.fill_(2 ** (bits - 1))
    scale_OG = (torch.rand(O, I // group, generator=draw) / 16 + 1 / 64).half()
    return code_OI, zero_OG, scale_OG


def gptq(code_OI, zero_OG, scale_OG, bits, version, group_I):
    """The tensors, and the weight in float16."""
    zeros = zero_OG - 1 if version == 1 else zero_OG
    tensors = {
        "qweight": words(code_OI, bits).view(torch.int32).T.contiguous(),
        "qzeros": words(zeros.T, bits).view(torch.int32),
        "scales": scale_OG.T.contiguous(),
        "g_idx": group_I.to(torch.int32),
    }
    dense = torch.empty(code_OI.shape, dtype=torch.float16)
    for i, g in enumerate(group_I.tolist()):
        dense[:, i] = ((code_OI[:, i] - zero_OG[:, g]).double() * scale_OG[:, g].double()).half()
    return tensors, dense


def awq(code_OI, zero_OG, scale_OG, group_I):
    def packed(codes):  # columns are output features
        return words(codes.reshape(len(codes), -1, 8)[:, :, AWQ_PLACES].reshape(codes.shape), 4).view(torch.int32)

    tensors = {
        "qweight": packed(code_OI.T),
        "qzeros": packed(zero_OG.T),
        "scales": scale_OG.T.contiguous(),
    }
    return tensors, gptq(code_OI, zero_OG, scale_OG, 4, 2, group_I)[1]


def mlx(code_OI, scale_OG, bits, group_I):
    """Every other scale is below zero; the product and the sum are rounded."""
    scale_OG = scale_OG.clone()
    scale_OG[:, ::2] *= -1
    bias_OG = (scale_OG.float() * -1.37).half()
    dense = (code_OI.half() * scale_OG[:, group_I]) + bias_OG[:, group_I]
    return {"weight": words(code_OI, bits), "scales": scale_OG, "biases": bias_OG}, dense


def write(source, out, section, encode, key="quantization_config", only=lambda module: True):
    """A copy of a folder whose linears in blocks are encoded; what they stand for, by name, and all else."""
    shutil.copytree(source, out)
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**content, key: section}))
    tensors, dense = {}, {}
    for seed, (name, tensor) in enumerate(sorted(load_file(source / "model.safetensors").items())):
        module = name.removesuffix(".weight")
        if tensor.ndim == 2 and ".layers." in name and only(module):
            parts, dense[name] = encode(*tensor.shape, seed)
            tensors.update({f"{module}.{part}": value for part, value in parts.items()})
        else:
            tensors[name] = dense[name] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return dense
