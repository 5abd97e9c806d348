"""The benchmark suite is honest: what it computes as an alternative is right, what is wrong is never timed, and what
is counted is counted as the design says."""

import functools
from dataclasses import replace

import pytest
import torch

import retro_kernels as rk
from retro_kernels.bench import attention, bench, decoding, projected, suite, timing, verify
from retro_kernels.bench.attention import Attention
from retro_kernels.bench.operations import (
    ATTENTIONS,
    CAUSAL_SELF,
    CCA,
    DECODE,
    DROPOUT,
    ENCODER_CROSS,
    ENCODER_SELF,
    LAYER,
    MODES,
    OPTIONS,
    PLAIN,
    PROJECTED,
    RELATIVE,
    RETRIEVAL,
    STEP,
    Workload,
)
from retro_kernels.bench.variants import WITHOUT, CompileBudget, CompileTimeout
from retro_kernels.bench.workloads import DEFAULT, GOALS, KINDS, QUICK, TINY, WORKLOADS, select

CPU = torch.device("cpu")
GROUPED = Attention("grouped", 4, 16, num_kv_heads=2, sequence_length=45, chunk_size=8, retrieved_length=16, batch=2)
EVERY = select(["tiny"], list(ATTENTIONS), [PLAIN, RELATIVE])
CEILINGS = timing.Ceilings(1e10, {"fp32": 1e11, "bf16": 2e11}, {}, {})


def settings(**changes):
    values = {
        "device": CPU,
        "dtypes": ["fp32"],
        "modes": MODES,
        "protocol": timing.Protocol(seconds=0.0, min_rounds=2, max_rounds=2),
        "budget": CompileBudget(0.0, 0.0),
        "compiled": False,
        "backends": ["reference"],
    }
    return suite.Settings(**{**values, **changes})


class Watcher:
    def __init__(self):
        self.rows = []

    def case(self, text):
        pass

    def step(self, text):
        pass

    def row(self, row):
        self.rows.append(row)


@pytest.mark.parametrize("rows", [False, True], ids=["", "rows"])
@pytest.mark.parametrize("function", [attention.eager, attention.sdpa, attention.flex])
@pytest.mark.parametrize("workload", [GROUPED, *EVERY], ids=lambda w: f"{w.operation}-{w.option}-{w.name}")
def test_alternatives_compute_the_operation(workload, function, rows):
    """Against the fp64 reference, output and gradients, with an incomplete last chunk and with grouped heads."""
    inputs = workload.inputs(torch.float64, CPU)
    truth = verify.Truth(workload, inputs)
    fixed = {"rows": rows}
    if function is attention.flex and workload.operation == CAUSAL_SELF:
        fixed["block_mask"] = attention.causal_block_mask(workload, CPU)
    mode = "forward" if function is attention.flex else "forward+backward"
    way = functools.partial(function, workload, **fixed)
    for error in truth.errors(verify.run(workload, way, verify.leaves(inputs, mode != "forward"), mode)):
        assert error.relative < 1e-12, error


def test_shift_moves_every_row_by_one():
    """Row i, slot t of the shifted logits is the distance i - t."""
    rows, slots = 3, 5
    distances = torch.arange(rows + slots - 1).flip(0).expand(2, rows, -1)  # largest first
    i, t = torch.arange(rows)[:, None], torch.arange(slots)
    assert torch.equal(attention.shift(distances)[1], i - t + slots - 1)


def test_rows_folding_repeats_nothing():
    """Encoder cross-attention folded into rows reads the keys where they are; the repeated form copies them."""
    workload = select(["tiny"], [ENCODER_CROSS])[0]
    query, key, value, _ = workload.inputs(torch.float32, CPU)
    folded = attention.fold(workload, query, key, value, rows=True)
    assert folded.key.data_ptr() == key.data_ptr()
    assert folded.query.data_ptr() == query.data_ptr()
    assert folded.query.shape[2] == workload.num_neighbours * workload.retrieved_length
    repeated = attention.fold(workload, query, key, value)
    assert repeated.key.numel() == workload.num_neighbours * key.numel()


def test_masked_flex_marks_the_same_pairs():
    """The block mask of FlexAttention's own idiom admits exactly the pairs of chunked cross-attention."""
    workload = WORKLOADS["lucidrains"]
    mask = attention.chunk_block_mask(workload, CPU)
    m, keys = workload.chunk_size, workload.keys_per_chunk
    for token, slot in ((62, 0), (63, 0), (63, 255), (63, 256), (126, 255), (127, 255), (127, 256), (2047, 8191)):
        expected = token >= m - 1 and (token - (m - 1)) // m == slot // keys
        assert bool(mask.mask_mod(0, 0, torch.tensor(token), torch.tensor(slot))) == expected


