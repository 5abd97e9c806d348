"""Other people's weights in a `Retro`, and back: logits and gradients of the peer's own model, and its greedy tokens.

retro-pytorch 0.3.9 is the installed package. Needs the extra `peers`."""

import argparse
import copy
import importlib
import random

import pytest
import torch
from torch import nn

pytest.importorskip("retro_pytorch", reason="the peer is not installed (extra `peers`)")

from retro_pytorch.retro_pytorch import RETRO
from retro_pytorch.training import TrainingWrapper
from torch.utils.flop_counter import FlopCounterMode

import retro_kernels as rk
from retro_kernels.integrations import retro_pytorch, swap
from retro_kernels.models import Neighbours, Retro


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(want.abs().max().item(), 1e-3))


def peer(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "num_tokens": 50,
        "max_seq_len": 64,
        "enc_dim": 36,
        "enc_depth": 1,
        "dec_dim": 24,
        "dec_depth": 3,
        "dec_cross_attn_layers": (1, 3),
        "dim_head": 32,
        "chunk_size": 8,
        **changes,
    }
    return RETRO(**settings).eval()


def random_case(seed):
    """A model's arguments, and the sizes of a call."""
    draw = random.Random(seed)
    m, depth, encoder_depth = draw.choice([1, 2, 3, 5, 8, 16]), draw.randint(1, 4), draw.randint(1, 3)
    layers = [tuple(sorted(draw.sample(range(1, n + 1), draw.randint(1, n)))) for n in (depth, encoder_depth)]
    form = draw.choice([{}, {}, {"gated_rmsnorm": True}, {"use_deepnet": True}, {"norm_klass": nn.LayerNorm}])
    arguments = {
        "chunk_size": m,
        "dec_depth": depth,
        "enc_depth": encoder_depth,
        "dec_cross_attn_layers": draw.choice([layers[0], layers[0], None]),
        "enc_cross_attn_layers": draw.choice([layers[1], None, ()]),
        "enc_dim": draw.choice([16, 33, 24]),
        "dec_dim": draw.choice([24, 33]),
        "dim_head": draw.choice([32, 40, 33]),
        "pad_id": draw.choice([0, 3]),
        **form,
    }
    n = draw.randint(m, 3 * m + 1)
    return arguments, (n, draw.randint(1, 3), draw.choice([m, 2 * m, 3 * m]))


@pytest.mark.parametrize("block", range(10))
def test_logits_and_gradients_of_random_models_and_back(block):
    """100 configurations: converted, every logit and gradient; exported again, the same bits."""
    for seed in range(10 * block, 10 * block + 10):
        arguments, (n, k, r) = random_case(seed)
        model = peer(seed, **arguments)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        retro = Retro.from_peer(model, retrieved_length=r, backend="reference" if seed % 2 else None)
        tokens, retrieved = torch.randint(1, 50, (2, n)), torch.randint(0, 50, (2, n // arguments["chunk_size"], k, r))
        close(retro(tokens), model(tokens))
        want, got = model(tokens, retrieved), retro(tokens, retrieved)
        close(got, want)
        gradient = torch.randn_like(want)
        want.backward(gradient)
        got.backward(gradient)
        zeros = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in retro.named_parameters()}
        theirs = retro_pytorch.export(retro.config, zeros)
        wanted = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in model.named_parameters()}
        # Some are 0 but for rounding (of keys with a single query and no null slot, say), which the others' size tells.
        largest = max(x.abs().max().item() for x in wanted.values())
        for name, x in wanted.items():
            torch.testing.assert_close(theirs[name], x, rtol=2e-4, atol=1e-6 * max(largest, 1.0), msg=name)
        again = RETRO(**retro_pytorch.arguments(retro.config))
        again.load_state_dict(retro.to_peer("retro-pytorch"))
        assert torch.equal(again.eval()(tokens, retrieved), model(tokens, retrieved))


class Lookup:
    """Neighbours that are a fixed function of a chunk, for both generations."""

    def __call__(self, chunks):
        start = (chunks * torch.arange(1, chunks.shape[1] + 1)).sum(-1)[:, None, None]
        tokens = (start * 7 + 3 * torch.arange(16) + 11 * torch.arange(2)[:, None]) % 50
        return Neighbours(tokens)


