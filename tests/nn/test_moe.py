"""nn.MoE against a mixture written out token by token: values, gradients, losses, statistics, options."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import backend, nn, ops
from gptcore.errors import UserError
from gptcore.optim import decay_groups
from tests.nn import moe_oracle
from tests.tolerance import assert_close_to_exact, same_bits

WIDTH, HIDDEN, EXPERTS, TOKENS = 24, 40, 5, 33

# name: options of the module; beside these every case runs in training mode without randomness
CASES: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "gelu-bias": {"activation": "gelu", "bias": True},
    "geglu-bias-shared": {"activation": "geglu", "bias": True, "shared_experts": 2},
    "relu-three": {"activation": "relu", "top_k": 3, "balance": "all"},
    "switch": {"top_k": 1, "capacity_factor": 1.0},
    "switch-renormalised": {"top_k": 1, "renormalise": True},
    "capacity": {"capacity_factor": 1.25, "shared_experts": 1},
    "assignment": {"capacity_factor": 0.5, "capacity_convention": "per_assignment", "capacity_rounding": "down"},
    "minimum": {"capacity_factor": 0.1, "capacity_minimum": 4, "capacity_rounding": "nearest"},
    "by-gate": {"capacity_factor": 0.6, "priority": "gate"},
    "not-renormalised": {"top_k": 4, "renormalise": False},
    "all-experts": {"top_k": 5},
}  # fmt: skip


def module_of(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.MoE:
    torch.manual_seed(1)
    module = nn.MoE(WIDTH, HIDDEN, EXPERTS, **{**CASES[name], **changes})
    with torch.no_grad():  # far enough from each other that no rounding changes a choice
        module.router.weight.mul_(3)
    return module.to(dtype)


def inputs(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)


def capacity_of(name: str) -> int | None:
    """By hand from the conventions, for 33 tokens and 5 experts."""
    return {"switch": 7, "capacity": 9, "assignment": 6, "minimum": 4, "by-gate": 4}.get(name)


def wanted(
    name: str, module: nn.MoE, x: torch.Tensor, dtype: torch.dtype, w: torch.Tensor, **more: Any
) -> tuple[moe_oracle.Run, dict[str, torch.Tensor]]:
    """The oracle's run in ``dtype`` and its gradients by name, of sum(w * output) + losses."""
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in module.named_parameters()}
    x = x.detach().to(dtype).requires_grad_()
    options: dict[str, Any] = {
        "top_k": module.top_k, "kind": module.activation, "renormalise": module.renormalise,
        "balance": module.balance, "capacity": capacity_of(name), **more,
    }  # fmt: skip
    if module.priority == "gate":
        gates = (x.double() @ leaves["router.weight"].double().T).softmax(-1).max(-1).values.tolist()
        options["order"] = sorted(range(len(x)), key=lambda n: (-gates[n], n))
    out = moe_oracle.run(leaves, x, **options)
    loss = (out.output.double() * w).sum() + 0.7 * out.balance_loss + 0.3 * out.z_loss
    names = ["input", *leaves]
    gradients = torch.autograd.grad(loss, [x, *leaves.values()], allow_unused=True)
    zero = [x, *leaves.values()]
    return out, {
        k: torch.zeros_like(z) if g is None else g for k, g, z in zip(names, gradients, zero, strict=True)
    }


