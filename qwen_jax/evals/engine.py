"""Runs tasks of the table on a model: items to queries, batches, answers, verdicts, records.

Every record is written to `OUT.partial.jsonl` as it completes, a line each; the same command goes
on with a file it has begun. Batches are always composed in the same way, so a resumed run computes
what an uninterrupted one would, and the result file has the same bytes.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from qwen_jax.evals.results import summarise
from qwen_jax.evals.runner import Batch, Runner, rolling_windows
from qwen_jax.evals.task import CHAT, Answer, Choose, Item, Predict, Query, Setting, Task, Write
from qwen_jax.text import chatml

FORMAT = 1
NUM_DIGITS = 5  # of log-probabilities in the records
_NO_WINDOW = 1 << 30  # no pair of a history is ever left out


class Order(NamedTuple):
    """A task to run and how."""

    task: Task
    setting: Setting


class _Asked(NamedTuple):
    """A query as ids. cut: tokens that did not fit and were cut off at the left."""

    query: Query
    tokens: list[int]
    cut: int


class Partial:
    """The records that are complete, kept in a file of JSON lines when a path is given.

    Raises:
      ValueError: the file holds something else, or records made with other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self.path = path
        self.digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.done: dict[tuple[str, str], dict[str, Any]] = {}
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._read()
            self._file = path.open("a", encoding="utf-8")

    def _read(self) -> None:
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            advice = f"{self.path}:{number}: {{}}; name another --out or remove the file"
            try:
                row = json.loads(line)
                key, digest, record = (row["task"], row["record"]["id"]), row["settings"], row
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
                raise ValueError(advice.format("no record of this command")) from error
            if digest != self.digest:
                raise ValueError(advice.format("was made with other settings"))
            self.done[key] = record["record"]
        if len(whole) < len(data):  # killed in the middle of a line
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def add(self, task: str, record: dict[str, Any]) -> None:
        """Keeps one record."""
        self.done[task, record["id"]] = record
        if self._file is not None:
            line = {"task": task, "settings": self.digest, "record": record}
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Removes the closed file, once its records are written elsewhere."""
        if self.path is not None:
            self.path.unlink()


def run(
    runner: Runner,
    orders: Sequence[Order],
    data: Path,
    partial: Partial,
    *,
    limit: int = 0,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """All tasks one after the other; the results by name of the task, as they go to JSON.

    data: the folder with the benchmarks. limit: items of each task, spread over its groups; 0 for
    all.

    Raises:
      ValueError: a data file is missing or wrong, or programs may not run here.
    """
    reasons = [order.task.unavailable() for order in orders]
    # All files are read first, so that a missing one is told before hours of work.
    read = [
        [] if reason else read_items(order, data, limit) for order, reason in zip(orders, reasons)
    ]
    results = {}
    for order, reason, items in zip(orders, reasons, read):
        if reason:
            log(f"{order.task.name}: skipped: {reason}")
            results[order.task.name] = _result(order, [], []) | {"skipped": reason}
        else:
            results[order.task.name] = run_task(runner, order, items, partial, log)
    return results


def read_items(order: Order, data: Path, limit: int) -> list[Item]:
    """The items of a task, `limit` of them when it is not 0.

    Raises:
      ValueError: a file is missing or wrong.
    """
    items = order.task.read(data / order.task.folder, order.setting)
    names = [item.id for item in items]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{order.task.name}: two items are called {double!r}")
    return limited(items, limit)


def limited(items: Sequence[Item], limit: int) -> list[Item]:
    """The first items of every group in turn, `limit` in all, in the order of the task."""
    if not limit or limit >= len(items):
        return list(items)
    rank, seen = {}, {}
    for number, item in enumerate(items):
        seen[item.group] = seen[item.group] + 1 if item.group in seen else 0
        rank[number] = (seen[item.group], number)
    chosen = sorted(sorted(rank, key=rank.__getitem__)[:limit])
    return [items[number] for number in chosen]


def run_task(
    runner: Runner, order: Order, items: Sequence[Item], partial: Partial, log: Callable
) -> dict[str, Any]:
    """The result of one task: setting, averages and all records in the order of the items."""
    task, setting = order
    asked = [_ask(runner, setting, task.query(item, setting)) for item in items]
    num_cut = sum(one.cut > 0 for one in asked)
    if num_cut:
        log(
            f"{task.name}: {num_cut} of {len(items)} prompts are longer than the context of "
            f"{runner.model.max_positions} tokens allows and lose their beginning"
        )
    num_groups = len({item.group for item in items})
    if num_groups < task.num_groups:
        log(f"{task.name}: {num_groups} of its {task.num_groups} parts, not comparable as a whole")
    todo = _batches(runner, items, asked)
    num_done = _check_done(task, items, asked, partial, runner)
    with (
        tqdm(total=len(items), initial=num_done, desc=task.name, unit="item") as bar,
        ThreadPoolExecutor(max(1, task.workers)) as pool,
    ):
        for batch in todo:
            missing = [row for row in batch.rows if (task.name, items[row].id) not in partial.done]
            if not missing:
                continue
            chosen = [items[row] for row in batch.rows]
            answers = _answer(runner, order, chosen, [asked[row] for row in batch.rows], batch)
            verdicts = pool.map(
                lambda pair: task.score(pair[0], pair[1], setting, runner.tokenizer),
                zip(chosen, answers),
            )
            for row, item, texts, verdict in zip(batch.rows, chosen, answers, verdicts):
                if row in missing:
                    partial.add(task.name, _record(runner, item, asked[row], texts, verdict))
                    bar.update()
    records = [partial.done[task.name, item.id] for item in items]
    return _result(order, items, records)


def _result(order: Order, items: Sequence[Item], records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "mode": order.setting.mode,
        "shots": order.setting.shots,
        "count": len(records),
        "parts": [len({item.group for item in items}), order.task.num_groups],
        "metrics": [score._asdict() for score in summarise(records, order.task.metrics)],
        "examples": records,
    }


def _check_done(task: Task, items, asked, partial: Partial, runner: Runner) -> int:
    """How many records are there already; they must be of the same prompts."""
    count = 0
    for item, one in zip(items, asked):
        if (task.name, item.id) not in partial.done:
            continue
        record = partial.done[task.name, item.id]
        if "prompt" in record and record["prompt"] != runner.tokenizer.decode(one.tokens):
            raise ValueError(
                f"{partial.path}: {task.name} {item.id} has another prompt: the data have changed; "
                "name another --out or remove the file"
            )
        count += 1
    return count


def _ask(runner: Runner, setting: Setting, query: Query) -> _Asked:
    """The ids of a query, cut at the left where they do not fit."""
    tokenizer, room = runner.tokenizer, runner.model.max_positions
    if isinstance(query, Predict):
        return _Asked(query, tokenizer.encode(query.text), 0)
    if isinstance(query, Write):
        room -= new_tokens(runner, query)
    else:
        longest = max(len(tokenizer.encode(choice)) for choice in query.choices)
        room -= longest
    tokens = render(tokenizer, setting, query)
    if isinstance(query, Choose) and query.max_tokens and len(tokens) > query.max_tokens:
        # As the released script does: one token fewer than what is too many.
        room = min(room, query.max_tokens - 1)
    cut = max(0, len(tokens) - room)
    return _Asked(query, tokens[cut:], cut)


def render(tokenizer: Any, setting: Setting, query: Choose | Write) -> list[int]:
    """The prompt as ids: raw text, or a conversation that waits for its next answer."""
    begun = query.begun if isinstance(query, Write) else ""
    if setting.mode != CHAT:
        return tokenizer.encode(query.prompt + begun) or [tokenizer.end_of_text]
    opened = chatml.render_context(
        tokenizer, chatml.DEFAULT_SYSTEM, query.history, query.prompt, _NO_WINDOW
    )
    return opened + tokenizer.encode(begun)


def new_tokens(runner: Runner, query: Write) -> int:
    """Tokens of the longest answer; prompt and answer share the context at least by halves."""
    return min(query.max_new_tokens, max(1, runner.model.max_positions // 2))


def _batches(runner: Runner, items: Sequence[Item], asked: Sequence[_Asked]) -> list[Batch]:
    if not items:
        return []
    new = max(
        (new_tokens(runner, one.query) for one in asked if isinstance(one.query, Write)), default=0
    )
    # An empty text has nothing to score, but its batch must have a length.
    prompts = [one.tokens or [0] for one in asked]
    groups = [item.group for item in items]
    if isinstance(asked[0].query, Predict):  # every window begins a row of its own
        groups = [str(number) for number in range(len(items))]
    return runner.plan(prompts, groups, new)


def _answer(
    runner: Runner, order: Order, items: Sequence[Item], asked: Sequence[_Asked], batch: Batch
) -> list[list[Answer]]:
    """The answers to each item of one batch: several where the task asks several times."""
    kind = asked[0].query
    if isinstance(kind, Choose):
        return [[answer] for answer in _choose(runner, asked, batch.shared)]
    if isinstance(kind, Predict):
        return [[answer] for answer in _predict(runner, asked)]
    answers: list[list[Answer]] = [[] for _ in items]
    waiting = dict(enumerate(asked))
    while waiting:
        written = _write(runner, order.setting, list(waiting.values()), batch.shared)
        for place, answer in zip(list(waiting), written):
            answers[place].append(answer)
            query = None
            if order.task.follow is not None:
                query = order.task.follow(items[place], answers[place], order.setting)
            del waiting[place]
            if query is not None:
                waiting[place] = _ask(runner, order.setting, query)
    return answers


def _write(runner: Runner, setting: Setting, asked: Sequence[_Asked], shared: int) -> list[Answer]:
    prompts = [one.tokens for one in asked]
    if any(prompt[:shared] != prompts[0][:shared] for prompt in prompts):
        shared = 0  # a later question was cut at the left
    shared = min(shared, min(map(len, prompts)) - 1)
    tokenizer, query = runner.tokenizer, asked[0].query
    chat = setting.mode == CHAT
    stop_ids = chatml.stop_ids(tokenizer) if chat else (tokenizer.end_of_text,)
    length = max(new_tokens(runner, one.query) for one in asked)
    written = runner.write(prompts, stop_ids, query.stops, length, shared)
    return [
        Answer(one.text, (), len(one.tokens), one.finish, question.query.begun)
        for one, question in zip(written, asked)
    ]


def _choose(runner: Runner, asked: Sequence[_Asked], shared: int) -> list[Answer]:
    """Letters by the next token where each is one token, else by the sum over their tokens."""
    choices = asked[0].query.choices
    ids = [runner.tokenizer.encode(choice) for choice in choices]
    prompts = [one.tokens for one in asked]
    if all(len(choice) == 1 for choice in ids):
        table = runner.next_log_probs(prompts, [choice[0] for choice in ids], shared).tolist()
    else:
        pairs = [(prompt, choice) for prompt in prompts for choice in ids]
        sums = [value for value, _ in _log_likelihoods(runner, pairs, shared)]
        table = [sums[i : i + len(ids)] for i in range(0, len(sums), len(ids))]
    return [Answer(choices[row.index(max(row))], tuple(row), 1) for row in table]


def _predict(runner: Runner, asked: Sequence[_Asked]) -> list[Answer]:
    """The likelihood of whole texts, in windows of the model's context."""
    first, longest = runner.tokenizer.end_of_text, runner.model.max_positions
    windows = [list(rolling_windows(one.tokens, first, longest)) for one in asked]
    values = iter(_log_likelihoods(runner, [pair for pairs in windows for pair in pairs], 0))
    answers = []
    for one, pairs in zip(asked, windows):
        total = sum(next(values)[0] for _ in pairs)
        answers.append(Answer("", (total,), len(one.tokens)))
    return answers


