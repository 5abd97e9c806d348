"""A GPU takes the kernels that proved themselves on it, and no others.

The GPU is faked (`faked_gpu.py`)."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faked_gpu import MODULES, NAME, fake, spoilt

import retro_kernels as rk
from retro_kernels import extension, testing
from retro_kernels.ops import backends
from retro_kernels.ops.absorbed.common import Call as AbsorbedCall
from retro_kernels.ops.attention.common import Call
from retro_kernels.ops.decoding.common import DecodeCall
from retro_kernels.ops.verification import records, self_check, verdicts
from retro_kernels.ops.verification.classes import Class, features, representative

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))

CPU = torch.device("cpu")
PLAIN = Class("chunked_cross_attention", "float32", 16, 16, 16)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The faked GPU -> the file that it remembers in."""
    fake(monkeypatch, tmp_path)
    yield tmp_path / "verified.json"
    verdicts.forget()


@pytest.fixture
def checks(monkeypatch):
    """The backends of the checks that were made."""
    made, check = [], testing.check_class

    def counted(wanted, backend, device):
        made.append(backend)
        return check(wanted, backend, device)

    monkeypatch.setattr(testing, "check_class", counted)
    return made


def arguments(**changes):
    return testing.make(testing.Case("", **changes), torch.float32)


def call(**changes):
    return rk.chunked_cross_attention(**arguments(**changes))


# What is checked is what was asked for.

ATTENTION_OPTIONS = (
    (),
    ("relative",),
    ("relative", "relative_biases"),
    ("content_bias", "null", "relative"),
    ("null", "rotary"),
    ("rotary_interleaved", "rotary_partial"),
    ("bias", "dropout"),
    ("bias_per_neighbour",),
    ("grouped",),
    ("packed",),
    ("bias", "fp32_parameters", "null"),
)
ENCODER_OPTIONS = (
    (),
    ("relative", "relative_biases"),
    ("rotary",),
    ("bias", "dropout"),
    ("grouped",),
    ("causal",),
    ("causal", "packed"),
)
DECODE_OPTIONS = (
    (),
    ("relative", "relative_biases", "null"),
    ("rotary",),
    ("key_rotary", "rotary_partial"),
    ("bias_per_neighbour",),
    ("int8",),
    ("float8_e4m3fn", "grouped"),
    ("int8", "unlike_caches"),
    ("unlike_caches",),
    ("content_bias", "relative"),
)


