"""What is uploaded to the hub is the model, its tokenizer and a card; what comes back is the model."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
import torch
from models_common import tiny
from test_training import trainer
from training_common import stream_of

from retro_kernels.models import Retro


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder. -> where its repositories are, and what was created"""
    created = {}

    class HfApi:
        def __init__(self, token=None):
            created["token"] = token

        def create_repo(self, repository, **options):
            created[repository] = options

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path / "hub" / name))
    return tmp_path / "hub", created


def test_a_model_goes_to_the_hub_and_comes_back(hub):
    folder, created = hub
    model = tiny(tokenizer="bytes")
    assert model.push_to_hub("me/tiny", private=True, token="t") == "https://huggingface.co/me/tiny"
    assert created == {"token": "t", "me/tiny": {"private": True, "exist_ok": True}}
    back = Retro.from_hub("me/tiny")
    assert all(torch.equal(x, back.state_dict()[name]) for name, x in model.state_dict().items())
    card = (folder / "me" / "tiny" / "README.md").read_text()
    assert 'rk.models.Retro.from_hub("me/tiny")' in card
    assert f"| decoder | {model.count_parameters()['decoder']:,} |" in card


def test_a_checkpoint_goes_without_its_optimiser_and_says_what_was_measured(hub, tmp_path):
    stream = stream_of(tmp_path / "data")
    run = trainer(stream, tmp_path / "run", steps=2)
    run.held_out = stream
    run.run()
    (tmp_path / "run" / "best" / "tokenizer.json").write_text("{}")
    best = tmp_path / "run" / "best"
    Retro.from_pretrained(best).push_to_hub("me/trained", checkpoint=best)
    uploaded = hub[0] / "me" / "trained"
    names = sorted(path.name for path in uploaded.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    card = (uploaded / "README.md").read_text()
    assert "Trained for 2 updates on 8 rows." in card
    assert f"Best held-out loss: {run.best['loss']:.4f} nats" in card
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        tiny().push_to_hub("me/nothing", checkpoint=tmp_path / "nowhere")
    assert "me/nothing" not in hub[1]
