"""The proof: a text whose key only the neighbours have is read with retrieval, and is chance without."""

from __future__ import annotations

import math

import pytest
from cipher import Cipher, evaluate, train

CIPHER = Cipher(letters=4, chunk_size=8, num_chunks=4, num_neighbours=2)
CHANCE = math.log(4)


@pytest.mark.parametrize(("retrieval", "steps"), [(True, 110), (False, 60)])
def test_the_cipher_is_read_with_its_key_only(retrieval, steps):
    losses = evaluate(CIPHER, train(CIPHER, steps, 32, 2e-3, retrieval=retrieval))
    if retrieval:
        assert losses["retrieval"] < 0.1 * CHANCE
        assert losses["none"] > CHANCE  # what it learned is to read, not the letters
        assert losses["of another text"] > CHANCE
    else:
        assert all(loss == pytest.approx(CHANCE, rel=0.02) for loss in losses.values())
