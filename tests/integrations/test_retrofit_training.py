"""A retrofitted decoder in transformers' Trainer and under PEFT's adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import retro_kernels as rk

transformers = pytest.importorskip("transformers")
from decoders import SETTINGS, M, batch, decoder  # noqa: E402
from retrofit_processes import WAYS, train  # noqa: E402


def call(model, **given):
    ids, neighbours, mask = batch()
    return model(ids, neighbours=neighbours, neighbour_mask=mask, labels=ids, **given)


def step(model, learning_rate=0.1):
    """One update of all that is trained -> the names of what changed."""
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    trained = [x for x in model.parameters() if x.requires_grad]
    optimiser = torch.optim.SGD(trained, learning_rate)
    call(model).loss.backward()
    optimiser.step()
    return {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def lora(peft, model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))


def test_adapters_on_a_retrofitted_model_train_and_keep_its_gates(peft, tmp_path):
    """Bare parameters are lost when an adapter is saved; a gate is a module."""
    model = decoder()
    rk.retrofit(model, gate=0.0, **SETTINGS)
    adapted = lora(peft, model, modules_to_save=["retro.gate"])
    with torch.no_grad():
        assert torch.equal(call(adapted).logits, call(model).logits)
    changed = step(adapted)
    assert {name.split(".")[-3] for name in changed if "gate" in name} == {"modules_to_save"}
    assert sum("retro.gate" in name for name in changed) == 3
    assert any("lora_B" in name for name in changed)
    with torch.no_grad():
        expected = call(adapted).logits
        adapted.save_pretrained(tmp_path)
        again = decoder()
        rk.retrofit(again, gate=0.0, **SETTINGS)
        again = peft.PeftModel.from_pretrained(again, tmp_path)
        torch.testing.assert_close(call(again).logits, expected)
    # The retrofit alone is saved with the gates that are in use.
    again.get_base_model().retro.save_pretrained(tmp_path / "retro")
    plain = decoder()
    rk.retrofit(plain, tmp_path / "retro")
    for layer, gate in plain.retro.gates().items():
        torch.testing.assert_close(gate, again.get_base_model().retro.gates()[layer])
        assert (gate != 0).any()


def test_an_adapted_model_is_retrofitted_and_the_adapters_learn_through_the_neighbours(peft):
    """Also from how the decoder reads the neighbours, which then has a gradient."""
    adapted = lora(peft, decoder())
    report = rk.retrofit(adapted, gate=0.0, freeze=False, **SETTINGS)
    call(adapted).loss.backward()
    whole = {name: x.grad.clone() for name, x in adapted.named_parameters() if x.grad is not None}
    assert sum("lora_B" in name for name in whole) == 6
    adapted.zero_grad()
    encode = report.model.retro.encode
    with torch.no_grad():
        ids, neighbours, mask = batch()
        fixed = encode(neighbours, mask)
    report.model.retro.encode = lambda *given: fixed
    call(adapted).loss.backward()
    name = next(name for name in whole if "v_proj.lora_B" in name)
    assert not torch.allclose(whole[name], dict(adapted.named_parameters())[name].grad, rtol=1e-3)
    del report.model.retro.encode
    out = adapted.generate(ids, neighbours=neighbours, neighbour_mask=mask, max_new_tokens=3, pad_token_id=0)
    assert out.shape[1] == ids.shape[1] + 3
    report.undo()
    assert not any("retro" in name for name, _ in adapted.named_parameters())


class Texts(torch.utils.data.Dataset):
    """Rows as a data set has them: lists."""

    def __init__(self):
        self.rows = [batch(1, 3 * M, seed=i) for i in range(8)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        ids, neighbours, mask = (x[0].tolist() for x in self.rows[i])
        return {"input_ids": ids, "labels": ids, "neighbours": neighbours, "neighbour_mask": mask, "title": "a text"}


def test_trainer_keeps_the_columns_trains_the_gates_and_saves(tmp_path):
    pytest.importorskip("accelerate")
    model = decoder("gemma2")  # its embeddings are tied
    rk.retrofit(model, gate=-1.0, **SETTINGS)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=0.1,
        report_to=[],
        save_steps=3,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts())
    assert {"neighbours", "neighbour_mask", "labels", "input_ids"} <= set(columns(trainer))
    trainer.train()
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {f"model.layers.{i}.self_attn.retro.gate.weight" for i in range(3)}
    assert trainer.evaluate()["eval_loss"] > 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3", attn_implementation="eager")
    ids, _, _ = batch()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def columns(trainer):
    trainer._set_signature_columns_if_needed()
    return trainer._signature_columns


def share_out(model):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for part in (*model.model.layers, model):
        torch.distributed.fsdp.fully_shard(part, mesh=mesh)


def test_fsdp_shares_out_the_parts_with_their_layers():
    distributed = torch.distributed
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        models = []
        for shared in (False, True):
            model = decoder()
            rk.retrofit(model, gate=0.0, **SETTINGS)
            if shared:
                share_out(model)
            out = call(model)
            out.loss.backward()
            grads = [part.gate.weight.grad for part in model.retro.parts()]
            models.append((out.logits, [x.full_tensor() if shared else x for x in grads]))
        model = decoder()
        rk.retrofit(model, encoder="own+cross", **SETTINGS)
        share_out(model)
        with pytest.raises(ValueError, match="under FSDP, expected"):
            call(model)
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(models[1], models[0])
    assert all(x.abs().min() > 0 for x in models[0][1])


def test_two_processes_train_what_one_does(tmp_path):
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / "retrofit_processes.py"), str(tmp_path)]
    both = [subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE) for rank in range(2)]
    errors = [one.communicate(timeout=240)[1].decode() for one in both]
    assert [one.returncode for one in both] == [0, 0], errors
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    expected = train("alone", slice(None))
    assert set(found) == set(WAYS)
    for added in found.values():
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-6)
    assert all(x.abs().max() > 1e-5 for x in expected.values())