def check(name: str, module: nn.MoE, x: torch.Tensor, mask: torch.Tensor | None = None, **more: Any) -> None:
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    got = module(leaf, mask)
    s = got.statistics
    loss = (got.output.double() * weights).sum() + 0.7 * s.balance_loss + 0.3 * s.z_loss
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, [leaf, *parameters.values()])
    if mask is not None:
        more["mask"] = mask.tolist()
    exact, exact_gradients = wanted(name, module, x, torch.float64, weights, **more)
    twin, twin_gradients = wanted(name, module, x, x.dtype, weights, **more)
    assert got.output.dtype == x.dtype
    assert_close_to_exact(got.output, exact.output, twin.output, terms=HIDDEN, what="output")
    for kind in ("balance_loss", "z_loss"):
        assert_close_to_exact(getattr(s, kind), getattr(exact, kind), terms=TOKENS, what=kind)
    assert float(s.drop_rate) == pytest.approx(exact.dropped / max(1, sum(exact.requested)), abs=1e-6)
    mean = sum(exact.requested) / EXPERTS
    assert float(s.load) == pytest.approx(max(exact.requested) / mean if mean else 0.0, rel=1e-6)
    for key, gradient in zip(["input", *parameters], gradients, strict=True):
        assert gradient.dtype == x.dtype
        assert_close_to_exact(gradient, exact_gradients[key], twin_gradients[key], terms=4 * TOKENS, what=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_values_gradients_losses_and_statistics(name: str, dtype: torch.dtype):
    check(name, module_of(name, dtype), inputs(dtype))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_options_together(data: Any):
    """Capacities by hand in exact arithmetic: the factors have few bits."""
    options: dict[str, Any] = {
        "top_k": data.draw(st.integers(1, EXPERTS)),
        "renormalise": data.draw(st.sampled_from([None, True, False])),
        "balance": data.draw(st.sampled_from(["first", "all"])),
        "priority": data.draw(st.sampled_from(["position", "gate"])),
        "capacity_factor": data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.25])),
        "capacity_convention": data.draw(st.sampled_from(["per_token", "per_assignment"])),
        "capacity_minimum": data.draw(st.sampled_from([1, 4])),
        "capacity_rounding": data.draw(st.sampled_from(["up", "down", "nearest"])),
        "shared_experts": data.draw(st.sampled_from([0, 1])),
        "activation": data.draw(st.sampled_from(["swiglu", "gelu_erf"])),
    }
    module, x = module_of("swiglu", **options), inputs()
    capacity = None
    if factor := Fraction(options["capacity_factor"]):
        share = (
            factor
            * TOKENS
            / EXPERTS
            * (module.top_k if options["capacity_convention"] == "per_assignment" else 1)
        )
        whole = {"up": math.ceil, "down": math.floor, "nearest": round}[options["capacity_rounding"]](share)
        capacity = max(whole, options["capacity_minimum"])
    mask = (
        torch.rand(TOKENS, generator=torch.Generator().manual_seed(4)) < 0.7
        if data.draw(st.booleans())
        else None
    )
    check("swiglu", module, x, mask, capacity=capacity)


@pytest.mark.parametrize("name", ["swiglu", "capacity", "switch", "relu-three"])
def test_padding_takes_no_place_and_counts_in_no_loss(name: str):
    module, x = module_of(name), inputs()
    mask = torch.rand(TOKENS, generator=torch.Generator().manual_seed(4)) < 0.7
    check(name, module, x, mask)
    if module.shared is None:
        assert not module(x, mask).output[~mask].any()


def test_all_padding_and_no_tokens_at_all():
    module = module_of("capacity")
    x = inputs().requires_grad_()
    out, statistics = module(x, torch.zeros(TOKENS, dtype=torch.bool))
    assert torch.equal(out, module.shared(x))
    assert [float(v.detach()) for v in statistics[:5]] == [0.0] * 5 and not statistics.share.any()
    (out.sum() + statistics.balance_loss + statistics.z_loss).backward()
    assert not module.up.weight.grad.any() and not module.router.weight.grad.any()
    out, statistics = module(torch.empty(2, 0, WIDTH))
    assert out.shape == (2, 0, WIDTH) and float(statistics.balance_loss) == 0.0
    out.sum().backward()


def test_a_token_that_is_not_a_number_spoils_itself_and_the_losses():
    module, x = module_of("swiglu"), inputs()
    clean = module(x)
    x[4, 3] = math.nan
    out, statistics = module(x)
    assert out[4].isnan().all()
    others = [n for n in range(TOKENS) if n != 4]
    assert torch.equal(out[others], clean.output[others])
    for loss in (statistics.balance_loss, statistics.z_loss, statistics.entropy):
        assert loss.isnan()
    mask = torch.arange(TOKENS) != 4
    masked = module(x, mask)
    assert torch.equal(masked.output[others], clean.output[others]) and not masked.output[4].any()
    assert masked.statistics.balance_loss.isfinite() and masked.statistics.z_loss.isfinite()


