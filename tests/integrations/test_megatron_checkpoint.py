"""Checkpoints as Megatron-LM's own training code saves them: `Retro.from_peer` and `retro-kernels convert` against the
logits of the models that it saved, without it.

megatron_checkpoints.json lists five such files, which benchmarks/megatron_checkpoints.py makes: the arguments that have
to do with the model, every name and shape under "model", the classes that the pickle names, and logits (every sixteenth
of the vocabulary). Their weights are `noise`, so that these tests can write the same ones."""

import argparse
import enum
import io
import json
import os
import pickletools
import random
import re
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint
from typer.testing import CliRunner

from benchmarks.megatron_checkpoints import noise
from retro_kernels.cli import app
from retro_kernels.integrations.megatron_checkpoint import merge
from retro_kernels.integrations.tensors import load_pickle
from retro_kernels.models import Retro

LISTED = json.loads((Path(__file__).parent / "megatron_checkpoints.json").read_text())
FILE = "iter_0000003/mp_rank_00/model_optim_rng.pt"


def member(monkeypatch, text):
    """The member of an enumeration that "package.module.Class(value)" says, of a class that is importable until the
    test is over."""
    path, name, value = re.fullmatch(r"(.+)\.(\w+)\((\d+)\)", text).groups()
    parts = path.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(parts[i]))
    kind = enum.Enum(name, {"chosen": int(value)}, module=path)
    setattr(sys.modules[path], name, kind)
    return kind.chosen


def arguments(monkeypatch, listed, **changes):
    own = listed["arguments"]
    found = {**LISTED[own["base"]]["arguments"], **own} if "base" in own else dict(own)
    for name, value in listed["other arguments"].items():
        if isinstance(value, str):
            value = getattr(torch, value[6:]) if value.startswith("torch.") else member(monkeypatch, value)
        found[name] = value
    return argparse.Namespace(**{**found, **changes})


def weights(listed, args):
    """The tree under "model"."""
    centre = 0.0 if args.apply_layernorm_1p else 1.0
    tree = {}
    for path, shape in listed["tensors"].items():
        span = re.search(r"(\d+)-(\d+)", path)
        for i in range(int(span[1]), int(span[2]) + 1) if span else [0]:
            *parts, last = re.sub(r"\d+-\d+", str(i), path).split("/")
            branch = tree
            for part in parts:
                branch = branch.setdefault(part, {})
            made = {"None": None, "_io.BytesIO()": io.BytesIO(b"fp8")}
            branch[last] = made[shape] if isinstance(shape, str) else noise(".".join((*parts, last)), shape, centre)
    return tree


def save(monkeypatch, folder, title, change=None, **changes):
    """A checkpoint of the listed structure -> its folder. `change` gets what its file will hold."""
    listed = LISTED[title]
    args = arguments(monkeypatch, listed, **changes)
    state = torch.get_rng_state()
    tree = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 3,
        "model": weights(listed, args),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(64, 32)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "opt_param_scheduler": {"max_lr": 0.01, "lr_decay_style": "cosine"},
        "rng_state": [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": ("MT19937", np.arange(624, dtype=np.uint32), 624, 0, 0.0),
                "torch_rng_state": state,
                "cuda_rng_state": state,
                "rng_tracker_states": {"model-parallel-rng": state},
            }
        ],
    }
    if change is not None:
        change(tree)
    (folder / FILE).parent.mkdir(parents=True)
    torch.save(tree, folder / FILE)
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return folder


