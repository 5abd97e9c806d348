"""Decoding against the full computation, on every backend: all options, every dtype, borders, quantised caches."""

from __future__ import annotations

import pytest
import torch

import retro_kernels as rk
from retro_kernels.ops.attention import reference as attention
from retro_kernels.ops.backends import DECODING as BACKENDS
from retro_kernels.ops.decoding import common as common_decode
from retro_kernels.ops.decoding.triton import configs

M, K, R, H, D = 8, 2, 11, 4, 20


# The CUDA kernels take rows of a multiple of 8 numbers and have their cases in test_decode_cuda.py.
@pytest.fixture(params=[name for name in BACKENDS if name != "cuda"])
def backend(request):
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one after the other; test_decode_triton.py has calls of many."""
    monkeypatch.setattr(configs, "PROGRAMS", 1)


@pytest.fixture(autouse=True)
def _guarded(guarded):
    """Every call's memory, not some test's alone."""


OPTIONS = {
    "plain": (),
    "mask": ("mask",),
    "bias": ("bias",),
    "bias_wide": ("bias_wide", "mask"),
    "null": ("null",),
    "relative": ("relative", "null", "bias_wide"),
    "rotary": ("rotary", "null"),
    "rotary_interleaved": ("rotary", "interleaved"),
    "everything": ("mask", "relative", "null", "bias"),
}


def make(options=(), dtype=torch.float32, b=3, m=M, k=K, r=R, h=H, hk=2, d=D, dv=12, l=3, seed=0):
    """The keyword arguments of a full call of l chunks."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    n = (l + 1) * m - 1
    x = {"query": draw(b, n, h, d), "key": draw(b, l, k, r, hk, d), "value": draw(b, l, k, r, hk, dv), "chunk_size": m}
    if "mask" in options:
        x["neighbour_mask"] = torch.rand(b, l, k, r, generator=generator) > 0.4
        x["neighbour_mask"][:1, 0] = False
    if "bias" in options:
        x["attention_bias"] = draw(h, m, r)
    if "bias_wide" in options:
        x["attention_bias"] = draw(h, m, k * r)
    if "null" in options:
        x |= {"null_key": draw(h, d), "null_value": draw(h, dv)}
    if "relative" in options:
        x |= {"relative_key": draw(h, m + r - 1, d), "content_bias": draw(h, d), "relative_bias": draw(h, d)}
    if "rotary" in options:
        for name, count in (("query_rotary", m), ("key_rotary", r)):
            angle = draw(count, d // 2 - 1).double()
            x[name] = tuple(
                y.to(torch.float64 if dtype == torch.float64 else torch.float32) for y in (angle.cos(), angle.sin())
            )
        x["rotary_interleaved"] = "interleaved" in options
    return x


def step(x, position, t=1, backend=None, turned=False, **more):
    """Decodes t tokens of every sequence from `position` on, all at the same place of the full call `x`."""
    chunk = max(position - (x["chunk_size"] - 1), 0) // x["chunk_size"]
    y = dict(x) | {"query": x["query"][:, position : position + t]}
    for name in ("key", "value", "neighbour_mask"):
        if name in y:
            y[name] = y[name][:, chunk]
    if turned:
        y["key"] = attention.rotate(y["key"].float(), y.pop("key_rotary"), y["rotary_interleaved"]).to(y["key"].dtype)
    places = torch.full((y["query"].shape[0],), position)
    return rk.chunked_cross_attention_decode(**y, position=places, return_lse=True, backend=backend, **more)


def close(given, expected, tolerance):
    for g, e in zip(given, expected):
        g, e = g.double(), e.double()
        finite = e.isfinite()
        assert torch.equal(g.isfinite(), finite)
        assert torch.equal(g[~finite], e[~finite])
        if finite.any():
            assert (g - e)[finite].abs().max() <= tolerance * max(e[finite].abs().max().item(), 0.1)


@pytest.mark.parametrize("name", OPTIONS)
def test_token_by_token_is_the_full_computation(name, backend):
    """Every token, over two borders; in the interpreter those at the borders. On the reference bit for bit: the
    reference computes a token inside its chunk."""
    slow = backend == "triton"
    x = make(OPTIONS[name], b=2 if slow else 3)
    full = rk.chunked_cross_attention(**x, return_lse=True, backend="reference")
    for position in (M - 2, M - 1, 2 * M - 2, 2 * M - 1) if slow else range(x["query"].shape[1]):
        given = step(x, position, backend=backend)
        expected = tuple(y[:, position : position + 1] for y in full)
        if backend == "reference":
            assert all(torch.equal(g, e) for g, e in zip(given, expected)), position
        close(given, expected, 1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_keys_turned_before_or_now(turned, backend):
    x = make(OPTIONS["rotary"])
    full = rk.chunked_cross_attention(**x, return_lse=True, backend="reference")
    close(step(x, M + 2, t=3, backend=backend, turned=turned), tuple(y[:, M + 2 : M + 5] for y in full), 1e-5)


SHAPES = (
    {"h": 1, "hk": 1, "d": 1, "dv": 1},
    {"h": 6, "hk": 6, "d": 128, "dv": 128, "r": 70},
    {"h": 32, "hk": 1, "d": 64},
    {"b": 1, "h": 2, "hk": 1, "k": 3, "r": 150},
    {"h": 2, "hk": 2, "d": 300, "dv": 260},
    {"k": 1, "r": 1},
    {"k": 0},
    {"b": 0},
    {"r": 0},
    {"m": 1},
    {"b": 1, "h": 40, "hk": 40, "d": 16, "r": 64},
)


@pytest.mark.parametrize("options", [(), ("mask", "null", "bias_wide"), ("mask", "rotary")], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, options, backend):
    if "rotary" in options and shape.get("d", D) in (1, 300):
        pytest.skip("too few or too many dimensions to turn")
    slow = backend == "triton"
    if slow and (shape.get("h", 0) > 5 or (not options and len(shape) > 1)):
        pytest.skip("nothing that the other shapes do not show, and slow in the interpreter")
    x = make(options, **{"b": 1, **shape} if slow else shape)
    m = x["chunk_size"]
    full = rk.chunked_cross_attention(**x, return_lse=True, backend="reference")
    for position, t in ((2 * m, 1), (max(m - 3, 0), min(4, m)))[slow:]:
        close(step(x, position, t, backend=backend), tuple(y[:, position : position + t] for y in full), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "everything", "rotary"])
def test_half_precision_is_within_twice_the_error_of_pytorch(name, dtype, backend, monkeypatch):
    x = make(OPTIONS[name], dtype)
    wide = {
        n: y.double()
        if isinstance(y, torch.Tensor) and y.is_floating_point()
        else tuple(z.double() for z in y)
        if isinstance(y, tuple)
        else y
        for n, y in x.items()
    }
    expected = step(wide, 11, t=4, backend="reference")[0]
    given = step(x, 11, t=4, backend=backend)[0].double()
    monkeypatch.setattr(attention, "accumulation_dtype", lambda dtype: dtype)
    plain = step(x, 11, t=4, backend="reference")[0].double()
    floor = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype] * expected.abs().max()
    assert (given - expected).abs().max() <= 2 * (plain - expected).abs().max() + floor


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("hk", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_caches(kind, hk, dtype, backend):
    """Against the dequantised cache: all 256 values of the type but NaN occur."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[~codes.view(kind).float().isnan()]

    def draw(*shape):
        picked = torch.randint(len(codes), shape, generator=generator)
        return codes[picked].view(kind), torch.rand(shape[:3], generator=generator) / (
            448 if kind.is_floating_point else 127
        )

    key, key_scale = draw(2, 3, 40, hk, 33)
    value, value_scale = draw(2, 3, 40, hk, 18)
    query = torch.randn(2, 2, 4, 33, generator=generator).to(dtype)
    places = torch.tensor([9, 18])
    given = rk.chunked_cross_attention_decode(
        query, key, value, key_scale=key_scale, value_scale=value_scale, chunk_size=8, position=places, backend=backend
    )
    expected = rk.chunked_cross_attention_decode(
        query.double(),
        key.double() * key_scale[..., None, None],
        value.double() * value_scale[..., None, None],
        chunk_size=8,
        position=places,
        backend="reference",
    )
    close((given,), (expected,), 1e-5 if dtype == torch.float32 else 8e-3)


def test_every_sequence_at_its_own_position_and_invalid_ones_unread(backend):
    x = make(("mask", "null", "bias"), b=4)
    full = rk.chunked_cross_attention(**x, backend="reference")
    positions = torch.tensor([2, 9, -5, 23])
    valid = torch.tensor([True, True, False, True])
    chunks = [0, 0, 0, 2]
    picked = {n: torch.stack([x[n][i, c] for i, c in enumerate(chunks)]) for n in ("key", "value", "neighbour_mask")}
    for name in ("key", "value"):
        picked[name][2] = float("nan")
    query = torch.stack([x["query"][i, max(int(p), 0)] for i, p in enumerate(positions)])[:, None]
    query[2] = float("nan")
    out = rk.chunked_cross_attention_decode(
        **(x | picked | {"query": query}), position=positions, valid=valid, backend=backend
    )
    for i in (0, 1, 3):
        close((out[i, 0],), (full[i, positions[i]],), 1e-5)
    assert not out[2].any()


def test_masked_tokens_reach_nothing(backend):
    x = make(("mask", "null"))
    clean = step(x, 9, backend=backend)
    for name in ("key", "value"):
        x[name][~x["neighbour_mask"]] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(step(x, 9, backend=backend), clean))


@pytest.mark.parametrize("first", range(2 * M))
def test_the_border_raises_at_every_position_of_a_chunk(first, backend):
    """t tokens from `first` on are decoded up to the border, and one more raises before anything is computed."""
    x = make()
    if backend == "triton" and first % 9 != 8:
        pytest.skip("what raises is the same for all backends")
    border = (max(first - (M - 1), 0) // M + 2) * M - 1
    step(x, first, border - first, backend=backend)
    with pytest.raises(ValueError, match="border"):
        step(x, first, border - first + 1, backend=backend)


def test_a_cache_of_another_chunk_and_negative_positions_raise(backend):
    x = make()
    with pytest.raises(ValueError, match="holds chunk 2"):
        step(x, 9, backend=backend, chunk=torch.tensor([0, 2, 0]))
    y = dict(x) | {"query": x["query"][:, :1], "key": x["key"][:, 0], "value": x["value"][:, 0]}
    with pytest.raises(ValueError, match="-1"):
        rk.chunked_cross_attention_decode(**y, position=torch.tensor([3, -1, 3]), backend=backend)


def test_beyond_the_border_is_nan_where_nothing_can_be_raised(backend):
    """In a compiled graph, as on a GPU."""
    x = make()
    torch._dynamo.reset()

    def call(query, key, value, position):
        return rk.chunked_cross_attention_decode(query, key, value, chunk_size=M, position=position, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out = compiled(x["query"][:, 12:16], x["key"][:, 0], x["value"][:, 0], torch.tensor([12, 13, -2]))
    full = rk.chunked_cross_attention(**x, backend="reference")
    close((out[0, :3],), (full[0, 12:15],), 1e-5)
    assert out[0, 3].isnan().all()
    assert out[1, 2:].isnan().all()
    assert not out[1, :2].isnan().any()
    assert out[2, :2].isnan().all()
    assert not out[2, 2:].any()


@pytest.mark.parametrize("hk", [1, 2])
@pytest.mark.parametrize("options", [(), ("mask", "null", "bias"), ("mask", "relative", "null")], ids=str)
@pytest.mark.parametrize("biases", [False, True])
def test_projected_is_the_projection_made(hk, options, biases, backend):
    x = make(options, hk=hk)
    encoded, w_key, w_value = torch.randn(3, K, R, 37), torch.randn(hk, D, 37) / 6, torch.randn(hk, 12, 37) / 6
    bias_key, bias_value = (torch.randn(hk, D), torch.randn(hk, 12)) if biases else (None, None)
    key, value = (torch.einsum("bkre,hde->bkrhd", encoded.double(), w.double()) for w in (w_key, w_value))
    if biases:
        key, value = key + bias_key, value + bias_value
    common_arguments = {n: y for n, y in x.items() if n not in ("query", "key", "value", "neighbour_mask")}
    if "mask" in options:
        common_arguments["neighbour_mask"] = x["neighbour_mask"][:, 0]
    places = torch.tensor([3, 7, 11])
    query = x["query"][:, :3]
    wide = {
        n: y.double() if isinstance(y, torch.Tensor) and y.is_floating_point() else y
        for n, y in common_arguments.items()
    }
    expected = rk.chunked_cross_attention_decode(
        query.double(), key, value, position=places, return_lse=True, backend="reference", **wide
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
        backend=backend,
        **common_arguments,
    )
    close(given, expected, 1e-5)


def test_projected_with_wide_states(backend):
    e = 1100 if backend == "triton" else 4096  # the interpreter is slow
    query, encoded = torch.randn(1, 1, 4, 16), torch.randn(1, 2, 40, e)
    w_key, w_value = torch.randn(4, 16, e) / 64, torch.randn(4, 16, e) / 64
    arguments = {"chunk_size": 8, "position": torch.tensor([9])}
    expected = rk.projected_chunked_cross_attention_decode(
        *(x.double() for x in (query, encoded, w_key, w_value)), backend="reference", **arguments
    )
    given = rk.projected_chunked_cross_attention_decode(query, encoded, w_key, w_value, backend=backend, **arguments)
    close((given,), (expected,), 1e-5)


def test_rotary_keys_are_refused_by_name():
    x = torch.randn(1, 1, 1, 4)
    table = (torch.ones(8, 2), torch.zeros(8, 2))
    for name in ("query_rotary", "key_rotary"):
        with pytest.raises(ValueError, match=f"{name}: .*after W_k"):
            rk.projected_chunked_cross_attention_decode(
                x,
                torch.randn(1, 1, 3, 5),
                torch.randn(1, 4, 5),
                torch.randn(1, 4, 5),
                chunk_size=8,
                position=torch.tensor([9]),
                **{name: table},
            )


def test_gradients_are_refused_by_the_kernels_and_made_by_the_reference():
    x = make()
    x["query"].requires_grad_()
    if BACKENDS["cpu"].unavailable() is None:
        with pytest.raises(ValueError, match="no_grad"):
            step(x, 9, backend="cpu")
        with torch.no_grad():
            step(x, 9, backend="cpu")
    out, _ = step(x, 9, backend="reference")
    out.sum().backward()
    assert x["query"].grad[:, 9].abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("key", torch.zeros(3, K, R, 2, D, dtype=torch.float64), TypeError),
        ("key", torch.zeros(3, K, R, 2, D, dtype=torch.int8), ValueError),
        ("key", torch.zeros(3, K, R, 2, D + 1), ValueError),
        ("value", torch.zeros(3, K, R + 1, 2, 12), ValueError),
        ("value", torch.zeros(3, K, R, 2, 12, device="meta"), ValueError),
        ("position", torch.zeros(3, dtype=torch.int32), TypeError),
        ("position", torch.zeros(2, dtype=torch.int64), ValueError),
        ("valid", torch.zeros(3), TypeError),
        ("key_scale", torch.ones(3, K, R), ValueError),
    ],
)
def test_bad_input_is_named(name, value, error):
    x = make()
    y = {
        **x,
        "query": x["query"][:, :1],
        "key": x["key"][:, 0],
        "value": x["value"][:, 0],
        "position": torch.zeros(3, dtype=torch.int64),
        name: value,
    }
    with pytest.raises(error, match=name):
        rk.chunked_cross_attention_decode(**y)


@pytest.mark.skipif(BACKENDS["cpu"].unavailable() is not None, reason="no compiled kernels")
class TestTheCpuKernels:
    @pytest.fixture(autouse=True)
    def _highest_level_afterwards(self):
        from retro_kernels import extension

        yield
        extension.set_isa("")

    def test_every_level_and_any_number_of_threads(self):
        from retro_kernels import extension

        cases = [make(("mask", "null"), h=8, hk=8, r=100), make(("mask", "rotary"), h=8, hk=1, r=100)]
        for isa in extension.usable_isas():
            extension.set_isa(isa)
            for x in cases:
                expected = step(x, 9, backend="reference")
                first = step(x, 9, backend="cpu")
                close(first, expected, 1e-5)
                torch.set_num_threads(2)
                again = step(x, 9, backend="cpu")
                torch.set_num_threads(1)
                assert all(torch.equal(a, b) for a, b in zip(first, again))
            for kind in (torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float16):
                dtype = torch.float32 if kind in (torch.int8, torch.float8_e4m3fn) else kind
                scale = torch.ones(2, 1, 30) if dtype == torch.float32 else None
                cache = torch.randint(-8, 9, (2, 1, 30, 2, 37)).to(kind)
                query = torch.randn(2, 1, 2, 37).to(dtype)
                arguments = {
                    "chunk_size": 8,
                    "position": torch.tensor([9, 9]),
                    "key_scale": scale,
                    "value_scale": scale,
                }
                given, expected = (
                    rk.chunked_cross_attention_decode(query, cache, cache, backend=name, **arguments)
                    for name in ("cpu", "reference")
                )
                close((given,), (expected,), 1e-5 if dtype == torch.float32 else 1e-2)

    def test_relative_positions_and_any_number_of_threads(self):
        """One head and eight rows: PyTorch's product of those and the table has other bits for three threads."""
        x = make(("relative", "bias"), b=8, r=12, h=1, hk=1)
        threads = torch.get_num_threads()
        try:
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(step(x, 9, backend="cpu"))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_projecting(self, dtype):
        """Against fp64 at every level, for few rows and many, shared and own weights, sizes that fill no vector, ranges
        of columns, and rows that do not lie side by side; any number of threads gives the same bits."""
        from retro_kernels import extension
        from retro_kernels.ops.decoding import cpu

        for isa in extension.usable_isas():
            extension.set_isa(isa)
            for n, h, hk, d, e in ((1, 4, 4, 33, 300), (3, 4, 1, 16, 70), (9, 6, 3, 5, 7), (2, 2, 2, 130, 64)):
                w = torch.randn(hk, d, e + 2).to(dtype)[..., :e]
                for x, transposed in (
                    (torch.randn(n, d, h).to(dtype).transpose(1, 2), False),
                    (torch.randn(n, h, e + 1).to(dtype)[..., 1:], True),
                ):
                    given = cpu._project_few(x.contiguous() if x.stride(-1) != 1 else x, w, transposed)
                    expected = common_decode.project(x.double(), w.double(), transposed)
                    limit = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
                    assert (given.double() - expected).abs().max() <= limit * expected.abs().max()
                    torch.set_num_threads(2)
                    again = cpu.project(x, w, transposed) if n < 9 else cpu._project_few(x.contiguous(), w, transposed)
                    torch.set_num_threads(1)
                    assert torch.equal(given, again)

    @pytest.mark.parametrize("test", ["test_schema", "test_faketensor"])
    def test_opcheck(self, test):
        project = torch.ops.retro_kernels.decode_project_cpu.default
        torch.library.opcheck(project, [torch.randn(2, 4, 5), torch.randn(2, 5, 7), False], test_utils=test)
        torch.library.opcheck(project, [torch.randn(2, 4, 7), torch.randn(2, 5, 7), True], test_utils=test)
        x = make()
        op = torch.ops.retro_kernels.decode_cpu.default
        arguments = [x["query"][:, :1].contiguous(), x["key"][:, 0], x["value"][:, 0], *(11 * [None])]
        arguments[11] = torch.tensor([9, 9, 9])
        torch.library.opcheck(op, [*arguments, False, 0.3, 1.5, M], test_utils=test)
