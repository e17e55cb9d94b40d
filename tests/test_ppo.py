"""PPO's invariants: small errors do not show in curves, so each is pinned down by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ppo_tools import (
    ENDS,
    MINIBATCH,
    TOKENIZER,
    bits,
    make_loss,
    make_nets,
    make_rollouts,
    make_stage,
    make_state,
    tiny_ppo,
    tree,
)
from tiny import mesh_of, tiny_config

from qwen_jax import losses
from qwen_jax.config import LoraConfig
from qwen_jax.data.formats import scored_sequence
from qwen_jax.model import scalar
from qwen_jax.sharding import use_mesh
from qwen_jax.stages import experience, pretrain
from qwen_jax.stages.ppo import answer_log_probs
from qwen_jax.text.chatml import USER, Message
from qwen_jax.trainer.stage import StageError
from qwen_jax.trainer.state import abstract_state
from qwen_jax.trainer.step import make_train_step

LORA = LoraConfig(rank=2, alpha=4.0, targets=("query", "value", "up"))
CFG = tiny_config()


@pytest.fixture(scope="module")
def first():
    """(params, first minibatch, rollouts) of an untouched policy."""
    rollouts = make_rollouts(tiny_ppo())
    state = make_state(make_stage(tiny_ppo(), rollouts))
    return state.params, rollouts.next(state), rollouts


@pytest.fixture(scope="module")
def loss():
    return jax.jit(make_loss(tiny_ppo()))


def rates(metrics):
    return {name: float(total / count) for name, (total, count) in metrics.items()}


def test_first_minibatch_has_ratio_one(first, loss):
    params, batch, _ = first
    figures = rates(loss(params, batch, None)[1])
    assert figures["ratio_error"] < 1e-6 and figures["approx_kl"] < 1e-9
    assert figures["clip_fraction"] == 0 and figures["value_clip_fraction"] == 0
    moved = params | {"policy": jax.tree.map(lambda x: x * 1.01, params["policy"])}
    assert rates(loss(moved, batch, None)[1])["ratio_error"] > 1e-3


def test_log_probs_of_a_truncated_sampler_would_be_another_thing(first):
    """Why the sampler's own log-probabilities are not used: top-p renormalises."""
    params, batch, _ = first
    rows = batch["rollout"]
    ours = np.asarray(rows["old_log_probs"])[np.asarray(rows["mask"]) > 0]
    logits = pretrain.apply_model(params["policy"], {
        "tokens": rows["tokens"], "positions": rows["positions"], "segment_ids": rows["segments"],
    }, CFG)  # fmt: skip
    scores = losses.token_log_probs(
        logits[:, 39:-1], params["policy"]["head"], rows["tokens"][:, 40:], temperature=1.0,
        num_real=TOKENIZER.vocab_size, chunk=8,
    )[0]  # fmt: skip
    np.testing.assert_allclose(ours, np.asarray(scores)[np.asarray(rows["mask"]) > 0], atol=1e-5)
    assert ours.max() < 0


def test_reference_equal_to_policy_has_no_divergence(first):
    figures = first[2].metrics()
    assert figures["kl"] == 0 and figures["kl_k3"] == 0
    assert figures["reward"] == pytest.approx(
        figures["score_normalised"] - (1 - figures["end_rate"]), abs=1e-5
    )


def test_answers_to_one_query_differ(first):
    rollouts = make_rollouts(tiny_ppo())
    rows = rollouts._draw(rollouts._writer(tree()), rollouts._prompts.next(None), jax.random.key(5))
    tokens = np.asarray(rows["tokens"])
    for query in range(8):
        one, other = tokens[2 * query], tokens[2 * query + 1]
        np.testing.assert_array_equal(one[:40], other[:40])
    assert sum(np.any(tokens[2 * q, 40:] != tokens[2 * q + 1, 40:]) for q in range(8)) >= 6
    assert len({row[:40].tobytes() for row in tokens}) == 8


