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

from ..nn import NeighbourEncoder, RetroDecoderBlock, common
from ..nn.context_parallel import ContextParallel
from ..nn.positions import t5_buckets
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
    `encoder_embedding`, where the embeddings are not tied, `readout`, and where the config asks for them
    `position_embedding` and `embedding_projection`. `from_peer` makes one of another implementation's model.

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
        own_positions, cross_positions, encoder_positions, encoder_cross_positions = config.kinds()
        shared: dict[str, Any] = {
            "chunk_size": config.chunk_size,
            "retrieved_length": config.retrieved_length,
            "align": config.align,
            "scale": config.attention_scale,
            "biases": config.attention_biases,
            "cross_biases": config.cross_attention_biases,
            "qk_norm": config.qk_norm,
            "gated": config.gated_feed_forward,
            "activation": config.activation,
            "feed_forward_biases": config.feed_forward_biases,
            "norm": config.norm,
            "norm_eps": config.norm_eps,
            "norm_position": config.norm_position,
            "backend": backend,
            **factory,
        }
        turning: dict[str, Any] = {
            "rotary_dim": config.rotary_dim,
            "rotary_base": config.rotary_base,
            "rotary_interleaved": config.rotary_interleaved,
            "rotary_frequencies": config.rotary_frequencies,
        }
        embedding_dim = config.embedding_dim or config.model_dim
        self.embedding = nn.Embedding(config.vocab_size, embedding_dim, **factory)
        self.position_embedding: nn.Embedding | None = None
        if config.absolute_positions != "none":
            self.position_embedding = nn.Embedding(config.max_length, embedding_dim, **factory)
        self.embedding_projection: nn.Linear | None = None
        if embedding_dim != config.model_dim:
            self.embedding_projection = nn.Linear(embedding_dim, config.model_dim, **factory)
        self.blocks = nn.ModuleList(
            RetroDecoderBlock(
                config.model_dim,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                cross_num_kv_heads=config.cross_attention_kv_heads,
                head_dim=config.head_dim,
                feed_forward_dim=config.feed_forward_dim,
                retrieves=p in config.cross_attention_layers,
                context_dim=config.context_dim,
                gate=config.cross_attention_gate if p in config.cross_attention_layers else False,
                condition_on=config.encoder_conditioning,
                residual_scale=config.residual_scale,
                positions=own_positions,
                cross_positions=cross_positions,
                max_length=config.max_length,
                num_buckets=config.self_num_buckets,
                cross_options=self._cross_options(),
                dropout=config.dropout,
                hidden_dropout=config.hidden_dropout,
                feed_forward_dropout=config.feed_forward_dropout,
                **turning,
                **shared,
            )
            for p in range(1, config.num_layers + 1)
        )
        make_norm = common.norm_maker(config.norm, config.norm_eps, factory)
        self.final_norm = make_norm(config.model_dim) if config.final_norm else nn.Identity()
        self.readout: nn.Linear | None = None
        if not config.tied_embeddings:
            self.readout = nn.Linear(config.model_dim, config.vocab_size, bias=config.readout_bias, **factory)
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
                residual_scale=config.encoder_residual_scale,
                partial_chunk=config.partial_chunk,
                cross_residual=config.encoder_cross_residual,
                context_norm=config.encoder_context_norm,
                final_norm=config.encoder_final_norm,
                output_dim=config.encoder_output_dim,
                positions=encoder_positions,
                cross_positions=encoder_cross_positions,
                num_buckets=config.encoder_num_buckets,
                cross_num_buckets=config.encoder_cross_num_buckets,
                dropout=config.encoder_dropout or 0.0,
                hidden_dropout=config.encoder_hidden_dropout or 0.0,
                feed_forward_dropout=config.encoder_feed_forward_dropout or 0.0,
                **(turning if "rotary" in (encoder_positions, encoder_cross_positions) else {}),
                **shared,
            )
        self.reset_parameters()

    def _cross_options(self) -> dict[str, Any]:
        """What chunked cross-attention alone has."""
        config = self.config
        options: dict[str, Any] = {"null_slot": config.null_slot}
        if config.cross_query_positions is not None:
            options["query_positions"] = config.cross_query_positions
        if config.cross_num_buckets is not None:
            m, k, r = config.chunk_size, config.num_neighbours, config.retrieved_length or 0
            buckets = t5_buckets(m, k * r, config.cross_num_buckets)
            options |= {"num_neighbours": k, "bias_buckets": buckets, "num_buckets": config.cross_num_buckets}
        return options

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of deviation `initializer_range`; what adds to a residual stream has it divided by the root of
        the number of such parts, so that the stream keeps its size. Norms are 1; u, v, gates and biases 0. (The paper
        does not say.)"""
        std = self.config.initializer_range
        encoder_layers = [] if self.encoder is None else list(self.encoder.layers)
        for layers in (list(self.blocks), encoder_layers):
            for layer in layers:
                for name, module in layer.named_modules():
                    if isinstance(module, nn.Linear):
                        adds = name.endswith("w_out")
                        nn.init.normal_(module.weight, std=std / (2 * len(layers)) ** (0.5 * adds))
        projection = None if self.encoder is None else self.encoder.w_out
        tables = (self.embedding, self.position_embedding, self.encoder_embedding)
        for module in (*tables, self.embedding_projection, projection, self.readout):
            if module is not None:
                nn.init.normal_(module.weight, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

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
                `retrieved_length`. l is the number of complete chunks (with align "end" also the incomplete one, which
                comes first); chunks beyond it are ignored. None: retrieval is off, and the result that of the decoder
                alone. Where fewer were retrieved, mask the rest.
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
        h = self.embed(tokens, sequence_starts=sequence_starts)
        encoded = None
        for p, block in enumerate(self.blocks, start=1):
            if neighbours is not None and p == config.cross_attention_layers[0]:
                encoded = self._encoder_of(neighbours, neighbour_mask, sequence_starts)
                if self.context is not None and neighbour_mask is not None:
                    neighbour_mask = self.context.prepend_previous_chunk(neighbour_mask)
            if self.activation_checkpointing and torch.is_grad_enabled():
                h, encoded = recompute(block, h, encoded, neighbour_mask, sequence_starts, cache, use_reentrant=False)
            else:
                h, encoded = block(h, encoded, neighbour_mask, sequence_starts, cache)
        return self.final_norm(h)

    def embed(
        self,
        tokens: torch.Tensor,
        position: torch.Tensor | None = None,
        sequence_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """EMB of Algorithm 1: tokens [b, n] -> [b, n, model_dim]. `position`: int64 [b], of the first token (0 by
        default), where positions are embedded."""
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            b, n = tokens.shape
            place = torch.arange(n, device=tokens.device).expand(b, n)
            if sequence_starts is not None:
                place = place - checks.document_starts(sequence_starts, x, b, n)
            if self.context is not None:
                place = place + self.context.rank * n
            x = x + self.position_embedding(place if position is None else place + position[:, None])
        x = F.dropout(x, self.config.embedding_dropout, self.training)
        return x if self.embedding_projection is None else self.embedding_projection(x)

    def read(self, activations: torch.Tensor) -> torch.Tensor:
        """READ of Algorithm 1: [..., model_dim] -> logits [..., vocab_size]."""
        return F.linear(activations, self.readout_weight, self.readout_bias)

    @property
    def readout_weight(self) -> torch.Tensor:
        """[vocab_size, model_dim]"""
        return self.embedding.weight if self.readout is None else self.readout.weight

    @property
    def readout_bias(self) -> torch.Tensor | None:
        """[vocab_size], where there is one."""
        return None if self.readout is None else self.readout.bias

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
        table = self.embedding if self.encoder_embedding is None else self.encoder_embedding
        embedded = table(neighbours)
        if self.position_embedding is not None and self.config.absolute_positions == "both":
            embedded = embedded + self.position_embedding.weight[: neighbours.shape[-1]]
        embedded = F.dropout(embedded, self.config.embedding_dropout, self.training)
        return self.encoder(embedded, activations, neighbour_mask, sequence_starts)

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
        return linear_cross_entropy(
            activations, self.readout_weight, targets, bias=self.readout_bias, reduction=reduction
        )

    def count_parameters(self) -> dict[str, int]:
        """Parameters by part: "decoder", "cross-attention" (and its norms), "encoder", "embeddings" (each table once).
        "decoder" alone is the paper's baseline; the first three together are its RETRO."""
        counts = dict.fromkeys(("decoder", "cross-attention", "encoder", "embeddings"), 0)
        for name, parameter in self.named_parameters():
            tables = "embedding.", "position_embedding.", "embedding_projection.", "encoder_embedding.", "readout."
            if name.startswith(tables):
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

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Uploads the model with a model card; see `models.hub.push_to_hub`."""
        from .hub import push_to_hub

        return push_to_hub(self, repository, **options)

    @classmethod
    def from_hub(cls, repository: str, **options: Any) -> Retro:
        """Reads a model from the Hugging Face hub, "owner/name", through its cache; options as in `from_pretrained`.

        Raises DatabaseError where it is not to be had."""
        from ..hub import model_folder

        return cls.from_pretrained(model_folder(repository, "repository"), **options)

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

    @classmethod
    def from_peer(
        cls,
        source: nn.Module | str | os.PathLike[str],
        *,
        peer: str | None = None,
        prefix: str | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        copy: bool = True,
        **changes: Any,
    ) -> Retro:
        """A copy of another implementation's model, in evaluation mode, with the same logits.

            Retro.from_peer(retro_pytorch_model).generate(tokens, retriever=retriever)
            Retro.from_peer("checkpoint.pt", chunk_size=64)

        Args:
            source: a model of one of `integrations.weights.PEERS` (or a wrapper that holds one, swapped or not), or a
                file or folder with its weights, which is read without running what a pickle might hold.
            peer: which implementation it is, by its name there; None finds out.
            prefix: of a file with several models (an average beside the model, say): what the names of the one begin
                with. What has another name is left aside. None finds the only one, beside which nothing may be.
            backend, device, dtype: of the model; by default the device of the source's weights, and their dtype.
            changes: fields of the config that a source does not tell, such as `retrieved_length`, `chunk_size` and
                `num_heads` of a bare state dict, `tokenizer`, `eos_token_id`.
            copy: False shares the parameters' memory with the source where the layout allows it.

        Raises TypeError or ValueError for what is none of them, for another version, and for tensors that are missing
        or left over, by name; FileNotFoundError.
        """
        from ..integrations.weights import converted

        if not isinstance(copy, bool):
            raise TypeError(f"copy: got {copy!r}, expected a bool")
        try:
            device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device: got {device!r}, expected a torch.device or its name, as 'cuda:1'") from error
        with torch.inference_mode(False):  # in which parameters could never be trained
            found = converted(source, peer=peer, prefix=prefix, dtype=dtype, **changes)
            tensors = (
                (found.source, name, x.detach().to(device, dtype if x.is_floating_point() else None, copy=copy))
                for name, x in found.weights.items()
            )
            return checkpoint.assemble(cls, found.config, tensors, found.source, backend=backend)

    def to_peer(self, peer: str) -> dict[str, torch.Tensor]:
        """The state dict of another implementation's model with this one's function: "retro-pytorch", for
        `retro_pytorch.RETRO` with the arguments that `integrations.retro_pytorch.arguments(config)` gives.

        Raises ValueError for another name, and for a config that it cannot express, naming the field.
        """
        from ..integrations.weights import exported

        return exported(self.config, self.state_dict(), peer)

    def _encoder_of(self, neighbours, neighbour_mask, sequence_starts):
        def encode(activations: torch.Tensor) -> torch.Tensor:
            encoded = self.encode(neighbours, activations, neighbour_mask, sequence_starts)
            return encoded if self.context is None else self.context.prepend_previous_chunk(encoded)

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
        if config.hard_limit is not None and n * parts > config.hard_limit:
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
        complete = config.num_chunks(n)
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
        elif config.pad_token_id is not None:
            neighbour_mask = neighbours != config.pad_token_id
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
