"""RETRO (arXiv 2112.04426, section 2.4 and Algorithm 1), to be held beside the paper: `Retro.activations` is
Algorithm 1 line by line; the decoder's layer is `nn.RetroDecoderBlock`, ENCODER is `nn.NeighbourEncoder`, CCA is
`nn.ChunkedCrossAttention`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from ..nn import NeighbourEncoder, RetroDecoderBlock
from ..nn.context_parallel import ContextParallel
from ..ops import checks
from ..ops.compiling import readable
from . import checkpoint
from .config import RetroConfig
from .loss import linear_cross_entropy

if TYPE_CHECKING:
    from ..nn.retro_decoder_block import SelfAttentionCache
    from .generation import Generated

INTEGERS = (torch.int64, torch.int32)


class Retro(nn.Module):
    """A decoder language model that attends to retrieved text. `retro(tokens)` without neighbours is the decoder alone.

        retro = Retro(RetroConfig.preset("retro-172m"))
        logits = retro(tokens, neighbours)          tokens [b, n], neighbours [b, l, k, r] -> [b, n, vocab_size]
        loss = retro.loss(tokens, targets, neighbours)
        retro.generate(tokens, retriever=retriever, max_new_tokens=100)

    Its parts are `embedding`, `blocks`, `final_norm`, with neighbours `encoder` and (unless the embeddings are shared)
    `encoder_embedding`, and, where the embeddings are not tied, `readout`.

    Args:
        config: sizes and options.
        backend: of all attentions; None chooses.
        device, dtype: of the parameters; `device="meta"` only counts them.

    Attributes:
        activation_checkpointing: recompute every block in the backward pass instead of keeping its activations.
        context: the processes that rows are divided among; see `models.parallel.divide_rows`.
    """

    def __init__(
        self,
        config: RetroConfig,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, RetroConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a RetroConfig")
        self.config = config
        self.activation_checkpointing = False
        self.context: ContextParallel | None = None
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shared: dict[str, Any] = {
            "chunk_size": config.chunk_size,
            "retrieved_length": config.retrieved_length,
            "positions": config.positions,
            "gated": config.gated_feed_forward,
            "activation": config.activation,
            "dropout": config.dropout,
            "hidden_dropout": config.hidden_dropout,
            "norm_eps": config.norm_eps,
            "backend": backend,
            **factory,
        }
        self.embedding = nn.Embedding(config.vocab_size, config.model_dim, **factory)
        self.blocks = nn.ModuleList(
            RetroDecoderBlock(
                config.model_dim,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                feed_forward_dim=config.feed_forward_dim,
                retrieves=p in config.cross_attention_layers,
                context_dim=config.encoder_dim,
                gate=config.cross_attention_gate and p in config.cross_attention_layers,
                max_length=config.max_length,
                **shared,
            )
            for p in range(1, config.num_layers + 1)
        )
        self.final_norm = nn.RMSNorm(config.model_dim, eps=config.norm_eps, **factory)
        self.readout = (
            None if config.tied_embeddings else nn.Linear(config.model_dim, config.vocab_size, bias=False, **factory)
        )
        self.encoder_embedding: nn.Embedding | None = None
        self.encoder: NeighbourEncoder | None = None
        if config.cross_attention_layers:
            if not config.shared_embeddings:
                self.encoder_embedding = nn.Embedding(config.vocab_size, config.encoder_dim, **factory)
            self.encoder = NeighbourEncoder(
                config.encoder_dim,
                num_heads=config.encoder_heads,
                num_layers=config.encoder_layers,
                context_dim=config.model_dim,
                head_dim=config.encoder_head_dim,
                feed_forward_dim=config.encoder_feed_forward_dim,
                cross_attention_layers=config.encoder_cross_attention_layers,
                feed_forward_biases=False,
                **shared,
            )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of deviation `initializer_range`; what adds to a residual stream has it divided by the root of
        the number of such parts, so that the stream keeps its size. Norms are 1; u, v and gates 0. (The paper does not
        say.)"""
        std = self.config.initializer_range
        encoder_layers = [] if self.encoder is None else list(self.encoder.layers)
        for layers in (list(self.blocks), encoder_layers):
            for layer in layers:
                for name, module in layer.named_modules():
                    if isinstance(module, nn.Linear):
                        adds = name.endswith("w_out")
                        nn.init.normal_(module.weight, std=std / (2 * len(layers)) ** (0.5 * adds))
        for module in (self.embedding, self.encoder_embedding, self.readout):
            if module is not None:
                nn.init.normal_(module.weight, std=std)

    def forward(
        self,
        tokens: torch.Tensor,
        neighbours: torch.Tensor | None = None,
        neighbour_mask: torch.Tensor | None = None,
        sequence_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of the next token at every place; see `activations`. -> [b, n, vocab_size]"""
        return self.read(self.activations(tokens, neighbours, neighbour_mask, sequence_starts))

    def activations(
        self,
        tokens: torch.Tensor,
        neighbours: torch.Tensor | None = None,
        neighbour_mask: torch.Tensor | None = None,
        sequence_starts: torch.Tensor | None = None,
        cache: SelfAttentionCache | None = None,
    ) -> torch.Tensor:
        """Algorithm 1 up to the last norm.

        Args:
            tokens: integers [b, n], below `vocab_size`.
            neighbours: integers [b, l, k, r], the tokens retrieved for each chunk; any k, r at most
                `retrieved_length`. l is the number of complete chunks; chunks beyond it are ignored. None: retrieval is
                off, and the result that of the decoder alone. Where fewer were retrieved, mask the rest.
            neighbour_mask: bool [b, l, k, r], True = a token that is there. With nothing visible a chunk's tokens get
                what they get without retrieval.
            sequence_starts: bool [b, n], True at the first token of every document packed into a row; chunk u is then
                the u-th complete chunk of the row's documents, and l is as many as any row has.
            cache: takes the keys and values of all self-attentions.

        Returns: [b, n, model_dim].

        Raises TypeError or ValueError for wrong dtypes and sizes, and, on a CPU, for tokens outside the vocabulary.
        """
        config = self.config
        neighbours, neighbour_mask = self._check_inputs(tokens, neighbours, neighbour_mask, sequence_starts)
        h = self.embedding(tokens)
        encoded = None
        for p, block in enumerate(self.blocks, start=1):
            if neighbours is not None and p == config.cross_attention_layers[0]:
                encoded = self._encoder_of(neighbours, neighbour_mask, sequence_starts)
                if self.context is not None and neighbour_mask is not None:
                    neighbour_mask = self.context.with_previous(neighbour_mask)
            if self.activation_checkpointing and torch.is_grad_enabled():
                h, encoded = recompute(block, h, encoded, neighbour_mask, sequence_starts, cache, use_reentrant=False)
            else:
                h, encoded = block(h, encoded, neighbour_mask, sequence_starts, cache)
        return self.final_norm(h)

    def read(self, activations: torch.Tensor) -> torch.Tensor:
        """READ of Algorithm 1: [..., model_dim] -> logits [..., vocab_size]."""
        return F.linear(activations, self.readout_weight)

    @property
    def readout_weight(self) -> torch.Tensor:
        """[vocab_size, model_dim]"""
        return self.embedding.weight if self.readout is None else self.readout.weight

    def encode(
        self,
        neighbours: torch.Tensor,
        activations: torch.Tensor,
        neighbour_mask: torch.Tensor | None = None,
        sequence_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ENCODER of Algorithm 1: neighbours' tokens [b, l, k, r], conditioned on the decoder's activations
        [b, n, model_dim] after the self-attention of layer min(P) -> [b, l, k, r, encoder_dim].

        Raises ValueError for a model without chunked cross-attention.
        """
        if self.encoder is None:
            raise ValueError(
                "neighbours: got some, but this model has no chunked cross-attention (cross_attention_layers is empty)"
            )
        embedding = self.embedding if self.encoder_embedding is None else self.encoder_embedding
        return self.encoder(embedding(neighbours), activations, neighbour_mask, sequence_starts)

    def loss(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        neighbours: torch.Tensor | None = None,
        neighbour_mask: torch.Tensor | None = None,
        sequence_starts: torch.Tensor | None = None,
        *,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """Cross-entropy in nats without all logits in memory at a time. `targets` [b, n] int64: the token that follows
        each, -100 where none counts. `reduction`: "mean", "sum" or "none" ([b, n])."""
        checks.tensor("targets", targets, (torch.int64,), tokens.device)
        checks.shape("targets", targets, "b, n", tuple(tokens.shape))
        activations = self.activations(tokens, neighbours, neighbour_mask, sequence_starts)
        return linear_cross_entropy(activations, self.readout_weight, targets, reduction=reduction)

    def count_parameters(self) -> dict[str, int]:
        """Parameters by part: "decoder", "cross-attention" (and its norms), "encoder", "embeddings" (each table once).
        "decoder" alone is the paper's baseline; the first three together are its RETRO."""
        counts = dict.fromkeys(("decoder", "cross-attention", "encoder", "embeddings"), 0)
        for name, parameter in self.named_parameters():
            if name.startswith(("embedding.", "encoder_embedding.", "readout.")):
                part = "embeddings"
            elif name.startswith("encoder."):
                part = "encoder"
            elif any(mark in name for mark in (".cross_attention.", ".cross_norm.", ".gate")):
                part = "cross-attention"
            else:
                part = "decoder"
            counts[part] += parameter.numel()
        return counts

    def generate(self, input_ids: Any, **options: Any) -> Generated:
        """New tokens after each of the prompts; arguments as in `models.generation.generate`."""
        from .generation import generate

        return generate(self, input_ids, **options)

    def save_pretrained(self, folder: str | os.PathLike[str], *, max_shard_size: int = 5_000_000_000) -> None:
        """Writes `config.json` and the weights as safetensors; see `models.checkpoint.save`."""
        checkpoint.save(self, folder, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        config: RetroConfig | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Retro:
        """Reads what `save_pretrained` wrote, in evaluation mode; see `models.checkpoint.load`."""
        return checkpoint.load(cls, folder, config=config, backend=backend, device=device, dtype=dtype)

    def _encoder_of(self, neighbours, neighbour_mask, sequence_starts):
        def encode(activations: torch.Tensor) -> torch.Tensor:
            encoded = self.encode(neighbours, activations, neighbour_mask, sequence_starts)
            return encoded if self.context is None else self.context.with_previous(encoded)

        return encode

    def _check_inputs(
        self,
        tokens: torch.Tensor,
        neighbours: torch.Tensor | None,
        neighbour_mask: torch.Tensor | None,
        sequence_starts: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The neighbours and their mask, of the chunks that are complete; None where there is none."""
        config = self.config
        checks.tensor("tokens", tokens, INTEGERS)
        checks.rank("tokens", tokens, "b, n")
        self.check_vocabulary("tokens", tokens)
        b, n = tokens.shape
        parts = 1 if self.context is None else self.context.size
        if n * parts > config.max_length and config.positions == "rotary":
            raise ValueError(f"tokens: got n = {n * parts}, expected at most max_length = {config.max_length}")
        if parts > 1 and n % config.chunk_size:
            raise ValueError(
                f"tokens: got n = {n} on one of {parts} processes that share a row, expected a multiple of chunk_size "
                f"= {config.chunk_size}, as rows are divided at chunk borders"
            )
        if neighbours is None:
            if neighbour_mask is not None:
                raise ValueError("neighbour_mask: got one without neighbours, expected None")
            return None, None
        checks.tensor("neighbours", neighbours, INTEGERS, tokens.device)
        checks.rank("neighbours", neighbours, "b, l, k, r")
        self.check_vocabulary("neighbours", neighbours)
        if self.encoder is None:
            raise ValueError("neighbours: got some, expected None: cross_attention_layers is empty")
        l, k, r = neighbours.shape[1:]
        complete = n // config.chunk_size
        needed = complete if sequence_starts is None else 0
        if neighbours.shape[0] != b or l < needed:
            raise ValueError(
                f"neighbours: got shape {list(neighbours.shape)}, expected [b, l, k, r] with b = {b} and at least "
                f"l = {needed} chunks of {config.chunk_size} in {n} tokens"
            )
        if r > (config.retrieved_length or 0):
            raise ValueError(f"neighbours: got r = {r}, expected at most retrieved_length = {config.retrieved_length}")
        if neighbour_mask is not None:
            checks.tensor("neighbour_mask", neighbour_mask, (torch.bool,), tokens.device)
            checks.shape("neighbour_mask", neighbour_mask, "b, l, k, r", tuple(neighbours.shape))
        if sequence_starts is None:
            neighbours = neighbours[:, :complete]
            neighbour_mask = None if neighbour_mask is None else neighbour_mask[:, :complete]
        if 0 in (neighbours.shape[1], k, r):
            return None, None
        return neighbours, neighbour_mask

    def check_vocabulary(self, name: str, tokens: torch.Tensor) -> None:
        """Raises ValueError for tokens outside the vocabulary, where looking costs nothing: on a CPU, not compiling."""
        if tokens.device.type != "cpu" or not readable(tokens) or tokens.numel() == 0:
            return
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"{name}: got token {low if low < 0 else high}, expected 0 to vocab_size - 1 = "
                f"{self.config.vocab_size - 1}: is it from another tokenizer?"
            )
