"""The GPT: token and position embeddings, a stack of blocks, a head with its loss.

Shapes: B batch, T tokens, C width, V vocabulary, N rows. Packed documents are carried as (N, C), otherwise
the stream is (B, T, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptcore import ops
from gptcore.dist import TensorShard, TensorSplit
from gptcore.dist.tensor_shard import shard_of
from gptcore.errors import UserError
from gptcore.models import accounting, tensor_parallel, vocabulary_parallel
from gptcore.models.adapter_spec import AdapterSpec
from gptcore.models.block import Context, KeyValueCache, Stack
from gptcore.models.checkpointing import Checkpointing
from gptcore.models.config import GPTConfig
from gptcore.models.init import Projection, initialise
from gptcore.models.norm import Norm
from gptcore.models.padding import Padding
from gptcore.models.positions import RotaryTables, document_positions
from gptcore.models.summed_gradients import SharedGradient, summed_gradients
from gptcore.models.tied import TiedTable
from gptcore.models.virtual_tokens import Prefix, VirtualTokens
from gptcore.nn.embedding import Embedding
from gptcore.nn.half_precision import in_f32
from gptcore.nn.linear import linear
from gptcore.nn.lora import AdaptedLinear
from gptcore.nn.moe import MoEStatistics, RoutingStatistics
from gptcore.nn.tensor_parallel import TensorPass, gather_columns

__all__ = ["GPT", "GPTLoss", "KeyValueCache"]

_linear_cross_entropy = in_f32(ops.linear_cross_entropy, rounds=False)


class GPTLoss(NamedTuple):
    """``loss`` without the z-loss, ``z_loss`` with its coefficient, ``logprobs`` (B, T) f32 of the targets.

    ``logprobs`` is detached; with ``reduction="none"`` the first two are (B, T) f32 too, and differentiable. Of a model
    with experts, ``balance_loss`` and ``router_z_loss`` are (), summed over the layers, with their coefficients from
    ``model.moe``, and ``routing`` has the statistics of each layer of experts; training minimises ``total``.
    """

    loss: Tensor
    z_loss: Tensor
    logprobs: Tensor
    balance_loss: Tensor | None = None
    router_z_loss: Tensor | None = None
    routing: tuple[MoEStatistics, ...] = ()

    @property
    def total(self) -> Tensor:
        """The sum of all losses; under ``reduction="none"`` those of the routers are added to every token's."""
        total = self.loss + self.z_loss
        if self.balance_loss is None or self.router_z_loss is None:
            return total
        return total + self.balance_loss + self.router_z_loss


