"""What a GPT is: nested frozen specifications for attention, norm, feed-forward and position.

Letters as in the kernels: L layers, C width, H query heads, Hkv key/value heads, D head size, F hidden
size of the feed-forward, V vocabulary, T context length. Derived sizes stay None in the fields and are read
through the properties of ``GPTConfig``, so that changing ``width`` also changes what follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from gptcore.errors import UserError
from gptcore.models.schema import Spec

InitFamily = Literal["gpt1", "gpt2", "opt", "bloom", "palm", "glm", "deepnet", "llama"]


def _positive(section: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{section}.{name}: expected a value above 0, got {value}")


@dataclass(frozen=True)
class AttentionSpec(Spec):
    """Attention of every layer.

    ``pattern`` is repeated over the layers; a ``banded`` layer sees ``window`` tokens, the query's own
    included (and as many after it where ``causal`` is false). ``softmax_scale`` None is D**-0.5. A scaled score s
    becomes soft_cap * tanh(s / soft_cap). ``dropout`` acts on the probabilities, in training. ``sinks`` gives each
    head a learned score that joins the softmax and leads to no value (Xiao et al. 2023). ``relative_bias`` and
    ``cross_attention`` are part of the format, but ``GPT`` refuses them so far.
    """

    section: ClassVar[str] = "model.attention"

    num_heads: int = 12
    num_kv_heads: int | None = None  # Hkv; None is num_heads (MHA), 1 is MQA
    head_dim: int | None = None  # D; None is width / num_heads
    causal: bool = True
    pattern: tuple[Literal["dense", "banded"], ...] = ("dense",)
    window: int = 256
    qkv_bias: bool = True
    out_bias: bool = True
    qk_norm: Literal["none", "layer_norm", "rms_norm"] = "none"
    softmax_scale: float | None = None
    dropout: float = 0.0
    soft_cap: float | None = None
    sinks: bool = False
    relative_bias: bool = False
    cross_attention: bool = False

    def validate(self) -> None:
        _positive(
            self.section, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim,
            window=self.window, softmax_scale=self.softmax_scale, soft_cap=self.soft_cap,
        )  # fmt: skip
        if not self.pattern:
            raise UserError(
                f"{self.section}.pattern: expected at least one of 'dense', 'banded', got an empty list"
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.section}.num_kv_heads: {self.num_kv_heads} key/value heads don't divide "
                f"{self.num_heads} query heads"
            )


@dataclass(frozen=True)
class NormSpec(Spec):
    """Normalisation and where it stands in a block, f being attention or feed-forward.

    ``pre``: x + f(norm(x)); ``post``: norm(x + f(x)); ``deepnorm``: norm(alpha * x + f(x));
    ``sandwich``: x + norm(f(norm(x))). ``parallel`` runs attention and feed-forward on the same x, through
    one norm (``shared``, PaLM) or one each (``separate``, GPT-NeoX). ``zero_centred`` applies 1 + weight
    (Gemma).
    """

    section: ClassVar[str] = "model.norm"

    kind: Literal["layer_norm", "rms_norm"] = "layer_norm"
    eps: float = 1e-5
    bias: bool | None = None  # None: layer_norm has one, rms_norm has none
    zero_centred: bool = False
    placement: Literal["pre", "post", "deepnorm", "sandwich"] = "pre"
    parallel: Literal["none", "shared", "separate"] = "none"
    final: bool | None = None  # None: after pre and sandwich blocks, which leave the stream unnormalised
    alpha: float | None = None  # deepnorm only; None is GLM's (2L)**0.5, DeepNet's decoders use (2L)**0.25

    @property
    def has_bias(self) -> bool:
        return self.kind == "layer_norm" if self.bias is None else self.bias

    @property
    def has_final(self) -> bool:
        return self.placement in ("pre", "sandwich") if self.final is None else self.final

    def validate(self) -> None:
        _positive(self.section, eps=self.eps, alpha=self.alpha)
        if self.kind == "rms_norm" and self.bias:
            raise UserError(
                f"{self.section}.bias: an rms_norm has no bias; leave the key out or choose layer_norm"
            )
        if self.parallel != "none" and self.placement != "pre":
            raise UserError(f"{self.section}.parallel: needs placement 'pre', got '{self.placement}'")
        if self.alpha is not None and self.placement != "deepnorm":
            raise UserError(f"{self.section}.alpha: belongs to placement 'deepnorm', got '{self.placement}'")


@dataclass(frozen=True)
class MlpSpec(Spec):
    """Feed-forward: down(act(up(x))), or down(act(gate(x)) * up(x)) for the gated ones (swiglu, geglu*).

    ``gelu`` and ``geglu_tanh`` use the tanh form, ``gelu_erf`` and ``geglu`` the error function.
    """

    section: ClassVar[str] = "model.mlp"

    hidden_size: int | None = None  # F; None is 4C
    activation: Literal["gelu", "gelu_erf", "relu", "silu", "swiglu", "geglu", "geglu_tanh"] = "gelu"
    bias: bool = True

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    def validate(self) -> None:
        _positive(self.section, hidden_size=self.hidden_size)


@dataclass(frozen=True)
class MoESpec(Spec):
    """Experts in place of the feed-forward of every ``every``-th block; ``gptcore.nn.MoE`` explains the options.

    A block of index i has experts where i % every == offset (None: the last of each ``every``). Activation and biases
    are those of ``model.mlp``, and so is the hidden size unless given. A capacity factor of 0 drops no token;
    ``eval_capacity_factor`` None is that of training. Generation with a cache drops none. ``balance_weight`` and
    ``z_weight`` are the coefficients of the losses, which are summed over the layers; with ``balance`` "shazeer" those
    of importance and load are ``balance_weight`` times ``w_importance`` and ``w_load``. ``router_init_scale`` s
    draws the router from N(0, s / C) (ST-MoE: 0.1); None: as the family's other matrices.
    """

    section: ClassVar[str] = "model.moe"

    num_experts: int = 8  # E
    top_k: int = 2  # K
    every: int = 1
    offset: int | None = None
    hidden_size: int | None = None
    shared_experts: int = 0
    renormalise: bool | None = None
    capacity_factor: float = 0.0
    eval_capacity_factor: float | None = None
    capacity_convention: Literal["per_token", "per_assignment"] = "per_token"
    capacity_minimum: int = 1
    capacity_rounding: Literal["up", "down", "nearest"] = "up"
    second_choice: Literal["always", "gshard", "st_moe"] = "always"
    priority: Literal["position", "gate", "random"] = "position"
    balance: Literal["first", "all", "shazeer"] = "first"
    w_importance: float = 1.0
    w_load: float = 1.0
    balance_weight: float = 1e-2
    z_weight: float = 1e-3
    noise: bool = False
    jitter: float = 0.0
    dropout: float = 0.0
    router_init_scale: float | None = None

    @property
    def first(self) -> int:
        """The offset that counts."""
        return self.every - 1 if self.offset is None else self.offset

    def validate(self) -> None:
        _positive(
            self.section, num_experts=self.num_experts, every=self.every, hidden_size=self.hidden_size,
            capacity_minimum=self.capacity_minimum, router_init_scale=self.router_init_scale,
        )  # fmt: skip
        if not 1 <= self.top_k <= min(self.num_experts, 64):
            raise UserError(
                f"{self.section}.top_k: expected 1 to {min(self.num_experts, 64)}, got {self.top_k}"
            )
        if self.num_experts > 4096:
            raise UserError(f"{self.section}.num_experts: expected at most 4096, got {self.num_experts}")
        if not 0 <= self.first < self.every:
            raise UserError(
                f"{self.section}.offset: expected 0 to {self.every - 1}, below every = {self.every}, got {self.offset}"
            )
        if self.top_k == 1 and self.second_choice != "always":
            raise UserError(
                f"{self.section}.second_choice: '{self.second_choice}' needs a top_k of 2 or more"
            )
        if self.balance == "shazeer" and not self.noise:
            raise UserError(f"{self.section}.balance: 'shazeer' needs {self.section}.noise = true")
        at_least_0 = {
            "shared_experts": self.shared_experts, "capacity_factor": self.capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor or 0.0, "balance_weight": self.balance_weight,
            "z_weight": self.z_weight, "w_importance": self.w_importance, "w_load": self.w_load,
        }  # fmt: skip
        for name, value in at_least_0.items():
            if not 0 <= value < float("inf"):
                raise UserError(f"{self.section}.{name}: expected 0 or more, got {value}")
        for name, value in (("jitter", self.jitter), ("dropout", self.dropout)):
            if not 0 <= value < 1:
                raise UserError(f"{self.section}.{name}: expected at least 0 and below 1, got {value}")


@dataclass(frozen=True)
class ScalingSpec(Spec):
    """Stretches rotary frequencies to contexts longer than those trained on.

    ``linear`` divides positions by ``factor`` (Chen et al. 2023); ``llama3`` divides low frequencies only,
    with a smooth step between wavelengths of ``original_context`` / ``high_factor`` and / ``low_factor``;
    ``yarn`` (Peng et al. 2023) ramps between ``beta_fast`` and ``beta_slow`` rotations in the original
    context and scales the tables by 0.1 ln(factor) + 1.
    """

    section: ClassVar[str] = "model.position.scaling"

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_context: int = 8192
    low_factor: float = 1.0
    high_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def validate(self) -> None:
        _positive(
            self.section, original_context=self.original_context, low_factor=self.low_factor,
            beta_slow=self.beta_slow,
        )  # fmt: skip
        if self.factor < 1.0:
            raise UserError(f"{self.section}.factor: expected at least 1, got {self.factor}")
        if self.high_factor <= self.low_factor:
            raise UserError(f"{self.section}.high_factor: expected above low_factor {self.low_factor}")
        if self.beta_fast <= self.beta_slow:
            raise UserError(f"{self.section}.beta_fast: expected above beta_slow {self.beta_slow}")


@dataclass(frozen=True)
class PositionSpec(Spec):
    """How tokens know their place: a learned table, rotated queries and keys, ALiBi's linear bias, nothing.

    ``base`` may be a list, repeated over the layers, and so may ``scaled``, which says whether ``scaling`` is for
    a layer (Gemma 3 stretches its global layers only). The first ``rotary_dim`` of D are rotated (None: the
    largest even number within ``rotary_fraction`` of D), as pairs (2i, 2i+1) if ``interleaved``, otherwise
    (i, i + R/2). ``offset`` rows of a learned table are never read (OPT keeps 2).
    """

    section: ClassVar[str] = "model.position"

    kind: Literal["learned", "rotary", "alibi", "none"] = "learned"
    base: float | tuple[float, ...] = 10000.0
    rotary_fraction: float = 1.0
    rotary_dim: int | None = None
    interleaved: bool = False
    scaling: ScalingSpec = field(default_factory=ScalingSpec)
    scaled: bool | tuple[bool, ...] = True
    offset: int = 0

    @property
    def bases(self) -> tuple[float, ...]:
        return self.base if isinstance(self.base, tuple) else (self.base,)

    def scaling_of(self, layer: int) -> ScalingSpec:
        """How the frequencies of ``layer`` are stretched."""
        scaled = self.scaled if isinstance(self.scaled, tuple) else (self.scaled,)
        return self.scaling if scaled[layer % len(scaled)] else ScalingSpec()

    def validate(self) -> None:
        if not self.bases or min(self.bases) <= 1.0:
            raise UserError(f"{self.section}.base: expected numbers above 1, got {self.base}")
        if self.scaled == ():
            raise UserError(
                f"{self.section}.scaled: expected true, false or a list of them, got an empty list"
            )
        if not 0.0 < self.rotary_fraction <= 1.0:
            raise UserError(
                f"{self.section}.rotary_fraction: expected above 0, at most 1, got {self.rotary_fraction}"
            )
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise UserError(
                f"{self.section}.rotary_dim: expected an even number from 2, got {self.rotary_dim}"
            )
        if self.offset < 0:
            raise UserError(f"{self.section}.offset: expected 0 or more, got {self.offset}")


@dataclass(frozen=True)
class GPTConfig(Spec):
    """A decoder (with ``attention.causal = false`` an encoder) and everything that shapes its parameters.

    ``embedding_width`` differs from ``width`` only in OPT-350M, which projects in and out.
    ``embedding_grad_shrink`` alpha lets alpha of the gradient through to the token embedding (GLM: 0.1).
    Logits are soft_cap(logit_scale * (x @ head + bias)), the bias with ``head_bias`` only (GPT-J). ``dropout``
    acts on embeddings and on what attention and feed-forward add to the residual stream. ``moe`` None is a dense
    model.
    """

    section: ClassVar[str] = "model"

    num_layers: int = 12  # L
    width: int = 768  # C
    vocab_size: int = 50257  # V
    context_length: int = 1024  # T
    attention: AttentionSpec = field(default_factory=AttentionSpec)
    norm: NormSpec = field(default_factory=NormSpec)
    mlp: MlpSpec = field(default_factory=MlpSpec)
    moe: MoESpec | None = None
    position: PositionSpec = field(default_factory=PositionSpec)
    tied_head: bool = True
    head_bias: bool = False
    embedding_width: int | None = None
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    embedding_grad_shrink: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    dropout: float = 0.0
    init: InitFamily = "gpt2"
    init_std: float | None = None  # None: the family's own; families without a normal deviation ignore it

    @property
    def num_heads(self) -> int:
        """H."""
        return self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Hkv."""
        return self.attention.num_kv_heads or self.attention.num_heads

    @property
    def head_dim(self) -> int:
        """D."""
        return self.attention.head_dim or self.width // self.attention.num_heads

    @property
    def hidden_size(self) -> int:
        """F."""
        return self.mlp.hidden_size or 4 * self.width

    def has_experts(self, layer: int) -> bool:
        """Whether block ``layer`` has experts in place of its feed-forward."""
        return self.moe is not None and layer % self.moe.every == self.moe.first

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The blocks with experts."""
        return tuple(layer for layer in range(self.num_layers) if self.has_experts(layer))

    @property
    def expert_hidden_size(self) -> int:
        """F of one expert."""
        return (self.moe.hidden_size if self.moe else None) or self.hidden_size

    @property
    def table_width(self) -> int:
        """Width of the token embedding: C, except where it is projected."""
        return self.embedding_width or self.width

    @property
    def rotary_dim(self) -> int:
        """R, the rotated part of D."""
        return self.position.rotary_dim or int(self.head_dim * self.position.rotary_fraction) // 2 * 2

    @property
    def deepnorm_alpha(self) -> float:
        return self.norm.alpha or (2.0 * self.num_layers) ** 0.5

    def window_size(self, layer: int) -> tuple[int, int]:
        """(left, right) keys beside its own that a query of ``layer`` sees; -1 is without limit."""
        spec = self.attention
        if spec.pattern[layer % len(spec.pattern)] == "dense":
            return (-1, -1)
        return (spec.window - 1, 0 if spec.causal else spec.window - 1)

    def rotary_base(self, layer: int) -> float:
        """Base of the rotary frequencies in ``layer``."""
        return self.position.bases[layer % len(self.position.bases)]

    def validate(self) -> None:
        _positive(
            self.section, num_layers=self.num_layers, width=self.width, vocab_size=self.vocab_size,
            context_length=self.context_length, embedding_width=self.embedding_width,
            embedding_scale=self.embedding_scale, logit_scale=self.logit_scale,
            logit_soft_cap=self.logit_soft_cap, init_std=self.init_std,
        )  # fmt: skip
        if self.attention.head_dim is None and self.width % self.attention.num_heads:
            raise UserError(
                f"model.width: {self.width} is not a multiple of {self.attention.num_heads} heads; "
                "change one of them or give model.attention.head_dim"
            )
        if self.moe is not None and not self.expert_layers:
            raise UserError(
                f"model.moe.every: no block of {self.num_layers} has experts with every = {self.moe.every}, "
                f"offset = {self.moe.first}"
            )
        if self.head_bias and self.tied_head:
            raise UserError("model.head_bias: belongs to a head of its own; set model.tied_head to false")
        if self.position.kind == "rotary" and not 2 <= self.rotary_dim <= self.head_dim:
            raise UserError(
                f"model.position.rotary_dim: expected 2 to the head size {self.head_dim}, "
                f"got {self.rotary_dim}"
            )
        for name, value in (("dropout", self.dropout), ("attention.dropout", self.attention.dropout)):
            if not 0.0 <= value < 1.0:
                raise UserError(f"model.{name}: expected at least 0 and below 1, got {value}")
        if not 0.0 < self.embedding_grad_shrink <= 1.0:
            raise UserError(
                f"model.embedding_grad_shrink: expected above 0, at most 1, got {self.embedding_grad_shrink}"
            )
