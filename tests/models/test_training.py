"""Training: a killed run resumed equals one that was not, several processes equal one, and what goes wrong is said."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_parallel import run_both
from training_common import COMPARABLE, ROWS, M, N, settings, stream_of
from two_processes import RUNS
from typer.testing import CliRunner

from retro_kernels.cli import app
from retro_kernels.models import Retro, RetroConfig
from retro_kernels.models.data import Order, TokenStream
from retro_kernels.models.run_folder import checkpoints
from retro_kernels.models.training import NonFiniteLoss, Trainer
from retro_kernels.models.training_config import TrainingConfig

SAME = {"rtol": 1e-4, "atol": 1e-5}


def trainer(stream, output, **changes) -> Trainer:
    return Trainer(stream.config, stream, settings(output, **changes), say=lambda text: None)


def weights_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return Retro.from_pretrained(folder / f"step-{step:08d}").state_dict()


def metrics_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if key not in ("seconds_a_step", "tokens_a_second")} for line in lines]


def test_a_killed_run_resumed_equals_one_that_was_not(tmp_path):
    """With dropout, so that the random state matters too; killed between two checkpoints."""
    stream = stream_of(tmp_path / "data", dropout=0.2)
    trainer(stream, tmp_path / "whole").run()

    killed = trainer(stream, tmp_path / "killed")
    save = killed.save

    def save_and_die():
        save()
        if killed.step == 4:
            killed._update = lambda batches: (_ for _ in ()).throw(KeyboardInterrupt)

    killed.save = save_and_die
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    (tmp_path / "killed" / ".step-00000006.partial").mkdir()  # a checkpoint that was being written
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 0.0}) + "\n")  # logged, but after the last checkpoint
    resumed = trainer(stream, tmp_path / "killed")
    assert resumed.step == 4
    resumed.run()
    expected, got = weights_of(tmp_path / "whole", 6), weights_of(tmp_path / "killed", 6)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    assert [line["step"] for line in metrics_of(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    assert trainer(stream, tmp_path / "whole").run() != 0.0  # complete: nothing is left to do
    with pytest.raises(ValueError, match="another learning_rate; continue it with the same"):
        trainer(stream, tmp_path / "whole", learning_rate=1.0)


def test_training_learns_to_read_the_neighbours(tmp_path):
    stream = stream_of(tmp_path / "data")
    run = trainer(stream, tmp_path / "run", steps=60, save_every=60, log_every=20, keep=1, clip=None)
    assert run.run() < 3.0  # from ln 64 = 4.2
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000060"]
    batch = stream.batch(range(ROWS))
    with torch.no_grad():
        run.model.eval()
        assert run.model.loss(*batch) < 0.8 * run.model.loss(*batch[:2])


def test_a_retrofitted_decoder_learns_to_read_neighbours_and_stays_what_it_was(tmp_path):
    stream = stream_of(tmp_path / "data")
    sizes = dataclasses.replace(stream.config, cross_attention_layers=())
    decoder = Trainer(sizes, TokenStream(tmp_path / "data", sizes), settings(tmp_path / "decoder"), say=print)
    decoder.run()
    given = {"retrofit": str(tmp_path / "decoder" / "step-00000006"), "clip": None}
    whole = trainer(stream, tmp_path / "whole", steps=120, save_every=60, log_every=60, **given)
    whole.run()
    shutil.copytree(tmp_path / "whole" / "step-00000060", tmp_path / "parts" / "step-00000060")
    trainer(stream, tmp_path / "parts", steps=120, save_every=60, log_every=60, **given).run()
    expected, got = weights_of(tmp_path / "whole", 120), weights_of(tmp_path / "parts", 120)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    tokens, targets, neighbours, mask, _ = stream.batch(range(ROWS))
    with torch.no_grad():
        assert torch.equal(whole.model.eval()(tokens), decoder.model.eval()(tokens))
        assert whole.model.loss(tokens, targets, neighbours, mask) < whole.model.loss(tokens, targets) - 0.2


def test_a_decoder_that_does_not_fit_is_named(tmp_path):
    stream = stream_of(tmp_path / "data")
    for config, message in (
        (stream.config, "the decoder has chunked cross-attention"),
        (dataclasses.replace(stream.config, cross_attention_layers=(), num_layers=2), "num_layers = 2, not 3"),
        (
            dataclasses.replace(stream.config, cross_attention_layers=(), feed_forward_dim=8),
            "feed_forward_dim = 8, not",
        ),
        # whose weights would fit
        (dataclasses.replace(stream.config, cross_attention_layers=(), activation="relu"), "activation = 'relu', not"),
    ):
        Retro(config).save_pretrained(tmp_path / "decoder")
        with pytest.raises(ValueError, match=f"retrofit: .*{message}"):
            trainer(stream, tmp_path / "run", retrofit=str(tmp_path / "decoder"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        trainer(stream, tmp_path / "run", retrofit=str(tmp_path / "nowhere"))


def test_chunked_cross_attention_begins_with_the_self_attention_of_its_block(tmp_path):
    stream = stream_of(tmp_path / "data")
    config = stream.config
    decoder = dataclasses.replace(config, cross_attention_layers=())
    Retro(decoder).save_pretrained(tmp_path / "decoder")
    given = {"retrofit": str(tmp_path / "decoder"), "init": "self_attention"}
    with pytest.raises(ValueError, match="init: got 'self_attention' without retrofit"):
        settings(tmp_path / "run", init="self_attention")
    same = {
        "encoder_dim": config.model_dim,
        "encoder_heads": config.num_heads,
        "encoder_head_dim": config.head_dim,
        "encoder_feed_forward_dim": config.feed_forward_dim,
    }
    for name in same:
        changed = dataclasses.replace(config, **{**same, name: 2 * same[name]})
        with pytest.raises(ValueError, match=f"init: .*{name} = {2 * same[name]}, expected {same[name]}"):
            trainer(TokenStream(tmp_path / "data", changed), tmp_path / "run", **given)
    stream = TokenStream(tmp_path / "data", dataclasses.replace(config, **same, cross_attention_gate=True))
    model = trainer(stream, tmp_path / "run", **given).model
    of_decoder = Retro.from_pretrained(tmp_path / "decoder").state_dict()
    for p in stream.config.cross_attention_layers:
        found = model.blocks[p - 1].cross_attention.state_dict()
        for name in ("w_query", "w_key", "w_value", "w_out", "relative.projection"):
            expected = of_decoder[f"blocks.{p - 1}.self_attention.{name}.weight"]
            assert torch.equal(found[f"{name}.weight"], expected), name
        assert model.blocks[p - 1].gate.tanh().item() == pytest.approx(0.3)
    for i, layer in enumerate(model.encoder.layers):
        expected = of_decoder[f"blocks.{i}.feed_forward.w_in.weight"]
        assert torch.equal(layer.feed_forward.w_in.weight, expected)
        assert torch.equal(layer.self_attention.w_key.weight, of_decoder[f"blocks.{i}.self_attention.w_key.weight"])
    neighbours = stream.batch([0, 1]).neighbours
    b, chunks = neighbours.shape[:2]
    with torch.no_grad():  # what the chunk is makes no difference to the encoder yet
        hidden = torch.randn(2, b, chunks * config.chunk_size, config.model_dim)
        assert torch.equal(model.encode(neighbours, hidden[0]), model.encode(neighbours, hidden[1]))
    frozen = {name for name, x in model.named_parameters() if not x.requires_grad}
    assert frozen == set(of_decoder)


def test_accumulated_micro_batches_and_several_processes_equal_one_batch(tmp_path):
    stream = stream_of(tmp_path / "data")
    one = trainer(stream, tmp_path / "one", steps=4, **COMPARABLE)
    one.held_out = stream
    one.run()
    trainer(stream, tmp_path / "accumulated", steps=4, micro_batch_size=1, **COMPARABLE).run()
    run_both(tmp_path, "train")

    def measured(name):
        lines = metrics_of(tmp_path / name)
        held_out = [
            line[f"held_out_{mode}"] for line in lines if "loss" not in line for mode in ("on", "off", "random")
        ]
        return [line["loss"] for line in lines if "loss" in line], held_out

    expected, (losses, held_out) = weights_of(tmp_path / "one", 4), measured("one")
    assert (len(losses), len(held_out)) == (4, 6)
    for name in ("accumulated", *RUNS):
        got = weights_of(tmp_path / name, 4)
        for key in expected:
            torch.testing.assert_close(
                got[key], expected[key], **SAME, msg=lambda text, at=(name, key): f"{at}: {text}"
            )
        assert measured(name)[0] == pytest.approx(losses, rel=1e-5)
        assert name == "accumulated" or measured(name)[1] == pytest.approx(held_out, rel=1e-4)
    # What two processes wrote in parts, one takes up whole.
    one = trainer(stream, tmp_path / "one", steps=4, **COMPARABLE)
    taken = trainer(stream, tmp_path / "fsdp", steps=4, parallel="fsdp", **COMPARABLE)
    assert taken.step == 4
    moments = [taken.optimiser.state_dict()["state"], one.optimiser.state_dict()["state"]]
    assert moments[0].keys() == moments[1].keys()
    for got, wanted in zip(*(found.values() for found in moments)):
        for name in ("exp_avg", "exp_avg_sq"):
            scale = float(wanted[name].abs().max())
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-3 * scale)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    stream = stream_of(tmp_path / "data")
    run = trainer(stream, tmp_path / "run", steps=3)
    run.run()
    with torch.no_grad():
        run.model.final_norm.weight[0] = torch.nan
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    run.settings = settings(tmp_path / "run", steps=9)
    with pytest.raises(NonFiniteLoss, match=r"update 4: loss nan.*last good checkpoint is .*step-00000003.*rows of"):
        run.run()
    assert all(torch.equal(x, before[name]) or x.isnan().any() for name, x in run.model.state_dict().items())
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000002", "step-00000003"]
    assert not any(x.isnan().any() for x in weights_of(tmp_path / "run", 3).values())


def test_the_schedule_and_the_order_of_rows():
    run = TrainingConfig(output="x", steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [run.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert all(x >= y for x, y in itertools.pairwise(rates[9:]))
    order = Order(7, seed=3)
    epochs = [[order[place] for place in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [Order(7, seed=3)[place] for place in range(21)] == [row for epoch in epochs for row in epoch]


def test_the_stream_gives_each_chunk_its_neighbours(tmp_path):
    stream = stream_of(tmp_path / "data")
    assert (stream.rows, stream.bytes) == (ROWS, 3 * (ROWS * N + 3))
    batch = stream.batch([2, 0])
    flat = np.load(tmp_path / "data" / "tokens.npy").astype(np.int64)
    assert batch.tokens[0].tolist() == flat[2 * N : 3 * N].tolist()
    assert batch.targets[0].tolist() == flat[2 * N + 1 : 3 * N + 1].tolist()
    assert torch.equal(batch.neighbours[0, :, 0, :M].flatten(), torch.from_numpy(flat[2 * N + M : 3 * N + M]))
    assert batch.neighbour_mask[:, :, 0].all()
    assert batch.neighbour_mask[0, 0, 1].tolist() == [True] * 5 + [False] * 3
    assert stream.batch([0], num_neighbours=1).neighbours.shape == (1, N // M, 1, 8)
    assert stream.batch([0], num_neighbours=0).neighbours is None


def test_data_that_do_not_fit_are_named(tmp_path):
    stream = stream_of(tmp_path / "data")
    folder, config = tmp_path / "data", stream.config

    def replaced(**changes):
        return RetroConfig.from_dict({**config.to_dict(), **changes})

    for changes, message in (
        ({"tokenizer": "words"}, "tokenizer 'letters', expected 'words'"),
        ({"chunk_size": 8}, "chunk_size 4, expected 8"),
        ({"max_length": 18}, "multiple of chunk_size"),
        ({"max_length": 1600}, "expected more than max_length = 1600"),
        ({"retrieved_length": 6}, "r at most 6"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenStream(folder, replaced(**changes))
    with pytest.raises(ValueError, match=r"tokens.npy: got token .* is it from another tokenizer"):
        TokenStream(folder, replaced(vocab_size=20)).batch([0])
    np.save(folder / "neighbours.npy", np.load(folder / "neighbours.npy")[:3])
    with pytest.raises(ValueError, match="at least 24 chunks"):
        TokenStream(folder, config)
    np.save(folder / "tokens.npy", np.zeros(99))
    with pytest.raises(ValueError, match="got float64"):
        TokenStream(folder, config)
    (folder / "tokens.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokens.npy is not there"):
        TokenStream(folder, config)


def test_the_command(tmp_path):
    stream_of(tmp_path / "data")
    path = tmp_path / "run.yaml"
    text = f"""