def classes():
    """Every set of options with some sizes, every size with some options."""
    made = []
    rows, slots = list(testing.ODD_ROWS), list(testing.ODD_SLOTS)
    for i in range(18):
        options = ATTENTION_OPTIONS[i % len(ATTENTION_OPTIONS)]
        made.append(Class("chunked_cross_attention", "bfloat16", 64, 96, rows[i % 6], 0, 0, options))
        if not set(options) & {"rotary", "rotary_interleaved", "bias_per_neighbour"}:
            biases = ("projection_biases",) if i % 2 else ()
            made.append(
                Class(
                    "projected_chunked_cross_attention",
                    "float16",
                    96,
                    96,
                    rows[i % 6],
                    slots[(i // 2) % 6],
                    192,
                    (*options, *biases),
                )
            )
        options = ENCODER_OPTIONS[i % len(ENCODER_OPTIONS)]
        made.append(Class("neighbour_self_attention", "bfloat16", 128, 128, rows[i % 6], 0, 0, options))
        if "causal" not in options:
            made.append(
                Class("neighbour_cross_attention", "float32", 32, 32, rows[i % 6], (64, 128)[i % 2], 0, options)
            )
    for i in range(3 * len(DECODE_OPTIONS)):
        count, options = (1, 16, 32)[i % 3], DECODE_OPTIONS[i % len(DECODE_OPTIONS)]
        if "grouped" in options:
            count = 32
        made.append(Class("chunked_cross_attention_decode", "bfloat16", 48, 64, count, 0, 0, options))
        if not set(options) & {"rotary", "key_rotary", "unlike_caches"}:
            made.append(
                Class(
                    "projected_chunked_cross_attention_decode",
                    "bfloat16",
                    64,
                    64,
                    count,
                    0,
                    768,
                    (*options, "projection_biases"),
                )
            )
    return made


class Seen(Exception):
    pass


@pytest.mark.parametrize("odd", [True, False], ids=["odd", "even"])
def test_the_problem_of_a_class_is_of_that_class(monkeypatch, odd):
    def refusal(seen):
        raise Seen(seen)

    for modules in MODULES:
        monkeypatch.setitem(modules, "cpu", SimpleNamespace(unavailable=lambda: None, refusal=refusal))
    assert len(set(classes())) > 80
    for wanted in classes():
        problem = testing.class_problem(wanted, odd)
        with torch.no_grad(), pytest.raises(Seen) as raised:
            testing.operation(problem)(**problem, backend="cpu")
        assert Class.of(wanted.operation, features(raised.value.args[0])) == wanted


def test_every_option_of_a_call_belongs_to_its_class():
    """A field that is added to a call must be added to `features`, or be one that no kernel is compiled for."""
    known = {
        "operation",
        "query",
        "key",
        "value",
        "attention_bias",
        "relative_key",
        "content_bias",
        "relative_bias",
        "query_cos",
        "rotary_interleaved",
        "null_key",
        "chunk_spans",
        "first_visible",
        "dropout_p",
        "logit_softcap",
        "causal",
        "stride",
        "grouping",
        "encoded",
        "w_key",
        "w_value",
        "bias_key",
        "bias_value",
        "key_cos",
    }
    # with the others of their pair, or both given and not in every check, or mere numbers
    other = {
        "query_sin",
        "key_sin",
        "key_scale",
        "value_scale",
        "null_value",
        "mask",
        "valid",
        "chunk",
        "position",
        "chunk_size",
        "scale",
        "rows",
        "first_token",
        "dropout_seed",
        "return_lse",
    }
    for kind in (Call, AbsorbedCall, DecodeCall):
        assert {field.name for field in dataclasses.fields(kind)} <= known | other, kind


def test_sizes_between_powers_of_two_stand_for_each_other():
    assert [representative(size) for size in (1, 3, 16, 20, 64, 72, 96, 127, 128, 896, 4096)] == [
        1,
        3,
        16,
        24,
        64,
        96,
        96,
        96,
        128,
        768,
        4096,
    ]


# The first call.


def test_a_class_is_checked_once_and_then_fused(gpu, checks, capfd):
    expected = rk.chunked_cross_attention(**arguments(), backend="cpu")
    for _ in range(3):
        assert torch.equal(call(), expected)
    assert checks == ["triton"]
    said = capfd.readouterr().err
    assert said.count("checking the triton kernels") == 1
    assert NAME in said
    assert "retro-kernels verify" in said
    call(d=20)  # another class
    assert checks == ["triton", "triton"]


def test_what_passed_is_remembered_by_the_next_process(gpu, checks):
    call()
    (record,) = json.loads(gpu.read_text())["devices"]
    assert record["identity"]["device"] == NAME
    assert record["identity"]["capability"] == "9.0"
    assert set(record["identity"]) == {"device", "capability", "driver", "torch", "triton", "kernels"}
    assert [verdict["status"] for verdict in record["verdicts"].values()] == ["passed"]
    verdicts.forget()
    call()
    assert checks == ["triton"]


@pytest.mark.parametrize("field", ["describe", "driver", "triton_version", "kernels_hash"])
def test_another_device_driver_compiler_or_kernel_is_checked_anew(gpu, checks, monkeypatch, field):
    call()
    verdicts.forget()
    monkeypatch.setattr(verdicts, field, lambda *_: "another")
    call()
    assert checks == ["triton", "triton"]
    assert len(json.loads(gpu.read_text())["devices"]) == 2


def nan_left(out, lse):
    out[..., -1, :] = float("nan")
    return out, lse


def beside(out, lse):
    if out._base is not None and out.storage_offset():  # between guard bands
        out._base[out.storage_offset() - 1] = 0.0
    return out, lse


def other_bits():
    count = [0]

    def forward(out, lse):
        count[0] += 1
        return out + 1e-7 * count[0], lse

    return forward


def raises(out, lse):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


FAULTS = {
    "a wrong output": ({"forward": lambda out, lse: (out * 1.001, lse)}, "out: error"),
    "a wrong lse": ({"forward": lambda out, lse: (out, lse + 0.01)}, "lse: error"),
    "a wrong gradient": ({"backward": lambda dq, dk, *rest: (dq, dk * 1.001, *rest)}, "gradient of key: error"),
    "an element not written": ({"forward": nan_left}, "infinite or NaN"),
    "a write beside the output": ({"forward": beside}, "outside its output"),
    "other bits every time": ({"forward": other_bits()}, "other bits"),
    "an exception": ({"forward": raises}, "illegal memory access"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_the_next_backend_taken(gpu, checks, monkeypatch, fault):
    spoil, words = FAULTS[fault]
    spoilt(monkeypatch, **spoil)
    taken = spoilt(monkeypatch, "cuda")
    with pytest.warns(UserWarning, match="runs on cuda, because") as found:
        out = call()
    (warning,) = (str(w.message) for w in found if "retro_kernels" in str(w.message))
    assert words in warning
    assert NAME in warning
    assert "retro-kernels verify" in warning
    assert checks == ["triton", "cuda"]
    assert torch.equal(out, rk.chunked_cross_attention(**arguments(), backend="cpu"))
    count = len(taken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
    assert len(taken) == count + 1
    verdicts.forget()  # the next process: nothing is checked, and it is told too
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(UserWarning, match="runs on cuda, because"):
        call()
    assert checks == ["triton", "cuda"]


def test_where_every_backend_fails_the_reference_runs_and_one_warning_says_so(gpu, checks, monkeypatch):
    for name in ("triton", "cuda"):
        spoilt(monkeypatch, name, forward=nan_left)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        out = call()
        call()
    (warning,) = (str(w.message) for w in found)
    assert "slow pure-PyTorch reference" in warning
    assert warning.count("its check failed") == 2
    assert checks == ["triton", "cuda"]
    assert torch.equal(out, rk.chunked_cross_attention(**arguments(), backend="reference"))


def test_a_check_that_memory_did_not_suffice_for_is_no_verdict(gpu, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(testing, "check_class", full)
    with pytest.warns(UserWarning, match=r"could not be checked.*out of memory"):
        call()
    assert not gpu.exists()


def test_the_check_leaves_the_caller_as_it_was(gpu, checks):
    """Its random numbers, its modes: inside no_grad and autocast the check still has gradients and its own dtypes."""
    x = arguments(dropout_p=0.5)
    torch.manual_seed(5)
    expected = rk.chunked_cross_attention(**x, backend="cpu")
    after = torch.rand(1)
    torch.manual_seed(5)
    with torch.no_grad():
        out = rk.chunked_cross_attention(**x)
    assert torch.equal(out, expected)
    assert torch.equal(torch.rand(1), after)
    with torch.autocast("cpu", torch.bfloat16):
        rk.chunked_cross_attention(**x)
    assert checks == ["triton", "triton"]
    assert all(x["status"] == "passed" for x in records.load(verdicts.identity(CPU, "triton")).values())


def test_a_named_backend_is_not_asked_for_proof(gpu, checks, monkeypatch):
    spoilt(monkeypatch, forward=nan_left)
    assert rk.chunked_cross_attention(**arguments(), backend="triton").isnan().any()
    monkeypatch.setenv("RETRO_KERNELS_BACKEND", "triton")
    assert call().isnan().any()
    assert checks == []


def test_the_faster_by_evidence_is_asked_first(gpu, checks, monkeypatch):
    monkeypatch.setattr(backends.evidence, "order", lambda *_: ("cuda", "triton"))
    call()
    assert checks == ["cuda"]


def test_every_operation_asks(gpu, checks):
    """And the check of each passes on the CPU kernels, in half precision too."""
    for dtype in (torch.float32, torch.bfloat16):
        for case in (testing.Case("", "self", options=("relative",)), testing.Case("", "cross", d=24)):
            x = testing.make(case, dtype)
            testing.operation(x)(**x)
        for operation in ("projected", "decode", "projected_decode"):
            case = testing.Case("", operation, e=48, options=("mask", "null"), strategy="absorb")
            testing.run(testing.make(case, dtype), None)
    assert len(checks) == 10
    kept = records.load(verdicts.identity(CPU, "triton"))
    assert len(kept) == 10
    assert all(verdict["status"] == "passed" for verdict in kept.values()), kept


def test_nothing_is_checked_while_a_graph_is_captured(gpu, checks, monkeypatch):
    monkeypatch.setattr(verdicts, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"CUDA graph.*retro-kernels verify"):
        call()
    assert checks == []
    monkeypatch.setattr(verdicts, "capturing", lambda device: False)
    call()
    verdicts.forget()
    monkeypatch.setattr(verdicts, "capturing", lambda device: True)
    call()  # what is on disk is known
    assert checks == ["triton"]


def test_a_cpu_is_asked_for_nothing(checks, monkeypatch, tmp_path):
    monkeypatch.setenv("RETRO_KERNELS_CACHE", str(tmp_path))
    call()
    assert checks == []
    assert not list(tmp_path.iterdir())


# Under torch.compile.


def test_a_compiled_call_is_checked_while_it_is_traced(gpu, checks):
    x = arguments()
    expected = rk.chunked_cross_attention(**x, backend="cpu")
    compiled = torch.compile(rk.chunked_cross_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**x), expected)
    assert checks == ["triton"]
    assert all(v["status"] == "passed" for v in records.load(verdicts.identity(CPU, "triton")).values())


def test_a_compiled_call_warns_too(gpu, checks, monkeypatch):
    for name in ("triton", "cuda"):
        spoilt(monkeypatch, name, forward=nan_left)
    x = arguments()
    compiled = torch.compile(rk.chunked_cross_attention, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="slow pure-PyTorch reference"):
        out = compiled(**x)
    torch.testing.assert_close(out, rk.chunked_cross_attention(**x, backend="reference"))
    assert checks == ["triton", "cuda"]


def test_a_dynamic_length_does_not_ask_again(gpu, checks):
    compiled = torch.compile(rk.chunked_cross_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (21, 30, 37):
        x = arguments(n=n)
        torch.testing.assert_close(compiled(**x), rk.chunked_cross_attention(**x, backend="cpu"))
    assert checks == ["triton"]


# The file.


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, 2]",
        '{"format": 99, "devices": []}',
        '{"format": 1, "devices": [{"identity": 3}]}',
        '{"format": 1, "devices": [{"identity": {}, "verdicts": {"x": {"status": "perhaps"}}}]}',
    ],
)
def test_a_corrupt_or_foreign_file_is_survived_with_a_sentence(gpu, checks, content):
    gpu.write_text(content)
    with pytest.warns(UserWarning, match=r"verified.json.*cannot be used"):
        call()
    assert checks == ["triton"]
    assert len(json.loads(gpu.read_text())["devices"]) == 1


def test_a_folder_that_cannot_be_written_is_said(gpu, checks, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETRO_KERNELS_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match="RETRO_KERNELS_CACHE names another folder"):
        call()
    call()
    assert checks == ["triton"]


def _add(number):
    for entry in range(10):
        records.add({"device": str(number % 2)}, f"{number} {entry}", {"status": "passed"})


def test_processes_that_write_at_once_lose_nothing(gpu):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(_add, range(4))
    kept = [len(records.load({"device": device})) for device in ("0", "1")]
    assert kept == [20, 20]
    assert sorted(file.name for file in gpu.parent.iterdir()) == ["verified.json", "verified.json.lock"]


# What ships with the library.


def ship(monkeypatch, status, **changes):
    identity = {**verdicts.identity(CPU, "triton"), **changes}
    entry = verdicts.entry_of(Class("chunked_cross_attention", "float32", 16, 16, 16), "triton")
    record = {"identity": identity, "verdicts": {entry: {"status": status, "detail": "of the suite"}}}
    monkeypatch.setattr(records, "_shipped", lambda: [record])


def test_shipped_evidence_is_read_first(gpu, checks, monkeypatch):
    ship(monkeypatch, "passed", driver="another", torch="another")
    call(m=8)
    assert checks == []
    assert not gpu.exists()
    ship(monkeypatch, "failed")
    verdicts.forget()
    with pytest.warns(UserWarning, match="of the suite"):
        call(m=8)
    assert checks == ["cuda"]


@pytest.mark.parametrize("field", ["device", "capability", "triton", "kernels"])
def test_shipped_evidence_of_something_else_does_not_count(gpu, checks, monkeypatch, field):
    ship(monkeypatch, "passed", **{field: "another"})
    call(m=8)
    assert checks == ["triton"]


def test_a_family_without_shipped_evidence_is_checked_apart(monkeypatch):
    record = {"identity": {"capability": "9.0"}, "verdicts": {"x": {"status": "passed"}}}
    monkeypatch.setattr(records, "_shipped", lambda: [record])
    assert not self_check.apart("9.0")
    assert self_check.apart("12.0")
    record["verdicts"]["x"]["status"] = "failed"
    assert self_check.apart("9.0")


# The child process.


def test_a_child_checks_and_reports(gpu, checks, monkeypatch):
    monkeypatch.setattr(self_check, "apart", lambda capability: True)
    wrong = dataclasses.replace(PLAIN, dtype="float64")  # which the CPU kernels refuse
    found = list(self_check.check([(PLAIN, "cpu"), (wrong, "cpu")], CPU, "9.0"))
    assert [verdict.status for verdict in found] == ["passed", "unknown"]
    assert "refuse" in found[1].detail
    assert checks == []  # not in this process


CHILD = """
import json, os, sys
checks = json.loads(sys.stdin.read())["checks"]
if checks[0][0]["head_dim"] == 32: {fate}
print({mark!r} + json.dumps({{"status": "passed", "detail": ""}}), flush=True)
if len(checks) > 1: {fate}
"""


@pytest.mark.parametrize(
    ("fate", "status", "words"),
    [
        ("os.abort()", "failed", "signal 6"),
        ("sys.exit('CUDA error: out of memory')", "unknown", "out of memory"),
        ("__import__('time').sleep(60)", "failed", "did not end within"),
    ],
    ids=["crash", "full", "hang"],
)
def test_a_child_that_dies_costs_the_class_it_was_at(gpu, monkeypatch, fate, status, words):
    monkeypatch.setattr(self_check, "PATIENCE", 60.0 if "sleep" not in fate else 3.0)
    monkeypatch.setattr(
        self_check, "child_command", lambda: [sys.executable, "-c", CHILD.format(fate=fate, mark=self_check.MARK)]
    )
    three = [(dataclasses.replace(PLAIN, head_dim=size), "cpu") for size in (16, 32, 64)]
    found = list(self_check.check_in_children(three, CPU))
    assert [verdict.status for verdict in found] == ["passed", status, "passed"]
    assert words in found[1].detail


def test_a_child_that_cannot_start_is_no_verdict(gpu, monkeypatch):
    monkeypatch.setattr(self_check, "child_command", lambda: ["/nowhere/python"])
    (verdict,) = self_check.check_in_children([(PLAIN, "cpu")], CPU)
    assert verdict.status == "unknown"


# Several processes.

RANK = """
import sys, warnings
sys.path[:0] = {path!r}
import torch, torch.distributed as dist
import test_verification as t
from _pytest.monkeypatch import MonkeyPatch
from pathlib import Path

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
monkeypatch = MonkeyPatch()
(folder / str(rank)).mkdir()
t.fake(monkeypatch, folder / str(rank))
made, check = [], t.testing.check_class
monkeypatch.setattr(t.testing, "check_class", lambda *x: made.append(x[1]) or check(*x))
dist.init_process_group("gloo", init_method="file://" + str(folder / "store"), rank=rank, world_size=2)
store, results = dist.distributed_c10d._get_default_store(), {{}}
for fate, size in (("at once", 16), ("rank 1 remembers", 32), ("rank 0's fails", 64)):
    wanted = t.dataclasses.replace(t.PLAIN, head_dim=size, value_dim=size)
    if (rank, fate) == (0, "rank 0's fails"):
        t.spoilt(monkeypatch, "triton", forward=t.nan_left)
    if (rank, fate) == (1, "rank 1 remembers"):
        t.records.add(t.verdicts.identity(t.CPU, "triton"), t.verdicts.entry_of(wanted, "triton"),
                            {{"status": "failed", "detail": "a bad GPU"}})
    if rank == 1 and fate != "at once":
        store.wait([f"rank 0 has called: {{fate}}"])
    made.clear()
    error, taken = "", []
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            t.call(d=size)
            taken = sorted(key[1] for key, answer in t.verdicts._answers.items() if answer[0] and key[3][1] == size)
        except RuntimeError as raised:
            error = str(raised)
    results[fate] = [taken, list(made), error]
    store.set(f"rank {{rank}} has called: {{fate}}", "yes")
    store.wait([f"rank {{other}} has called: {{fate}}" for other in range(2)])
print(t.json.dumps(results), flush=True)
"""


def test_all_ranks_take_the_verdict_of_the_first_that_asks(tmp_path):
    """Two processes over gloo."""
    root = Path(__file__).resolve()
    code = RANK.format(path=[str(root.parent), str(root.parent / "attention"), str(root.parents[2])])
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    first, second = (json.loads(rank.communicate(timeout=240)[0].splitlines()[-1]) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0]
    # Both at once: one of them checks, both take it.
    assert [first["at once"][0], second["at once"][0]] == [["triton"], ["triton"]]
    assert first["at once"][1] + second["at once"][1] == ["triton"]
    # What rank 0 found wrong, rank 1 does not take either, although it would find it right.
    assert first["rank 0's fails"] == [["cuda"], ["triton", "cuda"], ""]
    assert second["rank 0's fails"] == [["cuda"], [], ""]
    # What rank 0 found right and rank 1 remembers as wrong is an error there.
    assert first["rank 1 remembers"] == [["triton"], ["triton"], ""]
    taken, made, error = second["rank 1 remembers"]
    assert (taken, made) == ([], [])
    assert "rank 1 remembers" in error
    assert "a bad GPU" in error
