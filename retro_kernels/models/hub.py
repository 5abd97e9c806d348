"""Models on the Hugging Face hub, each with a card that says what it is and what was measured."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tokenizers import FILE
from .config import RetroConfig
from .run_folder import PROGRESS, read_json

if TYPE_CHECKING:
    from .retro import Retro

CARD = "README.md"
FILES = (FILE, CARD)
"""What of a checkpoint is uploaded besides the model: not the optimiser's state."""


def push_to_hub(
    model: Retro,
    repository: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    private: bool = False,
    message: str = "Upload model",
    token: str | None = None,
) -> str:
    """Uploads a model as "owner/name" to the Hugging Face hub, with a model card. -> the address

    Args:
        checkpoint: the folder of training that the model was read from: its tokenizer, its README.md, where it has one,
            and its held-out loss come with it.

    Raises FileNotFoundError for a checkpoint that is not there, and what the hub's client raises.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        progress = None
        if checkpoint is not None:
            if not (Path(checkpoint) / "config.json").is_file():
                raise FileNotFoundError(
                    f"checkpoint: {checkpoint} holds no config.json, expected a checkpoint's folder"
                )
            progress = read_json(Path(checkpoint) / PROGRESS)
            for name in FILES:
                if (Path(checkpoint) / name).is_file():
                    shutil.copyfile(Path(checkpoint) / name, folder / name)
        if not (folder / CARD).exists():
            text = model_card(model, repository, progress if isinstance(progress, dict) else None)
            (folder / CARD).write_text(text)
        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=message)
    return f"https://huggingface.co/{repository}"


def model_card(model: Retro, repository: str, progress: dict[str, Any] | None = None) -> str:
    """A model card in Markdown. `progress`: a checkpoint's progress.json, for what was trained and measured."""
    config: RetroConfig = model.config
    rows = [f"| {part} | {count:,} |" for part, count in model.count_parameters().items() if count]
    lines = [
        "---",
        "library_name: retro_kernels",
        "pipeline_tag: text-generation",
        "tags: [retro, retrieval]",
        "---",
        "",
        f"# {repository.rpartition('/')[2]}",
        "",
        "A RETRO ([arXiv 2112.04426](https://arxiv.org/abs/2112.04426)): a language model that attends to text that it",
        f"retrieves for every chunk of {config.chunk_size} tokens.",
        "",
        "```python",
        "import retro_kernels as rk",
        "",
        f'retro = rk.models.Retro.from_hub("{repository}")',
        "```",
        "",
        f"Tokenizer: {config.tokenizer or 'not stated'}; {config.vocab_size:,} tokens, "
        f"{'none ends' if config.eos_token_id is None else f'{config.eos_token_id} ends'} a document. "
        f"{config.num_neighbours} neighbours of {config.retrieved_length} tokens; "
        f"rows of {config.max_length:,} tokens in training.",
        "",
        "| part | parameters |",
        "|---|---:|",
        *rows,
    ]
    if progress is not None:
        lines += ["", f"Trained for {progress['step']:,} updates on {progress['rows']:,} rows."]
        if progress.get("best"):
            best = progress["best"]
            lines += [f"Best held-out loss: {best['loss']:.4f} nats a token, at update {best['step']:,}."]
        settings = {name: x for name, x in progress.get("settings", {}).items() if not isinstance(x, dict)}
        lines += ["", "```json", json.dumps(settings, indent=1), "```"]
    return "\n".join(lines) + "\n"
