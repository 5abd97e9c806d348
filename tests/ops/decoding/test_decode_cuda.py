"""Decoding in CUDA C++, in the emulator: against the full computation, with every kind of cache, sizes that cut a call
into many tiles of rows and slots, and with the order of warps drawn at random.

What decoding means is in test_decode.py; its cases have sizes that these kernels refuse.
"""

from __future__ import annotations

import pytest
import torch
from test_decode import OPTIONS, K, M, close, make, step

import retro_kernels as rk
from retro_kernels.ops.attention import reference as attention
from retro_kernels.ops.decoding import common, cuda

pytestmark = pytest.mark.usefixtures("emulated", "guarded")
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def of_eights(options=(), **sizes):
    """A full call whose rows the kernels can load."""
    return make(options, **{"d": 24, "dv": 16, **sizes})


@pytest.mark.parametrize("name", [name for name in OPTIONS if "rotary" not in OPTIONS[name]])
def test_tokens_are_the_full_computation(name):
    """Around two borders, one token and four."""
    x = of_eights(OPTIONS[name])
    full = rk.chunked_cross_attention(**x, return_lse=True, backend="reference")
    for position, t in ((M - 2, 1), (M - 1, 1), (2 * M - 2, 1), (2 * M - 1, 1), (M + 1, 4), (M - 3, 4)):
        given = step(x, position, t, backend="cuda")
        close(given, tuple(y[:, position : position + t] for y in full), 1e-5)


def test_keys_turned_before():
    x = of_eights(OPTIONS["rotary"])
    full = rk.chunked_cross_attention(**x, return_lse=True, backend="reference")
    close(step(x, M + 2, 3, backend="cuda", turned=True), tuple(y[:, M + 2 : M + 5] for y in full), 1e-5)


SHAPES = (
    {"h": 1, "hk": 1, "d": 8, "dv": 8},
    {"h": 6, "hk": 6, "d": 128, "dv": 128, "r": 70},
    {"h": 32, "hk": 1, "d": 64},
    {"b": 1, "h": 2, "hk": 1, "k": 3, "r": 150},
    {"h": 2, "hk": 2, "d": 304, "dv": 264},
    {"k": 1, "r": 1},
    {"k": 0},
    {"b": 0},
    {"r": 0},
    {"m": 1},
    {"h": 6, "hk": 2, "d": 1032, "dv": 1048},
    {"b": 9, "h": 40, "hk": 40, "d": 16, "r": 64},
)


@pytest.mark.parametrize("options", [(), ("mask", "null", "bias_wide")], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, options):
    x = of_eights(options, **shape)
    m = x["chunk_size"]
    full = rk.chunked_cross_attention(**x, return_lse=True, backend="reference")
    for position, t in ((2 * m, 1), (max(m - 3, 0), min(4, m))):
        close(step(x, position, t, backend="cuda"), tuple(y[:, position : position + t] for y in full), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_half_precision_is_within_twice_the_error_of_pytorch(name, dtype, monkeypatch):
    x = of_eights(OPTIONS[name], dtype=dtype)
    wide = {n: y.double() if isinstance(y, torch.Tensor) and y.is_floating_point() else y for n, y in x.items()}
    expected = step(wide, 11, t=4, backend="reference")[0]
    given = step(x, 11, t=4, backend="cuda")[0].double()
    monkeypatch.setattr(attention, "accumulation_dtype", lambda dtype: dtype)
    plain = step(x, 11, t=4, backend="reference")[0].double()
    floor = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype] * expected.abs().max()
    assert (given - expected).abs().max() <= 2 * (plain - expected).abs().max() + floor


