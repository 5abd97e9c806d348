"""A model's folder: what is written is read, in one file or several, and what is broken is named."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from models_common import batch, tiny
from safetensors.torch import load_file, save_file

from retro_kernels.models import Retro, RetroConfig, checkpoint


@pytest.mark.parametrize("preset", ["tiny", "tiny-rotary"])
@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 20_000])
def test_a_saved_model_comes_back_to_the_bit(tmp_path, preset, max_shard_size):
    model = tiny(preset, tokenizer="bytes")
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = Retro.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    arguments = batch(model)
    assert torch.equal(loaded(*arguments), model(*arguments))
    loaded.loss(arguments[0], arguments[0], *arguments[1:]).backward()
    assert all(p.grad is not None for p in loaded.parameters())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert all(name.endswith((".json", ".safetensors")) for name in names)
    shards = [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]
    assert (len(shards) > 1) == (max_shard_size == 20_000)
    if len(shards) > 1:  # a model saved over a sharded one leaves nothing of it
        model.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_weights_that_processes_share_are_gathered_a_file_at_a_time(tmp_path, monkeypatch):
    model, limit = tiny(), 20_000
    alive, most = weakref.WeakSet(), []

    def gather(tensor):
        whole = tensor.detach().clone()
        alive.add(whole)
        most.append(sum(x.nbytes for x in alive))
        return whole

    monkeypatch.setattr(checkpoint, "_whole", gather)
    weights = model.state_dict()
    checkpoint.write(model.config, weights, tmp_path / "other", max_shard_size=limit, writes=False)
    assert not (tmp_path / "other").exists()
    checkpoint.write(model.config, weights, tmp_path, max_shard_size=limit)
    assert len(most) == 2 * len(weights)
    assert max(most) <= limit + max(x.nbytes for x in weights.values()) < sum(x.nbytes for x in weights.values()) / 3
    monkeypatch.undo()
    assert all(torch.equal(x, weights[name]) for name, x in Retro.from_pretrained(tmp_path).state_dict().items())


def test_dtypes(tmp_path):
    model = tiny().bfloat16()
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in Retro.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in Retro.from_pretrained(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_what_is_missing_or_broken_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is not there"):
        Retro.from_pretrained(tmp_path)
    model = tiny()
    model.save_pretrained(tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    with pytest.raises(ValueError, match="num_layers = 3, not 4"):
        Retro.from_pretrained(tmp_path, config=RetroConfig.preset("tiny", num_layers=4))

    weights = load_file(path)
    changed = dict(weights)
    changed["embedding.weight"] = torch.zeros(3, 3)
    for broken, message in (
        ({name: x for name, x in weights.items() if "final_norm" not in name}, "final_norm.weight.* missing"),
        ({**weights, "decoder.other": torch.zeros(3)}, "got decoder.other, which a model of"),
        (changed, r"embedding.weight of shape \[3, 3\], expected \[64, 32\]"),
    ):
        save_file(broken, path)
        with pytest.raises(ValueError, match=message):
            Retro.from_pretrained(tmp_path)
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: broken"):
        Retro.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is not there"):
        Retro.from_pretrained(tmp_path)

    model.save_pretrained(tmp_path, max_shard_size=20_000)
    index = tmp_path / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    where["weight_map"]["embedding.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(where))
    with pytest.raises(ValueError, match="expected one in the same folder"):
        Retro.from_pretrained(tmp_path)

    values = json.loads(config.read_text())
    for broken, message in (
        (json.dumps({**values, "num_heads": 5}), "head_dim|num_heads"),
        (json.dumps({**values, "layers": 5}), "unknown names layers"),
        (json.dumps({"model_type": "gpt2"}), "expected a model of this library"),
        ("{", "no valid JSON"),
    ):
        config.write_text(broken)
        with pytest.raises(ValueError, match=message):
            Retro.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        Retro(RetroConfig.preset("tiny"), device="meta").save_pretrained(tmp_path)
