"""The losses of noisy top-K gating against the paper's equations, written out in floats for each token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import backend, nn
from gptcore.models import GPT, GPTConfig
from gptcore.nn import noisy_top_k
from gptcore.nn.noisy_top_k import NoisyLogits
from tests.models.cases import CASES, tokens_of
from tests.tolerance import assert_close_to_exact

WIDTH, EXPERTS = 24, 5


def phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def variation(x: list[float]) -> float:
    mean = sum(x) / len(x)
    return sum((v - mean) ** 2 for v in x) / len(x) / mean**2 if mean else 0.0


def by_hand(
    logits: NoisyLogits, top_k: int, renormalise: bool, mask: list[bool] | None
) -> tuple[float, float]:
    """CV^2 of importance and of load; equations 6 to 11."""
    noisy, clean = logits.noisy.tolist(), logits.clean.tolist()
    scale = None if logits.scale is None else logits.scale.tolist()
    tokens, number = logits.noisy.shape
    importance, load = [0.0] * number, [0.0] * number
    for n in range(tokens):
        if mask is not None and not mask[n]:
            continue
        h = noisy[n]
        chosen = sorted(range(number), key=lambda e: (-h[e], e))[:top_k]
        total = sum(math.exp(h[e] - h[chosen[0]]) for e in (chosen if renormalise else range(number)))
        for e in chosen:
            importance[e] += math.exp(h[e] - h[chosen[0]]) / total
        for i in range(number):
            others = sorted((h[e] for e in range(number) if e != i), reverse=True)
            if scale is None or top_k == number:
                load[i] += i in chosen
            else:
                load[i] += phi((clean[n][i] - others[top_k - 1]) / scale[n][i])  # kth_excluding(H, k, i)
    return variation(importance), variation(load)


def drawn(tokens: int, experts: int, seed: int, spread: float = 1.0) -> NoisyLogits:
    generator = torch.Generator().manual_seed(seed)
    clean, raw, normal = (torch.randn(tokens, experts, generator=generator).double() for _ in range(3))
    scale = torch.nn.functional.softplus(spread * raw)
    return NoisyLogits(clean + normal * scale, clean, scale)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_choice_against_the_equations(data: Any) -> None:
    experts, tokens = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 30))
    top_k, renormalise = data.draw(st.integers(1, experts)), data.draw(st.booleans())
    logits = drawn(
        tokens, experts, data.draw(st.integers(0, 999)), data.draw(st.sampled_from([0.1, 1.0, 8.0]))
    )
    if data.draw(st.booleans()):
        logits = NoisyLogits(logits.clean, logits.clean)
    mask = None
    if data.draw(st.booleans()):
        mask = torch.rand(tokens, generator=torch.Generator().manual_seed(1)) < data.draw(
            st.sampled_from([0.0, 0.6])
        )
    chosen = logits.noisy.topk(top_k).indices.int()
    if mask is not None:
        chosen[~mask] = -1
    w = data.draw(st.sampled_from([(1.0, 1.0), (0.1, 0.0), (0.0, 0.3)]))
    importance, load = by_hand(logits, top_k, renormalise, None if mask is None else mask.tolist())
    exact = torch.tensor(w[0] * importance + w[1] * load, dtype=torch.double)
    options: dict[str, Any] = {"renormalise": renormalise, "mask": mask, "w_importance": w[0], "w_load": w[1]}
    got = noisy_top_k.balance_loss(logits, chosen, **options)
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-12)
    single = NoisyLogits(*(None if x is None else x.float() for x in logits))
    # Rounded logits could choose others; the choice is given. A quotient by a small deviation magnifies rounding.
    if torch.equal(single.noisy.topk(top_k).indices, logits.noisy.topk(top_k).indices):
        got = noisy_top_k.balance_loss(single, chosen, **options)
        torch.testing.assert_close(got.double(), exact, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("top_k, renormalise", [(1, False), (2, True), (3, False), (4, True)])
def test_gradcheck(top_k: int, renormalise: bool) -> None:
    """By logits and scales, through the choice's thresholds too; padding gets none."""
    logits = drawn(7, 4, 3)
    normal = (logits.noisy - logits.clean) / logits.scale
    chosen = logits.noisy.topk(top_k).indices
    mask = torch.tensor([True, True, False, True, True, True, False])

    def loss(clean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        drawn_again = NoisyLogits(clean + normal * scale, clean, scale)
        return noisy_top_k.balance_loss(drawn_again, chosen, renormalise=renormalise, mask=mask, w_load=0.7)

    leaves = [x.clone().requires_grad_() for x in (logits.clean, logits.scale)]
    torch.autograd.gradcheck(loss, leaves)
    for gradient in torch.autograd.grad(loss(*leaves), leaves):
        assert not gradient[~mask].any()
        assert gradient[mask].any()


def test_load_is_the_share_of_new_draws_that_choose_an_expert() -> None:
    """Definition of P(x, i): only the noise of i is drawn anew. 40,000 draws, four standard errors."""
    logits, top_k, draws = drawn(1, 5, 8), 2, 40000
    chosen = logits.noisy.topk(top_k).indices
    got = noisy_top_k.load(logits, chosen, None)
    for i in range(5):
        anew = logits.noisy.repeat(draws, 1)
        anew[:, i] = logits.clean[0, i] + torch.randn(draws, dtype=torch.double) * logits.scale[0, i]
        share = (anew.topk(top_k).indices == i).any(-1).double().mean()
        assert abs(share - got[i]) < 4 * math.sqrt(0.25 / draws)


def test_a_deviation_that_underflows_gives_no_nan() -> None:
    clean = torch.tensor([[3.0, 1.0, -2.0], [0.0, 5.0, 5.0]], requires_grad=True)
    raw = torch.full((2, 3), -200.0, requires_grad=True)
    logits = NoisyLogits.drawn(clean, raw, torch.randn(2, 3))
    loss = noisy_top_k.balance_loss(logits, logits.noisy.topk(1).indices)
    loss.backward()
    assert loss.isfinite() and clean.grad.isfinite().all() and raw.grad.isfinite().all()


def module_of(**options: Any) -> nn.MoE:
    torch.manual_seed(1)
    options = {"noise": True, "balance": "shazeer", "renormalise": True, **options}
    module = nn.MoE(WIDTH, 8, EXPERTS, **options)
    with torch.no_grad():
        module.noise.weight.normal_(std=0.3)
    return module


def check_module(module: nn.MoE, x: torch.Tensor, mask: torch.Tensor | None) -> None:
    torch.manual_seed(5)
    statistics = module(x, mask).statistics
    torch.manual_seed(5)
    w, exact = module.router.weight.double(), x.double()
    clean, scale = exact @ w.T, torch.nn.functional.softplus(exact @ module.noise.weight.double().T)
    noisy = clean + torch.randn(len(x), EXPERTS, dtype=x.dtype).double() * scale if module.training else clean
    logits = NoisyLogits(noisy, clean, scale if module.training else None)
    counted = None if mask is None else mask.tolist()
    importance, load = by_hand(logits, module.top_k, module.renormalise, counted)
    wanted = torch.tensor(module.w_importance * importance + module.w_load * load)
    assert_close_to_exact(statistics.balance_loss, wanted.double(), terms=20 * len(x), what="balance_loss")


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 1}, {"top_k": 5}, {"capacity_factor": 0.4, "w_load": 0.3}], ids=str
)
def test_a_layer_takes_them_as_its_balance_loss(options: dict[str, Any]) -> None:
    """Of the gates before any is dropped; in evaluation, without noise, of the tokens that come."""
    module, x = module_of(**options), torch.randn(31, WIDTH)
    mask = torch.rand(31) < 0.7
    for kept in (None, mask):
        check_module(module.train(), x, kept)
        check_module(module.eval(), x, kept)
    module.train()
    statistics = module(x, mask).statistics
    (statistics.balance_loss + statistics.z_loss).backward()
    assert module.router.weight.grad.any()
    assert module.noise.weight.grad.any()
    plain = module(x, torch.zeros(31, dtype=torch.bool)).statistics
    assert float(plain.balance_loss.detach()) == 0.0


