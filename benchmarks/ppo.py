"""Samples per second of PPO on a CPU, rollout, scoring and update, against TRL's trainer.

    python -m benchmarks.ppo [--batches 16,64] [--rounds 6] [--threads 1,2]

Ours is the real stage: `Rollouts` as the batch source and `make_train_step` over the loss and the
optimizers of `ppo_stage.make_stage`, driven as the training loop does it. Theirs is
`trl.experimental.ppo.PPOTrainer` with a value model, its `train` called as it is. Both have four
models of the same shape in float32 with random weights (Qwen2 with as many key heads as query
heads, biases on query, key and value and an untied head is Qwen), answer the same number of random
queries of 16 tokens by exactly 32 tokens, and take one optimizer step over the whole rollout in
each of 4 epochs. Ours draws by top-p 0.9, computes the old log-probabilities again and clips
gradients; TRL's trainer does none of these. Its gradient checkpointing and bfloat16, which only
slow it down here, are off.

Our microbatches have 16 rows, which fit the cache and change no result; TRL, whose time grows less
than its batch, has none.

Each contender is a process of its own, TRL once for each number of threads, and they take turns
within one run. Compare the shortest rollouts, updates included; the medians say how busy the
machine was. TRL calls `gc.collect` twice in each rollout: a column of its own, for it grows with
what is imported and not with the model. Needs
torch, transformers and trl 1.12, the last with this trainer; exit status 1 below --accept.
"""

import argparse
import contextlib
import gc
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import types

import numpy as np

from benchmarks.qwen2 import qwen2_config
from qwen_jax import allocator

PROMPT, RESPONSE, EPOCHS = 16, 32, 4
ROWS = 16  # of our microbatches
KL_COEF, CLIP_RATIO, CLIP_VALUE, GAE_LAMBDA, LEARNING_RATE = 0.04, 0.2, 0.15, 0.95, 1e-6
PHASES = ("rollout", "scoring", "update", "gc")


def model_config():
    from qwen_jax.config import ModelConfig

    return ModelConfig(
        vocab_size=512,
        d_model=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        d_ff=344,
        qkv_bias=True,
        tie_embeddings=False,
        rope_base=10_000.0,
        norm_eps=1e-6,
        init_std=0.02,
        param_dtype="float32",
        compute_dtype="float32",
        remat="none",
        scan_layers=False,
        attention="blocked",
        loss_chunk=RESPONSE,
    )


def ppo_config(samples):
    from qwen_jax.config import PpoConfig

    return PpoConfig(
        reward_from="",
        prompt_len=PROMPT,
        response_len=RESPONSE,
        queries=samples,
        responses_per_query=1,  # TRL draws one
        epochs=EPOCHS,
        gather_policy=True,
        temperature=1.0,
        top_p=0.9,
        value_warmup_steps=0,
        kl_coef=KL_COEF,
        kl_estimator="k1",
        clip_ratio=CLIP_RATIO,
        clip_value=CLIP_VALUE,
        discount=1.0,
        gae_lambda=GAE_LAMBDA,
        whiten_advantages=True,
        reward_clip=10.0,
        scale_rewards=True,
        missing_end_penalty=1.0,
        calibration_queries=0,
        value_lr=LEARNING_RATE,
        pretrain_data="",
        pretrain_coef=0.0,
        pretrain_rows=0,
        ratio_tolerance=1e-3,
        max_kl=0.0,
        eval_data="",
        eval_queries=0,
    )


def optimizer_config():
    from qwen_jax.config import OptimizerConfig

    return OptimizerConfig(
        peak_lr=LEARNING_RATE,
        final_lr_fraction=1.0,
        warmup_steps=0,
        schedule="constant",
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
        moment_dtype="float32",
    )


class RandomQueries:
    """Queries of full length, in place of `DeviceBatches`."""

    def __init__(self, samples, length, vocab_size, mesh):
        self._shape, self._vocab_size, self._mesh = (samples, length), vocab_size, mesh
        self._rng = np.random.default_rng(0)

    def next(self, state):
        """The queries of one rollout."""
        from qwen_jax.data.batch import to_devices

        del state
        prompt = self._rng.integers(0, self._vocab_size, self._shape, np.int32)
        lengths = np.full(self._shape[:1], self._shape[1], np.int32)
        return to_devices({"prompt": prompt, "prompt_len": lengths}, self._mesh)


