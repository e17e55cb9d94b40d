"""What each stage's model is worth: held-out text, true and learned reward, divergence.

Every model answers the same held-out questions, once greedily and a few times drawn; the answers
are judged by the truth, by the reward model and by the fine-tuned model's probabilities.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import loading, sharding
from qwen_jax.config import MeshConfig, ModelConfig, PpoConfig
from qwen_jax.data.batch import STREAM_FIELDS
from qwen_jax.data.formats import PromptFormat, TextFormat
from qwen_jax.data.heldout import heldout_rows
from qwen_jax.data.sources import open_sources
from qwen_jax.evals.scoring import heldout_scores
from qwen_jax.generate.sampling import GREEDY, SamplingConfig
from qwen_jax.pipeline import task
from qwen_jax.stages import pretrain
from qwen_jax.stages.experience import Ends, draw_answers, finish, make_writer, measure_fn
from qwen_jax.stages.networks import POLICY, REFERENCE, REWARD, VALUE, networks, value_from_reward
from qwen_jax.text import chatml
from qwen_jax.text.tokenizer import Tokenizer

DRAWS = 16


class Judge(NamedTuple):
    """What all models are measured with.

    reference, reward: parameters. ppo: lengths of questions and answers. queries: held-out ones;
    seen: those of the training.
    """

    cfg: ModelConfig
    ppo: PpoConfig
    tokenizer: Tokenizer
    reference: Any
    reward: Any
    queries: dict[str, np.ndarray]
    seen: dict[str, np.ndarray]
    text: Any


def make_judge(
    reference: Path,
    reward_params: Any,
    queries: str,
    seen: str,
    heldout: str,
    documents: int,
    ppo: PpoConfig,
) -> Judge:
    """reference: workdir of the fine-tuned model. queries, seen, heldout: source specs."""
    model = loading.load(reference)
    prompts = PromptFormat(model.tokenizer, ppo.prompt_len, "")
    rows = heldout_rows(open_sources(queries)[0], prompts)
    # The file begins with each problem once.
    once = len(task.problems(heldout=False))
    seen_rows = heldout_rows(open_sources(seen)[0], prompts, once)
    length = model.context.seq_len
    text = heldout_rows(
        open_sources(heldout)[0], TextFormat(model.tokenizer, length, "concat"), documents
    )
    return Judge(
        model.cfg,
        ppo,
        model.tokenizer,
        model.params,
        reward_params,
        rows.rows,
        seen_rows.rows,
        text,
    )


def measure(judge: Judge, workdir: Path) -> dict[str, Any]:
    """The figures of one model, and its greedy answers as (question, answer, true reward).

    accuracy is greedy; true_reward, learned_reward, kl (nats for each answer, against the
    reference), response_len (tokens) and end_rate are of drawn answers. All are of held-out
    questions but those whose names end in `_seen`.
    """
    cfg, tokenizer = judge.cfg, judge.tokenizer
    params = loading.load(workdir).params
    nll_fn = jax.jit(lambda params, batch: pretrain.text_loss(params, None, batch, cfg))
    mesh = sharding.make_mesh(
        MeshConfig(dcn=1, data=1, fsdp=1, context=1, tensor=1), jax.devices()[:1]
    )
    text = heldout_scores(params, nll_fn, [("text", judge.text)], mesh, 32, STREAM_FIELDS)
    tree = {
        POLICY: params,
        REFERENCE: judge.reference,
        REWARD: judge.reward,
        VALUE: value_from_reward(judge.reward),
    }
    drawing = SamplingConfig(judge.ppo.temperature, 0, 1.0)
    greedy, _ = _answers(judge, judge.queries, tree, 1, GREEDY)
    drawn, figures = _answers(judge, judge.queries, tree, DRAWS, drawing)
    greedy_seen, _ = _answers(judge, judge.seen, tree, 1, GREEDY)
    drawn_seen, _ = _answers(judge, judge.seen, tree, DRAWS, drawing)
    return {
        "bits_per_byte": text["bits_per_byte"],
        "heldout_loss": text["heldout_loss"],
        "accuracy": _mean_reward(greedy),
        "true_reward": _mean_reward(drawn),
        "accuracy_seen": _mean_reward(greedy_seen),
        "true_reward_seen": _mean_reward(drawn_seen),
        "learned_reward": figures["score"],
        "kl": figures["kl"],
        "response_len": figures["response_len"],
        "end_rate": figures["end_rate"],
        "samples": greedy,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tokenizer_sha256": tokenizer.sha256,
    }


def _mean_reward(answers: list[tuple[str, str, float]]) -> float:
    return float(np.mean([reward for _, _, reward in answers]))


def _answers(judge: Judge, queries: dict, tree: Any, draws: int, sampling: SamplingConfig):
    """Answers with their true rewards, and the figures of a rollout."""
    cfg, tokenizer = judge.cfg, judge.tokenizer
    stops = chatml.stop_ids(tokenizer)
    ends = Ends(stops, stops[0], stops[0], tokenizer.end_of_text)
    ppo = dataclasses.replace(judge.ppo, responses_per_query=draws)
    nets = networks(cfg, None)
    rows = draw_answers(
        make_writer(cfg, ppo, nets)(tree), queries, jax.random.key(0), cfg=cfg, ppo=ppo,
        ends=ends, num_real=tokenizer.vocab_size, sampling=sampling,
    )  # fmt: skip
    parts = len(rows["ended"]) // len(queries["prompt_len"])
    measured, _ = jax.jit(measure_fn(cfg, ppo, nets, ends, tokenizer.vocab_size, parts))(tree, rows)
    _, figures = finish(measured, jnp.float32(0), jnp.float32(1), ppo=ppo)
    host = jax.device_get(rows)
    answers = []
    for tokens, mask, ended in zip(host["tokens"], host["mask"], host["ended"]):
        question = tokenizer.decode(tokens[: ppo.prompt_len].tolist())
        ids = tokens[ppo.prompt_len :][mask > 0]
        answer = tokenizer.decode(ids.tolist(), skip_special=True)
        reward = task.true_reward(question, answer, bool(ended))
        answers.append((question, answer, reward))
    return answers, {name: float(x) for name, x in jax.device_get(figures).items()}
