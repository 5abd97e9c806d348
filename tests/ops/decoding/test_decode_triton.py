"""What is particular to the Triton backend of decoding: many tiles of slots, row tiles, every form of product with
every kind of cache, refusals, and what the machine code of the shipped settings needs.

The options against the full computation are in test_decode.py, on every backend.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import retro_kernels as rk
from retro_kernels.ops.decoding.triton import configs
from retro_kernels.ops.decoding.triton import launch as backend
from retro_kernels.ops.decoding.triton.configs import LaunchSettings

pytest.importorskip("triton")

import aot
import aot_decode

runs = pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable()))

FRESH = (
    "sm_90 attend 1 bf16 own 128 plain",
    "sm_80 attend 4 bf16 fp8 128 options",
    "sm_100 attend 32 bf16 own 896 plain",
    "sm_90 combine 1 bf16 own 128 options",
)


def agree(x, backend_arguments=None, tolerance=1e-5):
    wide = {name: y.double() if isinstance(y, torch.Tensor) and y.is_floating_point() else y for name, y in x.items()}
    expected = rk.chunked_cross_attention_decode(**wide, return_lse=True, backend="reference")
    given = rk.chunked_cross_attention_decode(**x, return_lse=True, backend="triton")
    for g, e in zip(given, expected):
        assert torch.equal(g.isfinite(), e.isfinite())
        assert (g - e).nan_to_num(0, 0, 0).abs().max() <= tolerance * e.nan_to_num(0, 0, 0).abs().max()
    return given


def call(b=1, t=1, h=2, hk=2, k=2, r=19, d=16, dv=16, position=9):
    return {
        "query": torch.randn(b, t, h, d),
        "key": torch.randn(b, k, r, hk, d),
        "value": torch.randn(b, k, r, hk, dv),
        "chunk_size": 8,
        "position": torch.full((b,), position),
        "null_key": torch.randn(h, d),
        "null_value": torch.randn(h, dv),
        "neighbour_mask": torch.rand(b, k, r) < 0.7,
        "attention_bias": torch.randn(h, 8, k * r),
    }


@runs
def test_more_tiles_than_are_combined_at_once():
    """29 tiles of 16 slots, as one sequence of few heads is cut by the rule; 16 are combined at a time."""
    x = call(h=1, hk=1, k=3, r=150)
    assert -(-450 // configs.choose(torch.float32, 1, 16, 0, 450, 1).block_keys) == 29
    agree(x)


@runs
@pytest.mark.parametrize("settings", [LaunchSettings(16, 16, 16, 4, 1), LaunchSettings(32, 32, 16, 4, 1)], ids=str)
def test_tiles_of_rows_and_blocks_of_columns(settings):
    """6 tokens of 6 heads that share a key: 36 rows; keys and values of 40 and 33 in blocks of 16 columns."""
    with configs.override(settings):
        agree(call(t=6, h=6, hk=1, d=40, dv=33))


@runs
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("heads", [(2, 2), (3, 1)], ids=["one row", "rows"])
def test_a_quantised_cache_that_is_turned(kind, heads):
    """Keys are turned after they are made numbers of."""
    x = call(h=heads[0], hk=heads[1])
    key = torch.randint(-8, 9, x["key"].shape).to(kind)
    angles = [torch.randn(count, 6) for count in (8, 19)]
    rotary = {name: (a.cos(), a.sin()) for name, a in zip(("query_rotary", "key_rotary"), angles)}
    given = rk.chunked_cross_attention_decode(
        **x | rotary | {"key": key, "key_scale": torch.full(key.shape[:3], 0.3)}, backend="triton"
    )
    expected = rk.chunked_cross_attention_decode(**x | rotary | {"key": 0.3 * key.float()}, backend="reference")
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max()


@runs
def test_scales_too_small_for_a_half():
    """Weights times scales of 1e-6 would be subnormal halves."""
    x = call(t=2)
    x = {name: y.half() if y.is_floating_point() else y for name, y in x.items() if isinstance(y, torch.Tensor)}
    del x["null_key"], x["null_value"]
    value = torch.randint(-127, 128, x["value"].shape, dtype=torch.int8)
    scale = torch.rand(value.shape[:3]) * 1e-6
    given = rk.chunked_cross_attention_decode(
        **x | {"value": value, "value_scale": scale * 2**14}, chunk_size=8, backend="triton"
    )
    small = rk.chunked_cross_attention_decode(
        **x
        | {
            "value": value.clone(),
            "value_scale": scale,
            "query": x["query"].float(),
            "key": x["key"].float(),
            "attention_bias": x["attention_bias"].float(),
        },
        chunk_size=8,
        backend="reference",
    )
    assert (given.float() - small * 2**14).abs().max() <= 2e-3 * small.abs().max() * 2**14


@runs
def test_what_is_not_read():
    """The cache of an invalid or idle sequence, and every slot that is masked, may hold NaN and change no bit; and
    tokens beyond the border are NaN while the others of their call are right."""
    x = call(b=3, t=3, h=2, hk=1)
    x["position"] = torch.tensor([9, 3, 21])
    x["valid"] = torch.tensor([True, True, False])
    clean = agree(x)
    for name in ("key", "value"):
        x[name][~x["neighbour_mask"]] = float("nan")
        x[name][1:] = float("nan")
    x["query"][1:] = float("nan")
    again = rk.chunked_cross_attention_decode(**x, return_lse=True, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(clean, again))
    assert not again[0][1:].any()


NAN, INF, LOWEST = float("nan"), float("inf"), torch.finfo(torch.float32).min
NOT_FINITE = {
    "NaN in a query": ("query", (0, 0, 1, 2), NAN),
    "NaN in a key": ("key", (1, 0, 17, 0, 1), NAN),
    "NaN in a value": ("value", (1, 1, 0, 0, 3), NAN),
    "+inf in a bias": ("attention_bias", (0, 2, 5), INF),
    "NaN in a bias": ("attention_bias", (1, 2, 36), NAN),
    "a row of -inf": ("attention_bias", (1, 2), -INF),
    "a row of the lowest number": ("attention_bias", (1, 2), LOWEST),
    "NaN in the null key": ("null_key", (1, 0), NAN),
    "+inf in the null key": ("null_key", (0,), INF),
}


@runs
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # NumPy's, in the interpreter
@pytest.mark.parametrize("heads", [(2, 2), (2, 1)], ids=["one row", "rows"])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_is_not_finite_reaches_its_row_and_no_other(name, heads):
    """As in PyTorch: the softmax over the visible slots and the null slot, of one sequence and head at a time."""
    torch.manual_seed(1)
    h, hk, d, m = *heads, 16, 8
    x = call(b=2, h=h, hk=hk)
    if "null" not in name:
        del x["null_key"], x["null_value"]
    mask = x["neighbour_mask"]
    mask[1, 0, 17] = mask[1, 1, 0] = mask[:, 0, 5] = mask[:, 1, 17] = True
    x["key"][~mask] = x["value"][~mask] = NAN
    target, place, value = NOT_FINITE[name]
    x[target][place] = value
    given, lse = rk.chunked_cross_attention_decode(**x, return_lse=True, backend="triton")
    for sequence in range(2):
        seen = mask[sequence].flatten()
        for head in range(h):
            key, value = (
                x[name][sequence, :, :, head * hk // h].flatten(0, 1)[seen].double() for name in ("key", "value")
            )
            query = x["query"][sequence, 0, head].double()
            row = (9 - (m - 1)) % m
            logits = d**-0.5 * (query * key).sum(-1) + x["attention_bias"][head, row].double()[seen]
            if "null_key" in x:
                logits = torch.cat([d**-0.5 * (query * x["null_key"][head]).sum()[None], logits])
                value = torch.cat([x["null_value"][head][None].double(), value])
            nothing = (logits == -INF).all()
            expected = torch.zeros(d).double() if nothing else (torch.softmax(logits, 0)[:, None] * value).sum(0)
            torch.testing.assert_close(
                given[sequence, 0, head].double(), expected, rtol=2e-5, atol=2e-5, equal_nan=True
            )
            if "lowest" not in name:  # in base 2 it saturates: the weights are right, the number is not
                torch.testing.assert_close(
                    lse[sequence, 0, head].double(), logits.logsumexp(0), rtol=2e-5, atol=2e-5, equal_nan=True
                )


@runs
def test_refusals():
    x = call()
    table = torch.ones(8, 200), torch.zeros(8, 200)
    y = {name: x[name] for name in ("chunk_size", "position")}
    wide = {
        "query": torch.randn(1, 1, 1, 400),
        "key": torch.randn(1, 1, 8, 1, 400),
        "value": torch.randn(1, 1, 8, 1, 4),
    }
    with pytest.raises(ValueError, match="cache keys that are turned already"):
        rk.chunked_cross_attention_decode(**y, **wide, query_rotary=table, key_rotary=table, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        rk.chunked_cross_attention_decode(
            **{
                name: z.double() if name in ("query", "key", "value") else z
                for name, z in x.items()
                if name in ("query", "key", "value", "chunk_size", "position")
            },
            backend="triton",
        )


def test_how_a_call_is_cut_depends_on_shapes_alone_and_one_sequence_fills_a_gpu():
    for dtype, rows, width, shared_by in (
        (torch.bfloat16, 1, 128, 32),
        (torch.bfloat16, 4, 128, 8),
        (torch.float32, 1, 64, 16),
    ):
        settings = configs.choose(dtype, rows, width, 0, 256, shared_by)
        assert shared_by * 256 // settings.block_keys >= 128
    assert configs.choose(torch.bfloat16, 1, 128, 0, 256, 64 * 32).block_keys == 64


class TestMachineCode:
    """No spill, no atomic, shared memory that fits: of every shipped setting in a committed table, which is tied to the
    kernels by a hash, and of a few compiled anew."""

    committed = aot.read(aot_decode)

    @pytest.fixture(scope="class")
    def fresh(self):
        environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, aot_decode.__file__, "--list", *FRESH]
        out = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        return json.loads(out.stdout.splitlines()[-1])

    @pytest.mark.parametrize("version", aot.VERSIONS)
    def test_everything_that_is_listed_is_compiled_as_it_is_chosen(self, version):
        """An empty table is of other kernels: run aot_decode.py with each Triton, without TRITON_INTERPRET."""
        rows = self.committed[version]
        chosen = {x: aot_decode.described(x, version) for x in aot_decode.identifiers(version)}
        assert {x: row["settings"] for x, row in rows.items()} == chosen

    def test_every_setting_passed_the_gate(self):
        for rows in self.committed.values():
            assert {x: found for x in rows if (found := aot_decode.faults(x, rows[x]))} == {}

    @pytest.mark.parametrize("identifier", FRESH)
    def test_the_main_settings_compile_anew(self, identifier, fresh):
        assert aot_decode.faults(identifier, fresh[identifier]) == []