def own_loop(model, prompt, fetch=lambda chunks: Lookup()(chunks).tokens):
    """TrainingWrapper.generate with the most likely token, up to the longest sequence. (Its constructor would embed a
    folder of text with BERT.)"""
    wrapper = TrainingWrapper.__new__(TrainingWrapper)
    nn.Module.__init__(wrapper)
    wrapper.retro, wrapper.chunk_size, wrapper.max_seq_len = model, model.chunk_size, model.seq_len
    wrapper.fetch_knn_chunks_fn = fetch
    return wrapper.generate(torch.tensor(prompt), filter_thres=0.999)[:, : model.seq_len]


@pytest.mark.parametrize(
    ("form", "length"),
    [({}, 3), ({}, 21), ({"gated_rmsnorm": True}, 8), ({"use_deepnet": True}, 3), ({"pad_id": 3}, 21)],
)
def test_generation_gives_the_tokens_of_the_peers_own_loop(form, length):
    """From prompts shorter than a chunk, of a chunk, and longer, over several chunks; swapped and not."""
    model = peer(max_seq_len=40, **form)
    with torch.no_grad():
        model.to_logits.weight.mul_(3.0)
    prompt = torch.randint(1, 50, (2, length)).tolist()
    want = own_loop(model, prompt)
    options = {"retriever": Lookup(), "max_new_tokens": 40 - length}
    assert torch.equal(Retro.from_peer(model).generate(prompt, **options).sequences, want)
    report = swap(model)
    assert torch.equal(report.generate(prompt, **options).sequences, want)
    with torch.no_grad():  # the report's model is the model, not a copy of what it was
        model.to_logits.bias[7] += 100.0
    assert set(report.generate(prompt, **options).new_tokens(0)) == {7}


def test_generation_multiplies_a_tenth_of_what_the_own_loop_does():
    """Of the products of matrices outside the attentions, which PyTorch counts."""
    model, prompt = peer(max_seq_len=48), [[1, 2, 3, 4, 5, 6, 7, 8]]
    counted = []
    for generate in (
        lambda: own_loop(model, prompt),
        lambda: Retro.from_peer(model, copy=False).generate(prompt, retriever=Lookup(), max_new_tokens=40),
    ):
        with FlopCounterMode(display=False) as counter:
            generate()
        counted.append(counter.get_total_flops())
    assert counted[0] > 10 * counted[1]


def test_files_are_read_without_running_what_they_hold(tmp_path):
    from safetensors.torch import save_file

    model = peer()
    tokens, retrieved = torch.randint(1, 50, (1, 20)), torch.randint(1, 50, (1, 2, 2, 16))
    want = model(tokens, retrieved)
    wrapped = {f"module.retro.{name}": x for name, x in model.state_dict().items()}
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "lightning.ckpt")
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, tmp_path / "plain.safetensors")
    for name in ("plain.pt", "lightning.ckpt", "plain.safetensors"):
        close(Retro.from_peer(tmp_path / name, chunk_size=8)(tokens, retrieved), want)
    with pytest.raises(ValueError, match="chunk_size: got none"):
        Retro.from_peer(tmp_path / "plain.pt")
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"holds more than weights \(retro_pytorch.*run any code"):
        Retro.from_peer(tmp_path / "whole.pt", chunk_size=8)
    (tmp_path / "broken.pt").write_bytes((tmp_path / "plain.pt").read_bytes()[:3000])
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "plain.safetensors").read_bytes()[:3000])
    for name in ("broken.pt", "broken.safetensors"):
        with pytest.raises(ValueError, match=name):
            Retro.from_peer(tmp_path / name, chunk_size=8)
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"got tensors named a .*expected those of retro-pytorch"):
        Retro.from_peer(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Retro.from_peer(tmp_path / "nowhere.pt")


def test_the_names_under_which_people_save(tmp_path):
    """Other attributes and keys than ours, wrappers around inner parts, arguments and an optimizer beside."""
    model = peer()
    tokens, retrieved = torch.randint(1, 50, (1, 20)), torch.randint(1, 50, (1, 2, 2, 16))
    want, state = model(tokens, retrieved), model.state_dict()
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]}
    compiled = copy.deepcopy(model)
    compiled.decoder = torch.compile(compiled.decoder)
    for saved in (
        {"model_state_dict": state, "optimizer_state_dict": optimizer, "epoch": 3},
        {"state_dict": {f"net.{name}": x for name, x in state.items()}, "optimizer_states": [optimizer]},
        {"model": state, "args": argparse.Namespace(lr=1e-3), "rng": torch.get_rng_state()},
        {f"_fsdp_wrapped_module.{name}": x for name, x in state.items()},
        {f"module._orig_mod.{name}": x for name, x in state.items()},
        compiled.state_dict(),
    ):
        torch.save(saved, tmp_path / "saved.pt")
        close(Retro.from_peer(tmp_path / "saved.pt", chunk_size=8)(tokens, retrieved), want)
    close(Retro.from_peer(compiled)(tokens, retrieved), want)