class GPT(nn.Module):
    """A language model as ``config`` describes it, with weights drawn from ``seed``.

    ``dtype`` is that of every parameter, f32, bf16 or f16 (master copies belong to the optimizer); ``device`` may
    be "meta" to count without memory. A feature that no forward path computes yet is refused here.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        refuse_unimplemented(config)
        self.config = config
        self.tensor: TensorSplit | None = None
        self._shared_gradients: list[SharedGradient] = []
        with torch.device("meta"):
            self._build(config)
        self.to(dtype)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            initialise(self, config, seed)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> GPT:
        """As ``torch.nn.Module.to_empty``: parameters and buffers on ``device``, with no values yet."""

        def empty(t: Tensor) -> Tensor:
            if not t.is_meta:
                return torch.empty_like(t, device=device)
            # torch's own asks a meta tensor for its strides, by a decomposition that loads SymPy: 40 MB
            return torch.empty(t.shape, dtype=t.dtype, device=device)

        return self._apply(empty, recurse=recurse)

    def _build(self, config: GPTConfig) -> None:
        c, table = config.width, config.table_width
        self.token_embedding = Embedding(config.vocab_size, table)
        learned = config.position.kind == "learned"
        rows = config.context_length + config.position.offset
        self.position_embedding = Embedding(rows, c) if learned else None
        self.project_in = Projection(table, c, bias=False) if table != c else None
        self.embedding_norm = Norm(config.norm, c) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None
        self.rotary = RotaryTables(config) if config.position.kind == "rotary" else None
        self.stack = Stack(config)
        self.project_out = Projection(c, table, bias=False) if table != c else None
        self.head = None if config.tied_head else Projection(table, config.vocab_size, config.head_bias)
        # What ``gptcore.models.adapters`` has put on, and what of it is in use.
        self.virtual_tokens: VirtualTokens | None = None
        self.adapter_specs: dict[str, AdapterSpec] = {}
        self.adapters_in_use: dict[str, float] = {}

    @property
    def context_length(self) -> int:
        """Tokens that a sequence may have: the configuration's, less the virtual tokens before every sequence."""
        virtual = 0 if self.virtual_tokens is None else self.virtual_tokens.length
        return self.config.context_length - virtual

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the token embedding where it is tied."""
        if isinstance(self.head, AdaptedLinear):
            return self.head.whole_weight()
        return self.token_embedding.weight if self.head is None else self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """(V,) or None."""
        return None if self.head is None else self.head.bias

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KeyValueCache | None = None,
        all_logits: bool = False,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        weights: Tensor | None = None,
    ) -> Any:
        """The loss on ``targets``, or f32 logits.

        tokens, targets: (B, T) integers; targets of -100 don't count. ``cu_seqlens`` (documents + 1,) int32
        bounds documents in the B·T tokens laid end to end: none sees another, and positions start anew.
        ``mask`` (B, T) bool is False for padding, anywhere in a row (or document): it meets no layer, positions
        count the tokens that are left, and what is given for it is 0.
        With targets: ``GPTLoss``. Without: logits (B, T, V). With ``cache``: keys and values are appended to
        it, and the logits are those of the last position (B, V) unless ``all_logits``. ``weights`` (B, T) f32 are
        those of the targets in the mean.
        """
        if targets is not None and targets.shape != tokens.shape:
            got, expected = tuple(targets.shape), tuple(tokens.shape)
            raise ValueError(f"GPT: argument 'targets': got shape {got}, expected {expected}")
        if weights is not None:
            return self._weighted(
                weights, reduction, mask, tokens, targets, cu_seqlens, z_loss, label_smoothing
            )
        last_only = cache is not None and not all_logits
        if cache is not None and (targets is not None or cu_seqlens is not None):
            raise ValueError("GPT: cache goes with neither targets nor cu_seqlens, got both")
        if cache is not None and self.tensor is not None and self.tensor.sequence_parallel:
            raise ValueError("GPT: argument 'cache': got one with sequence_parallel, expected None")
        if mask is not None:
            if cache is not None:
                raise ValueError("GPT: argument 'mask': got one beside a cache, expected None")
            options = {"z_loss": z_loss, "label_smoothing": label_smoothing, "reduction": reduction}
            return self._without_padding(Padding.of(tokens, mask, cu_seqlens), tokens, targets, options)
        table = self._tied_table() if targets is not None else None
        routing = RoutingStatistics()
        tensor = self._begin(tokens, targets, cu_seqlens, cache)
        x = self._hidden(tokens, cu_seqlens, cache, tensor, last_only=last_only, table=table, routing=routing)
        if targets is not None:
            weight = self.head_weight if table is None else table.head()
            out = self._loss(x, weight, targets, z_loss, label_smoothing, reduction, tensor)
            return self._with_routing(out, routing.layers) if routing.layers else out
        logits = self.logits(x if tensor is None else tensor.gather(x))
        return logits[:, 0] if last_only else logits.view(*tokens.shape, -1)

    def _weighted(
        self,
        weights: Tensor,
        reduction: str,
        mask: Tensor | None,
        tokens: Tensor,
        targets: Tensor | None,
        cu_seqlens: Tensor | None,
        z_loss: float,
        label_smoothing: float,
    ) -> GPTLoss:
        """``forward`` with a mean in which each target has its weight."""
        if targets is None or weights.shape != targets.shape or reduction != "mean":
            raise ValueError(
                f"GPT: argument 'weights': got shape {tuple(weights.shape)} with reduction '{reduction}', expected "
                f"targets, as many weights {tuple(tokens.shape)}, and 'mean'"
            )
        options: dict[str, Any] = {"z_loss": z_loss, "label_smoothing": label_smoothing, "reduction": "none"}
        out = self.forward(tokens, targets, mask=mask, cu_seqlens=cu_seqlens, **options)
        weights = weights * (targets >= 0) if mask is None else weights * ((targets >= 0) & mask)
        share = weights / weights.sum()
        return out._replace(loss=(share * out.loss).sum(), z_loss=(share * out.z_loss).sum())  # type: ignore[no-any-return]

    def _without_padding(
        self, padding: Padding, tokens: Tensor, targets: Tensor | None, options: dict[str, Any]
    ) -> Any:
        """``forward`` of the tokens that count, as documents."""
        bounds = padding.cu_seqlens
        if targets is None:
            return padding.put(self.forward(padding.take(tokens), cu_seqlens=bounds))
        out = self.forward(padding.take(tokens), padding.take(targets), cu_seqlens=bounds, **options)
        out = out._replace(logprobs=padding.put(out.logprobs))
        if options["reduction"] == "none":
            out = out._replace(loss=padding.put(out.loss), z_loss=padding.put(out.z_loss))
        return out

    def hidden(
        self, tokens: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """(B, T, C): what the head would read, for heads of another kind; ``mask`` as ``forward`` takes it."""
        if mask is not None:
            padding = Padding.of(tokens, mask, cu_seqlens)
            return padding.put(self.hidden(padding.take(tokens), cu_seqlens=padding.cu_seqlens))
        tensor = self._begin(tokens, None, cu_seqlens, None)
        x = self._hidden(tokens, cu_seqlens, None, tensor)
        return (x if tensor is None else tensor.gather(x)).view(*tokens.shape, -1)

    def hidden_and_head(
        self, tokens: Tensor, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For losses of one's own on the head's logits and on the states it reads, in one pass.

        Returns:
            ``hidden`` (B, T, C); ``rows`` (B, T, C'), what the head multiplies, which is ``hidden`` unless the table is
            of another width; and the head's weight (V, C') for this pass, whose gradient joins the embedding's where
            they are tied.
        Raises:
            UserError: the model is cut over ranks.
        """
        if self.tensor is not None:
            raise UserError("hidden_and_head: the model is cut over ranks; use one that is whole")
        self._begin(tokens, None, cu_seqlens, None)
        table = self._tied_table()
        hidden = self._hidden(tokens, cu_seqlens, None, None, table=table).view(*tokens.shape, -1)
        return hidden, self._to_head(hidden), self.head_weight if table is None else table.head()

    def logits(self, x: Tensor) -> Tensor:
        """f32 logits (..., V) for hidden states x (..., C)."""
        x = self._to_head(x)
        if self.tensor is None:
            return self._logits(x)
        x = TensorPass(self.tensor.member, tuple(x.shape[:-1])).enter(x)
        return gather_columns(self._logits(x), self._words.sizes, self.tensor.member)

    def _logits(self, x: Tensor) -> Tensor:
        """Those of the words that are here, for what ``_to_head`` gave."""
        weight = self.head_weight
        if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or torch.compiler.is_compiling():
            logits = linear(x, weight, self.head_bias).float()
        else:  # straight to f32: rounding logits to bf16 would make ties
            flat = x.reshape(-1, x.shape[-1])
            out = flat.new_empty(flat.shape[0], weight.shape[0], dtype=torch.float32)
            ops.matmul(flat, weight, out=out, bias=self.head_bias, transpose_b=True)
            logits = out.view(*x.shape[:-1], -1)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _to_head(self, x: Tensor) -> Tensor:
        return x if self.project_out is None else self.project_out(x)

    def _hidden(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None,
        cache: KeyValueCache | None,
        tensor: TensorPass | None,
        **options: Any,
    ) -> Tensor:
        """Normed output of the stack: (B, T, C), packed (B·T, C), or (B, 1, C) if ``last_only``; of these a rank's
        rows with sequence parallelism."""
        if tensor is None:
            return self._stream(tokens, cu_seqlens, cache, tensor, **options)
        with summed_gradients(self._shared_gradients, tensor.member):
            return self._stream(tokens, cu_seqlens, cache, tensor, **options)

    def _stream(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None,
        cache: KeyValueCache | None,
        tensor: TensorPass | None,
        *,
        last_only: bool = False,
        table: TiedTable | None = None,
        routing: RoutingStatistics | None = None,
    ) -> Tensor:
        positions: int | Tensor = 0 if cache is None else _next_positions(cache, tokens.shape[1])
        if cu_seqlens is not None:
            tokens = tokens.reshape(-1)
            positions = document_positions(cu_seqlens, tokens.shape[0])
        prefix = self._prefix(positions, tokens, cache)
        if prefix is not None:
            positions = positions + prefix.length
        x, delta = self._embed(tokens, positions, table, tensor)
        seed = self._attention_seed(tokens.device)
        context = Context(cu_seqlens, positions, cache, self.rotary, seed, routing, tensor, prefix)
        x = self.stack(x, delta, context, last_only=last_only)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x

    def _prefix(self, positions: int | Tensor, tokens: Tensor, cache: KeyValueCache | None) -> Prefix | None:
        """What layers need of virtual tokens, for ``tokens`` at ``positions`` in their sequences."""
        if self.virtual_tokens is None:
            return None
        if not isinstance(positions, Tensor):
            positions = torch.arange(positions, positions + tokens.shape[-1], device=tokens.device)
        return self.virtual_tokens.prefix(self, positions, cache)

    def run_embeddings(self, x: Tensor, cache: KeyValueCache) -> None:
        """Run the blocks over embeddings (B, T, width of the token embedding) at positions from 0, for the keys and
        values that ``cache`` is given: those of a soft prompt."""
        x, delta = self._from_embeddings(x, 0, None)
        self.stack(x, delta, Context(cache=cache, rotary=self.rotary))

    def _attention_seed(self, device: torch.device) -> Tensor | None:
        """One draw for all layers of this forward, from torch's generator like every other dropout."""
        if not (self.training and self.config.attention.dropout):
            return None
        return torch.randint(2**63 - 1, (1,), device=device)

    def _tied_table(self) -> TiedTable | None:
        """For a pass that ends in the loss of a tied head: see ``gptcore.models.tied``."""
        embedding = self.token_embedding
        ours = self.head is None and type(embedding) is Embedding
        return TiedTable(embedding.weight) if ours and TiedTable.serves(embedding) else None

    def _embed(
        self, tokens: Tensor, positions: int | Tensor, table: TiedTable | None, tensor: TensorPass | None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream as (token part, position part), added by the first norm where it can."""
        if tensor is not None:
            x = vocabulary_parallel.embed(tokens, self.token_embedding, table, tensor)
        else:
            x = self.token_embedding(tokens) if table is None else table.rows(tokens)
        if self.config.embedding_grad_shrink != 1.0:
            x = _ShrinkGradient.apply(x, self.config.embedding_grad_shrink)
        return self._from_embeddings(x, positions, tensor, tokens.shape)

    def _from_embeddings(
        self, x: Tensor, positions: int | Tensor, tensor: TensorPass | None, shape: torch.Size | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As ``_embed``, of tokens of ``shape`` (that of x without it) whose embeddings are x."""
        config, shape = self.config, x.shape[:-1] if shape is None else shape
        if config.embedding_scale != 1.0:
            x = x * config.embedding_scale
        if self.project_in is not None:
            x = self.project_in(x)
        delta = None
        if self.position_embedding is not None:
            if not isinstance(positions, Tensor):
                positions = torch.arange(positions, positions + shape[-1], device=x.device)
            # gathered for every token rather than broadcast: the gather's backward sums in a fixed order
            rows = (positions + config.position.offset).expand(shape).contiguous()
            delta = self.position_embedding(rows if tensor is None else tensor.own_rows(rows))
        if self.embedding_norm is not None:
            x, delta = self.embedding_norm.add(x, delta)[0], None
        if self.dropout is not None:
            x, delta = x if delta is None else x + delta, None
            x = self.dropout(x) if tensor is None else tensor.drop(x, self.dropout)
        if delta is not None and config.norm.placement in ("post", "deepnorm"):
            x, delta = x + delta, None
        return x, delta

    def _loss(
        self,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        label_smoothing: float,
        reduction: str,
        tensor: TensorPass | None,
    ) -> GPTLoss:
        x, shape = self._to_head(x), targets.shape
        if tensor is not None:
            x = tensor.enter(x)
        flat, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
        if tensor is not None:
            options = vocabulary_parallel.HeadOptions(
                label_smoothing, z_loss, self.config.logit_scale, self.config.logit_soft_cap, reduction
            )
            parts = vocabulary_parallel.loss(flat, weight, self.head_bias, targets, self._words, options)
            return _shaped(parts, shape)
        out = _linear_cross_entropy(
            flat, weight, targets, label_smoothing=label_smoothing, z_loss=z_loss,
            logit_scale=self.config.logit_scale, reduction=reduction, bias=self.head_bias,
            logit_soft_cap=self.config.logit_soft_cap,
        )  # fmt: skip
        return _shaped(out[:3], shape)

    def _with_routing(self, out: GPTLoss, routing: list[MoEStatistics]) -> GPTLoss:
        """The losses of the routers beside those of the head."""
        spec = self.config.moe
        assert spec is not None
        balance = torch.stack([layer.balance_loss for layer in routing]).sum()
        z = torch.stack([layer.z_loss for layer in routing]).sum()
        return out._replace(
            balance_loss=spec.balance_weight * balance,
            router_z_loss=spec.z_weight * z,
            routing=tuple(routing),
        )

    def tensor_obstacle(self, ranks: int, sequence_parallel: bool) -> str | None:
        """Why :func:`gptcore.dist.tensor_parallel` cannot cut it over so many ranks; None: it can."""
        dtype = self.token_embedding.weight.dtype
        if self.adapter_specs:
            return "got one with adapters, expected one without: absorb them first"
        if dtype == torch.float16:
            return f"got one of {dtype}, expected torch.float32 or torch.bfloat16"
        return tensor_parallel.obstacle(self.config, ranks, sequence_parallel)

    def shard_tensors(self, split: TensorSplit) -> None:
        """Keep this rank's pieces of the matrices alone: see :func:`gptcore.dist.tensor_parallel`."""
        tensor_parallel.cut(self, split)
        self.tensor, self._shared_gradients = split, tensor_parallel.shared_gradients(self, split)

    @property
    def num_kv_heads(self) -> int:
        """Hkv of a cache; that of this rank, where the model is cut over some."""
        ranks = 1 if self.tensor is None else self.tensor.member.ranks
        return max(self.config.num_kv_heads // ranks, 1)

    @property
    def _words(self) -> TensorShard:
        """Who has which words of the head."""
        return shard_of(self.token_embedding if self.head is None else self.head, "weight")

    def _begin(
        self, tokens: Tensor, targets: Tensor | None, cu_seqlens: Tensor | None, cache: KeyValueCache | None
    ) -> TensorPass | None:
        """Checked arguments; on all ranks together where the model is cut over some."""
        before = 0 if cache is None else cache.length
        if self.tensor is not None:
            return tensor_parallel.begin(self, self.tensor, tokens, targets, cu_seqlens, before)
        self.check(tokens, cu_seqlens, before)
        return None

    def check(self, tokens: Tensor, cu_seqlens: Tensor | None, before: int) -> None:
        """Raises ValueError or TypeError for what ``forward`` does not take, ``before`` tokens being in the cache."""
        if tokens.dim() != 2 or tokens.numel() == 0:
            got = tuple(tokens.shape)
            raise ValueError(f"GPT: argument 'tokens': got shape {got}, expected (B, T) with B and T above 0")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"GPT: argument 'tokens': got {tokens.dtype}, expected torch.int64 or torch.int32"
            )
        longest = before + tokens.shape[1]
        if cu_seqlens is not None:
            self._check_documents(tokens, cu_seqlens)
        elif longest > self.context_length and self.config.position.kind in ("learned", "rotary"):
            raise ValueError(
                f"GPT: argument 'tokens': got {longest} positions, expected at most the context length "
                f"{self.context_length}"
            )

    def _check_documents(self, tokens: Tensor, cu_seqlens: Tensor) -> None:
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
            raise TypeError(
                f"GPT: argument 'cu_seqlens': got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, "
                "expected torch.int32 of shape (documents + 1,)"
            )
        if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu":
            return  # would wait for the device; the kernels check their own bounds
        lengths = cu_seqlens.diff()
        fits = len(lengths) > 0 and int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == tokens.numel()
        if not fits or int(lengths.min()) < 0:
            raise ValueError(
                f"GPT: argument 'cu_seqlens': got {cu_seqlens.tolist()[:8]}, expected rising from 0 to the "
                f"{tokens.numel()} tokens"
            )
        longest = int(lengths.max())
        if longest > self.context_length and self.config.position.kind in ("learned", "rotary"):
            raise ValueError(
                f"GPT: argument 'cu_seqlens': got a document of {longest} tokens, expected at most the "
                f"context length {self.context_length}"
            )

    def checkpoint_activations(self, kind: str = "block", *, every: int = 1) -> GPT:
        """Trade time for memory in training: compute values of the blocks anew in backward instead of keeping them.

        Gradients have the same bits; hooks on modules inside a block run twice.

        Args:
            kind: "block" keeps only what goes into a block; "selective" also the results of its products and of
                attention, and computes norms, activations and rotations anew; "none" keeps everything.
            every: of so many blocks the first is treated so.

        Returns:
            The model.

        Raises:
            UserError: an unknown kind.
            ValueError: ``every`` below 1.
        """
        self.stack.checkpointing = Checkpointing.checked(kind, every)
        return self

    def num_parameters(self, *, embeddings: bool = True, active: bool = False) -> int:
        """Number of parameters; ``embeddings`` false leaves tables and an own head out (Kaplan's N), ``active`` the
        experts that a token is not sent to."""
        counts = accounting.parameter_counts(self.config)
        idle = counts.total - accounting.active_parameters(self.config) if active else 0
        whole = sum(p.numel() for p in self.parameters()) if embeddings else counts.without_embeddings
        return whole - idle

    def flops_per_token(self, length: int, *, causal_halved: bool = False) -> int:
        """Model FLOPs of training on one token: see ``accounting.flops_per_token``."""
        return accounting.flops_per_token(self.config, length, causal_halved=causal_halved)

    def state_bytes(self) -> accounting.StateBytes:
        """Bytes of parameters, gradients and AdamW state in this model's dtype."""
        size = self.token_embedding.weight.element_size()
        return accounting.state_bytes(self.config, parameter_bytes=size)


def _shaped(out: Sequence[Tensor], shape: torch.Size) -> GPTLoss:
    """Loss and z-loss, each () or (B·T,), and logprobs, those of tokens as (B, T)."""
    loss, z, logprobs = (one.view(shape) if one.dim() else one for one in out)
    return GPTLoss(loss, z, logprobs)


def _next_positions(cache: KeyValueCache, count: int) -> int | Tensor:
    """Where the next ``count`` tokens stand; those of sequences of different lengths each for itself."""
    places: int | Tensor = cache.positions(count) if hasattr(cache, "positions") else cache.length
    return places


class _ShrinkGradient(torch.autograd.Function):
    """alpha * x + (1 - alpha) * stop_gradient(x): x itself, with alpha of its gradient (GLM-130B)."""

    generate_vmap_rule = True  # with setup_context what torch.func asks for

    @staticmethod
    def forward(x: Tensor, alpha: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.alpha = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.alpha, None


def refuse_unimplemented(config: GPTConfig) -> None:
    """Raises ``UserError`` for what the configuration can say but no forward path computes yet."""
    spec = config.attention
    foreseen = {
        "model.attention.relative_bias": spec.relative_bias,
        "model.attention.cross_attention": spec.cross_attention,
    }
    for key, wanted in foreseen.items():
        if wanted:
            raise UserError(
                f"{key} is part of the format, but no model computes it yet; leave it at its default"
            )