model: {{preset: tiny, max_length: {N}}}
data: data
training: {{output: {tmp_path / "run"}, steps: 2, batch_size: 2, warmup_steps: 1, log_every: 1, peak_flops: 1e12}}
"""
    path.write_text(text)
    result = CliRunner().invoke(app, ["train", str(path), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "step 2/2  loss 4." in result.output
    assert "MFU" in result.output
    assert len(checkpoints(tmp_path / "run")) == 1
    for broken, message in (
        (text.replace("warmup_steps", "warm_up"), "warm_up"),
        (text.replace("steps: 2", "steps: 0"), "steps: got 0"),
        (text.replace("data: data", "data: elsewhere"), "tokens.npy is not there"),
        (text.replace("data: data", ""), "expected the sections"),
        (text.replace("batch_size: 2", "batch_size: 2, micro_batch_size: 3"), "micro_batch_size: got 3"),
    ):
        path.write_text(broken)
        result = CliRunner().invoke(app, ["train", str(path)])
        assert result.exit_code == 2
        assert message in result.output


@pytest.mark.parametrize("name", ["clip", "peak_flops"])
def test_zero_is_no_way_of_saying_none(name, tmp_path):
    """clip: 0 would freeze the model in silence, and None is there for "no limit"."""
    with pytest.raises(ValueError, match=rf"{name}: got 0, expected more than 0, or None"):
        TrainingConfig(output=str(tmp_path), steps=1, **{name: 0})
