"""Adapters on packed models: PEFT puts them on, they train, are saved and loaded again, and the Trainer takes it all."""

import pytest
import torch
from conftest import PACKED
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import secateur
from secateur.errors import UsageError
from secateur.kernels.module import PackedLinear
from secateur.plugin.packed_modules import packed_linears

peft = pytest.importorskip("peft")

IDS_NS = torch.randint(2, 300, (4, 12), generator=torch.Generator().manual_seed(3))
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "qwen2": "all-linear"}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS_NS).logits


def config(family, **options):
    return peft.LoraConfig(target_modules=TARGETS[family], r=4, task_type="CAUSAL_LM", **options)


def train(model, steps=4):
    """Losses, step by step."""
    torch.manual_seed(1)  # of dropout
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(IDS_NS, labels=IDS_NS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def unpacked(monkeypatch):
    """How often a whole weight was unpacked."""
    calls = []
    dense = PackedLinear.dense
    monkeypatch.setattr(PackedLinear, "dense", lambda self: calls.append(self) or dense(self))
    return calls


@pytest.mark.thin(3)
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("layout", PACKED)
def test_lora_trains_as_on_the_dense_model(packed_of, tmp_path, unpacked, family, layout):
    path = packed_of(family, layout)
    torch.manual_seed(0)
    model = peft.get_peft_model(secateur.load(path, "torch"), config(family))
    torch.manual_seed(0)
    dense = peft.get_peft_model(secateur.load(path, "dense"), config(family))
    found = train(model)
    assert found == pytest.approx(train(dense), rel=1e-3)
    assert found[-1] < found[0]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter")
    assert any(list(packed_linears(again))) or not list(packed_linears(secateur.load(path)))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-3, atol=1e-4)
    assert not torch.equal(logits(model), logits(secateur.load(path, "torch")))
    # Adapters ask weights for their device and dtype, which takes no unpacking.
    assert not unpacked


def test_merging_is_refused_until_the_model_is_dense(packed_of):
    model = peft.get_peft_model(secateur.load(packed_of("qwen2", "packed-int"), "torch"), config("qwen2"))
    train(model)
    wanted = logits(model)
    with pytest.raises(UsageError, match=r"no adapter merged into it: call dequantize\(\) of the model first"):
        model.merge_and_unload()
    model.dequantize()
    torch.testing.assert_close(logits(model), wanted)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
    assert not list(packed_linears(merged))


def test_dora_reads_the_weights(packed_of):
    for family in ("llama", "gpt2"):
        path = packed_of(family, "nm")
        losses = []
        for backend in ("torch", "dense"):
            torch.manual_seed(0)
            losses.append(train(peft.get_peft_model(secateur.load(path, backend), config(family, use_dora=True))))
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert losses[0][-1] < losses[0][0]


def trainer(model, tmp_path, **options):
    rows = [{"input_ids": ids_S, "labels": ids_S} for ids_S in IDS_NS]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        per_device_train_batch_size=2,
        num_train_epochs=4,
        learning_rate=2e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_a_trainer_trains_and_evaluates_adapters(packed_of, tmp_path, options):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(packed_of("llama", "spqr")), config("llama"))
    run = trainer(model, tmp_path, **options)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.05
    run.save_model(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(packed_of("llama", "spqr"))
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    found, wanted = map(peft.get_peft_model_state_dict, (again, model))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_transformers_own_adapters(packed_of, tmp_path):
    path = packed_of("llama", "packed-int")
    model = AutoModelForCausalLM.from_pretrained(path)
    model.add_adapter(config("llama"))
    run = trainer(model, tmp_path)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.05
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(path)
    again.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-3, atol=1e-4)


def test_a_trainer_evaluates_without_adapters(packed_of, tmp_path):
    path = packed_of("llama", "spqr")
    run = trainer(AutoModelForCausalLM.from_pretrained(path), tmp_path)
    wanted = secateur.load(path, "torch")(IDS_NS, labels=IDS_NS).loss.item()
    assert run.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-3)
    # A dense weight of a compressed layout would train off its grid.
    with pytest.raises(ValueError, match="adapters"):
        trainer(secateur.load(path, "dense"), tmp_path)