@pytest.mark.parametrize(
    "kinds",
    [
        (torch.int8, torch.int8),
        (torch.float8_e4m3fn, torch.float8_e4m3fn),
        (torch.int8, None),
        (None, torch.float8_e4m3fn),
    ],
    ids=str,
)
@pytest.mark.parametrize("hk", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_caches(kinds, hk, dtype):
    """Against the dequantised cache: all 256 values of a type but NaN occur. Key and value may differ in type."""
    codes = torch.arange(256, dtype=torch.uint8)

    def draw(kind, name, *shape):
        """The arguments, and the cache in fp64."""
        if kind is None:
            x = torch.randn(shape).to(dtype)
            return {name: x}, x.double()
        usable = codes[~codes.view(kind).float().isnan()]
        x, scale = usable[torch.randint(len(usable), shape)].view(kind), torch.rand(shape[:3]) / 127
        return {name: x, f"{name}_scale": scale}, x.double() * scale.double()[..., None, None]

    (key, wide_key), (value, wide_value) = (
        draw(kind, name, 2, 3, 40, hk, size) for kind, name, size in zip(kinds, ("key", "value"), (40, 24))
    )
    query, places = torch.randn(2, 2, 4, 40).to(dtype), torch.tensor([9, 18])
    given = rk.chunked_cross_attention_decode(query, **key, **value, chunk_size=8, position=places, backend="cuda")
    expected = rk.chunked_cross_attention_decode(
        query.double(), wide_key, wide_value, chunk_size=8, position=places, backend="reference"
    )
    close((given,), (expected,), 1e-5 if dtype == torch.float32 else 8e-3)


def test_what_is_not_read():
    """The cache of an invalid or idle sequence, and every slot that is masked, may hold NaN and change no bit.
    Positions differ by sequence."""
    x = of_eights(("mask", "null", "bias"), b=4)
    full = rk.chunked_cross_attention(**x, backend="reference")
    positions, valid, chunks = torch.tensor([2, 9, -5, 23]), torch.tensor([True, True, False, True]), [0, 0, 0, 2]
    picked = {n: torch.stack([x[n][i, c] for i, c in enumerate(chunks)]) for n in ("key", "value", "neighbour_mask")}
    query = torch.stack([x["query"][i, max(int(p), 0)] for i, p in enumerate(positions)])[:, None]

    def call():
        return rk.chunked_cross_attention_decode(
            **(x | picked | {"query": query}), position=positions, valid=valid, return_lse=True, backend="cuda"
        )

    out, lse = call()
    for i in (0, 1, 3):
        close((out[i, 0],), (full[i, positions[i]],), 1e-5)
    for name in ("key", "value"):
        picked[name][~picked["neighbour_mask"]] = float("nan")
        picked[name][[0, 2]] = float("nan")
    query[2] = float("nan")
    again = call()
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
    assert not out[[0, 2]].any()


def test_beyond_the_border_is_nan_where_nothing_can_be_raised():
    """In a compiled graph, as on a GPU."""
    x = of_eights()
    torch._dynamo.reset()

    def call(query, key, value, position):
        return rk.chunked_cross_attention_decode(query, key, value, chunk_size=M, position=position, backend="cuda")

    out = torch.compile(call, fullgraph=True, backend="aot_eager")(
        x["query"][:, 12:16].contiguous(), x["key"][:, 0], x["value"][:, 0], torch.tensor([12, 13, -2])
    )
    full = rk.chunked_cross_attention(**x, backend="reference")
    close((out[0, :3],), (full[0, 12:15],), 1e-5)
    assert out[0, 3].isnan().all()
    assert out[1, 2:].isnan().all()
    assert not out[1, :2].isnan().any()
    assert out[2, :2].isnan().all()
    assert not out[2, 2:].any()


@pytest.mark.parametrize("hk", [1, 4])
@pytest.mark.parametrize("kind", [None, torch.int8])
def test_projected_is_the_projection_made(hk, kind):
    x = of_eights(("mask", "relative", "null"), hk=hk)
    encoded, w_key, w_value = torch.randn(3, K, 11, 40), torch.randn(hk, 24, 40) / 6, torch.randn(hk, 16, 40) / 6
    bias_key, bias_value = torch.randn(hk, 24), torch.randn(hk, 16)
    scale, wide_states = {}, encoded.double()
    if kind is not None:
        encoded = torch.randint(-127, 128, encoded.shape).to(kind)
        scale = {"encoded_scale": torch.rand(3, K, 11) / 127}
        wide_states = encoded.double() * scale["encoded_scale"].double()[..., None]
    key, value = (torch.einsum("bkre,hde->bkrhd", wide_states, w.double()) for w in (w_key, w_value))
    arguments = {n: y for n, y in x.items() if n not in ("query", "key", "value", "neighbour_mask")}
    arguments["neighbour_mask"] = x["neighbour_mask"][:, 0]
    wide = {n: y.double() if isinstance(y, torch.Tensor) and y.is_floating_point() else y for n, y in arguments.items()}
    places, query = torch.tensor([3, 7, 11]), x["query"][:, :3]
    expected = rk.chunked_cross_attention_decode(
        query.double(),
        key + bias_key,
        value + bias_value,
        position=places,
        return_lse=True,
        backend="reference",
        **wide,
    )
    given = rk.projected_chunked_cross_attention_decode(
        query,
        encoded,
        w_key,
        w_value,
        bias_key=bias_key,
        bias_value=bias_value,
        position=places,
        return_lse=True,
        backend="cuda",
        **arguments,
        **scale,
    )
    close(given, expected, 1e-5)


def test_projected_with_wide_states():
    query, encoded = torch.randn(1, 1, 4, 16), torch.randn(1, 2, 40, 4096)
    w_key, w_value = torch.randn(4, 16, 4096) / 64, torch.randn(4, 16, 4096) / 64
    arguments = {"chunk_size": 8, "position": torch.tensor([9])}
    expected = rk.projected_chunked_cross_attention_decode(
        *(x.double() for x in (query, encoded, w_key, w_value)), backend="reference", **arguments
    )
    given = rk.projected_chunked_cross_attention_decode(query, encoded, w_key, w_value, backend="cuda", **arguments)
    close((given,), (expected,), 1e-5)


@pytest.mark.parametrize("dtype", TYPES)
def test_projecting(dtype):
    """Against fp64: one row of x and many, shared and own weights, parts of columns and of rows, rows that do not lie
    side by side."""
    for n, h, hk, d, e in ((1, 4, 4, 40, 304), (3, 4, 1, 16, 72), (9, 6, 3, 8, 8), (2, 2, 2, 136, 64)):
        w = torch.randn(hk, d, e + 8).to(dtype)[..., :e]
        for x, transposed in (
            (torch.randn(n, h, d + 8).to(dtype)[..., :d], False),
            (torch.randn(n, h, e + 8).to(dtype)[..., 8:], True),
        ):
            given = cuda._project_few(x, w, transposed)
            expected = common.project(x.double(), w.double(), transposed)
            limit = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
            assert (given.double() - expected).abs().max() <= limit * expected.abs().max()


def test_any_order_of_warps_gives_the_same_bits(monkeypatch):
    """A barrier that is missing would show."""
    x = of_eights(("mask", "null", "bias"), r=70, h=8, hk=2)
    weight, rows = torch.randn(2, 24, 72), torch.randn(3, 8, 24)
    first = (*step(x, 9, 3, backend="cuda"), cuda._project_few(rows, weight, False))
    for seed in range(1, 5):
        monkeypatch.setenv("RETRO_KERNELS_EMULATOR_SEED", str(seed))
        again = (*step(x, 9, 3, backend="cuda"), cuda._project_few(rows, weight, False))
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_a_call_is_cut_by_shapes_alone_and_one_sequence_fills_a_gpu():
    assert cuda.tile(1, 256, 32) == 32  # 256 blocks
    assert cuda.tile(1, 256, 64 * 32) == cuda.MOST_SLOTS
    assert cuda.tile(1, 256, 8) == cuda.FEWEST_SLOTS


def test_refusals_name_what_is_not_taken():
    x = make()
    with pytest.raises(ValueError, match="query has rows of 20"):
        step(x, 9, backend="cuda")
    x = of_eights(OPTIONS["rotary"])
    with pytest.raises(ValueError, match="key_rotary"):
        step(x, 9, backend="cuda")
    x = of_eights(dtype=torch.bfloat16, d=32)
    x["key"] = torch.randn(3, 3, K, 11, 2, 36).bfloat16()[..., 4:]
    with pytest.raises(ValueError, match="key has strides"):
        step(x, 9, backend="cuda")


@pytest.mark.parametrize("test", ["test_schema", "test_faketensor"])
def test_opcheck(test):
    project = torch.ops.retro_kernels.decode_project_cuda.default
    torch.library.opcheck(project, [torch.randn(2, 4, 8), torch.randn(2, 8, 16), False], test_utils=test)
    torch.library.opcheck(project, [torch.randn(2, 4, 16), torch.randn(2, 8, 16), True], test_utils=test)
    x = of_eights()
    arguments = [x["query"][:, :1].contiguous(), x["key"][:, 0], x["value"][:, 0], *(11 * [None])]
    arguments[11] = torch.tensor([9, 9, 9])
    torch.library.opcheck(
        torch.ops.retro_kernels.decode_cuda.default, [*arguments, False, 0.3, 0.0, M], test_utils=test
    )


@pytest.mark.parametrize("what", ["NaN of query", "NaN of key", "NaN of value", "inf of query", "NaN of null_key"])
def test_what_is_not_finite_comes_out_as_of_pytorch(what):
    """Of sequence 1 alone, and of its head and the tokens that the number belongs to: NaN, and an lse of inf where a
    logit is; 300 slots are several tiles."""
    x = of_eights(("mask", "null"), k=3, r=100)
    name = what.split(" of ")[1]
    clean = step(x, 9, 2, backend="cuda")
    spoilt = x | {name: x[name].clone()}
    value = float("nan") if what.startswith("NaN") else float("inf")
    seen = int(x["neighbour_mask"][1, 0].flatten().nonzero()[5])
    if name == "query":
        spoilt[name][1, 9, 2, 3] = value
    elif name == "null_key":
        spoilt[name][2, 3] = value
    else:
        spoilt[name][1, 0].view(300, *x[name].shape[4:])[seen, 1, 3] = value  # heads 2 and 3
    out, lse = step(spoilt, 9, 2, backend="cuda")
    touched = torch.zeros(3, 2, 4, dtype=torch.bool)
    all_of = slice(None)
    places = {"query": (1, 0, 2), "null_key": (all_of, all_of, 2)}
    touched[places.get(name, (1, all_of, slice(2, 4)))] = True
    assert torch.equal(out.isnan().any(-1), touched)
    assert out[touched].isnan().sum() == touched.sum() * (1 if name == "value" else out.shape[-1])
    assert torch.equal(out[~touched], clean[0][~touched])
    assert torch.equal(lse[~touched], clean[1][~touched])
    if name == "value":
        assert torch.equal(lse, clean[1])
    elif what.startswith("inf"):
        assert (lse[touched] == value).all()
    else:
        assert lse[touched].isnan().all()


def test_large_logits_give_no_weight_above_one():
    """The null slot's logit is rounded to 2^-24 of itself, hundreds at 1e10: less the largest it is at most 0."""
    for seed in range(20):
        x = of_eights(("null",), seed=seed)
        x |= {"value": torch.ones_like(x["value"]), "null_value": torch.ones_like(x["null_value"]), "scale": 1e10}
        out, lse = step(x, 9, 1, backend="cuda")
        assert (out == 1).all()
        assert lse.isfinite().all()
