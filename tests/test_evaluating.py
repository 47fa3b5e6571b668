"""What a trained model is worth, measured: a run in the bits that it wrote down, a directory as transformers has it."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from thinpipe.cli import app
from thinpipe.node.checkpoints.assemble import assemble
from thinpipe.node.evaluating.chain import Chain
from thinpipe.node.evaluating.choices import Question, read_questions, score
from thinpipe.node.evaluating.generation import Sampling, generate, load
from thinpipe.node.evaluating.subject import Directory, EvaluationError
from thinpipe.node.evaluating.text_loss import Batch, bytes_of_ids, loss_sum, text_loss, windows
from thinpipe.node.export.export import export_run
from thinpipe.node.export.heldout_loss import recorded_loss
from thinpipe.node.preparation import prepare_vocabulary
from thinpipe.node.run_corpus import RECORD
from typer.testing import CliRunner

from .conftest import TINY, WORDS, TinyConfig
from .published import SHAPES, save
from .test_bad_input import refused
from .trained_run import shake, train

CODECS = {
    "bf16": "bf16",
    "mapl": "mapl:r=8,context=2,ce=4,ch=6,anchors=factorized,every=2",
    "resbm": "resbm:b=8",
    "ssn": "ssn:k=8",
}
QUESTIONS = [
    {"context": "def alpha_", "choices": ["beta(x1):", "(((((", "layer"], "answer": 0},
    {"context": "", "choices": ["def node_link(x3):\n", "zz"], "answer": 0},
    {"context": "    return ", "choices": [" wire(x, 7)", "\n"], "answer": 1},
]


@pytest.fixture(scope="module")
def run(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three stages, with boundaries that count for much."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(tiny({"pipeline.stages": 3, "codec.codec": CODECS["mapl"]}), out, after=shake)
    return out


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with its tokenizer, as transformers writes it; its context is 64 tokens."""
    out = tmp_path_factory.mktemp("models") / "llama"
    save(out, SHAPES["llama"]())
    return out


def asked(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("codec", CODECS)
def test_a_run_is_measured_in_the_bits_that_it_wrote_down(codec: str, tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny({"pipeline.stages": 2, "codec.codec": CODECS[codec]})
    train(config, tmp_path / "run")
    found = asked("eval", tmp_path / "run")
    rounded, exact = found["text"]
    assert found["step"] == config.run.steps
    assert rounded["loss"] == recorded_loss(config, tmp_path / "run", 0, config.run.steps)
    assert rounded["tokens"] == exact["tokens"] == TINY["data.heldout_sequences"] * TINY["data.sequence_length"]
    assert exact["loss"] != rounded["loss"]
    assert exact["loss"] == pytest.approx(rounded["loss"], rel=0.02)
    for each in (rounded, exact):
        assert each["perplexity"] == pytest.approx(math.exp(each["loss"]))
        assert each["bits_per_byte"] == pytest.approx(each["loss"] * each["tokens"] / math.log(2) / each["bytes"])


def test_a_run_and_its_export_are_measured_alike(run: Path, tiny_text: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text.read_text()[:2000] + "§ an ending that fills no window")
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    result = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "export")])
    assert result.exit_code == 0, result.output
    more = ["--data", text, "--choices", tmp_path / "questions.jsonl"]
    own = asked("eval", run, *more)
    exported = asked("eval", tmp_path / "export", *more, "--sequence-length", TINY["data.sequence_length"])
    assert len(own["text"]) == 2
    assert exported["text"][0]["loss"] == pytest.approx(own["text"][1]["loss"], rel=1e-5)
    for key in ("tokens", "bytes"):
        assert exported["text"][0][key] == own["text"][1][key]
    assert own["text"][1]["bytes"] == len(text.read_bytes())
    for found in (own, exported):
        del found["choices"]["file"]
    assert exported["choices"] == own["choices"]


