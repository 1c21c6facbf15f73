"""Experts from a dense model, each at first a copy of the feed-forward it replaces (Komatsuzaki et al. 2022)."""

from __future__ import annotations

import torch

from gptcore.errors import UserError
from gptcore.models.config import MoESpec
from gptcore.models.gpt import GPT


def upcycle(model: GPT, moe: MoESpec, *, seed: int = 0) -> GPT:
    """A model with experts as ``moe`` says, and with the weights of dense ``model``.

    Routers are drawn from ``seed`` as the family of ``model`` does, or by ``moe.router_init_scale``; the output layer
    of shared experts is 0. So the new model computes what ``model`` does, but for the rounding of a weighted mean of
    equal terms, wherever the gates of a token sum to 1 and none of its choices is dropped: with ``renormalise``, the
    default from two choices on, and without a capacity (or one that is not reached). Without ``renormalise`` (Switch)
    the feed-forward's output is scaled by the sum of the chosen probabilities. Dropout of the experts is for training.

    Raises:
        UserError: a model that has experts already, or experts of another hidden size.
    """
    if model.config.moe is not None:
        raise UserError("upcycle: the model has experts already")
    weight = model.token_embedding.weight
    config = model.config.merged({"moe": moe.to_dict()})
    grown = GPT(config, seed=seed, dtype=weight.dtype, device=weight.device).train(model.training)
    copy_weights(model, grown)
    return grown


def copy_weights(source: GPT, target: GPT) -> None:
    """Copy every parameter of ``source`` to its place in ``target``, to every expert where that has experts instead.

    Raises:
        UserError: names the first parameter that has no place; nothing is copied then.
    """
    own = dict(source.named_parameters())
    places = dict(target.named_parameters())
    missing = [name for name in own if name not in places]
    for name, place in places.items():
        if name in own and own[name].shape not in (place.shape, place.shape[1:]):
            raise UserError(
                f"'{name}' has shape {tuple(own[name].shape)} where the new model has {tuple(place.shape)}"
            )
        if name not in own and not _is_new(name):
            missing.append(name)
    if missing:
        raise UserError(f"the two models differ in more than experts: only one has '{missing[0]}'")
    with torch.no_grad():
        for name, place in places.items():
            if name in own:
                place.copy_(own[name])  # repeated for every expert
            elif ".mlp.shared.down." in name:
                place.zero_()


def _is_new(name: str) -> bool:
    """Whether this is a parameter that only layers of experts have."""
    return any(f".mlp.{part}." in name for part in ("router", "noise", "shared"))