def test_what_a_process_has_declared_harmless_stays_so(tmp_path):
    torch.save(peer().state_dict(), tmp_path / "saved.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        Retro.from_peer(tmp_path / "saved.pt", chunk_size=8)
        assert argparse.Namespace in torch.serialization.get_safe_globals()


def test_of_several_models_in_a_file_the_caller_says_which(tmp_path):
    model, average = peer(), peer(1)
    tokens, retrieved = torch.randint(1, 50, (1, 20)), torch.randint(1, 50, (1, 2, 2, 16))
    both = {"model": model.state_dict(), "ema": {"shadow": average.state_dict()}}
    torch.save(both, tmp_path / "both.pt")
    with pytest.raises(
        ValueError, match=r"prefix: got none, .*both\.pt holds 2 models.*'model\.' .* or 'ema\.shadow\.'"
    ):
        Retro.from_peer(tmp_path / "both.pt", chunk_size=8)
    for prefix, meant in (("model", model), ("ema.shadow.", average), ("ema", average)):
        found = Retro.from_peer(tmp_path / "both.pt", prefix=prefix, chunk_size=8)
        close(found(tokens, retrieved), meant(tokens, retrieved))
    with pytest.raises(ValueError, match=r"got tensors named none .* under 'mean', expected those of"):
        Retro.from_peer(tmp_path / "both.pt", prefix="mean", chunk_size=8)
    torch.save({"all": both}, tmp_path / "deeper.pt")
    with pytest.raises(ValueError, match=r"prefix: got 'all', .*'all\.model\.' .* or 'all\.ema\.shadow\.'"):
        Retro.from_peer(tmp_path / "deeper.pt", prefix="all", chunk_size=8)
    with pytest.raises(TypeError, match="prefix: got int"):
        Retro.from_peer(tmp_path / "both.pt", prefix=3)
    with pytest.raises(ValueError, match="prefix: got 'model' with a module"):
        Retro.from_peer(model, prefix="model")
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), tmp_path / "averaged.pt")
    with pytest.raises(ValueError, match=r"n_averaged left over beside the model.*prefix='module\.'"):
        Retro.from_peer(tmp_path / "averaged.pt", chunk_size=8)
    found = Retro.from_peer(tmp_path / "averaged.pt", prefix="module.", chunk_size=8)
    close(found(tokens, retrieved), model(tokens, retrieved))


def test_numbers_that_no_model_could_compute_with_are_refused(tmp_path):
    model = peer()
    state = model.state_dict()
    for changed, message in (
        (
            {name: x.bfloat16() if "decoder" in name else x for name, x in state.items()},
            r"dtype: got none, and .*float32",
        ),
        (
            {**state, "to_logits.weight": state["to_logits.weight"].int()},
            r"to_logits\.weight of torch\.int32, expected",
        ),
        (
            {name: x.to("meta") for name, x in state.items()},
            r"token_emb\.weight on the meta device, expected its values",
        ),
        (
            {**state, "to_logits.weight": state["to_logits.weight"].to_sparse()},
            r"of torch\.sparse_coo, expected a dense",
        ),
        (
            {name.replace("0.fn.to_q.", "0.fn.to_q.base_layer."): x for name, x in state.items()},
            r"to_q\.weight missing, .* got .*to_q\.base_layer\.weight in its place: are adapters not merged",
        ),
    ):
        torch.save(changed, tmp_path / "changed.pt")
        with pytest.raises(ValueError, match=message):
            Retro.from_peer(tmp_path / "changed.pt", chunk_size=8)
        if "dtype" in message:
            assert (
                Retro.from_peer(tmp_path / "changed.pt", chunk_size=8, dtype=torch.bfloat16).embedding.weight.dtype
                == torch.bfloat16
            )
    model.decoder.bfloat16()
    with pytest.raises(ValueError, match=r"dtype: got none, and the RETRO has .* expected one for all"):
        Retro.from_peer(model)
    with pytest.raises(ValueError, match=r"dtype: got torch\.int8, expected one of"):
        Retro.from_peer(model, dtype=torch.int8)
    torch.save(state, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="num_heads, encoder_heads: got 4, 8, expected 8"):
        Retro.from_peer(tmp_path / "plain.pt", chunk_size=8, num_heads=4)
    with pytest.raises(TypeError, match="chunk_size: got '8'"):
        Retro.from_peer(tmp_path / "plain.pt", chunk_size="8")
    with pytest.raises(ValueError, match=r"got a folder, .*; changed\.pt, plain\.pt there may be one"):
        Retro.from_peer(tmp_path)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Tripled(nn.Module):
    def forward(self, x):
        return 3 * self.ff(x)


