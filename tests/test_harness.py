"""lm-evaluation-harness around our model gives the numbers of our own engine."""

import dataclasses
import json
import math
import types

import pytest
from test_engine import CFG
from tiny import byte_tokenizer, random_params

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", reason="pip install -e .[harness]")


@pytest.fixture(scope="module")
def model():
    from qwen_jax.model.context import NEUTRAL
    from qwen_jax.model.transformer import unstack_layers

    tokenizer = byte_tokenizer()
    return types.SimpleNamespace(
        params=unstack_layers(random_params(CFG), CFG),
        cfg=dataclasses.replace(CFG, scan_layers=False),
        tokenizer=tokenizer, max_positions=96, context=NEUTRAL, chat=False,
        num_real=tokenizer.vocab_size,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    """One run of the harness over a task of each output type."""
    from lm_eval.tasks import TaskManager

    from qwen_jax.evals.harness import HarnessModel

    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"what {'so ' * n}is", "answer": "ABCD"[n % 4]} for n in range(6)]
    texts = [{"text": "words and words " * n} for n in (1, 9)]
    for name, content in (("rows", rows), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))

    def task(name, data, **more):
        files = {"test": str(folder / f"{data}.jsonl")}
        return {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files},
                "test_split": "test", **more}  # fmt: skip

    tasks = [
        task("choices", "rows", output_type="multiple_choice", doc_to_text="{{question}} Answer:",
             doc_to_choice=["A", "B", "C", "D"], doc_to_target="answer"),
        task("texts", "texts", output_type="loglikelihood_rolling", doc_to_text="",
             doc_to_target="{{text}}", metric_list=[{"metric": "bits_per_byte"}]),
        task("answers", "rows", output_type="generate_until", doc_to_text="{{question}}",
             doc_to_target="answer", metric_list=[{"metric": "exact_match"}],
             generation_kwargs={"until": ["e"], "max_gen_toks": 8, "do_sample": False}),
    ]  # fmt: skip
    return lm_eval.simple_evaluate(
        model=HarnessModel(model, 4),
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )


@pytest.fixture(scope="module")
def runner(model):
    from qwen_jax.evals.runner import Runner

    return Runner(model, 3)


def test_choices(found, runner):
    from qwen_jax.evals.engine import _Asked, _choose
    from qwen_jax.evals.task import Choose

    for sample in found["samples"]["choices"]:
        theirs = [response[0][0] for response in sample["resps"]]
        prompt = f"{sample['doc']['question']} Answer:"
        query = Choose(prompt, (" A", " B", " C", " D"))
        [answer] = _choose(runner, [_Asked(query, runner.tokenizer.encode(prompt), 0)], 0)
        assert theirs == pytest.approx(answer.log_probs, abs=1e-3)
    assert len(found["samples"]["choices"]) == 6


def test_bits_per_byte(found, runner):
    from qwen_jax.evals.engine import _Asked, _predict
    from qwen_jax.evals.task import Predict

    texts = [sample["doc"]["text"] for sample in found["samples"]["texts"]]
    asked = [_Asked(Predict(text), runner.tokenizer.encode(text), 0) for text in texts]
    nats = -sum(answer.log_probs[0] for answer in _predict(runner, asked))
    ours = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["results"]["texts"]["bits_per_byte,none"] == pytest.approx(ours, abs=1e-3)
    assert max(map(len, texts)) > 96  # more than one window


def test_answers(found, runner):
    for sample in found["samples"]["answers"]:
        prompt = runner.tokenizer.encode(sample["doc"]["question"])
        [answer] = runner.write([prompt], (runner.tokenizer.end_of_text,), ["e"], 8, 0)
        assert sample["resps"][0][0] == answer.text


def test_chats_are_rendered_and_sampling_is_refused(model):
    from lm_eval.api.instance import Instance

    from qwen_jax.evals.harness import HarnessModel

    ours = HarnessModel(model, 2)
    text = ours.apply_chat_template([{"role": "user", "content": "Q"}])
    assert text.endswith("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n")
    request = Instance("generate_until", {}, ("a", {"do_sample": True}), 0)
    with pytest.raises(ValueError, match="only greedy"):
        ours.generate_until([request])