def _log_likelihoods(runner: Runner, pairs, shared: int) -> list[tuple[float, bool]]:
    values = []
    for start in range(0, len(pairs), runner.batch_size):
        values += runner.log_likelihoods(pairs[start : start + runner.batch_size], shared)
    return values


def _record(
    runner: Runner, item: Item, asked: _Asked, answers: Sequence[Answer], verdict: dict[str, Any]
) -> dict[str, Any]:
    """What the result file says of one item."""
    record: dict[str, Any] = {"id": item.id, "group": item.group}
    if not isinstance(asked.query, Predict):
        record["prompt"] = runner.tokenizer.decode(asked.tokens)
    if asked.cut:
        record["tokens_cut"] = asked.cut
    if isinstance(asked.query, Write):
        record["answers"] = [answer.text for answer in answers]
        record["num_tokens"] = [answer.num_tokens for answer in answers]
        record["finish"] = [answer.finish for answer in answers]
    if isinstance(asked.query, Choose):
        record["log_probs"] = [round(value, NUM_DIGITS) for value in answers[0].log_probs]
    return record | verdict


def read_results(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
      ValueError: it is none.
    """
    with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
        results = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(results, dict) and results.keys() >= {"format", "settings", "tasks"}:
            return results
    raise ValueError(f"{path}: no result file of `python -m qwen_jax.evaluate`")