def test_what_the_weights_do_not_tell_is_refused_by_name():
    """A layer that was changed alone: its settings, its class, its forward."""
    for change, message in (
        (lambda x: setattr(x.decoder.layers[1][0].fn, "heads", 4), r"heads is 4 in decoder\.layers\.1\.0\.fn and 8 in"),
        (lambda x: setattr(x.decoder.layers[1][0].fn, "scale", 1.0), r"scale is 1\.0 in decoder\.layers\.1\.0\.fn"),
        (lambda x: setattr(x.decoder.norm_out, "eps", 1.0), r"eps is 1\.0 in decoder\.norm_out"),
        (
            lambda x: setattr(x.decoder.layers[0][1].fn, "chunk_size", 4),
            r"chunk_size is 4 in decoder\.layers\.0\.1\.fn",
        ),
        (lambda x: setattr(x.decoder.layers[1][0].fn.dropout, "p", 0.5), r"p is 0\.5 in decoder\.layers\.1\.0\.fn"),
        (lambda x: x.decoder.layers[1][2].fn.ff.__setitem__(1, nn.ReLU()), r"decoder\.layers\.1\.2\.fn.*ReLU"),
        (
            lambda x: setattr(x.to_logits, "__class__", Doubled),
            "to_logits is a Doubled, a Linear with a forward of its own",
        ),
        (
            lambda x: setattr(x.decoder.layers[1][2].fn, "__class__", Tripled),
            r"decoder\.layers\.1\.2\.fn, Tripled\.forward is not that of",
        ),
        (lambda x: setattr(x.to_logits, "forward", lambda y: y), "something else has replaced forward on to_logits"),
    ):
        model = peer()
        change(model)
        with pytest.raises(ValueError, match=f"source: got a RETRO.*{message}"):
            Retro.from_peer(model)
    model = peer()
    model.to_logits.register_forward_hook(lambda module, given, out: 2 * out)
    with pytest.warns(UserWarning, match="hooks on to_logits are left out"):
        Retro.from_peer(model)


@pytest.mark.filterwarnings("ignore:FSDP")
def test_weights_that_fsdp_divides(tmp_path):
    model = peer()
    tokens, retrieved = torch.randint(1, 50, (1, 20)), torch.randint(1, 50, (1, 2, 2, 16))
    want = model(tokens, retrieved)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fsdp = importlib.import_module("torch.distributed.fsdp")
        wrapped = fsdp.FullyShardedDataParallel(copy.deepcopy(model), device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"with FullyShardedDataParallel in it.*save a full state dict"):
            Retro.from_peer(wrapped)
        sharded = fsdp.fully_shard(copy.deepcopy(model))
        report = swap(sharded)
        close(Retro.from_peer(sharded)(tokens, retrieved), want)
        prompt = tokens.tolist()
        assert torch.equal(
            report.generate(prompt, max_new_tokens=3).sequences,
            swap(model).generate(prompt, max_new_tokens=3).sequences,
        )
        torch.save(sharded.state_dict(), tmp_path / "part.pt")
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(ValueError, match=r"part\.pt: it holds what one process had"):
        Retro.from_peer(tmp_path / "part.pt", chunk_size=8)