def our_stage(cfg, samples, mesh):
    """The stage of PPO over random queries; answers never stop, as their stop is never drawn."""
    import jax

    from qwen_jax.stages import ppo_stage
    from qwen_jax.stages.experience import Ends
    from qwen_jax.stages.networks import networks
    from qwen_jax.stages.rollout import Rollouts
    from qwen_jax.text.tokenizer import Tokenizer, byte_ranks

    ppo, nets = ppo_config(samples), networks(cfg, None)
    tokenizer = Tokenizer.from_ranks(byte_ranks())
    stop = tokenizer.vocab_size  # a padding row of the head
    ends = Ends(stops=(stop,), turn=stop, score=stop, pad=stop)
    rollouts = Rollouts(
        cfg,
        ppo,
        nets,
        prompts=RandomQueries(samples, PROMPT, tokenizer.vocab_size, mesh),
        text=None,
        mesh=mesh,
        ends=ends,
        num_real=tokenizer.vocab_size,
        minibatch_size=samples,
        num_microbatches=samples // ROWS,
        key=jax.random.key(0),
        seed=0,
        log=lambda text: None,
    )
    run = ppo_stage.PpoRun(10**6, (samples, PROMPT + RESPONSE), [], None, ROWS)
    return ppo_stage.make_stage(
        cfg, optimizer_config(), ppo, nets, rollouts, mesh, tokenizer, ends, run
    )


def our_turn(cfg, samples, rollouts_per_turn):
    """A function that makes some rollouts with their updates and returns `PHASES` of each."""
    import jax

    from qwen_jax import sharding
    from qwen_jax.config import MeshConfig
    from qwen_jax.trainer.state import create_state
    from qwen_jax.trainer.step import make_train_step

    mesh = sharding.make_mesh(
        MeshConfig(dcn=1, data=1, fsdp=1, context=1, tensor=1), jax.devices()[:1]
    )
    stage = our_stage(cfg, samples, mesh)
    step = jax.jit(make_train_step(stage, samples // ROWS), donate_argnums=0)
    state = create_state(stage.init, stage.tx, jax.random.key(0), mesh, stage.trained)
    taken = 0

    def read(report):
        nonlocal taken
        taken += 1
        stage.check(taken, {name: float(x) for name, x in jax.device_get(report).items()})

    def one_rollout():
        """As in `trainer/loop.py`, the figures of a step are read when the next is under way."""
        nonlocal state
        began, pending = time.perf_counter(), None
        for _ in range(EPOCHS):
            batch = stage.batches.next(state)
            with sharding.use_mesh(mesh):
                state, report = step(state, batch)
            if pending is not None:
                read(pending)
            pending = report
        read(pending)
        total, figures = time.perf_counter() - began, stage.batches.metrics()
        if figures["response_len"] != RESPONSE or not stage.batches.resumable():
            raise AssertionError(f"not one rollout of full length: {figures}")
        drawn, scored = figures["rollout_secs"], figures["scoring_secs"]
        return drawn, scored, total - drawn - scored, 0.0

    return lambda: [one_rollout() for _ in range(rollouts_per_turn)]


def their_models(cfg):
    """Policy, reference, value and reward model by transformers."""
    from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification

    config = qwen2_config(cfg, PROMPT + RESPONSE, num_labels=1)
    language_models = [Qwen2ForCausalLM(config).float() for _ in range(2)]
    return language_models + [Qwen2ForSequenceClassification(config).float() for _ in range(2)]


def their_tokenizer(vocab_size):
    """A tokenizer for the trainer's sake; its padding is an id that is never drawn."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(vocab_size)} | {"pad": vocab_size}
    words |= {"end": vocab_size + 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        pad_token="pad",
        eos_token="end",
    )


def their_trainer(cfg, samples, folder, callback):
    """`PPOTrainer` with the settings of `ppo_config`."""
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy, reference, value, reward = their_models(cfg)
    queries = np.random.default_rng(0).integers(0, cfg.vocab_size, (16 * samples, PROMPT))
    args = PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=samples,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        local_rollout_forward_batch_size=samples,
        total_episodes=samples,  # of one call
        num_ppo_epochs=EPOCHS,
        num_sample_generations=0,
        response_length=RESPONSE,
        temperature=1.0,
        missing_eos_penalty=1.0,
        kl_coef=KL_COEF,
        cliprange=CLIP_RATIO,
        cliprange_value=CLIP_VALUE,
        gamma=1.0,
        lam=GAE_LAMBDA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=their_tokenizer(cfg.vocab_size),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": queries.tolist()}),
        eval_dataset=Dataset.from_dict({"input_ids": queries[:1].tolist()}),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def their_turn(cfg, samples, rollouts_per_turn, threads, folder):
    """As `our_turn`; the phases end where those of the trainer do."""
    import torch
    from transformers import TrainerCallback
    from trl.experimental.ppo import ppo_trainer

    marks = []

    collecting = []

    def mark(*args, **kwargs):
        marks.append(time.perf_counter())

    def collect():
        began = time.perf_counter()
        gc.collect()
        collecting.append(time.perf_counter() - began)

    def marked(inner):
        def call(*args, **kwargs):
            result = inner(*args, **kwargs)
            mark()
            return result

        return call

    # Each is called once for a rollout: at the end of its first phase and of its second.
    ppo_trainer.batch_generation = marked(ppo_trainer.batch_generation)
    ppo_trainer.masked_whiten = marked(ppo_trainer.masked_whiten)
    ppo_trainer.gc = types.SimpleNamespace(collect=collect)
    callback = type("Marks", (TrainerCallback,), {"on_train_begin": mark, "on_train_end": mark})
    trainer = their_trainer(cfg, samples, folder, callback())
    torch.set_num_threads(threads)

    def one_rollout():
        marks.clear()
        collecting.clear()
        with contextlib.redirect_stdout(io.StringIO()):  # it announces every call
            trainer.train()
        rollout, scoring, update = np.diff(marks).tolist()
        scored, updated = collecting
        return rollout, scoring - scored, update - updated, scored + updated

    return lambda: [one_rollout() for _ in range(rollouts_per_turn)]


def work(connection, make_turn, *arguments):
    """The life of a contender's process: a turn for each message, its result sent back."""
    # `qwen_jax.train` does this on CPUs; torch does not lose by it.
    allocator.keep_freed_memory()
    turn = make_turn(*arguments)
    while connection.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        phases = turn()
        connection.send((phases, time.perf_counter() - wall, time.process_time() - cpu))


class Contender:
    """One side in a process of its own, which waits while the others have their turn."""

    def __init__(self, name, make_turn, *arguments):
        self.name, self.phases, self.wall, self.cpu = name, [], 0.0, 0.0
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, make_turn, *arguments))
        self._process.start()
        theirs.close()

    def take_turn(self, counts=True):
        """Makes some rollouts; the first turn, which compiles, does not count."""
        self._connection.send(True)
        phases, wall, cpu = self._connection.recv()
        if counts:
            self.phases += phases
            self.wall += wall
            self.cpu += cpu

    def best(self):
        """Seconds of each phase of the shortest rollout."""
        return min(self.phases, key=sum)

    def median(self):
        """Seconds of the median rollout."""
        return statistics.median(map(sum, self.phases))

    def close(self):
        """Ends the process."""
        self._connection.send(False)
        self._process.join()


