"""Supervised fine-tuning: it learns responses, resumes exactly, and its update does not depend on how it is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import checkpoint
from gptcore.align.demonstrations import fit
from gptcore.align.reward_model import RewardModel
from gptcore.align.stage_settings import kept
from gptcore.align.supervised import fine_tune, prepare, started
from gptcore.align.supervised_spec import SFTSpec
from gptcore.data.chat import Chat
from gptcore.data.examples import Tokenised
from gptcore.data.vocabulary import Tokenizer
from gptcore.errors import UserError
from gptcore.infer import generate, trained
from gptcore.models import GPT
from gptcore.train.metrics import read
from tests.align import supervised_cases
from tests.align.supervised_cases import base_run, copying, table_of, write_rows
from tests.ranks import finish, start


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_run(tmp_path_factory.mktemp("base") / "run")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "copying.jsonl", copying(300))


LONG = [{"prompt": "a" * 90, "completion": "b"}] * 3


def stage_of(table: dict[str, Any]) -> Any:
    own = SFTSpec.from_dict(table["sft"])
    return prepare({key: value for key, value in table.items() if key != "sft"}, own)


def weights(run_dir: Path, step: int) -> torch.Tensor:
    tensors, state = checkpoint.load(checkpoint.path_of(run_dir / "checkpoints", step), only="model/")
    return torch.cat([t.flatten() for _, t in sorted(checkpoint.model_tensors(tensors, state).items())])


def test_it_learns_to_answer_and_to_stop(base: Path, data: Path, tmp_path: Path) -> None:
    table = table_of(tmp_path, base, data, steps=250, optimizer={"lr": 1e-2}, evaluation={"every": 50})
    table |= {"checkpoint": {"every": 0, "best": "exact_match", "best_mode": "max"}}
    table |= {"sample": {"every": 250, "tokens": 12}}
    table["sft"] |= {"answers": 20, "answer_tokens": 12}
    result = fine_tune(table, quiet=True)
    assert result.evaluation["val_loss"] < 0.1
    lines = read(tmp_path / "metrics.jsonl")
    matches = {line["step"]: line["exact_match"] for line in lines if line["kind"] == "evaluation"}
    assert matches[0] == 0.0 and matches[250] >= 0.8
    assert result.best is not None and matches[int(result.best.name[-8:])] == max(matches.values())
    model, tokenizer = trained.load(tmp_path / "best")
    chat = Chat(tokenizer, None)
    right = 0
    for row in copying(40, seed=9):
        ids = chat.prompt_ids(row["prompt"])
        made = generate(model, tokenizer, ids, max_new_tokens=12, temperature=0.0, end_ids=chat.stop_ids)
        right += made.text == row["completion"] and made.finish_reason == "end"
    assert right >= 32, "four in five of answers not seen in training, each ended by the stop token"
    trained_on = [line["tokens"] for line in read(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert 250 * 100 < trained_on[-1] < 250 * 128, "tokens of examples, not of full rows"
    samples = [line["text"] for line in read(tmp_path / "metrics.jsonl") if line["kind"] == "sample"]
    assert len(samples) == 1 and samples[0].count("\n-> ") == 2


def test_the_prompt_is_not_learnt(base: Path, data: Path, tmp_path: Path) -> None:
    """Other losses on prompts change nothing: the gradient is that of response tokens alone."""
    stage = stage_of(table_of(tmp_path, base, data))
    batch = stage.loader.batch_at(0)
    starts = batch.cu_seqlens[:-1]
    assert (batch.targets[0, starts] == -100).all(), "after the first letter of a prompt comes its second"
    digits = [target for target in batch.targets[0] if ord("1") <= target <= ord("9")]
    assert digits == [] and (batch.targets == stage.chat.tokenizer.eot).sum() == len(starts)


@pytest.mark.parametrize("template", ["none", "chatml"])
def test_a_run_that_was_stopped_equals_one_that_was_not(
    base: Path, data: Path, tmp_path: Path, template: str
) -> None:
    """With noise on embeddings, several epochs of rows and a grown vocabulary, bit for bit."""
    sft = {"template": template, "neftune_alpha": 5.0}
    whole = table_of(tmp_path / "whole", base, data, sft=sft, evaluation={"every": 3})
    cut = table_of(
        tmp_path / "cut", base, data, sft=sft, evaluation={"every": 3}, steps=6, schedule={"name": "constant"}
    )
    whole["schedule"] = {"name": "constant"}
    assert fine_tune(whole, quiet=True).step == 12
    fine_tune(cut, quiet=True)
    result = fine_tune({**cut, "steps": 12}, quiet=True)
    assert torch.equal(weights(tmp_path / "cut", 12), weights(tmp_path / "whole", 12))
    assert result.best is not None and result.best.name == "step-00000012"
    noiseless = table_of(
        tmp_path / "plain", base, data, sft={"template": template}, schedule={"name": "constant"}
    )
    fine_tune(noiseless, quiet=True)
    assert not torch.equal(weights(tmp_path / "plain", 12), weights(tmp_path / "whole", 12))


def test_a_run_goes_on_with_the_examples_it_began_with(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", copying(40))
    table = table_of(tmp_path / "run", base, data, steps=2)
    fine_tune(table, quiet=True)
    write_rows(data, copying(40, seed=1))
    with pytest.raises(UserError, match="was begun with other examples"):
        fine_tune({**table, "steps": 3}, quiet=True)
    write_rows(data, copying(40))
    assert fine_tune({**table, "steps": 3}, quiet=True).step == 3


def test_an_update_does_not_depend_on_how_it_is_cut(base: Path, data: Path, tmp_path: Path) -> None:
    """Four rows as 1, 2 and 4 micro-batches, whose responses are of very different lengths: the same step of SGD.

    And as one micro-batch in leaves of one row, which is how ranks share it.
    """
    found = []
    for accumulate, grain in ((1, 0), (2, 0), (4, 0), (1, 1)):
        cut = {"batch": 4 // accumulate, "accumulate": accumulate, "length": 16}
        sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "max_norm": 0.0}
        run_dir = tmp_path / f"{accumulate}-{grain}"
        more: dict[str, Any] = {
            "data": cut,
            "optimizer": sgd,
            "parallel": {"grain": grain},
            "sft": {"packing": False},
        }
        table = table_of(run_dir, base, data, steps=3, **more)
        fine_tune(table, quiet=True)
        found.append(weights(run_dir, 3))
    moved = float((found[0] - weights(base, 1)).abs().max())
    assert moved > 1e-3
    for other in found[1:]:
        assert float((other - found[0]).abs().max()) < 1e-6 * max(moved, float(found[0].abs().max()))


def test_two_ranks_give_the_bits_of_one(base: Path, data: Path, tmp_path: Path) -> None:
    cut = {"batch": 2, "accumulate": 2}
    sft = {"neftune_alpha": 5.0}
    one = table_of(tmp_path / "one", base, data, steps=3, data=cut, sft=sft)
    fine_tune(one, quiet=True)
    two = table_of(tmp_path / "two", base, data, steps=3, data=cut, sft=sft)
    for code, err in finish(start(2, supervised_cases.__file__, json.dumps(two)), timeout=90):
        assert code == 0, err
    assert torch.equal(weights(tmp_path / "two", 3), weights(tmp_path / "one", 3))


def test_the_best_checkpoint_by_a_score_is_kept(base: Path, data: Path, tmp_path: Path) -> None:
    """InstructGPT's way: not the held-out loss chooses, but a reward model's score."""
    asked: list[int] = []

    def score(model: GPT, chat: Chat) -> dict[str, float]:
        asked.append(len(asked))
        return {"reward": [0.0, 1.0, 3.0, 2.0][asked[-1]]}

    table = table_of(tmp_path, base, data, checkpoint={"every": 12, "best": "reward", "best_mode": "max"})
    result = fine_tune(table, score=score, quiet=True)
    assert len(asked) == 4 and result.best == tmp_path / "best" / "step-00000008"
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step-00000008"]
    model, _ = trained.load(tmp_path / "best")
    last, _ = trained.load(tmp_path)
    assert not torch.equal(model.head_weight, last.head_weight)
    again, _ = trained.load(tmp_path / "best" / "step-00000008")
    assert torch.equal(model.head_weight, again.head_weight)


def save_reward_model(judge: RewardModel, tokenizer: Tokenizer, run_dir: Path) -> None:
    tokenizer.save(run_dir / "tokenizer")
    tensors = {f"model/{name}": tensor.detach() for name, tensor in judge.state_dict().items()}
    state = {"model": judge.config.to_dict(), "tokenizer": tokenizer.fingerprint, "tied": {}}
    checkpoint.save(run_dir / "checkpoints", 1, tensors, state)


def test_a_reward_model_chooses_the_checkpoint(base: Path, data: Path, tmp_path: Path) -> None:
    """A judge that gives every answer the same, so that the mean, and which checkpoint is kept, are known."""
    model, tokenizer = trained.load(base)
    judge = RewardModel.over(model)
    with torch.no_grad():
        judge.reward_head.weight.zero_()
        judge.reward_head.bias.fill_(0.75)
    save_reward_model(judge, tokenizer, tmp_path / "judge")
    sft = {"answers": 6, "answer_tokens": 4, "reward_model": str(tmp_path / "judge")}
    table = table_of(tmp_path / "run", base, data, sft=sft, checkpoint={"best": "reward", "best_mode": "max"})
    result = fine_tune(table, quiet=True)
    assert result.evaluation["reward"] == 0.75 and result.best is not None
    assert result.best.name == "step-00000004", "of equal ones the earliest"
    with pytest.raises(UserError, match="sft.reward_model: judges answers; set sft.answers"):
        fine_tune({**table, "sft": {**table["sft"], "answers": 0}}, quiet=True)


def test_a_score_that_nobody_gives(base: Path, data: Path, tmp_path: Path) -> None:
    table = table_of(tmp_path, base, data, checkpoint={"best": "val_los"})
    with pytest.raises(UserError, match="unknown checkpoint.best 'val_los'; did you mean 'val_loss'"):
        fine_tune(table, quiet=True)
    table = table_of(tmp_path / "other", base, data, evaluation={"every": 0})
    with pytest.raises(UserError, match="checkpoint.best: needs evaluations"):
        fine_tune(table, quiet=True)


def test_a_mixture_has_the_shares_that_were_asked_for(base: Path, tmp_path: Path) -> None:
    files = {}
    for number, (name, count) in enumerate([("sums", 40), ("letters", 400), ("reasons", 60)]):
        files[name] = str(write_rows(tmp_path / f"{name}.jsonl", copying(count, number)))
    tasks = [
        {"name": name, "files": file, "chain_of_thought": name == "reasons"} for name, file in files.items()
    ]
    table = table_of(tmp_path / "run", base, tmp_path)

    def quotas(**sft: Any) -> dict[str, float]:
        stage = stage_of({**table, "sft": {"template": "none", "tasks": tasks, **sft}})
        whole = sum(stage.loader.quotas.values())
        assert whole == 450, "a tenth of each is held out"
        return {name: quota / whole for name, quota in stage.loader.quotas.items()}

    assert quotas() == pytest.approx({"sums": 36 / 450, "letters": 360 / 450, "reasons": 54 / 450})
    assert quotas(mixture_cap=54) == pytest.approx(
        {"sums": 36 / 144, "letters": 54 / 144, "reasons": 54 / 144}, abs=2e-3
    )
    thoughtful = quotas(mixture_cap=54, chain_of_thought=0.6)
    assert thoughtful == pytest.approx({"sums": 0.4 * 0.4, "letters": 0.4 * 0.6, "reasons": 0.6}, abs=3e-3)
    tasks[0]["weight"] = 2.0
    with pytest.raises(UserError, match="sft.tasks: letters has no weight, others have"):
        quotas()
    tasks[1]["weight"], tasks[2]["weight"] = 1.0, 1.0
    assert quotas() == pytest.approx({"sums": 0.5, "letters": 0.25, "reasons": 0.25}, abs=3e-3)
    tasks[2]["chain_of_thought"] = False
    with pytest.raises(UserError, match="no task has chain_of_thought = true"):
        quotas(chain_of_thought=0.5)


def test_steps_follow_from_epochs(base: Path, data: Path, tmp_path: Path) -> None:
    table = table_of(tmp_path, base, data, sft={"epochs": 2.0, "packing": False})
    for name in ("steps", "evaluation", "checkpoint"):
        del table[name]
    config = stage_of(table).config
    assert config.steps == 270 and config.evaluation.every == config.checkpoint.every == 135
    assert config.schedule.warmup == 9 and config.optimizer.weight_decay == 0.0
    packed = stage_of({**table, "sft": {**table["sft"], "packing": True}}).config
    assert packed.steps < 60, "more than four examples to a row"


def test_what_does_not_fit_a_row() -> None:
    example = Tokenised.of([1, 2, 3, 4], [5, 6, 0])
    assert fit(example, 6, "refuse") is example and fit(example, 5, "skip") is None
    cut = fit(example, 4, "truncate")
    assert cut is not None and cut.tokens.tolist() == [1, 2, 3, 4, 5] and cut.targets == 1
    assert fit(example, 3, "truncate") is None, "nothing of the response is left"
    cut = fit(example, 4, "truncate_prompt")
    assert cut is not None and cut.tokens.tolist() == [3, 4, 5, 6, 0] and cut.targets == 3
    assert fit(example, 2, "truncate_prompt") is None, "the response itself would be cut"


@pytest.mark.parametrize(
    ("rows", "sft", "sentence"),
    [
        (
            [{"prompt": "a" * 90, "completion": "b"}] * 3,
            {},
            "2 of 2 examples are longer than a row of 64 tokens.*line",
        ),
        (
            [{"prompt": "a" * 90, "completion": "b"}] * 3,
            {},
            "with 92 tokens, of which the prompt alone has 90",
        ),
        (
            [{"prompt": "a" * 90, "completion": "b"}] * 3,
            {"overflow": "skip"},
            "no example is left of 2: .'longer than 64",
        ),
        ([{"prompt": "a", "completion": ""}] * 3, {}, "line 1: the response is empty"),
        ([{"prompt": "a", "completion": "b"}], {}, "has 1 demonstration, expected 2 or more"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3,
            {},
            "holds a ranking, expected a demonstration",
        ),
        (
            [{"prompt": "a", "completion": "b"}] * 3,
            {"template": "nowhere"},
            "nowhere: no chat_template.jinja",
        ),
        ([{"prompt": "a", "completion": "b"}] * 3, {"epochs": 0.0}, "sft.epochs: got 0.0"),
        ([{"prompt": "a", "completion": "b"}] * 3, {"overflw": "skip"}, "did you mean 'sft.overflow'"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    base: Path, tmp_path: Path, rows: Any, sft: Any, sentence: str
) -> None:
    data = write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(UserError, match=sentence):
        fine_tune(table_of(tmp_path / "run", base, data, sft=sft), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_the_checkpoint_s(base: Path, data: Path, tmp_path: Path) -> None:
    from gptcore.data.characters import CharacterTokenizer

    CharacterTokenizer("abcdef123456789").save(tmp_path / "other")
    table = table_of(tmp_path / "run", base, data, data={"tokenizer": str(tmp_path / "other")})
    with pytest.raises(UserError, match="vocabulary mismatch"):
        fine_tune(table, quiet=True)
    with pytest.raises(UserError, match="start: expected the run"):
        fine_tune({**table, "start": None}, quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no run of 'gptcore sft' to continue"):
        kept(tmp_path, "sft")


def test_settings_of_the_model_may_change_where_its_weights_still_fit(
    base: Path, data: Path, tmp_path: Path
) -> None:
    table = table_of(tmp_path, base, data, model={"dropout": 0.2})
    stage = stage_of(table)
    assert stage.model.config.dropout == 0.2 and stage.config.model["dropout"] == 0.2
    original, _ = trained.load(base)
    assert torch.equal(stage.model.head_weight, original.head_weight)
    with pytest.raises(UserError):
        stage_of({**table, "model": {"width": 96}})
    with pytest.raises(UserError, match="did you mean 'model.dropout'"):
        stage_of({**table, "model": {"dropot": 0.2}})


def test_an_adapter_adds_no_tokens_that_it_could_not_train(base: Path) -> None:
    """Their rows would stay the mean of the others and equal to each other: none could ever be the likeliest."""
    table = {"start": str(base), "adapter": {"kind": "lora"}}
    model, chat = started(table, "auto")
    assert model.config.vocab_size == 257 and chat.stop_ids == (256,)
    assert chat.prompt_ids("hi") == list(b"User:\nhi\n\nAssistant:\n")
    with pytest.raises(
        UserError, match="template 'chatml' needs tokens that the vocabulary lacks, and an adapter"
    ):
        started(table, "chatml")
    model, chat = started({"start": str(base)}, "auto")
    assert model.config.vocab_size == 259 and chat.stop_ids == (258, 256)


def test_gsm8k_at_toy_size(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "gsm8k_train.jsonl.gz"
    long = base_run(tmp_path / "long", context_length=2048)
    table = table_of(tmp_path / "run", long, path, steps=2, data={"batch": 1, "length": 2048})
    result = fine_tune(
        {**table, "evaluation": {"every": 2, "batches": 2}, "checkpoint": {"every": 2}}, quiet=True
    )
    assert result.step == 2 and result.evaluation["val_loss"] < 6.0