@functools.cache
def wider(extra: int):
    """The same answers with more padding before the prompts: (rows, wider rows)."""
    rollouts = make_rollouts(tiny_ppo())
    query, key = rollouts._prompts.next(None), jax.random.key(7)
    policy = rollouts._writer(tree())
    narrow = rollouts._draw(policy, query, key)
    tokens = np.asarray(narrow["tokens"])
    start = np.argmax(np.asarray(narrow["segments"]) == 1, axis=1)
    padded = np.pad(tokens, ((0, 0), (extra, 0)), constant_values=ENDS.pad)
    inside = np.pad(np.asarray(narrow["segments"]) == 1, ((0, 0), (extra, 0)))
    layout = experience._layout((start + extra)[:, None], jnp.asarray(inside))
    return narrow, narrow | {"tokens": jnp.asarray(padded)} | layout


def test_padding_before_the_prompt_changes_nothing():
    narrow, wide = wider(8)
    ppo = tiny_ppo()
    params, num_real = tree()["policy"], TOKENIZER.vocab_size
    a, _ = answer_log_probs(params, None, narrow, CFG, ppo, num_real)
    b, _ = answer_log_probs(params, None, wide, CFG, tiny_ppo(prompt_len=48), num_real)
    mask = np.asarray(narrow["mask"]) > 0
    np.testing.assert_allclose(np.asarray(a)[mask], np.asarray(b)[mask], atol=2e-5)
    c = experience.answer_scores(tree()["reward"], narrow, CFG, ppo, ENDS)
    d = experience.answer_scores(tree()["reward"], wide, CFG, tiny_ppo(prompt_len=48), ENDS)
    np.testing.assert_allclose(c, d, atol=1e-4)


def test_scores_are_those_of_the_reward_model_on_the_same_text():
    narrow, _ = wider(8)
    for end_token in (TOKENIZER.im_end, TOKENIZER.extra(0)):
        ends = ENDS._replace(score=end_token)
        scores = np.asarray(
            experience.answer_scores(tree()["reward"], narrow, CFG, tiny_ppo(), ends)
        )
        sequences = []
        for tokens, mask, segments in zip(
            *(np.asarray(narrow[name]) for name in ("tokens", "mask", "segments"))
        ):
            answer = tokens[40:][mask > 0].tolist()
            if answer[-1] in ENDS.stops:
                answer = answer[:-1]
            prompt = tokens[:40][segments[:40] == 1].tolist()
            closing = [TOKENIZER.im_end] + [end_token] * (end_token != TOKENIZER.im_end)
            sequences.append(prompt + answer + closing)
        length = max(map(len, sequences))
        padded = np.zeros((len(sequences), length), np.int32)
        for row, sequence in enumerate(sequences):
            padded[row, : len(sequence)] = sequence
        expected = scalar.end_scores(
            tree()["reward"], padded, np.array([len(s) for s in sequences]), CFG, calibrated=True
        )
        np.testing.assert_allclose(scores, expected, atol=1e-4)
        assert np.std(scores) > 1e-3


def test_a_whole_answer_is_laid_out_as_in_training_of_the_reward_model():
    """Prompt, answer and end as `PreferenceFormat` builds them."""
    ids = scored_sequence(TOKENIZER, [Message(USER, "hi")], "yo", "", TOKENIZER.im_end)
    text = TOKENIZER.decode(ids.tolist())
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>"


def test_score_arrives_unrounded_at_the_last_token_only():
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], np.float32)
    kl = np.array([[0.5, -0.25, 1.0, 9], [2.0, 9, 9, 9]], np.float32)
    rewards = experience.token_rewards(jnp.array([0.25, -1.6]), kl, mask, 0.04)
    assert rewards.dtype == jnp.float32
    expected = [[-0.02, 0.01, 0.25 - 0.04, 0], [-1.6 - 0.08, 0, 0, 0]]
    np.testing.assert_allclose(rewards, expected, atol=1e-6)
    total = np.asarray(rewards).sum(1)
    np.testing.assert_allclose(total, np.array([0.25, -1.6]) - 0.04 * (kl * mask).sum(1), atol=1e-6)


