"""Flamingo's cross-attention to media (open_flamingo 2.0.1, flamingo-pytorch 0.1.2): what `swap` replaces there.

`MaskedCrossAttention` norms the text, and with `only_attend_immediate_media` every token attends to the last media
before it: chunked cross-attention whose chunks are as long as the text between two media. Text before the first media
gets 0. Where the media are fewer than their places in the text, every slot of a row is masked, and its softmax is
uniform over all media there are: reproduced here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops.chunked_cross_attention import attend_spans
from ..ops.compiling import readable
from ..ops.verification.classes import Class
from . import base
from .base import FusedForward, class_names, describe_change, warn_once

NAME = "flamingo"
VERSIONS = {
    "open_flamingo.src.helpers.MaskedCrossAttention": "open_flamingo 2.0.1",
    "flamingo_pytorch.flamingo_pytorch.MaskedCrossAttention": "flamingo-pytorch 0.1.2",
}
LOOKS_FOR = tuple(VERSIONS)
KNOWN_SOURCES = {
    "open_flamingo.src.helpers.MaskedCrossAttention": (
        "b0819d7571dab0345a31a2d0a05c897cabf0b4e98638193cf4a8d23ffa1c4d57"
    ),
    "flamingo_pytorch.flamingo_pytorch.MaskedCrossAttention": (
        "bdedb1315a893b0e7203f9dd4c11e2f949a7aea08cb80f8eb1dde072af5a9975"
    ),
}
PARTS = {"norm", "to_q", "to_kv", "to_out"}


def _kind(module: nn.Module) -> str | None:
    """Which of LOOKS_FOR it is, or a copy of: people copy files."""
    found = next((name for name in class_names(module) if name in VERSIONS), None)
    copies = ((name, {"MaskedCrossAttention.forward": source}) for name, source in KNOWN_SOURCES.items())
    return found or next((name for name, known in copies if base.kind_of(module, (), known)), None)


def recognises(module: nn.Module) -> bool:
    return _kind(module) is not None


def refusal(module: Any) -> str | None:
    kind = str(_kind(module))
    found = dict(module.named_children()).keys()
    if found != PARTS or any(True for _ in module.parameters(recurse=False)):
        return (
            f"its parts are {', '.join(sorted(found)) or 'none'}, those of {VERSIONS[kind]} {', '.join(sorted(PARTS))}"
        )
    if not isinstance(module.heads, int) or not isinstance(module.scale, float):
        return f"heads and scale are {module.heads!r} and {module.scale!r}, expected an int and a float"
    return describe_change("MaskedCrossAttention.forward", type(module).forward, KNOWN_SOURCES[kind], VERSIONS[kind])


def note(module: Any) -> str | None:
    if module.only_attend_immediate_media:
        return None
    return "text that attends to all media before it runs its own forward; with cached media alone it is fused"


def likely_class(module: Any) -> Class:
    weight = next(module.parameters())
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    inner = getattr(module.to_q, "out_features", None)  # unknown where an adapter has taken the layer's place
    d = 64 if inner is None else inner // module.heads
    return Class.of("chunked_cross_attention", (dtype, d, d, 512, 0, 0, ("packed",)))


def fused_forward(module: nn.Module, positions: str) -> FusedForward:
    return (FusedOpenFlamingo if _kind(module) == LOOKS_FOR[0] else FusedFlamingoPytorch)(module, None)


class Fused(FusedForward):
    def attend(
        self, x: torch.Tensor, media: torch.Tensor, media_locations: torch.Tensor | None, cached: bool
    ) -> torch.Tensor | None:
        """x [b, n, dim], media [b, t, s, dim_visual], media_locations bool [b, n], True at each token that stands for
        the next of the t media, None where all text sees all of them; `cached`: all text follows the last place that
        `media_locations` (of any length) says -> as x, or None for a call that is not covered."""
        module: Any = self.module
        reason = _unusual(x, media, media_locations, cached)
        if reason is None and media_locations is not None and not module.only_attend_immediate_media:
            reason = "its text attends to all media before it"
        if reason is not None:
            warn_once(f"a call ran Flamingo's own forward, not the fused one: {reason}")
            return None
        (b, n), t = x.shape[:2], media.shape[1]
        query = module.to_q(module.norm(x)).unflatten(-1, (module.heads, -1))
        key, value = (y.unflatten(-1, (module.heads, -1))[:, :, None] for y in module.to_kv(media).chunk(2, dim=-1))
        if media_locations is None:
            spans = torch.tensor([0, n], dtype=torch.int32, device=x.device).expand(b, 1, 2)
            out = attend_spans(query, key.transpose(1, 2), value.transpose(1, 2), spans, scale=module.scale)
            return module.to_out(out.flatten(2))
        if cached:
            time = media_locations.count_nonzero(dim=1)[:, None].expand(b, n)
        else:
            time = media_locations.cumsum(-1)
        number = torch.arange(1, t + 1, device=x.device)[:, None]
        spans = torch.stack([(time[:, None] < number).sum(-1), (time[:, None] == number).sum(-1)], -1)
        out = attend_spans(query, key, value, spans.to(torch.int32), scale=module.scale)
        beyond = time > t
        if not (x.is_cpu and readable(time)) or bool(beyond.any()):
            mean = value.flatten(1, 3).mean(1, keepdim=True).to(out.dtype)
            out = torch.where(beyond[..., None, None], mean, out)
        return module.to_out(out.flatten(2))


class FusedOpenFlamingo(Fused):
    def __call__(
        self,
        x: torch.Tensor,
        media: torch.Tensor,
        media_locations: torch.Tensor | None = None,
        use_cached_media: bool = False,
    ) -> torch.Tensor:
        module: Any = self.module
        whole = media_locations is not None and media_locations.shape[1:] == x.shape[1:2]
        out = self.attend(x, media, media_locations, use_cached_media) if use_cached_media or whole else None
        return type(module).forward(module, x, media, media_locations, use_cached_media) if out is None else out


class FusedFlamingoPytorch(Fused):
    def __call__(
        self, x: torch.Tensor, media: torch.Tensor, media_locations: torch.Tensor | None = None
    ) -> torch.Tensor:
        module: Any = self.module
        out = self.attend(x, media, media_locations, False)
        return type(module).forward(module, x, media, media_locations) if out is None else out


def _unusual(x: torch.Tensor, media: torch.Tensor, locations: torch.Tensor | None, cached: bool) -> str | None:
    """What about this call the fused operation does not cover."""
    if x.dim() != 3 or media.dim() != 4 or 0 in media.shape or media.shape[0] != x.shape[0]:
        return f"x and media: got shapes {list(x.shape)} and {list(media.shape)}, expected [b, n, d] and [b, t, s, e]"
    if locations is None:
        return None
    shape = (x.shape[0], locations.shape[-1] if cached else x.shape[1])
    if locations.dtype != torch.bool or locations.shape != shape:
        return f"media_locations: got {locations.dtype} {list(locations.shape)}, expected bool {list(shape)}"
    return None