def test_the_tables_say_what_was_measured(run: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    result = CliRunner().invoke(app, ["eval", str(run), "--choices", str(tmp_path / "questions.jsonl")])
    assert result.exit_code == 0, result.output
    for words in ("after step 3 on the held-out part of", "as trained, rounded", "without rounding", "3 questions"):
        assert words in result.stdout


def test_other_text_in_the_place_of_the_run_s_is_refused(tiny: TinyConfig, tiny_text: Path, tmp_path: Path) -> None:
    """Its held-out part is not the one that the run was measured on. Any text can be named, and is measured."""
    own = tiny_text.read_text()[:30_000]  # all of it is measured in the end
    (text := tmp_path / "text.txt").write_text(own)
    train(tiny({"pipeline.stages": 2, "data.source": str(text)}), tmp_path / "run")
    before = asked("eval", tmp_path / "run")
    text.write_text(own + "one line more\n")
    record = tmp_path / "run" / RECORD
    for says in (
        rf"the run in {tmp_path}/run was trained on {text}, digest [0-9a-f]{{12}}",
        r"the checkpoint after 3 steps is of the text with digest [0-9a-f]{12}",  # which is known without the record
    ):
        line = refused(["eval", str(tmp_path / "run")])
        remedy = "put the run's own there, or say which one to measure on with --data"
        assert re.search(f"data.source has changed: {says}, here is {text}, digest [0-9a-f]{{12}}; {remedy}", line), (
            line
        )
        record.unlink(missing_ok=True)
    assert asked("eval", tmp_path / "run", "--data", text)["text"][0]["tokens"] > before["text"][0]["tokens"]
    text.write_text(own)
    assert asked("eval", tmp_path / "run") == before


# Text


@given(
    documents=st.lists(st.lists(st.integers(1, 99), max_size=30), max_size=6),
    length=st.integers(1, 9),
    batch_size=st.integers(1, 4),
)
def test_every_id_is_a_target_once_in_its_order(documents: list[list[int]], length: int, batch_size: int) -> None:
    arrays = [np.array(ids, dtype=np.uint16) for ids in documents]
    batches = list(windows(arrays, length=length, begin_id=0, batch_size=batch_size))
    targets, before = [], [0]
    for batch in batches:
        assert batch.ids_BS.shape == (batch_size, length + 1)
        for row, count in zip(batch.ids_BS, batch.targets_B, strict=True):
            targets += row[1 : count + 1].tolist()
            if count:
                assert row[0] == before[-1]
            before += row[1 : count + 1].tolist()
    assert targets == [number for ids in documents for number in ids]
    assert all(each.tokens for each in batches)


def test_the_loss_is_of_the_targets_that_count() -> None:
    """Against the mean over the same tokens one by one."""
    vocabulary, ids = 7, np.arange(11, dtype=np.uint16) % 7
    table_VV = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(1))

    def logits_of(ids_BS: np.ndarray, _: int) -> torch.Tensor:
        return table_VV[torch.from_numpy(ids_BS.astype(np.int64))[:, :-1]]

    found = text_loss(logits_of, windows([ids], length=4, begin_id=3, batch_size=2), lambda: 22)
    row = [3, *ids.tolist()]
    each = [-float(F.log_softmax(table_VV[a], dim=-1)[b]) for a, b in itertools.pairwise(row)]
    assert (found.tokens, found.bytes) == (11, 22)
    assert found.loss == pytest.approx(sum(each) / 11, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(sum(each) / math.log(2) / 22, rel=1e-6)
    with pytest.raises(EvaluationError, match="the text is empty; give one with --data"):
        text_loss(logits_of, windows([], length=4, begin_id=3, batch_size=2), lambda: 0)
    whole = Batch(np.array([row[:5]]), np.array([4]))
    assert loss_sum(table_VV[None, row[:4]], whole) == pytest.approx(sum(each[:4]), rel=1e-6)
    with pytest.raises(EvaluationError, match="the loss is not finite: the model's weights are damaged"):
        text_loss(lambda *_: torch.full((1, 4, 7), torch.nan), [whole], lambda: 0)


def test_the_bytes_of_ids_are_those_of_their_text(directory: Path) -> None:
    subject = Directory(directory)
    text = "def alpha(x):\n    return '§ \N{SNOWMAN}'\n"
    ids = np.array([0, *subject.tokenizer.encode(text, add_special_tokens=False).ids, 0])
    assert bytes_of_ids(subject.tokenizer, ids) == len(text.encode())
    assert sum(bytes_of_ids(subject.tokenizer, ids[[place]]) for place in range(len(ids))) == len(text.encode())


# Questions


def test_choices_are_scored_as_each_by_itself(directory: Path) -> None:
    """Batches, padding and a context that is cut change nothing."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    subject = Directory(directory)
    words = subject.tokenizer
    questions = [Question(context=q["context"], choices=tuple(q["choices"]), answer=q["answer"]) for q in QUESTIONS]
    questions.append(Question(context=" ".join(WORDS * 9) + " ", choices=("alpha", "wire(x)", "a"), answer=1))
    right, right_per_byte = [], []
    for question in questions:
        sums = []
        for choice in question.choices:
            own = len(words.encode(question.context.rstrip()).ids)
            whole = words.encode(question.context + choice).ids
            count = len(whole) - own
            ids = torch.tensor([[0, *whole][-65:]])
            with torch.no_grad():
                logprobs = F.log_softmax(model(input_ids=ids[:, :-1]).logits[0].double(), dim=-1)
            sums.append(sum(float(logprobs[-count + place, ids[0, -count + place]]) for place in range(count)))
        a_byte = [each / len(choice.encode()) for each, choice in zip(sums, question.choices, strict=True)]
        right.append(max(range(len(sums)), key=sums.__getitem__) == question.answer)
        right_per_byte.append(max(range(len(sums)), key=a_byte.__getitem__) == question.answer)
    found = score(subject, questions)
    assert found.right == sum(right) / 4
    assert found.right_per_byte == sum(right_per_byte) / 4
    assert found.cut == 3
    assert found.error(0.5) == 0.25
    long = Question(context="", choices=("x " * 90, "y"), answer=0)
    with pytest.raises(
        EvaluationError, match=r"a question: the choice \"x x .*\.\.\.\" has \d+ tokens, and the model's context is 64"
    ):
        score(subject, [long])


class Dropping:
    """A model with a tokenizer that knows three letters and drops all others, as some that are published do."""

    begin_id, context, ids = 0, 8, 4

    def __init__(self, logit: float = 0.0) -> None:
        self.tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 1, "b": 2, "c": 3}, []))
        self._logit = logit

    def logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return torch.full((*ids_BT.shape, self.ids), self._logit)


@pytest.mark.parametrize("context", ["", "a ", "z"])
@pytest.mark.parametrize("choice", ["zz", " ", "\n"])
def test_a_choice_without_a_token_is_named(context: str, choice: str, tmp_path: Path) -> None:
    """Where it stands alone a row would be empty, and behind a context it would be scored by that one's last token."""
    path = tmp_path / "questions.jsonl"
    rows = [{"context": context, "choices": ["a", "b"], "answer": 0}]
    rows.append({"context": context, "choices": ["a", choice], "answer": 0})
    path.write_text("\n".join(map(json.dumps, rows)))
    questions = read_questions(path)
    assert score(Dropping(), questions[:1]).questions == 1
    fault = f"{path} line 2: the choice {json.dumps(choice)} has no token, so it has no score: the tokenizer drops all"
    with pytest.raises(EvaluationError, match=re.escape(fault)):
        score(Dropping(), questions)


def test_a_context_may_be_empty_or_dropped() -> None:
    for context in ("", "  ", "zz"):
        assert score(Dropping(), [Question(context=context, choices=("a", "bc"), answer=0)]).right == 1.0


def test_a_text_that_a_tokenizer_refuses_is_named() -> None:
    subject = Dropping()
    subject.tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 1}))
    fault = r'q\.jsonl line 3: the tokenizer cannot encode "b": .*UNK.*; mend or remove it'
    with pytest.raises(EvaluationError, match=fault):
        score(subject, [Question(context="", choices=("a", "b"), answer=0, where="q.jsonl line 3")])