def measured(seed=0):
    """A made-up rollout after its measurement."""
    rng = np.random.default_rng(seed)
    lengths = np.array([3, 6, 1, 4])
    mask = (np.arange(6)[None, :] < lengths[:, None]).astype(np.float32)
    draw = lambda: rng.standard_normal((4, 6)).astype(np.float32)  # noqa: E731
    return {
        "tokens": rng.integers(0, 200, (4, 10)).astype(np.int32),
        "positions": np.zeros((4, 10), np.int32), "segments": np.ones((4, 10), np.int32),
        "mask": mask, "ended": np.array([1, 0, 1, 1], np.float32),
        "old_log_probs": draw(), "reference_log_probs": draw(), "old_values": draw(),
        "entropy": draw(), "scores": rng.standard_normal(4).astype(np.float32),
    }  # fmt: skip


def test_what_is_masked_plays_no_part():
    rows = measured()
    dirty = dict(rows)
    for name in ("old_log_probs", "reference_log_probs", "old_values", "entropy"):
        noise = np.random.default_rng(9).standard_normal((4, 6)) * 1e3
        dirty[name] = np.where(rows["mask"] > 0, rows[name], noise).astype(np.float32)
    clean_rows, clean = experience.finish(rows, 0.0, 1.0, ppo=tiny_ppo())
    dirty_rows, dirtied = experience.finish(dirty, 0.0, 1.0, ppo=tiny_ppo())
    for name in ("advantages", "returns"):
        kept = rows["mask"] > 0
        np.testing.assert_array_equal(
            np.asarray(clean_rows[name])[kept], np.asarray(dirty_rows[name])[kept]
        )
    assert {k: float(v) for k, v in clean.items()} == {k: float(v) for k, v in dirtied.items()}


def test_missing_end_costs_and_scores_are_centred():
    rows = measured()
    ppo = tiny_ppo(kl_coef=0.0, missing_end_penalty=3.0)
    _, figures = experience.finish(rows, 0.5, 2.0, ppo=ppo)
    normal = (rows["scores"] - 0.5) / 2.0
    assert float(figures["score_normalised"]) == pytest.approx(normal.mean(), abs=1e-6)
    assert float(figures["reward"]) == pytest.approx(normal.mean() - 3.0 / 4, abs=1e-6)


def test_order_and_empty_rows_change_nothing(first, loss):
    params, batch, _ = first
    order = np.random.default_rng(0).permutation(MINIBATCH)
    turned = {"rollout": jax.tree.map(lambda x: x[order], batch["rollout"])}
    empty = jax.tree.map(jnp.copy, batch["rollout"])
    empty["mask"] = jnp.zeros_like(empty["mask"])
    more = {"rollout": jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch["rollout"], empty)}
    grad = jax.jit(jax.grad(lambda p, b: loss(p, b, None)[0][0]))
    (whole, weight), _ = loss(params, batch, None)
    for other in (turned, more):
        (total, other_weight), _ = loss(params, other, None)
        assert float(total) == pytest.approx(float(whole), rel=1e-4, abs=1e-4)
        assert float(other_weight) == float(weight)
        for a, b in zip(jax.tree.leaves(grad(params, batch)), jax.tree.leaves(grad(params, other))):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)


def test_without_clipping_the_gradient_is_that_of_the_policy_gradient(first):
    params, batch, _ = first
    rows = batch["rollout"]
    ppo = tiny_ppo(clip_ratio=1e9)
    clipped = make_loss(ppo)

    def plain(policy):
        log_probs, _ = answer_log_probs(policy, None, rows, CFG, ppo, TOKENIZER.vocab_size)
        return -jnp.sum(rows["mask"] * rows["advantages"] * log_probs)

    ours = jax.grad(lambda p: clipped(params | {"policy": p}, batch, None)[0][0])
    a, b = ours(params["policy"]), jax.grad(plain)(params["policy"])
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
    assert float(optax.tree.norm(b)) > 1e-3


def run(stage, state, rollouts, steps, microbatches=1):
    step = jax.jit(make_train_step(stage, microbatches))
    reports = []
    for number in range(1, steps + 1):
        state, report = step(state, rollouts.next(state))
        values = {name: float(value) for name, value in report.items()}
        stage.check(number, values)
        reports.append(values)
    return state, reports


