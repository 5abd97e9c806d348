"""A faked GPU: CPU tensors are taken for those of an H100, and the CPU kernels, some of them spoilt, for Triton's and
CUDA C++'s."""

from __future__ import annotations

from types import ModuleType

from retro_kernels.ops import backends, plans
from retro_kernels.ops.backends import ABSORBED as ABSORBED_BACKENDS
from retro_kernels.ops.backends import ATTENTION as BACKENDS
from retro_kernels.ops.backends import DECODING as DECODE_BACKENDS
from retro_kernels.ops.verification import self_check, verdicts

NAME = "NVIDIA H100 80GB HBM3"
MODULES = (BACKENDS, DECODE_BACKENDS, ABSORBED_BACKENDS)


def fake(monkeypatch, tmp_path):
    """The GPU knows nothing, and has evidence for its family, so that checks run in this process."""
    monkeypatch.setenv("RETRO_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(verdicts, "needs_proof", lambda device: True)
    monkeypatch.setattr(verdicts, "describe", lambda device: NAME)
    monkeypatch.setattr(verdicts, "capability", lambda device: "9.0")
    monkeypatch.setattr(verdicts, "driver", lambda: "550.54.15")
    monkeypatch.setattr(self_check, "apart", lambda capability: False)
    monkeypatch.setattr(backends, "DEFAULT_ORDER", {"cpu": ("triton", "cuda")})
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(plans, "signature", lambda *_: None)  # a GPU's tensors have none, and no plan of another test
    for modules in MODULES:
        for name in ("triton", "cuda"):
            monkeypatch.setitem(modules, name, modules["cpu"])
    verdicts.forget()


def spoilt(monkeypatch, name="triton", forward=None, backward=None):
    """Puts CPU kernels in a backend's place whose results go through `forward` or `backward` first -> their calls."""
    cpu, calls = BACKENDS["cpu"], []

    def run_forward(*arguments):
        calls.append(name)
        out, lse = cpu.forward(*arguments)
        return forward(out, lse) if forward else (out, lse)

    def run_backward(*arguments):
        gradients = cpu.backward(*arguments)
        return backward(*gradients) if backward else gradients

    module = ModuleType("spoilt")
    module.__dict__.update(
        unavailable=lambda: None, refusal=lambda call: None, forward=run_forward, backward=run_backward
    )
    monkeypatch.setitem(BACKENDS, name, module)
    return calls