def named(path):
    """The classes and functions that a file's pickle names."""
    with zipfile.ZipFile(path) as file:
        pickled = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    found = {argument.replace(" ", ".") for code, argument, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
    return {name.replace("numpy._core", "numpy.core") for name in found}  # as NumPy 1 called it


def told(title):
    """What legacy arguments do not tell: the chunks' length is in a file of the retro workdir."""
    return {} if title == "core" else {"chunk_size": 4}


def compare(retro, title):
    """Its logits with the listed ones."""
    for case in LISTED[title]["cases"]:
        tokens, neighbours, want = (torch.tensor(case[name]) for name in ("tokens", "neighbours", "logits"))
        with torch.no_grad():
            torch.testing.assert_close(retro(tokens, neighbours)[..., ::16], want, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("title", LISTED)
def test_the_logits_are_those_of_megatrons_own_model(monkeypatch, tmp_path, title):
    """With the recipe of InstructRetro (layernorm_1p, SwiGLU, half rotary, untied, no biases), a gate between, biases
    with learned positions, names of before September 2023; and Megatron-core's with Transformer Engine's names, whose
    argument of a gate, 0, means nothing. Whole chunks or not."""
    with monkeypatch.context() as patch:
        folder = save(patch, tmp_path, title)
    assert set(LISTED[title]["classes"]) <= named(folder / FILE)
    retro = Retro.from_peer(folder, **told(title))
    assert retro.config.retrieved_length == 8
    compare(retro, title)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_same_as_a_distributed_checkpoint(monkeypatch, tmp_path):
    """With what a trainer's `torch_dist` has besides: the optimizer's tensors, and bytes for fp8 and random states."""
    listed = LISTED["core"]
    args = arguments(monkeypatch, listed, ckpt_format="torch_dist")
    state = {name: x for name, x in weights(listed, args).items() if isinstance(x, torch.Tensor)}
    state["optimizer.state.exp_avg.output_layer.weight"] = torch.ones(64, 32)
    state["rng_state/shard_0.0_1.1"] = state["decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1"] = io.BytesIO(
        b"x"
    )
    folder = tmp_path / "iter_0000003"
    checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"args": args, "iteration": 3, "optimizer": {"param_groups": [{"step": 3}]}}, folder / "common.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    compare(Retro.from_peer(tmp_path), "core")


def test_the_command_converts_one(monkeypatch, tmp_path):
    folder = save(monkeypatch, tmp_path / "theirs", "legacy, recipe")
    refused = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out")])
    assert refused.exit_code == 2
    assert "chunk_size: got none" in refused.output
    assert "retro_gpt_chunk_length in args.json" in refused.output
    done = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out"), "--set", "chunk_size=4"])
    assert done.exit_code == 0, done.output
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["readout.weight"], noise("language_model.output_layer.weight", (64, 32), 0.0))


class Runs:
    """A pickle of it calls a function where it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def made(path):
    return Runs(eval, f"open({str(path)!r}, 'w')")


def test_no_object_is_made_and_none_is_missed(monkeypatch, tmp_path):
    """What is needed neither under model nor of the arguments may be anything; nothing of it is run."""
    mark = tmp_path / "ran"
    aside = save(monkeypatch, tmp_path / "aside", "core", lambda x: x.update(extra=made(mark)), save_dir=made(mark))
    assert Retro.from_peer(aside).config.chunk_size == 4
    inside = "decoder.layers.0.self_attention.linear_qkv.weight"
    for title, change, changes, message in (
        ("a", lambda x: x["model"].update({inside: made(mark)}), {}, rf"got {inside} that is no tensor"),
        ("b", lambda x: x["model"].update(more=made(mark)), {}, "got more that is no tensor"),
        ("c", lambda x: x.update(args=made(mark)), {}, "args that are no argparse.Namespace"),
        ("d", None, {"normalization": made(mark)}, "normalization: got a Stand in the checkpoint's arguments"),
        ("e", None, {"retro_chunk_length": made(mark)}, "retro_chunk_length: got a Stand"),
        (
            "f",
            lambda x: x.update(extra=Runs(os.system, f"touch {mark}")),
            {},
            r"no checkpoint that can be read .*system whose module \w+ is blocked",
        ),
    ):
        folder = save(monkeypatch, tmp_path / title, "core", change, **changes)
        with pytest.raises(ValueError, match=message):
            Retro.from_peer(folder)
    assert not mark.exists()


def test_arguments_that_say_another_model(monkeypatch, tmp_path):
    """Some change the function, some do not reach the model of Megatron's own training: it ignores --rotary-base."""
    for i, (title, changes, message) in enumerate(
        (
            ("core", {"quick_geglu": True}, "quick_geglu: got True"),
            ("core", {"num_experts": 4}, "num_experts: got 4"),
            ("core", {"hidden_size": None}, "hidden_size: got none"),
            ("legacy, recipe", {"apply_residual_connection_post_layernorm": True}, "post_layernorm: got True"),
            ("core", {"rotary_base": 500}, "rotary_frequencies: got none, since rotary_base = 500"),
            ("core", {"rotary_seq_len_interpolation_factor": 2}, "rotary_frequencies: got none, since rotary_seq_len"),
            ("core", {"use_rope_scaling": True}, "rotary_frequencies: got none, since use_rope_scaling"),
        )
    ):
        folder = save(monkeypatch, tmp_path / str(i), title, **changes)
        with pytest.raises(ValueError, match=message):
            Retro.from_peer(folder, **told(title))
    assert Retro.from_peer(folder, rotary_frequencies=(1.0, 0.1)).config.rotary_frequencies == (1.0, 0.1)
    halved = save(monkeypatch, tmp_path / "halved", "legacy, recipe", rotary_seq_len_interpolation_factor=2)
    assert Retro.from_peer(halved, chunk_size=4).config.rotary_frequencies == pytest.approx((0.5, 0.005))
    tanh = save(monkeypatch, tmp_path / "tanh", "legacy, biases", bias_gelu_fusion=False, openai_gelu=True)
    assert Retro.from_peer(tanh, chunk_size=4).config.activation == "gelu_tanh"


