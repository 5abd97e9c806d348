"""pytest-benchmark of a retro-pytorch model on real text, with and without rk.swap; compared first."""

import pytest
import torch

from retro_kernels.bench import real_text, text_database

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTH = 512


@pytest.fixture(scope="module")
def models():
    try:
        original = real_text.load_model(DEVICE)
        swapped, _, _ = real_text.swapped_copy(original)
    except real_text.Unavailable as error:
        pytest.skip(str(error))
    corpus = text_database.build(
        vocabulary=original.token_emb.num_embeddings,
        chunk_size=original.chunk_size,
        length=LENGTH,
        k=2,
        characters=60_000,
        device=DEVICE,
    )
    data = corpus.sequence.to(DEVICE), corpus.retrieved.to(DEVICE)
    results = [real_text._results(model, *data, "fp32") for model in (original, swapped)]
    comparison = real_text.compare(*results, results[0], "fp32")
    assert comparison.passed, comparison.worst
    return {real_text.ORIGINAL: original, real_text.SWAPPED: swapped}, data, corpus.description


@pytest.mark.parametrize("name", [real_text.ORIGINAL, real_text.SWAPPED])
def test_training_step(benchmark, models, name):
    trained, (sequence, retrieved), description = models
    optimizer = torch.optim.AdamW(trained[name].parameters(), lr=1e-5)

    def step():
        trained[name](sequence, retrieved, return_loss=True).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = "training step"
    benchmark.extra_info.update(description)
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
