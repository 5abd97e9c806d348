"""What is particular to the Triton backend: every tile loop, launch settings, 64-bit offsets, tuning, refusals.

The options against the reference are in test_conformance.py; here small tiles are forced, so that tiny shapes run
every loop of the kernels in the interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import types

import cases
import pytest
import torch

import retro_kernels as rk
from retro_kernels.ops import tuning
from retro_kernels.ops.attention import common
from retro_kernels.ops.attention.triton import arguments, configs
from retro_kernels.ops.attention.triton import launch as backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable())),
    pytest.mark.usefixtures("guarded"),
]


def small_tiles(block_rows=16, block_keys=16, relative=16):
    """The same tile for every kind but that of the relative gradients, whose tiles are square."""
    settings = configs.LaunchSettings(block_rows, block_keys, num_warps=4, num_stages=1)
    square = configs.LaunchSettings(relative, relative, num_warps=4, num_stages=1)
    return configs.override(**{**dict.fromkeys(configs.KINDS, settings), "backward_relative": square})


def agree(case, dtype=torch.float32):
    arguments = cases.make(case, dtype, DEVICE)
    grad_out = torch.randn(case.out_shape, device=DEVICE)
    expected = cases.run(cases.as_dtype(arguments, torch.float64), "reference", grad_out.double())
    given = cases.run(arguments, "triton", grad_out)
    cases.assert_close(given, expected, 1e-5)
    return arguments, grad_out, given


@pytest.mark.parametrize(
    ("rows", "keys", "two_passes"),
    [(32, 16, False), (16, 16, True), (16, 32, True)],
    ids=["single pass, several key tiles", "two passes, several of both", "two passes, tiles across neighbours"],
)
@pytest.mark.parametrize("options", [(), ("mask", "bias", "rotary", "null")], ids=["plain", "options"])
def test_every_tile_loop(rows, keys, two_passes, options, monkeypatch):
    """20 rows and 2 x 19 keys in tiles of 16 and 32: tiles are cut by the end of the chunk and of a neighbour."""
    launched = []
    run = backend.Launch.__call__
    monkeypatch.setattr(backend.Launch, "__call__", lambda self: (launched.append(self.kind), run(self))[1])
    with small_tiles(rows, keys):
        agree(cases.Case("", b=1, n=45, m=20, k=2, r=19, h=1, d=16, options=options))
    passes = ["backward_queries", "backward_keys"] if two_passes else ["backward"]
    assert launched == ["forward", *passes, *(["backward_bias", "backward_null"] if options else [])]


def test_grouped_heads_take_two_passes_and_agree():
    with small_tiles():
        agree(cases.Case("", b=1, n=30, m=20, k=2, r=9, h=4, hk=2, d=16, options=("mask", "bias", "null")))


def test_bias_shared_by_neighbours_shorter_than_a_tile():
    """Several neighbours add to one element of the bias gradient, which one tile must never do."""
    with small_tiles():
        agree(cases.Case("", b=2, n=23, m=8, k=5, r=3, h=2, d=8, options=("bias",)))


def test_more_items_than_partial_copies():
    """Each of the 32 copies takes several (batch, chunk) items."""
    agree(cases.Case("", b=3, n=47, m=4, k=1, r=3, h=1, d=4, options=("bias", "null")))


def test_long_offsets_compute_the_same(monkeypatch):
    """The 64-bit variant, which tensors beyond 2^31 elements take, is bitwise the 32-bit one."""
    arguments, grad_out, short = agree(cases.Case("", b=1, n=29, m=8, k=2, r=5, h=2, d=8, options=cases.ALL))
    monkeypatch.setattr(backend, "_needs_long_offsets", lambda *_: True)
    long = cases.run(arguments, "triton", grad_out)
    for name, x in short.items():
        assert torch.equal(long[name], x), name


@pytest.mark.parametrize(("shape", "long"), [((1, 4, 2, 128, 32, 128), False), ((1, 4, 40, 2048, 256, 128), True)])
def test_long_offsets_are_taken_when_a_chunk_is_beyond_2_31_elements(shape, long):
    key = torch.empty(shape, device="meta")
    query = torch.empty(1, 1, 1, 256, shape[4], 128, device="meta")
    call = common.Call(query=query, key=key, value=key, grouping=common.CLOCK, scale=1.0, stride=64, first_token=63)
    assert backend._needs_long_offsets(call, query) is long


@pytest.mark.parametrize(
    ("case", "tile", "passes"),
    [
        (cases.Case("", "self", b=1, l=1, r=20, h=2, d=8), (32, 16), ["backward"]),
        (cases.Case("", "self", b=1, l=1, r=20, h=2, hk=1, d=8), (16, 32), ["backward_shared"]),
        (cases.Case("", "self", b=1, l=1, r=20, h=2, hk=1, d=8), (16, 16), ["backward_sweeps"]),
        (
            cases.Case("", "self", b=1, l=1, k=1, r=20, h=2, hk=1, d=8, causal=True, documents=(9, 11)),
            (16, 16),
            ["backward_queries", "backward_keys"],
        ),
        (cases.Case("", "cross", b=1, l=2, m=12, r=20, h=2, hk=1, d=8), (16, 16), ["backward_shared"]),
        (cases.Case("", "cross", b=1, l=1, m=20, r=20, h=1, d=8), (16, 16), ["backward_queries", "backward_keys"]),
    ],
    ids=["rows", "keys", "sweeps", "causal", "chunk", "long chunk"],
)
@pytest.mark.parametrize("relative", [False, True], ids=["plain", "relative"])
def test_every_form_of_the_backward(case, tile, passes, relative, monkeypatch):
    """Of both encoder attentions, with dropout on: the single passes, the sweeps and the two launches."""
    launched = []
    run = backend.Launch.__call__
    monkeypatch.setattr(backend.Launch, "__call__", lambda self: (launched.append(self.kind), run(self))[1])
    options = ("relative", "relative_biases") if relative else ()
    with small_tiles(*tile, relative=16):
        agree(dataclasses.replace(case, dropout_p=0.3, options=options))
    assert launched == ["forward", *passes, *(["backward_relative"] if relative else [])]


M, SCALE = 4, 0.5


def chunk_by_chunk(x):
    """Chunked cross-attention as PyTorch's softmax has it, in fp64, of the visible slots of one chunk and head at a
    time, so that nothing reaches what does not depend on it. A row whose logits are all -inf gives 0."""
    (b, n, h, _), num_chunks = x["query"].shape, x["key"].shape[1]
    outs, lses = x["query"].new_zeros(b, n, h, x["value"].shape[-1]), x["query"].new_full((b, n, h), float("-inf"))
    places, parts = [], []
    for sequence in range(b):
        for chunk in range(num_chunks):
            tokens = [i for i in range(n) if i >= M - 1 and min((i - M + 1) // M, num_chunks - 1) == chunk]
            seen = x["neighbour_mask"][sequence, chunk].flatten()
            for head in range(h):
                key, value = (x[name][sequence, chunk, :, :, head].flatten(0, 1)[seen] for name in ("key", "value"))
                rows = torch.tensor([(i - M + 1) % M for i in tokens])
                bias = x["attention_bias"][head][rows].repeat(1, x["key"].shape[2])[:, seen]
                query = x["query"][sequence, tokens, head]
                logits = SCALE * (query[:, None] * key).sum(-1) + bias
                if "null_key" in x:
                    null = SCALE * (query * x["null_key"][head]).sum(-1, keepdim=True)
                    logits = torch.cat([null, logits], dim=1)
                    value = torch.cat([x["null_value"][head][None], value])
                nothing = (logits == float("-inf")).all(1, keepdim=True)
                weights = torch.softmax(torch.where(nothing, 0.0, logits), dim=1)
                parts.append(torch.where(nothing, 0.0, (weights[..., None] * value).sum(1)))
                places.append((sequence, tokens, head))
                lses[sequence, tokens, head] = torch.logsumexp(logits.detach(), dim=1)
    for (sequence, tokens, head), part in zip(places, parts):
        outs[sequence, tokens, head] = part
    return outs, lses


NAN, INF, LOWEST = float("nan"), float("inf"), torch.finfo(torch.float32).min
POISON = {
    "NaN in a query": [("query", (0, 5, 1, 2), NAN)],
    "NaN in a key": [("key", (0, 1, 0, 2, 0, 1), NAN)],
    "NaN in a value": [("value", (0, 0, 1, 0, 1, 3), NAN)],
    "NaN in a bias": [("attention_bias", (1, 2, 1), NAN)],
    "+inf in a bias": [("attention_bias", (0, 1, 2), INF)],
    "+inf and NaN in one row": [("attention_bias", (0, 1, 2), INF), ("attention_bias", (0, 1, 1), NAN)],
    "a row of -inf": [("attention_bias", (1, 2), -INF)],
    "a row of -1e30": [("attention_bias", (1, 2), -1e30)],
    "rows of the lowest number": [("attention_bias", (1, 2), LOWEST), ("attention_bias", (0, 0), LOWEST)],
    "NaN in the null key": [("null_key", (1, 0), NAN)],
    "+inf in the null key": [("null_key", (0, 3), INF)],
}


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # NumPy's, in the interpreter
@pytest.mark.parametrize("two_passes", [False, True], ids=["one launch", "two launches"])
@pytest.mark.parametrize("name", POISON)
def test_what_is_not_finite_reaches_all_that_depends_on_it_and_nothing_else(name, two_passes):
    """As in PyTorch. The masked slots hold NaN, and so do the queries before the first chunk; rows that saw nothing
    have the log-sum-exp -inf, and no others have."""
    torch.manual_seed(1)
    b, n, k, r, h, d = 1, 10, 2, 3, 2, 4
    x = {
        "query": torch.randn(b, n, h, d),
        "key": torch.randn(b, 2, k, r, h, d),
        "value": torch.randn(b, 2, k, r, h, d),
        "attention_bias": torch.randn(h, M, r),
    }
    if "null" in name:
        x |= {"null_key": torch.randn(h, d), "null_value": torch.randn(h, d)}
    mask = torch.ones(b, 2, k, r, dtype=torch.bool)
    mask[0, 0, 1, 2] = mask[0, 1, 0, 0] = False
    x["key"][~mask], x["value"][~mask], x["query"][:, : M - 1] = NAN, NAN, NAN
    for target, place, value in POISON[name]:
        x[target][place] = value
    x = {name: tensor.to(DEVICE).requires_grad_() for name, tensor in x.items()}
    grad_out = torch.randn(b, n, h, d)
    doubles = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in x.items()}
    out, lse = chunk_by_chunk({**doubles, "neighbour_mask": mask})
    expected = dict(zip(x, torch.autograd.grad(out, list(doubles.values()), grad_out.double())), out=out, lse=lse)

    with small_tiles() if two_passes else contextlib.nullcontext():
        out, lse = rk.chunked_cross_attention(
            **x, neighbour_mask=mask.to(DEVICE), chunk_size=M, scale=SCALE, return_lse=True, backend="triton"
        )
        given = dict(zip(x, torch.autograd.grad(out, list(x.values()), grad_out.to(DEVICE))), out=out, lse=lse)
    for what, tensor in expected.items():
        if what == "lse" and "lowest" in name:  # in base 2 it saturates: the weights are right, the number is not
            continue
        torch.testing.assert_close(
            given[what].cpu().float(),
            tensor.float(),
            rtol=2e-5,
            atol=2e-5,
            equal_nan=True,
            msg=lambda text, what=what: f"{what}: {text}",
        )


@pytest.mark.parametrize("bias", [False, True])
def test_probabilities_of_large_logits_are_at_most_one(bias):
    """Logits of 1e11, whose log-sum-exp is rounded to a multiple of 8192, give weights of 0 and 1."""
    torch.manual_seed(0)
    x = {
        name: torch.randn(1, *shape, device=DEVICE)
        for name, shape in {"query": (5, 1, 4), "key": (1, 1, 5, 1, 4), "value": (1, 1, 5, 1, 4)}.items()
    }
    x["query"] *= 1e11
    if bias:
        x["attention_bias"] = torch.randn(1, M, 5, device=DEVICE)
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    out = rk.chunked_cross_attention(**x, chunk_size=M, backend="triton")
    wide = {name: tensor.detach().double() for name, tensor in x.items()}
    expected = rk.chunked_cross_attention(**wide, chunk_size=M, backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    grad_out = torch.ones_like(out)
    (of_value,) = torch.autograd.grad(out, x["value"], grad_out, retain_graph=True)
    assert of_value.isfinite().all()
    assert of_value.max() <= 2 + 1e-5, "there are two rows, and no weight exceeds 1"
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out, list(x.values()), grad_out))


def test_bitwise_deterministic_in_two_passes():
    arguments = cases.make(
        cases.Case("", b=2, n=45, m=20, k=2, r=7, h=2, hk=1, d=8, options=cases.ALL), torch.float32, DEVICE
    )
    grad_out = torch.randn(2, 45, 2, arguments["value"].shape[-1], device=DEVICE)
    with small_tiles():
        first = cases.run(arguments, "triton", grad_out)
        again = cases.run(arguments, "triton", grad_out)
    for name, x in first.items():
        assert torch.equal(again[name], x), name


def test_settings_never_depend_on_batch_or_length():
    """Neither the choice nor the compiled variant: lengths are not specialised."""
    lengths = {"num_tokens", "num_chunks", "num_groups", "num_items", "num_slots", "retrieved_length", "first_token"}
    assert set(arguments.LENGTHS) >= lengths


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 64, 128, 256, 384])
@pytest.mark.parametrize("options", configs.FEATURES)
def test_the_rule_covers_everything(sm, dtype, width, options):
    """Every kind has settings; only the single passes and the sweeps may say that they do not fit."""
    for kind in configs.KINDS:
        for rows in (1, 16, 64, 100):
            settings = configs.rule(kind, sm, dtype, width, options, rows)
            if kind in ("backward", "backward_shared", "backward_sweeps") and settings is None:
                continue
            assert min(settings.block_rows, settings.block_keys) >= 16
            assert settings.block_rows <= configs.power_of_two(rows)
            assert configs.candidates(kind, sm, dtype, width, options, rows)[0] == settings


def test_import_and_refusal_without_the_interpreter_or_a_gpu():
    """In a process without TRITON_INTERPRET the module imports, and says why it cannot run."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "from retro_kernels.ops.attention.triton import launch as t; print(t.unavailable())"
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "no CUDA device" in out.stdout
    assert "TRITON_INTERPRET=1" in out.stdout


