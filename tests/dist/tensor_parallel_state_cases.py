"""Models cut over ranks: their whole state, generation with a cache, and mistakes."""

from __future__ import annotations

import torch
import torch.distributed as c10d

from gptcore import dist
from gptcore.dist.tensor_shard import tensor_shards
from gptcore.infer.engine import new_cache
from gptcore.models import GPT
from tests.dist.model_cases import raised
from tests.dist.processes import Case, World
from tests.dist.tensor_parallel_cases import GPT2, VARIANTS, VOCABULARY, WIDTH, assert_near, batch, model_of
from tests.tolerance import same_bits


def _state(world: World) -> None:
    """Whole state has the bits of the model before it was cut, and goes into models of any number of ranks."""
    for options in (GPT2, VARIANTS["palm"]):
        whole = model_of(options).state_dict()
        cut = dist.tensor_parallel(model_of(options), world.group)
        gathered = dist.full_state_dict(cut)
        assert gathered.keys() == whole.keys()
        assert all(same_bits(gathered[name], tensor) for name, tensor in whole.items())
        other = {name: tensor * 2 for name, tensor in whole.items()}
        dist.load_full_state_dict(cut, other)
        assert all(same_bits(dist.full_state_dict(cut)[name], tensor) for name, tensor in other.items())
        empty = dist.tensor_parallel(GPT(cut.config, device="meta"), world.group)
        empty.to_empty(device="cpu")
        dist.load_full_state_dict(empty, whole)
        assert all(same_bits(dist.full_state_dict(empty)[name], tensor) for name, tensor in whole.items())
        wrong = {**other, "stack.blocks.1.attention.out.weight": torch.zeros(WIDTH, 7)}
        sentence = f"got shape \\({WIDTH}, 7\\), expected the whole of {WIDTH} along the second dimension"
        raised(sentence, dist.load_full_state_dict, cut, wrong)


def _gradients_in_f32(world: World) -> None:
    """Where weights collect gradients in f32, those of a tied slice go there, of embedding and of loss."""
    one = model_of(GPT2)
    cut = dist.tensor_parallel(model_of(GPT2), world.group)
    table = cut.token_embedding.weight
    table.main_grad = torch.zeros_like(table)
    for model in (one, cut):
        for step in range(2):
            model(*batch(step)).total.backward()
    assert table.grad is None
    whole = tensor_shards(cut)["token_embedding.weight"].gather(table.main_grad)
    assert_near(whole, one.token_embedding.weight.grad, "gradient")


def _generation(world: World) -> None:
    """The same tokens on every rank, and those of one process."""
    for options in (GPT2, VARIANTS["palm"]):
        one = model_of(options).eval()
        cut = dist.tensor_parallel(model_of(options), world.group).eval()
        caches = [new_cache(model, 2, 40) for model in (one, cut)]
        tokens = torch.tensor([[3, 5, 8], [13, 21, 34]])
        with torch.inference_mode():
            for _ in range(12):
                wanted, got = (
                    model(tokens, cache=cache) for model, cache in zip((one, cut), caches, strict=True)
                )
                assert_near(got, wanted, "logits")
                tokens = wanted.argmax(-1, keepdim=True)
        parts = [torch.empty_like(got) for _ in range(world.ranks)]
        c10d.all_gather(parts, got, group=world.group)
        assert all(same_bits(part, got) for part in parts)


def _models_that_do_not_fit(world: World) -> None:
    """Every rank raises, and none waits for another."""
    cut, ranks, last = dist.tensor_parallel, world.ranks, world.rank == world.ranks - 1
    raised("got Linear, expected a gptcore.models.GPT", cut, torch.nn.Linear(2, 2), world.group)
    odd = model_of({"attention": {"num_heads": 3, "head_dim": 8}})
    raised(f"got 3 heads, expected a multiple of the {ranks} ranks", cut, odd, world.group)
    shared = model_of({"attention": {"num_heads": 12, "num_kv_heads": 3, "head_dim": 4}})
    raised("got 3 key/value heads, expected a multiple or a divisor", cut, shared, world.group)
    half = model_of(GPT2, torch.float16)
    raised("got one of torch.float16, expected torch.float32 or torch.bfloat16", cut, half, world.group)
    few = model_of(GPT2, vocab_size=ranks - 1)
    raised(f"and {ranks - 1} words, expected at least one of each", cut, few, world.group)
    projected = model_of(VARIANTS["opt"])
    raised("got an embedding_width other than", cut, projected, world.group, sequence_parallel=True)
    raised(
        "got sequence_parallel = False on rank 0", cut, model_of(GPT2), world.group, sequence_parallel=last
    )
    other = model_of(GPT2)
    with torch.no_grad():
        other.head_weight[0, 0] += last
    raised("got contents of token_embedding.weight", cut, other, world.group)
    model = cut(model_of(GPT2), world.group)
    raised("got one that is cut already", cut, model, world.group)
    raised(
        "several ranks among which 'token_embedding.weight' is cut",
        dist.average_gradients,
        model,
        world.group,
    )
    spread = dist.expert_parallel(model_of(VARIANTS["experts"]), world.group)
    raised("got experts spread over ranks of the same group", cut, spread, world.group)


def _calls_that_do_not_fit(world: World) -> None:
    """One rank's mistake is an error on every rank, and the next call works."""
    model = dist.tensor_parallel(model_of(GPT2), world.group)
    tokens, targets = batch(1)
    last = world.rank == world.ranks - 1
    elsewhere = "" if last else f"GPT: rank {world.ranks - 1} of the group refused its arguments"
    raised(elsewhere or "expected torch.int64", model, tokens.float() if last else tokens)
    unknown = torch.where(tokens == tokens.max(), VOCABULARY, tokens) if last else tokens
    raised(elsewhere or f"got {VOCABULARY}, expected 0 to {VOCABULARY - 1}", model, unknown)
    raised("got contents of tokens", model, tokens.flip(0) if last else tokens)
    raised("got contents of targets", model, tokens, targets.flip(0) if last else targets)
    raised("got shape of tokens", model, tokens.reshape(1, -1) if last else tokens)
    model.train(last)
    raised("got training mode = ", model, tokens)
    model.train()
    assert model(tokens, targets).loss.isfinite()
    rows = dist.tensor_parallel(model_of(GPT2), world.group, sequence_parallel=True)
    raised("got one with sequence_parallel", rows, tokens, cache=new_cache(rows, 3, 40))


CASES: dict[str, Case] = {
    "state": _state,
    "gradients-in-f32": _gradients_in_f32,
    "generation": _generation,
    "models-that-do-not-fit": _models_that_do_not_fit,
    "calls-that-do-not-fit": _calls_that_do_not_fit,
}