def test_value_only_phase_leaves_the_policy_alone():
    ppo = tiny_ppo(value_warmup_steps=8, epochs=4, clip_value=100.0)
    rollouts = make_rollouts(ppo)
    stage = make_stage(ppo, rollouts)
    start = make_state(stage)
    state, reports = run(stage, start, rollouts, 8)
    assert bits(state.params["policy"]) == bits(start.params["policy"])
    policy_state = [s.opt_state.inner_states["policy"] for s in (start, state)]
    moments = [optax.tree_utils.tree_get(s, "mu") for s in policy_state]
    assert bits(moments[0]) == bits(moments[1]) and len(bits(moments[0])) > 5
    counts = [int(optax.tree_utils.tree_get_all_with_path(s, "count")[0][1]) for s in policy_state]
    assert counts == [0, 0]
    assert bits(state.params["value"]) != bits(start.params["value"])
    assert reports[-1]["value_loss"] < reports[0]["value_loss"]
    for name in ("reference", "reward"):
        assert bits(state.params[name]) == bits(start.params[name])
    # From the ninth step on the policy moves.
    state, _ = run(stage._replace(check=lambda *_: None), state, rollouts, 1)
    assert bits(state.params["policy"]) != bits(start.params["policy"])
    for name in ("reference", "reward"):
        assert bits(state.params[name]) == bits(start.params[name])


def test_the_ratio_alarm_stops_a_run():
    ppo = tiny_ppo()
    rollouts = make_rollouts(ppo)
    stage = make_stage(ppo, rollouts)
    state = make_state(stage)
    batch = rollouts.next(state)
    wrong = batch["rollout"] | {"old_log_probs": batch["rollout"]["old_log_probs"] - 0.05}
    _, report = jax.jit(make_train_step(stage, 1))(state, {"rollout": wrong})
    with pytest.raises(StageError, match="step 1.*0.0513"):
        stage.check(1, {name: float(value) for name, value in report.items()})
    # Later minibatches of a rollout may differ: the policy has moved.
    stage.check(2, {name: float(value) for name, value in report.items()})


def test_microbatches_change_nothing():
    ppo = tiny_ppo(pretrain_data="text", pretrain_coef=0.5, pretrain_rows=4)
    results = []
    for microbatches in (1, 2):
        rollouts = make_rollouts(ppo, microbatches=microbatches)
        stage = make_stage(ppo, rollouts)
        results.append(run(stage, make_state(stage), rollouts, 2, microbatches))
    (one, first_reports), (two, second_reports) = results
    for name in ("loss", "policy_loss", "value_loss", "text_loss", "weight"):
        assert first_reports[0][name] == pytest.approx(second_reports[0][name], rel=1e-3), name
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params)):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_text_is_weighted_against_the_tokens_of_the_answers():
    ppo = tiny_ppo(pretrain_data="text", pretrain_coef=0.5, pretrain_rows=4)
    rollouts = make_rollouts(ppo)
    params = tree()
    state = make_state(make_stage(ppo, rollouts))
    batch = rollouts.next(state)
    tokens = float(jnp.sum(batch["rollout"]["mask"]))
    assert float(jnp.sum(batch["text"]["loss_mask"])) == pytest.approx(0.5 * tokens, rel=1e-5)
    # Without anything from the answers it is plain training on text, scaled.
    quiet = batch["rollout"] | {"advantages": jnp.zeros_like(batch["rollout"]["advantages"])}
    ours = jax.grad(
        lambda p: make_loss(ppo)(params | {"policy": p}, batch | {"rollout": quiet}, None)[0][0]
    )(params["policy"])
    text = batch["text"] | {"loss_mask": jnp.ones_like(batch["text"]["loss_mask"])}
    plain = jax.grad(lambda p: pretrain.text_loss(p, None, text, CFG))(params["policy"])
    factor = float(batch["text"]["loss_mask"][0, 0])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain)):
        np.testing.assert_allclose(a, b * factor, rtol=1e-3, atol=1e-4)


