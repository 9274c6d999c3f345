"""Models in FP8 blocks and MXFP4 as their publishers write them, by encoders that are slow and plain."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FP8 = torch.float8_e4m3fn
LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
LEVELS += [-level for level in LEVELS]


def fp8_blocks(W_OI, block, scale_dtype=torch.float32):
    """Codes and scales of a matrix, block by block; what is left at its edges makes blocks as well."""
    O, I = W_OI.shape
    rows, columns = block or (O, I)
    code_OI = torch.empty(O, I, dtype=FP8)
    scale_GH = torch.empty(-(-O // rows), -(-I // columns))
    for g in range(scale_GH.shape[0]):
        for h in range(scale_GH.shape[1]):
            place = slice(g * rows, (g + 1) * rows), slice(h * columns, (h + 1) * columns)
            most = W_OI[place].abs().max().float().clamp(min=1e-12) / 448
            if scale_dtype in (torch.float8_e8m0fnu, torch.uint8):
                most = most.log2().ceil().exp2()
            elif scale_dtype != torch.float32:
                most = most.to(scale_dtype).float()
            scale_GH[g, h] = most
            code_OI[place] = (W_OI[place].float() / most).clamp(-448, 448).to(FP8)
    if scale_dtype == torch.uint8:
        return code_OI, (scale_GH.log2() + 127).to(torch.uint8)
    return code_OI, scale_GH.to(scale_dtype)


def decode_fp8(code_OI, scale, block, dtype=torch.bfloat16):
    """Every weight by itself, with the size of blocks that the config says."""
    O, I = code_OI.shape
    rows, columns = block or (O, I)
    scale = scale.float() if scale.dtype != torch.uint8 else torch.exp2(scale.float() - 127)
    scale_GH = scale.reshape(-(-O // rows), -(-I // columns))
    row_O, column_I = torch.arange(O) // rows, torch.arange(I) // columns
    return (code_OI.float() * scale_GH[row_O[:, None], column_I[None, :]]).to(dtype)


def mxfp4(W_EIO):
    """Blocks and scales of experts' matrices, each transposed and in groups of 32."""
    group_EOGK = W_EIO.transpose(1, 2).float().unflatten(2, (-1, 32))
    exponent_EOG = (group_EOGK.abs().amax(3).clamp(min=2.0**-100) / 6).log2().ceil()
    scaled_EOGK = group_EOGK * torch.exp2(-exponent_EOG)[..., None]
    code_EOGK = (scaled_EOGK[..., None] - torch.tensor(LEVELS)).abs().argmin(-1)
    low, high = code_EOGK[..., 0::2], code_EOGK[..., 1::2]
    return (low + 16 * high).to(torch.uint8), (exponent_EOG + 127).to(torch.uint8)


def set_config(folder, **changes):
    """Change `config.json`."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change(folder, tensors):
    """Change tensors of a folder of one file; None: there is no such tensor."""
    file = Path(folder) / "model.safetensors"
    content = {name: tensor.clone() for name, tensor in {**load_file(file), **tensors}.items() if tensor is not None}
    save_file(content, file, metadata={"format": "pt"})


def to_fp8(folder, block, scale_dtype=torch.float32, static=False, **section):
    """Make the linears of a model's blocks FP8, where they lie."""
    tensors = load_file(Path(folder) / "model.safetensors")
    made = {}
    for name, W_OI in tensors.items():
        if ".layers." in name and name.endswith("_proj.weight"):
            made[name], scale = fp8_blocks(W_OI, block, scale_dtype)
            made[f"{name}_scale_inv"] = scale if block else scale.reshape(())
            if static:
                made[f"{name.removesuffix('weight')}activation_scale"] = torch.tensor(0.5)
    change(folder, made)
    set_config(
        folder,
        quantization_config={
            "quant_method": "fp8",
            "weight_block_size": list(block) if block else None,
            "activation_scheme": "static" if static else "dynamic",
            "modules_to_not_convert": ["lm_head"],
            **section,
        },
    )
    return folder