def test_float64_references_agree() -> None:
    module, x = module_of().double(), torch.randn(9, WIDTH).double()
    check_module(module, x, None)


def test_bits_do_not_depend_on_threads() -> None:
    torch.manual_seed(2)
    module, x = nn.MoE(32, 16, 13, noise=True, balance="shazeer"), torch.randn(4099, 32)
    before, ours = torch.get_num_threads(), backend.num_threads()
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        backend.set_num_threads(threads)
        torch.manual_seed(3)
        module.zero_grad()
        loss = module(x).statistics.balance_loss
        loss.backward()
        results.append([loss, module.router.weight.grad.clone(), module.noise.weight.grad.clone()])
    torch.set_num_threads(before)
    backend.set_num_threads(ours)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_graph_under_compile() -> None:
    torch._dynamo.reset()
    module, x = module_of().eval(), torch.randn(31, WIDTH)  # in training the noise is drawn elsewhere
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    wanted, got = module(x).statistics.balance_loss, compiled(x).statistics.balance_loss
    torch.testing.assert_close(got, wanted)
    module.train()
    compiled(x).statistics.balance_loss.backward()
    assert module.noise.weight.grad.any()


def test_a_model_trains_on_them() -> None:
    moe = {"num_experts": 5, "hidden_size": 40, "noise": True, "balance": "shazeer", "balance_weight": 0.1}
    config = CASES["llama"].merged({"moe": {**moe, "w_load": 0.5}})
    assert GPTConfig.from_dict(config.to_dict()) == config
    model = GPT(config, seed=1)
    out = model(*tokens_of(config))
    torch.testing.assert_close(out.balance_loss, 0.1 * sum(layer.balance_loss for layer in out.routing))
    assert model.stack.blocks[0].mlp.w_load == 0.5
    out.total.backward()
    assert all(block.mlp.noise.weight.grad.any() for block in model.stack.blocks)