def compare(cfg, samples, threads, rounds, rollouts_per_turn, folder):
    """Prints the table of one batch size; the ratio to the best of theirs."""
    shared = cfg, samples, rollouts_per_turn
    ours = Contender("ours", our_turn, *shared)
    peers = [
        Contender(f"TRL, {count} threads", their_turn, *shared, count, folder) for count in threads
    ]
    for side in (ours, *peers):
        side.take_turn(counts=False)
    for _ in range(rounds):
        for side in (ours, *peers):
            side.take_turn()
    for side in (ours, *peers):
        side.close()
    print(f"\n{samples} samples in each rollout")
    print(f"{'':16}{'samples/s':>10}{'median':>8}{'cores':>7}", *(f"{p:>9}" for p in PHASES), "ms")
    for side in (ours, *peers):
        rates = f"{samples / sum(side.best()):10.1f}{samples / side.median():8.1f}"
        times = (f"{1e3 * seconds:9.1f}" for seconds in side.best())
        print(f"{side.name:16}{rates}{side.cpu / side.wall:7.2f}", *times)
    ratio = min(sum(peer.best()) for peer in peers) / sum(ours.best())
    medians = min(peer.median() for peer in peers) / ours.median()
    per_cpu = min(peer.cpu for peer in peers) / ours.cpu
    without = min(sum(phases[:-1]) for peer in peers for phases in peer.phases)
    print(
        f"ours / best of TRL in samples/s: shortest {ratio:.2f}, median {medians:.2f}, "
        f"per CPU second {per_cpu:.2f}, shortest without TRL's gc.collect "
        f"{without / sum(ours.best()):.2f}; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return ratio


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="16,64", help=f"samples of one rollout, by {ROWS}")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rollouts", type=int, default=3, help="of one turn")
    parser.add_argument("--threads", default="1,2", help="of torch; ours has the most of them")
    parser.add_argument("--accept", type=float, default=2.0, help="least ratio to TRL")
    args = parser.parse_args()
    threads = [int(count) for count in args.threads.split(",")]
    # Inherited by the contenders: JAX and torch size their thread pools by this.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: max(threads)])
    os.environ |= {"JAX_PLATFORMS": "cpu", "TRL_EXPERIMENTAL_SILENCE": "1"}
    cfg, ratios = model_config(), []
    for samples in map(int, args.batches.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            ratios.append(compare(cfg, samples, threads, args.rounds, args.rollouts, folder))
    passed = min(ratios) >= args.accept
    print(f"{'PASS' if passed else 'FAIL'}: at least {args.accept}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
