"""The rule that copies from neighbours, against its definition; neighbours that are replaced in training; what
docs/retro.md says is what the results say."""

from __future__ import annotations

import json

import numpy as np

from benchmarks import end_to_end, language_model
from benchmarks.language_model import LONGEST_MATCH, copy_rule, matches


def test_the_page_is_not_stale():
    assert language_model.main(["--check"]) == 0
    page = language_model.DOCUMENT.read_text()
    for path in (language_model.HERE / "results").glob(f"*/{end_to_end.FILE}"):
        assert end_to_end.tables(json.loads(path.read_text())) in page


def test_the_longest_piece_before_a_token_is_found_and_what_followed_it():
    """By comparing every piece with every place of every neighbour; few letters, so that most match somewhere."""
    random = np.random.default_rng(0)
    for _ in range(20):
        text, neighbours = random.integers(3, size=40), random.integers(3, size=(2, 24))
        neighbours[1, 20:] = language_model.ABSENT
        neighbours[0, 5:25] = text[3:23][: len(neighbours[0, 5:25])]
        lengths, tokens = matches(text, neighbours)
        for i in range(len(text) - 1):
            longest, followers = 0, set()
            for neighbour in neighbours:
                for j in range(len(neighbour) - 1):
                    if neighbour[j + 1] == language_model.ABSENT:
                        continue
                    most = min(i + 1, j + 1, LONGEST_MATCH)
                    same = next((n for n in range(most) if neighbour[j - n] != text[i - n]), most)
                    if same >= longest:
                        followers = {int(neighbour[j + 1])} | (followers if same == longest else set())
                        longest = same
            assert lengths[i] == longest
            assert tokens[i] in (followers if longest else {language_model.ABSENT})
    assert matches(np.zeros(40, np.int64), np.zeros((1, 40), np.int64))[0].max() == LONGEST_MATCH


def test_a_fold_is_mixed_by_what_the_other_says_of_matches_of_that_length():
    """Matches of length 1 are right half the time and of length 2 always; without one nothing changes."""
    length = np.tile([0, 1, 1, 2], 100)
    hit = np.tile([False, True, False, True], 100)
    fold = np.repeat([0, 1], 200)
    probability = np.full(400, 0.1)
    mixed = copy_rule(probability, length, hit, fold)
    assert (mixed[length == 0] == 0.1).all()
    assert (mixed[length == 2] > 0.95).all()
    # The share w that makes (0.1 + 0.9 w)(0.1 - 0.1 w) the largest is 4/9, of those tried the nearest.
    assert np.abs(mixed[(length == 1) & hit] - (0.1 + 0.9 * 4 / 9)).max() < 0.01
    wrong = copy_rule(probability, length, np.where(fold == 1, False, hit), fold)
    assert (wrong[fold == 0] == 0.1).all(), "the other fold has no hit, so that nothing is copied"