def test_a_conversion_under_inference_mode_can_be_trained():
    with torch.inference_mode():
        retro = Retro.from_peer(peer())
    retro(torch.randint(1, 50, (1, 20)), torch.randint(1, 50, (1, 2, 2, 16))).sum().backward()
    assert retro.embedding.weight.grad is not None


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # PyTorch's, of RMS norms
def test_generation_under_autocast():
    model = peer(max_seq_len=40)
    with torch.no_grad():
        model.to_logits.weight.mul_(30.0)  # no ties in bfloat16
    prompt = torch.randint(1, 50, (2, 11)).tolist()
    report = swap(model)
    with torch.autocast("cpu", torch.bfloat16):
        want = own_loop(model, prompt)
        assert torch.equal(report.generate(prompt, retriever=Lookup(), max_new_tokens=29).sequences, want)


def test_generation_with_more_and_longer_neighbours_than_a_model_tells():
    model = peer(max_seq_len=40)
    k, r = 3, 24

    def retrieve(chunks):
        start = (chunks * torch.arange(1, chunks.shape[1] + 1)).sum(-1)[:, None, None]
        return Neighbours((start * 7 + 3 * torch.arange(r) + 11 * torch.arange(k)[:, None]) % 50)

    prompt = torch.randint(1, 50, (2, 11)).tolist()
    want = own_loop(model, prompt, lambda chunks: retrieve(chunks).tokens)
    report = swap(model)
    with pytest.raises(ValueError, match="num_neighbours = 2 and r at most retrieved_length = 16: give generate"):
        report.generate(prompt, retriever=retrieve, max_new_tokens=29)
    options = {"retriever": retrieve, "max_new_tokens": 29, "num_neighbours": k, "retrieved_length": r}
    assert torch.equal(report.generate(prompt, **options).sequences, want)
    with pytest.raises(ValueError, match="num_neighbours: got one without a retriever"):
        report.generate(prompt, max_new_tokens=3, num_neighbours=3)


def test_what_half_matches_is_refused_by_name(monkeypatch, tmp_path):
    model = peer()
    state = model.state_dict()
    for change, message in (
        (lambda x: x.pop("decoder.layers.1.2.fn.ff.3.bias"), r"decoder\.layers\.1\.2\.fn\.ff\.3\.bias missing"),
        (lambda x: x.update({"decoder.layers.0.0.fn.to_q.lora_A": torch.ones(2)}), r"to_q\.lora_A left over"),
        (lambda x: x["decoder.rotary_pos_emb.inv_freq"].mul_(2), "other rotary frequencies in decoder"),
        (
            lambda x: x.update({"encoder.project_out.weight": torch.ones(3, 3)}),
            r"project_out\.weight of shape \[3, 3\], expected \[24, 36\]",
        ),
    ):
        changed = {name: x.clone() for name, x in state.items()}
        change(changed)
        torch.save(changed, tmp_path / "changed.pt")
        with pytest.raises(ValueError, match=rf"changed\.pt: .*{message}"):
            Retro.from_peer(tmp_path / "changed.pt", chunk_size=8)
    with pytest.raises(ValueError, match="a Linear with none of retro-pytorch"):
        Retro.from_peer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a Sequential with 2 "):
        Retro.from_peer(nn.Sequential(model, peer()))
    with pytest.raises(TypeError, match="source: got dict"):
        Retro.from_peer({})
    with pytest.raises(TypeError, match="copy: got 'no', expected a bool"):
        Retro.from_peer(model, copy="no")
    for device in ("cudaa", 3.5):
        with pytest.raises(ValueError, match=f"device: got {device!r}, expected a torch.device"):
            Retro.from_peer(model, device=device)
    with pytest.raises(TypeError, match="changes: got width"):
        Retro.from_peer(model, width=3)
    with pytest.raises(ValueError, match="peer: got 'gpt'"):
        Retro.from_peer(model, peer="gpt")
    with pytest.raises(ValueError, match="peer: got 'gpt'"):
        Retro.from_peer(model).to_peer("gpt")
    with pytest.raises(ValueError, match=r"config: got .* which retro-pytorch has not"):
        Retro(rk.models.RetroConfig.preset("tiny")).to_peer("retro-pytorch")
    monkeypatch.setattr(RETRO, "forward", lambda self, x: x)
    with pytest.raises(ValueError, match=r"RETRO\.forward is not that of 0\.3\.9"):
        Retro.from_peer(model)


