"""The position tables: which distance each row holds, and where they start."""

import pytest
import torch

from retro_kernels.nn import RelativePositions, RotaryPositions


@pytest.mark.parametrize(("queries", "keys", "offset"), [(4, 6, 3), (6, 4, 0), (6, 6, 0)])
def test_rows_stand_for_the_distances_of_design_section_3(queries, keys, offset):
    """CCA: x - (r - m); encoder cross-attention: x - (m - 1); self-attention: x - (r - 1)."""
    width = 8
    relative = RelativePositions(width, num_heads=1, head_dim=width).double()
    with torch.no_grad():
        relative.projection.weight.copy_(torch.eye(width))
    table = relative(queries, keys, offset)
    assert table.shape == (1, queries + keys - 1, width)
    for x, row in enumerate(table[0]):
        distance = x - (keys - queries) if offset else x - (keys - 1)
        frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        torch.testing.assert_close(row, torch.cat([(distance * frequency).sin(), (distance * frequency).cos()]))


def test_u_and_v_start_at_zero_and_are_optional():
    relative = RelativePositions(6, num_heads=2, head_dim=4)
    assert relative.content_bias.shape == relative.relative_bias.shape == (2, 4)
    assert not relative.content_bias.any()
    assert not relative.relative_bias.any()
    assert set(RelativePositions(6, num_heads=2, head_dim=4, biases=False).state_dict()) == {"projection.weight"}
    with pytest.raises(ValueError, match="model_dim"):
        RelativePositions(5, num_heads=2, head_dim=4)


def test_rotary_tables_follow_fp64_but_not_half_precision():
    rotary = RotaryPositions(range(3, 7), range(6), rotary_dim=4)
    assert rotary.half().query_cos.dtype == torch.float32
    assert rotary.double().query_cos.dtype == torch.float64
    (query_cos, query_sin), (key_cos, key_sin) = rotary(5)
    assert query_cos.shape == query_sin.shape == (4, 2)
    assert key_cos.shape == key_sin.shape == (5, 2)
    torch.testing.assert_close(query_cos[:, 0], torch.arange(3.0, 7.0, dtype=torch.float64).cos())
    torch.testing.assert_close(
        key_sin[:, 1], (torch.arange(5.0, dtype=torch.float64) / 100).sin(), atol=1e-7, rtol=1e-7
    )
    with pytest.raises(ValueError, match="retrieved_length"):
        rotary(7)