def test_scores_of_a_damaged_model_are_refused() -> None:
    with pytest.raises(EvaluationError, match="the scores are not finite: the model's weights are damaged"):
        score(Dropping(math.nan), [Question(context="", choices=("a", "b"), answer=0)])


BAD_LINES = [
    (b"{", r"line 2 is not valid JSON: "),
    (b"[]", r"line 2 is no object with context, choices and answer; mend"),
    (b"\xff", r"line 2 is not valid JSON: .*utf-8"),
    (b'{"choices": ["a", "b"], "answer": 0}', r"line 2: 'context' has to be a text"),
    (b'{"context": "", "choices": ["a"], "answer": 0}', r"line 2: 'choices' has to be a list of two texts or more"),
    (b'{"context": "", "choices": ["a", ""], "answer": 0}', r"line 2: 'choices' .*, none empty"),
    (b'{"context": "", "choices": ["a", 1], "answer": 0}', r"line 2: 'choices' has to be"),
    (b'{"context": "", "choices": ["a", "b"]}', r"line 2: 'answer' .*, from 0 to 1, not null; mend or remove it"),
    (b'{"context": "", "choices": ["a", "b"], "answer": 2}', r"line 2: 'answer' has to be .*, from 0 to 1, not 2"),
    (b'{"context": "", "choices": ["a", "b"], "answer": -1}', r"line 2: 'answer' has to be .*, not -1"),
    (b'{"context": "", "choices": ["a", "b"], "answer": true}', r"line 2: 'answer' has to be .*, not true"),
    (b'{"context": "\\ud800", "choices": ["a", "b"], "answer": 0}', r'line 2: "\\ud800" has half a surrogate pair'),
    (b'{"context": "", "choices": ["a", "b\\udc00"], "answer": 0}', r'line 2: "b\\udc00" has half a surrogate pair'),
]