def test_a_capacity_without_a_place():
    """Nothing is dropped silently as a whole; without tokens there is nothing to drop."""
    options = {"capacity_factor": 0.01, "capacity_minimum": 0, "capacity_rounding": "down"}
    module = module_of("swiglu", **options)
    with pytest.raises(
        ValueError, match=r"expert_capacity: got 0 \(factor 0.01, 33 tokens, 5 experts, rounded down\)"
    ):
        module(inputs())
    assert module(torch.empty(0, WIDTH)).output.shape == (0, WIDTH)
    assert torch.equal(module(inputs(), drop=False).output, module_of("swiglu")(inputs()).output)


def test_every_choice_of_a_token_dropped_leaves_the_shared_experts():
    """One place for each expert and tokens that all want the same two: the first finds room, the others none."""
    module = module_of("capacity", capacity_factor=0.01)
    x = inputs()[:1].expand(TOKENS, WIDTH).contiguous()
    out, statistics = module(x)
    assert module.capacity(TOKENS) == 1
    assert torch.equal(out[1:], module.shared(x)[1:]) and not torch.equal(out[0], module.shared(x)[0])
    assert float(statistics.drop_rate) == pytest.approx(1 - 1 / TOKENS)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_shapes_of_batches_and_what_is_watched():
    module, x = module_of("relu-three"), inputs(tokens=30)
    flat, batched = module(x), module(x.view(2, 15, WIDTH))
    assert torch.equal(batched.output.view(30, WIDTH), flat.output)
    for a, b in zip(flat.statistics, batched.statistics, strict=True):
        assert torch.equal(a, b)
    s = flat.statistics
    assert s.balance_loss.requires_grad and s.z_loss.requires_grad
    assert not any(t.requires_grad for t in s[2:])
    probabilities = torch.softmax(x @ module.router.weight.T, -1)
    first = torch.bincount(probabilities.argmax(-1), minlength=EXPERTS) / 30
    torch.testing.assert_close(s.share, first)  # of first choices, although all count in the loss
    torch.testing.assert_close(s.entropy, torch.special.entr(probabilities).sum(-1).mean().detach())
    assert 0 < float(s.entropy) < math.log(EXPERTS)


def test_capacity_of_evaluation_is_its_own():
    module, x = module_of("swiglu", capacity_factor=0.5, eval_capacity_factor=0.0), inputs()
    assert module.capacity(TOKENS) == 4 and float(module(x).statistics.drop_rate) > 0
    assert float(module(x, drop=False).statistics.drop_rate) == 0
    module.eval()
    assert module.capacity(TOKENS) is None and float(module(x).statistics.drop_rate) == 0
    assert module_of("swiglu", capacity_factor=0.5).eval().capacity(TOKENS) == 4  # unless told, training's
    assert module_of("swiglu", capacity_factor=1.25, eval_capacity_factor=2.0).eval().capacity(TOKENS) == 14


def test_noise_and_jitter_are_for_training_only():
    plain, x = module_of("swiglu"), inputs()
    noisy = module_of("swiglu", noise=True)
    with torch.no_grad():
        noisy.noise.weight.normal_()
    jittered = module_of("swiglu", jitter=0.3)
    for module in (noisy, jittered):
        assert not torch.equal(module(x).output, plain(x).output)
        module.eval()
        assert torch.equal(module(x).output, plain(x).output)