def test_a_shard_is_no_checkpoint(monkeypatch, tmp_path):
    folder = save(monkeypatch, tmp_path, "core")
    with pytest.raises(ValueError, match=r"got a shard .* expected the checkpoint's folder, .*iter_0000003$"):
        Retro.from_peer(folder / FILE)
    assert Retro.from_peer(folder / "iter_0000003").config.num_layers == 6


class ModelType(enum.Enum):
    other = 1


def test_a_class_declared_harmless_elsewhere_is_not_made(monkeypatch, tmp_path):
    """As importing Megatron-core 0.15.3 declares its own, which lacks the member that a legacy checkpoint names."""
    folder = save(monkeypatch, tmp_path, "legacy, recipe")
    name = "megatron.core.enums.ModelType"
    with torch.serialization.safe_globals([(ModelType, name), np.ndarray]):
        assert Retro.from_peer(folder, chunk_size=4).config.num_layers == 6
        assert {(ModelType, name), np.ndarray} <= set(torch.serialization.get_safe_globals())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps, which says what is mapped")
def test_an_optimizers_state_is_not_read(monkeypatch, tmp_path):
    folder = save(monkeypatch, tmp_path, "core")
    held = load_pickle(folder / FILE, stand_in=True)
    assert str(folder / FILE) in Path("/proc/self/maps").read_text()
    assert torch.equal(held["optimizer"]["state"][0]["exp_avg"], torch.ones(64, 32))
    del held
    assert str(folder / FILE) not in Path("/proc/self/maps").read_text()


def test_copies_in_shards_may_drift_apart_but_not_be_of_other_runs():
    """Norms are kept whole in every tensor-parallel shard, and trained in each by itself."""
    norm, name, apart = torch.rand(8) + 1, "decoder.layers.0.input_layernorm.weight", {}
    parts = [norm, norm * 1.001, norm]
    torch.testing.assert_close(merge("run", name, parts, False, apart), norm * (1 + 0.001 / 3))
    assert apart == {name: pytest.approx(0.001, rel=1e-3)}
    for other in (norm + 0.1, norm * torch.nan):
        with pytest.raises(ValueError, match=f"{name} that differs between shards, expected shards of one run"):
            merge("run", name, [norm, other], False, apart)
    with pytest.raises(ValueError, match=r"of shapes \[8\] and \[4\] in its shards"):
        merge("run", name, [norm, norm[:4]], False, apart)
    assert merge("run", name, [norm, norm.clone(), norm], False, apart) is norm