@pytest.mark.parametrize(("line", "fault"), BAD_LINES, ids=[line.decode("latin-1") for line, _ in BAD_LINES])
def test_a_line_that_is_no_question_is_named(line: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(json.dumps(QUESTIONS[0]).encode() + b"\n" + line + b"\n")
    with pytest.raises(EvaluationError, match=fault):
        read_questions(path)


# Writing


def test_a_run_ends_texts_with_what_ends_its_documents(run: Path) -> None:
    """Llama's configuration names id 2, which is any token of a tokenizer that was trained on the text."""
    model, words = load(run, step=None, trusted=False, device="cpu", report=print)
    assert words.eos_token == "<|endoftext|>"
    assert model.generation_config.eos_token_id == words.eos_token_id


def test_an_export_runs_no_code_but_its_own(run: Path, tmp_path: Path) -> None:
    """Whatever its config.json names beside the file that is compared."""
    export_run(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    config["auto_map"] = dict.fromkeys(config["auto_map"], f"{elsewhere}--evil.Evil")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    model, _ = load(tmp_path / "out", step=None, trusted=False, device="cpu", report=print)
    assert type(model).__module__ == "thinpipe.node.export.modeling_thinpipe"
    assert not (tmp_path / "ran").exists()


def continued(target: Path, text: str, **options: Any) -> str:
    model, words = load(target, step=None, trusted=False, device="cpu", report=print)
    parts: list[str] = []
    generate(model, words, text, Sampling(**options), parts.append)
    return "".join(parts)


def test_a_run_writes_as_its_own_stages_would(run: Path) -> None:
    """With a cache of keys and values, over its boundaries, as all of it computed anew for each token."""
    found = assemble(run)
    vocabulary = prepare_vocabulary(found.config)
    chain = Chain(found, vocabulary.tokenizer, begin_id=vocabulary.end_id)
    text = "def alpha_beta(x"
    ids = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    count = len(ids)
    while len(ids) - count < 12 and ids[-1] != vocabulary.end_id:
        ids.append(int(chain.logits(torch.tensor([ids]))[0, -1].argmax()))
    expected = vocabulary.tokenizer.decode(ids[count:], skip_special_tokens=True)
    assert continued(run, text, max_tokens=12, temperature=0.0) == expected


def test_draws_follow_seed_temperature_and_top_p(directory: Path) -> None:
    text = "def gamma("
    drawn = [continued(directory, text, max_tokens=12, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    likely = continued(directory, text, max_tokens=12, temperature=0.0)
    assert continued(directory, text, max_tokens=12, top_p=1e-6) == likely != drawn[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    words = transformers.AutoTokenizer.from_pretrained(directory)
    given = words(text, return_tensors="pt").input_ids
    theirs = model.generate(given, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(given))
    assert words.decode(theirs[0, given.shape[1] :], skip_special_tokens=True) == likely


def test_the_command_writes_the_text_and_what_follows(directory: Path) -> None:
    given = ["generate", str(directory), "def gamma(", "--max-tokens", "5", "--temperature", "0"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert result.stdout == "def gamma(" + continued(directory, "def gamma(", max_tokens=5, temperature=0.0) + "\n"


# Bad input


REFUSED = [
    (["eval", "{dir}/none"], r"none holds neither run\.toml nor config\.json; give a run, or a model's directory"),
    (["eval", "{fresh}"], r"there is no checkpoint in .*fresh.*; a run writes them every checkpoint\.every steps"),
    (["eval", "{run}", "--step", "2"], r"stage 0 has no checkpoint after 2 steps in "),
    (["eval", "{run}", "--data", "{dir}/missing"], r"no such file or directory: .*missing"),
    (["eval", "{run}", "--data", "{dir}/empty.txt"], r"the text is empty; give one with --data|holds no text"),
    (["eval", "{run}", "--sequence-length", "8"], r"--sequence-length 8: messages of this run are of 32 tokens; omit"),
    (["eval", "{run}", "--choices", "{dir}/broken.jsonl"], r"broken\.jsonl line 1 is not valid JSON"),
    (["eval", "{run}", "--choices", "{dir}/empty.txt"], r"empty\.txt holds no question; write one a line: \{"),
    (["eval", "{run}", "--choices", "{dir}/none.jsonl"], r"cannot read .*none\.jsonl: .*; check --choices"),
    (["eval", "{run}", "--device", "cuda"], r"is a run; --device and --trust-code are for a directory"),
    (["eval", "{llama}"], r"is no run and has no held-out text of its own; give one with --data"),
    (["eval", "{llama}", "--data", "stdlib", "--step", "1"], r"--step goes with a run, and .* has no run\.toml; omit"),
    (
        ["eval", "{llama}", "--data", "{dir}/text.txt", "--sequence-length", "65"],
        r"--sequence-length 65 is above the model's context of 64; lower it",
    ),
    (["eval", "{llama}", "--data", "{dir}/text.txt", "--device", "tpu"], r"--device tpu cannot be used: .*; use cpu"),
    (["eval", "{evil}", "--data", "{dir}/text.txt"], r"brings code of its own: read it, and say --trust-code"),
    (["generate", "{evil}", "text"], r"brings code of its own: read it, and say --trust-code"),
    (["generate", "{dir}/none", "text"], r"none holds neither run\.toml nor config\.json"),
    (["generate", "{fresh}", "text"], r"there is no checkpoint in "),
    (["generate", "{llama}", ""], r"there is no text to go on with; give some, such as thinpipe generate RUN"),
    (["generate", "{llama}", "text", "--temperature", "-1"], r"--temperature -1 has to be 0, for the most likely text"),
    (["generate", "{llama}", "text", "--temperature", "nan"], r"--temperature nan has to be 0"),
    (["generate", "{llama}", "text", "--top-p", "0"], r"--top-p 0 has to be above 0 and at most 1"),
    (["generate", "{llama}", "text", "--top-p", "nan"], r"--top-p nan has to be above 0 and at most 1"),
    (["generate", "{llama}", "text", "--max-tokens", "64"], r"and 64 are wanted, but the model's context is 64; sho"),
    (
        ["generate", "{wide}", "<added 0>", "--max-tokens", "3"],
        r"the text has token 320, but the model's vocabulary ends at 319; say it in",
    ),
    (
        ["eval", "{wide}", "--choices", "{dir}/added.jsonl"],
        r"added\.jsonl line 1: the text has token 320 \('<added 0>'\), but the model's vocabulary ends at 319; leave",
    ),
    (["generate", "{llama}", "text", "--step", "1"], r"--step goes with a run, and .* has no run\.toml; omit it"),
]


@pytest.mark.parametrize(("arguments", "fault"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_bad_input_is_one_line(arguments: list[str], fault: str, run: Path, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.txt").write_text("def alpha(x)")
    (tmp_path / "broken.jsonl").write_text("{")
    added = {"context": "", "choices": ["<added 0>", "b"], "answer": 0}
    (tmp_path / "added.jsonl").write_text(json.dumps(added))
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "run.toml").write_text((run / "run.toml").read_text())
    (tmp_path / "evil").mkdir()
    tree = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "evil" / "config.json").write_text(json.dumps(tree))
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    if "{wide}" in arguments:
        save(tmp_path / "wide", SHAPES["llama"](), extra_ids=1)
    where = {"dir": tmp_path, "run": run, "llama": directory}
    where |= {name: tmp_path / name for name in ("fresh", "evil", "wide")}
    result = CliRunner().invoke(app, [each.format(**where) for each in arguments])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("thinpipe: error: ")
    assert re.search(fault, line), line
    assert not (tmp_path / "ran").exists()
