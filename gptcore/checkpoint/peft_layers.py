"""LoRA and DoRA in PEFT's names: which tensors of an adapter belong to which outputs of which layer of ours.

Families that keep q, k and v apart have an update for each, ours may have one for the fused projection: its A is then
written three times, and three equal As are read as one. Where a family stores rows in another order (BLOOM, GPT-NeoX,
Falcon) those of B and of the magnitude are too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from gptcore.checkpoint.huggingface import layout
from gptcore.errors import UserError
from gptcore.models.adapter_parts import Part, linear_paths, updates_of
from gptcore.models.adapter_spec import AdapterSpec
from gptcore.nn.linear import Linear
from gptcore.nn.lora import AdaptedLinear, LowRank, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from gptcore.models import GPT

_PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


class Place(NamedTuple):
    """Where one of their modules is in ours: outputs ``rows`` of the layer at ``path``; ``piece`` orders its rows."""

    path: str
    rows: Rows
    piece: layout.Piece


class Update(NamedTuple):
    """One update as it was read."""

    part: Part
    a: Tensor
    b: Tensor
    magnitude: Tensor | None


def places(gpt: GPT, family: str) -> dict[str, Place]:
    """By the path of their module, every linear layer that may have an update."""
    found = {}
    for path in linear_paths(gpt):
        layer = cast(Linear, gpt.get_submodule(path))
        piece = layout.pieces(family, gpt.config, {f"{path}.weight": layer.weight})[0]
        sizes = list(piece.rows) or [layer.out_features]
        for index, theirs in enumerate(piece.theirs):
            rows = Rows(sum(sizes[:index]), sizes[index])
            found[theirs.removesuffix(".weight")] = Place(path, rows, _untransposed(piece))
    return found


def names_for(gpt: GPT, tensors: Mapping[str, Tensor], families: Sequence[str]) -> dict[str, Place]:
    """The places of the first of ``families`` that has all modules in ``tensors``.

    Raises:
        UserError: none has.
    """
    wanted = {_module(key)[0] for key in tensors}
    strangers = ""
    for family in families:
        known = places(gpt, family)
        missing = wanted - set(known)
        if not missing:
            return {name: known[name] for name in wanted}
        strangers = strangers or min(missing)
    raise UserError(
        f"the adapter has an update for '{strangers}', which is no linear layer of this model "
        f"(as {', '.join(families) or 'any family'} names them)"
    )


def read(
    gpt: GPT, names: Mapping[str, Place], tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, list[Update]]:
    """The updates by the path of our layer, in the order of their rows.

    Raises:
        UserError: a tensor that is missing, of another shape, or an embedding's.
    """
    dora = bool(config.get("use_dora"))
    found: dict[str, list[Update]] = {}
    for module, place in names.items():
        a, b = (_take(tensors, module, kind) for kind in (_A, _B))
        inputs = cast(Linear, gpt.get_submodule(place.path)).in_features
        magnitude = _take(tensors, module, _MAGNITUDE) if dora else None
        wanted = ((a.shape[0], inputs), (place.rows.size, a.shape[0]))
        if (tuple(a.shape), tuple(b.shape)) != wanted or (dora and magnitude.shape != b.shape[:1]):  # type: ignore[union-attr]
            raise UserError(
                f"the update of '{module}' has A {tuple(a.shape)} and B {tuple(b.shape)}; this model asks for "
                f"(rank, {inputs}) and ({place.rows.size}, rank)"
            )
        part = Part(place.rows, a.shape[0], _scale(module, a.shape[0], config))
        update = Update(part, a, _ours(place, b), None if magnitude is None else _ours(place, magnitude))
        found.setdefault(place.path, []).append(update)
    return {
        path: _joined(sorted(each, key=lambda update: update.part.rows), gpt, path)
        for path, each in found.items()
    }


@torch.no_grad()
def fill(gpt: GPT, name: str, updates: Mapping[str, Sequence[Update]]) -> None:
    """Give adapter ``name``, which is in place, what was read, in its dtype."""
    for path, modules in updates_of(gpt, name).items():
        for module, update in zip(modules, updates[path], strict=True):
            module.to(update.a.dtype)
            module.a.copy_(update.a)
            module.b.copy_(update.b)
            if module.magnitude is not None and update.magnitude is not None:
                module.magnitude.copy_(update.magnitude)


def write(gpt: GPT, name: str, family: str, spec: AdapterSpec) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of adapter ``name`` by PEFT's names, and its configuration."""
    tensors: dict[str, Tensor] = {}
    given = updates_of(gpt, name)
    modules: dict[str, LowRank] = {}
    known = places(gpt, family)
    for module, place in known.items():
        for update in given.get(place.path, ()):
            if _inside(update.rows, place, known, family):
                modules[module] = update
                tensors |= _tensors_of(module, place, update)
    return tensors, _config(gpt, family, spec, modules)