def test_wrappers_swapped_models_and_positions_of_the_paper():
    model = peer()
    tokens, retrieved = torch.randint(1, 50, (1, 20)), torch.randint(1, 50, (1, 2, 2, 16))
    want = model(tokens, retrieved)
    assert torch.equal(
        Retro.from_peer(nn.ModuleDict({"retro": model}))(tokens, retrieved), Retro.from_peer(model)(tokens, retrieved)
    )
    swap(model, positions="paper")
    other = Retro.from_peer(model)(tokens, retrieved)
    close(other, model(tokens, retrieved))
    assert not torch.allclose(other, want, atol=1e-4)
    before = Retro.from_peer(model)
    with torch.no_grad():
        model.to_logits.bias.add_(1.0)
    close(before(tokens, retrieved), other)  # a copy


def test_the_command_converts_there_and_back(tmp_path):
    from safetensors.torch import load_file
    from typer.testing import CliRunner

    from retro_kernels.cli import app

    model = peer(enc_cross_attn_layers=(1,), use_deepnet=True)
    torch.save(model.state_dict(), tmp_path / "peer.pt")

    def run(*arguments):
        return CliRunner().invoke(app, ["convert", *map(str, arguments)])

    refused = run(tmp_path / "peer.pt", tmp_path / "out")
    assert refused.exit_code == 2
    assert "chunk_size: got none" in refused.output
    assert not (tmp_path / "out").exists()
    done = run(tmp_path / "peer.pt", tmp_path / "out", "--set", "chunk_size=8", "--set", "tokenizer=bert-base-cased")
    assert done.exit_code == 0, done.output
    assert "every one accounted for" in done.output
    assert "the weights do not tell pad_token_id=0, dropout=0.0" in " ".join(done.output.split())
    retro = Retro.from_pretrained(tmp_path / "out")
    assert retro.config.tokenizer == "bert-base-cased"
    tokens, retrieved = torch.randint(1, 50, (1, 20)), torch.randint(0, 50, (1, 2, 2, 16))
    close(retro(tokens, retrieved), model(tokens, retrieved))
    assert run(tmp_path / "out", tmp_path / "back", "--to", "retro-pytorch").exit_code == 0
    for name, x in load_file(tmp_path / "back" / "model.safetensors").items():
        assert torch.equal(x, model.state_dict()[name])
    assert "is there already" in run(tmp_path / "out", tmp_path / "back", "--to", "retro-pytorch").output
    assert "name=value" in run(tmp_path / "peer.pt", tmp_path / "x", "--set", "chunk_size").output
    torch.save({"a": model.state_dict(), "b": model.state_dict()}, tmp_path / "two.pt")
    chosen = "--prefix", "a", "--dtype", "bfloat16", "--set", "chunk_size=8"
    assert run(tmp_path / "two.pt", tmp_path / "one", *chosen).exit_code == 0
    assert Retro.from_pretrained(tmp_path / "one").embedding.weight.dtype == torch.bfloat16
    assert "dtype: got 'half-full'" in run(tmp_path / "two.pt", tmp_path / "x", "--dtype", "half-full").output
    assert "got one with --to" in run(tmp_path / "out", tmp_path / "x", "--to", "retro-pytorch", "--prefix", "a").output


def made_for_the_check():
    return peer()


def test_swap_check_prints_differences_and_times(monkeypatch):
    import json

    from typer.testing import CliRunner

    from retro_kernels.cli import app

    def run(*arguments):
        return CliRunner().invoke(app, ["swap-check", *arguments])

    done = run("test_weights:made_for_the_check", "--rounds", "1", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["agree"]
    assert 0 < found["gradient_difference"] < 1e-4
    assert len(found["replaced"]) == 7
    assert "a step takes" in run("test_weights:made_for_the_check", "--rounds", "1").output
    wrong = run("test_weights:nothing_there")
    assert wrong.exit_code == 2
    assert "expected package.module:name" in wrong.output
    assert "json:dumps() raised" in run("json:dumps").output
    assert "Invalid value for '--rounds'" in run("test_weights:made_for_the_check", "--rounds", "0").output
    forward = retro_pytorch.FusedRetroPytorch.__call__
    monkeypatch.setattr(retro_pytorch.FusedRetroPytorch, "__call__", lambda self, *a, **k: 1.1 * forward(self, *a, **k))
    assert run("test_weights:made_for_the_check", "--rounds", "1").exit_code == 1