def test_import_without_triton():
    """Where Triton is not installed the module imports all the same, and `unavailable` names the remedy."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from retro_kernels.ops.attention.triton import launch as t; print(t.unavailable())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install triton" in out.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.empty(1, 1, 1, 4, dtype=torch.float64)}, "float64"),
        ({"value": torch.empty(1, 1, 1, 1, 1, 300)}, "256"),
    ],
)
def test_refusals_name_the_option(change, words):
    call = types.SimpleNamespace(
        query=torch.empty(1, 1, 1, 4, device=DEVICE),
        value=torch.empty(1, 1, 1, 1, 1, 4),
        relative_key=None,
        dropout_p=0.0,
        logit_softcap=0.0,
    )
    assert backend.refusal(call) is None
    vars(call).update(change)
    assert words in backend.refusal(call)


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), True), ((8, 6), False), ((9, 0), True), ((12, 0), False)])
def test_what_does_not_fit_into_99_kib_is_refused(capability, fits, monkeypatch):
    """Gradients with relative positions at 256 wide in fp32, whose smallest tile takes 114 (aot.py)."""
    monkeypatch.setattr(backend, "_INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query = types.SimpleNamespace(dtype=torch.float32, shape=(1, 1, 1, 256), device=torch.device("cuda", 0))
    call = types.SimpleNamespace(query=query, value=query, relative_key=query)
    assert fits == (backend.refusal(call) is None)
    query.shape = (1, 1, 1, 128)
    assert backend.refusal(call) is None


class FakeTimer:
    """Says that one setting is fast, and counts."""

    def __init__(self, fast):
        self.fast, self.seen = fast, []

    def __call__(self, run):
        run()
        (candidate,) = run.args
        self.seen.append(candidate)
        return 1.0 if candidate == self.fast else 2.0


@pytest.fixture
def tuned_in(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, "1")
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(configs, "tuned", {})
    return tmp_path / "tuning.json"


CASE = cases.Case("", b=1, n=9, m=4, k=1, r=3, h=1, d=4)


def test_tuning_takes_the_fastest_and_remembers_it(tuned_in, monkeypatch):
    choice = ("forward", backend._compute_capability(torch.device(DEVICE)), torch.float32, 16, "plain", 4)
    fast = configs.candidates(*choice)[2]
    timer = FakeTimer(fast)
    monkeypatch.setattr(tuning, "median_milliseconds", timer)
    agree(CASE)
    assert configs.tuned[choice] == fast
    entries = json.loads(tuned_in.read_text())["entries"]
    assert len(entries) == len(configs.tuned)
    key = json.loads(next(key for key in entries if '"forward"' in key))
    assert set(key) == {"operation", "choice", "triton", "code", "device"}

    timer.seen.clear()
    configs.tuned.clear()
    agree(CASE)
    assert configs.tuned[choice] == fast
    assert not timer.seen, "the second process tuned again"


def test_a_candidate_that_is_wrong_or_fails_is_left_out():
    def run(candidate):
        if candidate == "fails":
            raise RuntimeError("out of shared memory")
        return [torch.tensor([1.0, 2.0]) * (2 if candidate == "wrong" else 1)]

    times = iter([3.0, 2.0])
    best, record = tuning.tune(["rule", "wrong", "fails", "good"], run, lambda _: next(times))
    assert best == "good"
    assert "differs" in record["wrong"]
    assert "out of shared memory" in record["fails"]


@pytest.mark.parametrize("content", ["{", '{"format": 0, "entries": {}}', "[]", '{"format": 1}'])
def test_a_broken_cache_is_ignored_with_a_warning_and_replaced(content, tuned_in):
    tuned_in.write_text(content)
    with pytest.warns(UserWarning, match="delete it to tune again"):
        assert tuning.load() == {}
    with pytest.warns(UserWarning, match="ignored"):
        tuning.save("key", {"settings": {}})
    assert tuning.load() == {"key": {"settings": {}}}
    names = sorted(file.name for file in tuned_in.parent.iterdir())
    assert names == ["tuning.json", "tuning.json.lock"], "a temporary file was left"


def test_a_cache_entry_that_makes_no_settings_is_tuned_again(tuned_in, monkeypatch):
    monkeypatch.setattr(tuning, "median_milliseconds", FakeTimer(None))
    agree(CASE)
    content = json.loads(tuned_in.read_text())
    content["entries"] = {key: {"settings": {"unknown": 1}} for key in content["entries"]}
    tuned_in.write_text(json.dumps(content))
    configs.tuned.clear()
    with pytest.warns(UserWarning, match="is not understood"):
        agree(CASE)
    assert all(isinstance(settings, configs.LaunchSettings) for settings in configs.tuned.values())


def test_no_tuning_unless_asked(monkeypatch):
    monkeypatch.delenv(tuning.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(configs, "tuned", {})
    agree(CASE)
    assert not configs.tuned