def test_every_row_is_checked_and_timed():
    watcher = Watcher()
    rows = suite.run([TINY], settings(), CEILINGS, watcher)
    assert rows == watcher.rows
    timed = {row.variant for row in rows if row.status == suite.OK}
    assert timed == {"eager", "sdpa[math]", "sdpa[flash]", "retro_kernels[reference]"}
    for row in rows:
        if row.status == suite.OK:
            assert row.errors, row
            assert row.checked == "every element"
            assert row.samples == 2
            assert row.p20_ms <= row.p50_ms <= row.p80_ms
        else:
            assert row.reason, row
            assert row.p50_ms is None


def test_a_wrong_variant_is_not_timed(monkeypatch):
    """A shift off by one token is caught, named, and never gets a time."""

    def shifted(*arguments, **settings):
        return attention.eager(*arguments, **settings).roll(1, dims=1)

    monkeypatch.setattr(attention, "sdpa", shifted)
    for row in suite.run([TINY], settings(), CEILINGS, Watcher()):
        if row.variant.startswith("sdpa"):
            assert row.status == suite.WRONG
            assert row.p50_ms is None
            assert "output: error" in row.reason


@pytest.mark.parametrize("operation", ATTENTIONS)
def test_options_are_timed_beside_none(operation):
    """With positions or dropout, ours stands beside ours without it: checked, in the same rounds, its own counts."""
    cases = select(["tiny"], [operation], [RELATIVE, DROPOUT])
    rows = suite.run(cases, settings(modes=("forward+backward",)), CEILINGS, Watcher())
    for option in (RELATIVE, DROPOUT):
        found = {row.variant: row for row in rows if row.option == option}
        ours, without = found["retro_kernels[reference]"], found["retro_kernels[reference]" + WITHOUT]
        assert (ours.status, without.status, found["eager"].status) == (suite.OK,) * 3
        assert len(ours.errors) == (7 if option == RELATIVE else 4)
        assert len(without.errors) == 4
        assert (ours.flops > without.flops) == (option == RELATIVE)


def test_dropout_of_the_wrong_probability_or_scale_is_seen():
    """PyTorch's own mask cannot be compared; what it must leave alone and change is."""
    workload = replace(select(["tiny"], [ENCODER_SELF], [DROPOUT])[0], sequence_length=256)
    inputs = workload.inputs(torch.float32, CPU)
    truth = verify.Truth(workload.with_option(PLAIN), inputs)

    def outcome(p, scale=1.0):
        torch.manual_seed(0)
        way = functools.partial(attention.eager, workload, dropout_p=p)
        result = verify.run(workload, lambda *tensors: scale * way(*tensors), inputs, "forward")
        return truth.judge_own_dropout(result)

    assert outcome(workload.dropout_p) is None
    assert "noise" in outcome(3 * workload.dropout_p)
    assert "noise" in outcome(0.0)
    assert "on average" in outcome(workload.dropout_p, 1 - workload.dropout_p)


def test_another_dropout_mask_of_ours_is_wrong(monkeypatch):
    """Ours is compared with a reference that drops the same probabilities: another seed does not pass."""
    (workload,) = select(["tiny"], [ENCODER_SELF], [DROPOUT])
    real = Attention.attend

    def reseeded(self, *tensors, backend=None):
        torch.manual_seed(int(tensors[0].dtype == torch.float64))
        return real(self, *tensors, backend=backend)

    monkeypatch.setattr(Attention, "attend", reseeded)
    rows = suite.run([workload], settings(modes=("forward",)), CEILINGS, Watcher())
    assert {row.variant: row.status for row in rows}["retro_kernels[reference]"] == suite.WRONG


def test_a_failing_variant_does_not_stop_the_rest(monkeypatch):
    def broken(*arguments, **settings):
        raise RuntimeError("no kernel is available")

    monkeypatch.setattr(attention, "sdpa", broken)
    rows = suite.run([TINY], settings(modes=("forward",)), CEILINGS, Watcher())
    statuses = {row.variant: row.status for row in rows}
    assert statuses["sdpa[flash]"] == suite.SKIPPED
    assert statuses["eager"] == suite.OK


