"""What a GPU would meet before its first kernel, met here: the GPU branch of the choice of a backend, eager and under
torch.compile, and every operation's plan, arguments and compilation down to a cubin for sm_90.

A case an operation, on whatever PyTorch is there. `make gpu-rehearsal` walks every case of the GPU suite, gradients on
CUDA tensors among them, for which it needs PyTorch's CUDA build and a Triton of a GPU machine: several GB to download.

Each test is a process of its own: the others of this suite have their kernels interpreted, and these must not be."""

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

pytest.importorskip("triton")

COMMON = """
    import json
    from unittest import mock

    import torch

    import retro_kernels
    from benchmarks.fake_gpu import fake_driver, fake_tensors
    from retro_kernels import testing

    small = dict(b=1, n=130, m=64, k=2, r=128, h=2, d=64)
    token = dict(small, b=3, t=1, positions=(70, 71, 72))
    CASES = [
        testing.Case("cca", **small),
        testing.Case("cca dropout", **small, dropout_p=0.1),
        testing.Case("projected absorb", "projected", **small, e=64, strategy="absorb"),
        testing.Case("projected materialise", "projected", **small, e=64, strategy="materialise"),
        testing.Case("decode", "decode", **token),
        testing.Case("projected decode", "projected_decode", **token, e=64),
        testing.Case("self", "self", **small),
        testing.Case("cross", "cross", **small),
    ]
"""


def in_a_process(code: str) -> Any:
    """Runs the code, which prints JSON in its last line, without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(COMMON) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_triton_is_traced_whole_on_a_cuda_device():
    """torch.compile(fullgraph=True) of every operation leaves its private op in the graph."""
    found = in_a_process("""
        found = {}
        for case in CASES:
            if case.strategy == "materialise" and torch.version.cuda is None:
                continue  # indexing asks a CUDA device for its guard, which torch without CUDA does not have
            with fake_tensors(90):
                given = {
                    name: torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, torch.Tensor) else x
                    for name, x in testing.make(case, torch.bfloat16).items()
                }
                call, ops = testing.operation(given), []
                eager = call(**given, backend="triton")

                def keep(graph, _, ops=ops):
                    ops += [str(node.target) for node in graph.graph.nodes if "retro_kernels" in str(node.target)]
                    return graph.forward

                compiled = torch.compile(lambda given: call(**given, backend="triton"), fullgraph=True, backend=keep)
                out = compiled(given)
                assert out.shape == eager.shape and out.device == eager.device == torch.device("cuda:0"), case
                found[case.name] = sorted(set(ops))
        print(json.dumps(found))
    """)
    for name, ops in found.items():
        assert any(op.endswith("_triton.default") for op in ops), f"{name}: {ops}"


def test_the_default_call_is_traced_whole_on_a_cuda_device():
    """With no backend named, by what was found out about this device before: no file and no lock is traced."""
    found = in_a_process("""
        from retro_kernels.ops.verification import self_check, verdicts

        passed = self_check.Verdict(self_check.PASSED, "", 0.0, "here")
        with fake_tensors(90), mock.patch.object(verdicts, "_decided", lambda *_: passed):
            query = torch.empty(1, 130, 2, 64, dtype=torch.bfloat16, device="cuda")
            key = torch.empty(1, 2, 2, 128, 2, 64, dtype=torch.bfloat16, device="cuda")
            ops = []

            def keep(graph, _):
                ops.extend(str(node.target) for node in graph.graph.nodes if "retro_kernels" in str(node.target))
                return graph.forward

            call = lambda query, key: retro_kernels.chunked_cross_attention(query, key, key, chunk_size=64)
            torch.compile(call, fullgraph=True, backend=keep)(query, key)
        print(json.dumps(ops))
    """)
    assert found == ["retro_kernels.attention_forward_triton.default"]


def test_every_operation_is_planned_compiled_and_launched_for_sm_90():
    """Forward and backward by Triton's real path, compiler and shared-memory limit included. A second call of the same
    shape compiles nothing."""
    found = in_a_process("""
        from retro_kernels.ops.attention.triton import launch as attention

        found = {}
        with fake_driver(90) as driver:
            for case in CASES:
                for _ in range(2):
                    given = testing.make(case, torch.bfloat16)
                    before = len(driver.launches)
                    torch.manual_seed(0)
                    out = testing.operation(given)(**given, backend="triton")
                    if out.requires_grad:
                        out.float().sum().backward()
                launches = driver.launches[before:]
                found[case.name] = [[x.kernel, x.programs, x.shared_memory] for x in launches]
        print(json.dumps(found))
    """)
    for name, launches in found.items():
        assert launches, name
        assert all(programs > 0 and shared <= 232_448 for _, programs, shared in launches), name
        if "decode" not in name:
            assert len(launches) >= 2, f"{name}: {launches}"
