"""Our models inside lm-evaluation-harness, for its tasks and for cross-checks.

Needs the extra `harness` (`pip install -e .[harness]`). Importing it takes the package some ten
seconds, so nothing else here imports this file. Use:

    from lm_eval import simple_evaluate
    from qwen_jax.evals.harness import HarnessModel
    simple_evaluate(model=HarnessModel(qwen_jax.load(DIR)), tasks=["arc_easy"])

Its prompts are not Qwen's: results are comparable with those of the harness, not with the report.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from qwen_jax.evals.runner import MIN_SHARED, Runner, Subject, rolling_windows
from qwen_jax.text import chatml

MAX_NEW_TOKENS = 256  # where a task does not say


class HarnessModel(TemplateLM):
    """The interface of the harness on top of `Runner`. chat: prompts become ChatML turns."""

    def __init__(self, model: Subject, batch_size: int = 16, mesh: jax.sharding.Mesh | None = None):
        super().__init__()
        self._runner = Runner(model, batch_size, mesh)
        self._model = model

    @property
    def eot_token_id(self) -> int:
        """What stands before a text without context."""
        return self._model.tokenizer.end_of_text

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the cache of the harness."""
        return self._model.tokenizer.sha256[:12]

    def tok_encode(self, string: str, **options: Any) -> list[int]:
        """The ids of ordinary text."""
        del options
        return self._model.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, **options: Any) -> list[tuple[float, bool]]:
        room = self._model.max_positions + 1  # the last token is predicted, not read
        pairs = []
        for _, context, continuation in requests:
            if len(continuation) >= room:
                raise ValueError(f"a continuation of {len(continuation)} tokens does not fit")
            pairs.append((list(context)[-(room - len(continuation)) :], list(continuation)))
        return self._in_batches(
            [context for context, _ in pairs],
            lambda rows, shared: self._runner.log_likelihoods([pairs[r] for r in rows], shared),
        )

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context."""
        del disable_tqdm
        windows = [
            list(rolling_windows(self.tok_encode(request.args[0]), self.eot_token_id,
                                 self._model.max_positions))
            for request in requests
        ]  # fmt: skip
        flat = [pair for pairs in windows for pair in pairs]
        values = iter(
            self._in_batches(
                [[*context, *targets] for context, targets in flat],
                lambda rows, _: self._runner.log_likelihoods([flat[r] for r in rows], 0),
            )
        )
        return [sum(next(values)[0] for _ in pairs) for pairs in windows]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers.

        Raises:
          ValueError: a task asks for sampling.
        """
        del disable_tqdm
        answers: list[str] = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for kind, numbers in kinds.items():
            texts = self._generate([requests[n].args[0] for n in numbers], json.loads(kind))
            for number, text in zip(numbers, texts):
                answers[number] = text
        return answers

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        settings = {"do_sample": False, "until": [], "max_gen_toks": MAX_NEW_TOKENS} | settings
        if settings["do_sample"]:
            raise ValueError(f"{settings}: only greedy answers are offered here")
        new, stops = settings["max_gen_toks"], settings["until"]
        stops = [stops] if isinstance(stops, str) else stops
        room = self._model.max_positions - new
        if room < 1:
            raise ValueError(f"max_gen_toks = {new}: leaves no room for a prompt")
        tokenizer = self._model.tokenizer
        encode = tokenizer.encode_with_specials if self._model.chat else tokenizer.encode
        prompts = [encode(text)[-room:] for text in contexts]
        ends = chatml.stop_ids(tokenizer) if self._model.chat else (self.eot_token_id,)
        written = self._in_batches(
            prompts,
            lambda rows, shared: self._runner.write(
                [prompts[r] for r in rows], ends, stops, new, shared
            ),
            new,
        )
        return [one.text for one in written]

    def _in_batches(self, prompts: Sequence[list[int]], run, new_tokens: int = 0) -> list[Any]:
        """`run(rows, shared)` for all prompts; those that begin alike are kept together."""
        groups = [str(prompt[:MIN_SHARED]) for prompt in prompts]
        found: list[Any] = [None] * len(prompts)
        with tqdm(total=len(prompts), unit="request") as bar:
            for batch in self._runner.plan(prompts, groups, new_tokens):
                for row, value in zip(batch.rows, run(batch.rows, batch.shared)):
                    found[row] = value
                bar.update(len(batch.rows))
        return found

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        """A conversation of the harness as text with the control tokens of ChatML."""
        messages = [chatml.Message(turn["role"], turn["content"]) for turn in chat_history]
        rendered = chatml.render(self._model.tokenizer, messages, open_answer=add_generation_prompt)
        return self._model.tokenizer.decode(rendered.tokens.tolist())