def _tensors_of(module: str, place: Place, update: LowRank) -> dict[str, Tensor]:
    start = place.rows.start - update.rows.start
    rows = slice(start, start + place.rows.size)
    found = {
        f"{_PREFIX}{module}.{_A}": update.a.detach().clone(),  # a tensor may stand in a file once
        f"{_PREFIX}{module}.{_B}": _theirs(place, update.b.detach()[rows]),
    }
    if update.magnitude is not None:
        found[f"{_PREFIX}{module}.{_MAGNITUDE}"] = _theirs(place, update.magnitude.detach()[rows])
    return found


def _inside(rows: Rows, place: Place, known: Mapping[str, Place], family: str) -> bool:
    """Whether an update of ``rows`` is the place's; one of a part of what the family keeps whole is refused."""
    if rows.start <= place.rows.start and place.rows.stop <= rows.stop:
        return True
    if rows.stop <= place.rows.start or place.rows.stop <= rows.start:
        return False
    raise UserError(
        f"{family} keeps all outputs of '{place.path}' in one layer, the adapter has updates for parts of it; "
        "expected adapter.targets to name the whole"
    )


def _config(gpt: GPT, family: str, spec: AdapterSpec, modules: Mapping[str, LowRank]) -> dict[str, Any]:
    alpha = float(spec.rank) if spec.alpha is None else spec.alpha
    ranks, alphas = {}, {}
    for module, update in modules.items():
        rank = update.a.shape[0]
        own = update.scale * (rank**0.5 if spec.rslora else rank)
        if rank != spec.rank:
            ranks[module] = rank
        if abs(own - alpha) > 1e-9 * max(own, alpha):
            alphas[module] = own
    inside = [re.sub(r"^.*?\.\d+\.", "", module) for module in modules]
    transposed = family == "gpt2"  # whose layers are transformers' Conv1D
    return {
        "peft_type": "LORA", "r": spec.rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": spec.dropout, "use_dora": spec.kind == "dora", "use_rslora": spec.rslora, "bias": "none",
        "fan_in_fan_out": transposed, "init_lora_weights": True, "rank_pattern": ranks, "alpha_pattern": alphas,
        "target_modules": sorted(set(inside)),
    }  # fmt: skip


def _joined(updates: list[Update], gpt: GPT, path: str) -> list[Update]:
    """Updates of all outputs with one A are one update."""
    first, layer = updates[0], cast(AdaptedLinear, gpt.get_submodule(path))
    whole = sum(update.part.rows.size for update in updates) == layer.out_features
    same = all(u.part.scale == first.part.scale and torch.equal(u.a, first.a) for u in updates)
    if len(updates) == 1 or not whole or not same:
        return updates
    magnitude = None if first.magnitude is None else torch.cat([cast("Tensor", u.magnitude) for u in updates])
    part = first.part._replace(rows=Rows(0, layer.out_features))
    return [Update(part, first.a, torch.cat([u.b for u in updates]), magnitude)]


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """By PEFT's rule: a pattern is the end of a module's path, or a regular expression for one."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _module(key: str) -> tuple[str, str]:
    """Their module and the kind of tensor that ``key`` names."""
    for kind in (_A, _B, _MAGNITUDE):
        if key.startswith(_PREFIX) and key.endswith("." + kind):
            return key[len(_PREFIX) : -len(kind) - 1], kind
    raise UserError(f"the adapter holds '{key}', which is no LoRA or DoRA of a linear layer")


def _take(tensors: Mapping[str, Tensor], module: str, kind: str) -> Tensor:
    key = f"{_PREFIX}{module}.{kind}"
    if key not in tensors:
        raise UserError(f"the adapter holds no '{key}'")
    return tensors[key]


def _untransposed(piece: layout.Piece) -> layout.Piece:
    """How rows lie, for B and magnitudes, which no family transposes."""
    return dataclasses.replace(piece, transposed=False, rows=())


def _ours(place: Place, theirs: Tensor) -> Tensor:
    if place.piece.heads is None:
        return theirs
    ours = torch.empty_like(theirs)
    place.piece.write(0, theirs, ours)
    return ours


def _theirs(place: Place, ours: Tensor) -> Tensor:
    return ours.contiguous() if place.piece.heads is None else place.piece.read(0, ours)