def test_noisy_logits_and_jittered_inputs_are_as_published():
    noisy, x = module_of("swiglu", noise=True), inputs()
    assert not noisy.noise.weight.any()  # so that it starts with noise of ln 2
    with torch.no_grad():
        noisy.noise.weight.normal_()
    torch.manual_seed(5)
    noise = torch.randn(TOKENS, EXPERTS)
    weights = torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
    torch.manual_seed(5)
    got = noisy(x)
    exact, _ = wanted("swiglu", noisy, x, torch.float64, weights, noise=noise.double())
    assert_close_to_exact(got.output, exact.output, terms=HIDDEN)
    got.output.sum().backward()
    assert noisy.noise.weight.grad.any()
    jittered = module_of("swiglu", jitter=0.3)
    torch.manual_seed(5)
    factors = torch.empty(TOKENS, WIDTH).uniform_(0.7, 1.3)
    torch.manual_seed(5)
    got = jittered(x)
    exact, _ = wanted("swiglu", jittered, x, torch.float64, weights, router_input=(x * factors).double())
    assert_close_to_exact(got.output, exact.output, terms=HIDDEN)


def test_random_priority_and_second_choices_leave_evaluation_alone():
    x = inputs()
    for option, value in (("priority", "random"), ("second_choice", "gshard"), ("second_choice", "st_moe")):
        factor = 0.6 if option == "priority" else 2.5
        plain = module_of("swiglu", capacity_factor=factor)
        module = module_of("swiglu", capacity_factor=factor, **{option: value})
        outputs = []
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            outputs.append(module(x).output)
        assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
        assert torch.equal(module.eval()(x).output, plain.eval()(x).output)
    kept = module_of("swiglu", second_choice="gshard")
    torch.manual_seed(1)
    uniforms = torch.rand(TOKENS)
    gates = (x @ kept.router.weight.T).topk(2).values.softmax(-1)
    expected = TOKENS + int((uniforms < 2 * gates[:, 1]).sum())
    torch.manual_seed(1)
    routed = kept.route(nn.moe._KERNELS, *kept.scores(nn.moe._KERNELS, x), None, True)
    assert int(routed.requested.sum()) == expected


def test_expert_dropout_scales_what_it_keeps():
    module, x = module_of("swiglu", top_k=1, renormalise=True, dropout=0.5), inputs()
    with torch.no_grad():
        module.up.weight.fill_(0.1)
        module.down.weight.fill_(1.0)
    torch.manual_seed(1)
    dropped = module(x).output
    full = module.eval()(x).output
    ratio = (dropped / full)[:, 0]  # twice the share of hidden values that stayed
    assert len(set(ratio.tolist())) > 5 and 0.8 < float(ratio.mean()) < 1.2
    torch.testing.assert_close(ratio * HIDDEN / 2, (ratio * HIDDEN / 2).round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype):
    torch.manual_seed(1)
    module = nn.MoE(96, 160, 7, shared_experts=1, capacity_factor=1.1).to(dtype)
    x = torch.randn(130, 96).to(dtype)
    before, ours = torch.get_num_threads(), backend.num_threads()
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        backend.set_num_threads(threads)
        module.zero_grad()
        out, statistics = module(x)
        (out.float().square().sum() + statistics.balance_loss + statistics.z_loss).backward()
        results.append([out, *statistics, *(p.grad.clone() for p in module.parameters())])
    torch.set_num_threads(before)
    backend.set_num_threads(ours)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("noise", [False, True])
def test_a_tokens_logits_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch, noise: bool):
    # As where MKL may multiply the large groups of other products: it would the 600 tokens, and not the fewer.
    monkeypatch.setattr(backend, "mkl_is_strict", lambda: True)
    module, x = nn.MoE(96, 8, 64, noise=noise), torch.randn(600, 96)
    if noise:
        torch.nn.init.normal_(module.noise.weight)
    engine = module.engine(x)
    whole = module.scores(engine, x)
    for some in (slice(3, 4), slice(40, 57), slice(0, 511)):
        for part, of in zip(module.scores(engine, x[some]), whole, strict=True):
            assert of is None or same_bits(part.detach(), of[some].detach())