def test_coefficient_zero_is_no_text(first, loss):
    params, batch, rollouts = first
    text = {
        "tokens": jnp.zeros((4, 16), jnp.int32), "targets": jnp.ones((4, 16), jnp.int32),
        "loss_mask": jnp.ones((4, 16)),
    }  # fmt: skip
    with_text = make_loss(tiny_ppo(pretrain_data="x", pretrain_coef=1.0, pretrain_rows=4))
    silent = experience.take_minibatch(
        batch["rollout"], np.arange(MINIBATCH, dtype=np.int32), text, coef=0.0
    )
    grads = [
        jax.grad(lambda p, f=f, b=b: f(p, b, None)[0][0])(params)["policy"]
        for f, b in ((with_text, silent), (make_loss(tiny_ppo()), batch))
    ]
    for a, b in zip(*map(jax.tree.leaves, grads)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_rollouts_resume_bit_for_bit():
    ppo = tiny_ppo(pretrain_data="text", pretrain_coef=0.5, pretrain_rows=4)
    whole = make_rollouts(ppo)
    stage = make_stage(ppo, whole)
    state = make_state(stage)
    step = jax.jit(make_train_step(stage, 1))
    for number in range(4):
        assert whole.resumable() == (number == 0)
        state, _ = step(state, whole.next(state))
    assert whole.resumable()
    saved, kept = whole.get_state(), state
    for _ in range(4):
        state, _ = step(state, whole.next(state))
    again = make_rollouts(ppo)
    again.set_state(saved)
    other = kept
    for _ in range(4):
        other, _ = step(other, again.next(other))
    assert bits(other.params) == bits(state.params)
    # From the start of the prompts and of the running mean it would be another run.
    fresh = make_rollouts(ppo)
    third = kept
    for _ in range(4):
        third, _ = step(third, fresh.next(third))
    assert bits(third.params) != bits(state.params)


def test_adapters_serve_four_models_with_two():
    ppo = tiny_ppo()
    rollouts = make_rollouts(ppo, lora=LORA)
    stage = make_stage(ppo, rollouts, lora=LORA)
    start = make_state(stage, LORA)
    assert set(start.params) == {"policy", "value", "reward"}
    state, reports = run(stage, start, rollouts, 4)
    assert reports[0]["ratio_error"] < 1e-6
    assert bits(state.params["policy"]["base"]) == bits(start.params["policy"]["base"])
    assert bits(state.params["reward"]) == bits(start.params["reward"])
    assert bits(state.params["policy"]["adapters"]) != bits(start.params["policy"]["adapters"])
    assert bits(state.params["value"]) != bits(start.params["value"])
    # What is decoded is the adapted policy, and the reference is the base.
    nets = make_nets(LORA)
    writer = nets.writer(state.params)
    assert bits(writer) != bits(state.params["policy"]["base"])
    assert bits(nets.reference(state.params)[0]) == bits(state.params["policy"]["base"])
    rollouts.next(state)
    assert rollouts.metrics()["kl"] != 0


@pytest.mark.slow
def test_eight_devices_equal_one():
    figures, states = [], []
    for mesh in (mesh_of(1), mesh_of(8, fsdp=4, tensor=2)):
        ppo = tiny_ppo()
        rollouts = make_rollouts(ppo, mesh)
        stage = make_stage(ppo, rollouts)
        abstract = abstract_state(stage.init, stage.tx, jax.random.key(0), mesh, stage.trained)
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = jax.device_put(make_state(stage), places)
        kernel = state.params["policy"]["blocks"]["feed_forward"]["up"]["kernel"]
        assert len({str(shard.index) for shard in kernel.addressable_shards}) == mesh.size
        with use_mesh(mesh):
            state, reports = run(stage, state, rollouts, 2)
        figures.append(rollouts.metrics())
        states.append((state, reports))
    for name in ("score", "response_len", "end_rate", "return", "value"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-3, abs=1e-4), name
    assert states[0][1][0]["loss"] == pytest.approx(states[1][1][0]["loss"], rel=1e-3)
