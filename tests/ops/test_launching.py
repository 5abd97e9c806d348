"""A known launch goes by place: the same kernel, grid and arguments as Triton's own path, and that path itself wherever
something may want to see the launch or may have changed.

In a process of its own: the others of this suite have their kernels interpreted."""

from __future__ import annotations

import textwrap

import pytest
from test_fake_gpu import in_a_process

pytest.importorskip("triton")

RECORDED = """
    from benchmarks.fake_gpu import FakeDriver
    from retro_kernels.ops import launching, plans
    from triton.runtime.jit import JITFunction

    launches, by_triton = [], []

    def flat(value):
        if isinstance(value, tuple):
            return [y for x in value for y in flat(x)]
        return [value.data_ptr() if isinstance(value, torch.Tensor) else getattr(value, "value", value)]

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *values):
            launches.append([metadata.name, x, y, z, *flat(values)])
        return launch

    def run(self, *args, run=JITFunction.run, **kwargs):
        by_triton.append(self.__name__)
        return run(self, *args, **kwargs)

    FakeDriver.launcher_cls, JITFunction.run = launcher_cls, run

    def new():
        found = launches[:], by_triton[:]
        launches.clear(), by_triton.clear()
        return found

    def call(case, given):
        torch.manual_seed(0)
        out = testing.operation(given)(**given, backend="triton")
        if out.requires_grad:
            out.float().sum().backward()
        return out
"""


def test_a_known_launch_has_the_arguments_of_triton_s_own():
    """Forward, backward and decoding. Pointers of what a call allocates may differ, all else may not."""
    found = in_a_process(
        textwrap.dedent(RECORDED)
        + textwrap.dedent("""
        cases = [testing.Case("cca", **small, options=("mask", "bias")), testing.Case("decode", "decode", **token)]
        found = {}
        with fake_driver(90):
            for case in cases:
                given = testing.make(case, torch.bfloat16)
                if "decode" in case.operation:
                    given = {k: x.detach() if isinstance(x, torch.Tensor) else x for k, x in given.items()}
                inputs = {x.data_ptr() for v in given.values() for x in (v if isinstance(v, tuple) else (v,))
                          if isinstance(x, torch.Tensor)}
                given_only = lambda launch: [
                    v if not isinstance(v, int) or v < 2**32 or v in inputs else "made" for v in launch]
                call(case, given), new()  # compiles
                plans._plans.clear()
                call(case, given)
                slow, compiled = new()
                call(case, given)
                fast, again = new()
                found[case.name] = [len(compiled), len(slow), len(again),
                                    [*map(given_only, fast)] == [*map(given_only, slow)]]
        print(json.dumps(found))
        """)
    )
    for name, (by_triton, launches, again, same) in found.items():
        assert by_triton == launches > 0, name
        assert again == 0, name
        assert same, name


def test_what_watches_or_changes_a_launch_sends_it_triton_s_way():
    found = in_a_process(
        textwrap.dedent(RECORDED)
        + textwrap.dedent("""
        from triton import knobs
        from retro_kernels.ops.attention.triton import configs

        case = testing.Case("cca", **small)
        given = {k: x.detach() if isinstance(x, torch.Tensor) else x
                 for k, x in testing.make(case, torch.bfloat16).items()}
        found = {}

        def known(**changed):
            call(case, {**given, **changed})
            return len(new()[1])

        seen = []
        with fake_driver(90):
            known()
            found["known"] = known()
            hook = lambda *_: seen.append(1)
            knobs.runtime.launch_enter_hook.add(hook)
            found["hook"] = known()
            knobs.runtime.launch_enter_hook.remove(hook)
            store = torch.empty(given["query"].numel() + 1, dtype=torch.bfloat16)
            odd = store[1:].view(given["query"].shape).copy_(given["query"])
            assert odd.data_ptr() % 16 and odd.stride() == given["query"].stride()
            found["alignment"] = known(query=odd)
            known()
            found["known again"] = known()
            with configs.override(forward=configs.LaunchSettings(32, 32, 4, 1)):
                found["settings"] = known()
            found["after"] = known()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                found["profiler"] = known()
            names = {event.key for event in profile.key_averages()}
            assert "retro_kernels::attention_forward_triton" in names, names
        with fake_driver(80):
            found["another driver"] = known()
        print(json.dumps(found))
        """)
    )
    assert found == {
        "known": 0,
        "hook": 1,
        "alignment": 1,
        "known again": 0,
        "settings": 1,
        "after": 0,
        "profiler": 1,
        "another driver": 1,
    }