def test_float64_goes_to_the_references_and_is_reported():
    backend.reset_report()
    module = module_of("geglu-bias-shared", torch.float64)
    x = inputs(torch.float64)
    weights = torch.randn(x.shape, dtype=torch.float64)
    exact, _ = wanted("geglu-bias-shared", module, x, torch.float64, weights)
    torch.testing.assert_close(module(x).output, exact.output, rtol=1e-12, atol=1e-12)
    assert set(backend.report()) == {"moe", "feed_forward"}
    backend.reset_report()


def test_autocast_leaves_the_router_in_f32():
    module, x = module_of("swiglu"), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert torch.equal(out.statistics.z_loss, module(x).statistics.z_loss)
    assert out.output.dtype == torch.bfloat16


def test_compile_sees_one_graph():
    torch._dynamo.reset()
    module, x = module_of("capacity"), inputs()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def gradients(function: Any) -> list[torch.Tensor]:
        out = function(x)
        loss = out.output.square().sum() + out.statistics.balance_loss + out.statistics.z_loss
        return [out.output, *torch.autograd.grad(loss, list(module.parameters()))]

    for a, b in zip(gradients(compiled), gradients(module), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_state_dict_and_what_decays():
    module = nn.MoE(8, 12, 3, activation="gelu", bias=True, shared_experts=2, noise=True)
    shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    assert shapes == {
        "router.weight": (3, 8), "noise.weight": (3, 8), "up.weight": (3, 12, 8), "up.bias": (3, 12),
        "down.weight": (3, 8, 12), "down.bias": (3, 8), "shared.up.weight": (24, 8), "shared.up.bias": (24,),
        "shared.down.weight": (8, 24), "shared.down.bias": (8,),
    }  # fmt: skip
    assert nn.MoE(8, 12, 3).up.weight.shape == (3, 24, 8)
    rest = decay_groups(module, 0.1)[1]
    assert {n for n, _ in rest["params"]} == {n for n in shapes if n.endswith("bias")}


def test_grouped_linear_is_a_linear_layer_for_each_expert():
    layer = nn.GroupedLinear(3, 5, 4)
    x, offsets = torch.randn(6, 5), torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    y = layer(x, offsets)
    torch.testing.assert_close(y[:2], torch.nn.functional.linear(x[:2], layer.weight[0], layer.bias[0]))
    torch.testing.assert_close(y[2:5], torch.nn.functional.linear(x[2:5], layer.weight[2], layer.bias[2]))
    assert not y[5].any()
    assert repr(layer) == "GroupedLinear(3, 5, 4, bias=True)"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_k": 6}, "argument 'top_k': got 6 of 5 experts, expected 1 to 5"),
        ({"top_k": 0}, "argument 'top_k': got 0 of 5 experts"),
        ({"num_experts": 100, "top_k": 65}, "argument 'top_k': got 65 of 100 experts, expected 1 to 64"),
        ({"num_experts": 0}, "argument 'num_experts': got 0, expected 1 to 4096"),
        ({"num_experts": 4097}, "argument 'num_experts': got 4097, expected 1 to 4096"),
        ({"balance": "shazer"}, "unknown balance 'shazer'; did you mean 'shazeer'"),
        (
            {"balance": "shazeer"},
            "argument 'balance': got 'shazeer' without noise, expected noise=True beside it",
        ),
        ({"priority": "gates"}, "unknown priority 'gates'; did you mean 'gate'"),
        ({"activation": "swigl"}, "unknown activation 'swigl'; did you mean 'swiglu'"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        nn.MoE(WIDTH, HIDDEN, **{"num_experts": EXPERTS, **options})


def test_mistakes_of_a_call_are_named():
    module = module_of("swiglu", capacity_convention="per_choice", capacity_factor=1.0)
    with pytest.raises((ValueError, UserError), match="unknown convention 'per_choice'"):
        module(inputs())
    with pytest.raises(ValueError, match=r"argument 'mask': got torch.bool of shape \(3,\)"):
        module_of("swiglu")(inputs(), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="got a tensor on meta, expected one on the CPU"):
        module_of("swiglu").to("meta")(inputs().to("meta"))
    assert ops.expert_capacity(33, 5, factor=1.0) == 7