def test_compile_budget_caps_the_wall_clock():
    budget = CompileBudget(total=10.0, per_variant=0.05)

    def endless():
        with budget.spend():
            while True:
                torch.ones(1)

    with pytest.raises(CompileTimeout):
        endless()
    assert 0.05 <= budget.used < 5
    assert CompileBudget(1.0, 1.0, used=1.0).allowed == 0


def test_compile_beyond_its_budget_is_skipped_and_said():
    rows = suite.run([TINY], settings(modes=("forward",), compiled=True), CEILINGS, Watcher())
    reasons = {row.variant: row.reason for row in rows if row.variant.startswith("compile")}
    assert reasons
    assert all("compile budget" in reason for reason in reasons.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_compare_counts_nan_and_infinity_as_infinite(value):
    truth = torch.ones(3, 4, dtype=torch.float64)
    found = truth.clone()
    found[2, 1] = value
    error = verify.compare("x", found, truth)
    assert error.largest == float("inf")
    assert error.worst == (2, 1)
    assert verify.judge([error], None, "bf16")


def test_judge_allows_twice_the_eager_error_and_no_more():
    def error(relative):
        return verify.Error("output", relative, relative, 1.0, (0,))

    eager = [error(1e-2)]
    assert verify.judge([error(2.0e-2)], eager, "bf16") is None
    assert "output" in verify.judge([error(2.2e-2)], eager, "bf16")
    assert "cosine" in verify.judge([verify.Error("output", 0.0, 0.0, 0.9, (0,))], eager, "bf16")


def test_corners_are_checked_when_everything_is_too_much(monkeypatch):
    """A fault in the last head is seen although only two corners of the tensors are compared."""
    monkeypatch.setattr(verify, "LARGEST_FP64_KEY", 0)
    inputs = GROUPED.inputs(torch.float32, CPU)
    truth = verify.Truth(GROUPED, inputs)
    assert not truth.whole
    result = verify.run(
        GROUPED, functools.partial(attention.eager, GROUPED), verify.leaves(inputs, True), "forward+backward"
    )
    assert verify.judge(truth.errors(result), None, "fp32") is None
    result["key gradient"][-1, ..., -1, :] += 1
    assert "key gradient" in verify.judge(truth.errors(result), None, "fp32")
    result["output"][0, 0, 1] = float("nan")
    assert max(error.largest for error in truth.errors(result)) == float("inf")


def test_no_workload_inherits_from_another():
    assert {kind.__bases__ for kind in KINDS.values()} == {(Workload,)}


def test_counts():
    """FLOPs and bytes of one small shape, by hand: 30 of 37 tokens attend, 4 chunks of 32 keys, 2 heads of 16."""
    assert TINY.attending_tokens == 30
    assert TINY.flops("forward") == 2 * 2 * 30 * 2 * 32 * 16
    assert TINY.flops("forward+backward") == 7 * 2 * 30 * 2 * 32 * 16
    query, key, lse = 37 * 2 * 16 * 4, 4 * 32 * 2 * 16 * 4, 37 * 2 * 4
    assert TINY.bytes("forward", torch.float32) == 2 * query + 2 * key + lse
    assert TINY.bytes("forward+backward", torch.float32) == 6 * query + 6 * key + 2 * lse
    assert GROUPED.bytes("forward", torch.float32) < Attention(**{**vars(GROUPED), "num_kv_heads": None}).bytes(
        "forward", torch.float32
    )


def test_counts_of_the_encoder():
    """By hand: 4 chunks, 2 neighbours of 16 tokens, 2 heads of 16; chunks of 8 activations."""
    own, cross, causal = (select(["tiny"], [name])[0] for name in (ENCODER_SELF, ENCODER_CROSS, CAUSAL_SELF))
    product = 2 * 2 * 16
    assert own.flops("forward") == 2 * product * 4 * 2 * 16 * 16
    assert cross.flops("forward") == 2 * product * 4 * 2 * 16 * 8
    assert causal.flops("forward") == 2 * product * 37 * 38 // 2
    query, key, lse = 4 * 2 * 16 * 32 * 4, 4 * 8 * 32 * 4, 4 * 2 * 16 * 2 * 4
    assert cross.bytes("forward", torch.float32) == 2 * query + 2 * key + lse
    assert own.bytes("forward", torch.float32) == 4 * query + lse


def test_counts_of_relative_positions():
    """One neighbour's products serve all neighbours of a chunk, but every row of the encoder has its own."""

    def more(operation):
        plain, relative = (select(["tiny"], [operation], [option])[0] for option in (PLAIN, RELATIVE))
        return relative.flops("forward") / plain.flops("forward")

    assert more(CCA) == 1.25  # two neighbours share it
    assert more(ENCODER_SELF) == more(ENCODER_CROSS) == more(CAUSAL_SELF) == 1.5
    relative = select(["tiny"], [ENCODER_CROSS], [RELATIVE])[0]
    assert relative.shapes()[3:] == ((2, 16 + 8 - 1, 16), (2, 16), (2, 16))
    table = (23 + 2) * 2 * 16 * 4
    plain = relative.with_option(PLAIN)
    assert relative.bytes("forward", torch.float32) == plain.bytes("forward", torch.float32) + table


def test_truth_head_by_head_is_the_whole_truth(monkeypatch):
    workload = select(["tiny"], [CAUSAL_SELF], [RELATIVE])[0]
    inputs = workload.inputs(torch.float32, CPU)
    whole = verify.Truth(workload, inputs).results[0]
    monkeypatch.setattr(verify, "LARGEST_FP64_LOGITS", 1)
    for name, tensor in verify.Truth(workload, inputs).results[0].items():
        assert torch.allclose(tensor, whole[name], rtol=0, atol=1e-12), name


def test_inputs_are_the_same_numbers_in_every_precision():
    single, half = TINY.inputs(torch.float32, CPU), TINY.inputs(torch.bfloat16, CPU)
    assert all(torch.equal(a, b.float()) for a, b in zip(single, half))


def test_workloads_of_the_design_are_there():
    assert set(WORKLOADS) >= {
        "retro-172m",
        "retro-425m",
        "retro-1.5b",
        "retro-7.5b",
        "megatron-8b",
        "gqa-8b",
        "lucidrains",
    }
    assert [WORKLOADS[f"retro-7.5b-k{k}"].num_neighbours for k in (1, 10, 40)] == [1, 10, 40]
    assert WORKLOADS["retro-172m"].on("cuda").batch == 8
    assert (WORKLOADS["encoder-896"].num_heads, WORKLOADS["encoder-896"].head_dim) == (14, 64)
    assert (WORKLOADS["encoder-4096"].num_heads, WORKLOADS["encoder-4096"].head_dim) == (32, 128)


def test_select():
    """What is not named comes from the table; names are taken with every operation that has them."""

    def found(*arguments, **keywords):
        return {(w.operation, w.option, w.name) for w in select(*arguments, **keywords)}

    assert found() == {(*key, name) for key, names in DEFAULT.items() for name in names}
    assert found(default=QUICK) == {(*key, name) for key, names in QUICK.items() for name in names}
    assert found(["gqa-8b"]) == {(name, PLAIN, "gqa-8b") for name in (CCA, CAUSAL_SELF, PROJECTED, LAYER)}
    assert found(["retro-7.5b-batch-8"]) == {
        (DECODE, PLAIN, "retro-7.5b-batch-8"),
        (STEP, RETRIEVAL, "retro-7.5b-batch-8"),
    }
    assert found(["encoder-896"], [ENCODER_SELF], [DROPOUT]) == {(ENCODER_SELF, DROPOUT, "encoder-896")}
    assert found(None, [CCA], [DROPOUT]) == {(CCA, DROPOUT, "retro-172m")}
    assert len(found(["tiny"], None, list(OPTIONS))) == 12 + 4
    for arguments in (["nothing"], [], []), ([], ["nothing"], []), ([], [], ["nothing"]):
        with pytest.raises(ValueError, match=r"unknown \w+ nothing"):
            select(*arguments)
    with pytest.raises(ValueError, match="no case in common"):
        select(["gqa-8b"], [ENCODER_SELF])


def test_floor_is_the_larger_of_two_times():
    assert CEILINGS.floor_seconds(10**11, 10, "fp32") == (1.0, "arithmetic")
    assert CEILINGS.floor_seconds(10, 10**10, "fp32") == (1.0, "memory")


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.randn(256, 1024)
    size = x.numel() * 4
    scalars = 64  # torch may make one-element tensors of the constants
    assert timing.peak_extra_bytes(lambda: x + 1, CPU) == pytest.approx(size, abs=scalars)
    assert timing.peak_extra_bytes(lambda: (x + 1) * 2, CPU) == pytest.approx(2 * size, abs=scalars)
    assert timing.peak_extra_bytes(lambda: (x + 1).mul_(2), CPU) == pytest.approx(size, abs=scalars)


def test_scratch_memory_leaves_out_what_is_returned_from_when_it_was_allocated():
    x = torch.randn(256, 1024)
    size = x.numel() * 4
    scalars = 64
    found = timing.memory(lambda: x + 1, CPU)
    assert (found.peak, found.scratch) == pytest.approx((size, 0), abs=scalars)
    found = timing.memory(lambda: {"output": ((x + 1).mul_(2) * 3, x)}, CPU)  # an input given back was there before
    assert (found.peak, found.scratch) == pytest.approx((2 * size, size), abs=scalars)

    def later():
        (x + 1) * 2  # two at once, before the result is there
        return x * 3

    found = timing.memory(later, CPU)
    assert (found.peak, found.scratch) == pytest.approx((2 * size, 2 * size), abs=scalars)


def test_what_does_not_fit_into_memory_is_skipped_and_said(monkeypatch):
    monkeypatch.setattr(suite, "available_memory", lambda: 1000.0)
    rows = suite.run([TINY], settings(modes=("forward",)), CEILINGS, Watcher())
    assert [(row.variant, row.status) for row in rows] == [("all", suite.SKIPPED)]
    assert "GB of memory" in rows[0].reason


def test_percentiles():
    samples = timing.Samples([5.0, 1.0, 3.0, 2.0, 4.0])
    assert [samples.percentile(p) for p in (0, 20, 50, 80, 100)] == pytest.approx([1.0, 1.8, 3.0, 4.2, 5.0])


def test_rounds_are_interleaved():
    calls = []
    variants = {name: timing.Timed(lambda name=name: calls.append(name)) for name in "abc"}
    timing.interleaved(variants, CPU, timing.Protocol(seconds=0.0, min_rounds=4, max_rounds=4, warm_up=0))
    assert [sorted(calls[i : i + 3]) for i in range(0, 12, 3)] == [["a", "b", "c"]] * 4
    assert len({tuple(calls[i : i + 3]) for i in range(0, 12, 3)}) > 1


AROUND = {
    PROJECTED: {"eager", "sdpa[math]", "sdpa[flash]"},
    LAYER: {"eager", "sdpa[math]", "sdpa[flash]"},
    DECODE: {"eager", "sdpa[flash, projected again]", "sdpa[flash, kv]"},
    STEP: {"eager", "sdpa[projected again]", "sdpa[kv]", "retro_kernels without"},
}


@pytest.mark.parametrize("operation", AROUND)
def test_what_is_round_the_attention_is_checked_and_timed(operation):
    """Every alternative and every form of ours agrees with the fp64 reference, and a kernel of ours is among them."""
    (workload,) = select(["tiny"], [operation])
    backends = None if rk.backends()["cpu"].available else ["reference"]
    rows = suite.run([workload], settings(backends=backends), CEILINGS, Watcher())
    ok = {row.variant for row in rows if row.status == suite.OK}
    assert {row.variant: row.reason for row in rows if row.status in (suite.WRONG, suite.FAILED)} == {}
    assert ok >= AROUND[operation]
    own = {name for name in ok - AROUND[operation] if name.startswith("retro_kernels")}
    assert len(own) >= (2 if operation in (DECODE, STEP) else 1)
    assert {row.mode for row in rows} == set(workload.modes)
    for row in rows:
        if row.status == suite.OK:
            assert (row.saved_bytes is not None) == (row.mode != "forward"), row
            assert 0 <= row.scratch_bytes <= row.peak_extra_bytes, row
            assert row.whole_scratch_bytes is None, row
            assert (row.cache_bytes is not None) == (operation in (DECODE, STEP)), row


@pytest.mark.parametrize("operation", [PROJECTED, LAYER, DECODE])
def test_a_wrong_projection_is_not_timed(operation, monkeypatch):
    """Keys and values exchanged: caught in the operation, in the layer and in decoding."""
    name = "reproject_sdpa" if operation == DECODE else "project_then"
    module = decoding if operation == DECODE else projected
    real = getattr(module, name)

    def exchanged(*arguments):
        *rest, w_key, w_value = arguments[: -3 if operation == LAYER else None]
        more = arguments[-3:] if operation == LAYER else ()
        return real(*rest, w_value, w_key, *more)

    monkeypatch.setattr(module, name, exchanged)
    # The eager way of the projected operation is exchanged too, and cannot judge it.
    reference = functools.partial(projected.Projected.attend, backend="reference")
    monkeypatch.setattr(projected.Projected, "eager", lambda workload: functools.partial(reference, workload))
    (workload,) = select(["tiny"], [operation])
    rows = suite.run([workload], settings(modes=("forward",)), CEILINGS, Watcher())
    statuses = {row.variant: row.status for row in rows}
    assert statuses["sdpa[flash, projected again]" if operation == DECODE else "sdpa[flash]"] == suite.WRONG


def test_counts_of_what_is_round_the_attention():
    """By hand, at the tiny shape: 30 tokens attend to 4 chunks of 32 slots of 896 numbers, 2 heads of 16."""
    whole, layer, decode, step = (select(["tiny"], [name])[0] for name in AROUND)
    made = 4 * 4 * 32 * 896 * 32 + 4 * 30 * 32 * 32
    absorbed = 4 * 30 * 896 * 2 * (16 + 32)
    assert whole.flops("forward") == min(made, absorbed)
    assert layer.flops("forward") == whole.flops("forward") + 2 * 2 * 37 * 32 * 32
    states, weights, query = 4 * 32 * 896, 2 * 32 * 896, 37 * 32
    assert whole.bytes("forward", torch.float32) == 4 * (2 * query + states + weights) + 4 * 37 * 2
    assert decode.counts("kv", torch.float32)["cache_bytes"] == 4 * 2 * 32 * 32
    assert decode.counts("states", torch.float32)["cache_bytes"] == 4 * 32 * 896
    assert decode.counts("states", torch.float32)["bytes"] == 4 * (2 * 32 + 32 * 896 + weights)
    on, off = (x.counts("kv", torch.float32)["parameter_bytes"] for x in (step, step.with_option(PLAIN)))
    assert off == 4 * step.layers * (4 * 32 * 32 + 2 * 32 * 128)
    assert on - off == 4 * len(step.retrieving) * 2 * 32 * 32


def test_a_cpu_gets_fewer_chunks_of_the_same_shape():
    for workload in select(None, [PROJECTED, LAYER]):
        smaller = workload.on("cpu")
        assert (smaller.sequence_length + 1) % smaller.chunk_size == 0
        assert smaller.attending_tokens == smaller.num_chunks * smaller.chunk_size
        assert smaller.keys_per_chunk == workload.keys_per_chunk
        assert smaller.flops("forward") < 2 * projected.CPU_FLOPS[workload.operation] or smaller.num_chunks == 1


def test_a_short_case_tells_the_memory_of_its_whole_length(monkeypatch):
    """Both strategies', at TINY's length, of a case with half of its chunks; and the layer at 7.5B has one."""
    (tiny,) = select(["tiny"], [PROJECTED])
    half = replace(tiny, sequence_length=17, whole_length=tiny.sequence_length)
    monkeypatch.setattr(projected, "WHOLE", ("tiny",))
    assert half.whole() == tiny
    assert tiny.whole() is None
    backends = None if rk.backends()["cpu"].available else ["reference"]
    rows = suite.run([half], settings(modes=("forward",), backends=backends), CEILINGS, Watcher())
    own = [row for row in rows if row.status == suite.OK and row.variant.startswith("retro_kernels")]
    assert own
    for row in own:
        assert row.whole_scratch_bytes >= row.scratch_bytes, row
    assert all(row.whole_scratch_bytes is None for row in rows if row not in own)
    monkeypatch.undo()
    (layer,) = select(["retro-7.5b"], [LAYER])
    assert layer.on("cpu").whole() == replace(layer, batch=1)


def test_a_limited_run_times_the_cases_of_stated_goals_early():
    cases = [(case.operation, case.name) for case in bench.Options().resolved().cases()]
    assert set(cases) >= GOALS
    for operation in (PROJECTED, LAYER):
        names = [name for what, name in cases if what == operation]
        assert "retro-7.5b" in names[:3]


def test_saved_bytes_counts_each_storage_once_and_no_input():
    x = torch.randn(100, requires_grad=True)
    y = torch.randn(100, requires_grad=True)
    assert timing.saved_bytes(lambda: (x.exp() * y).sum(), (x, y)) == 400
    assert timing.saved_bytes(lambda: x * y, (x, y)) == 0
