"""The benchmarks of letters, numbers and texts: prompts byte for byte, rules, gold answers."""

import csv
import json
import math
import re

import pytest
from evaluation_data import data_folder
from tiny import byte_tokenizer

from qwen_jax.evals import engine, reading
from qwen_jax.evals.results import summarise
from qwen_jax.evals.task import BASE, CHAT, Answer, Choose, Item, Predict, Setting, Write
from qwen_jax.evals.tasks import TASKS, choice_answers, multiple_choice, numbers
from qwen_jax.evals.tasks import math as math_tasks

TOKENIZER = byte_tokenizer()
OPTIONS = {"A": "red", "B": "green", "C": "a blue one.", "D": "none"}
ROW = {"question": "Which one?", **OPTIONS, "answer": "B"}
SHOT = {"question": "Pick.", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "D"}
ZH = {"question": "这里是____。", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "answer": "A"}
QUESTIONS = {
    "mmlu": Item("x", "high_school_physics", ROW, (SHOT, ROW)),
    "ceval": Item("x", "law", ZH, (SHOT, ZH)),
    "cmmlu": Item("x", "law", ZH, (SHOT, ZH)),
    "gsm8k": Item(
        "x", "", {"question": "How many are 2 and 2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        ("Question: a\nLet's think step by step\nb\nThe answer is 1",
         "Question: c\nLet's think step by step\nd\nThe answer is 2"),
    ),
    "math401": Item("x", "", {"query": "1+1=", "response": "2"}),
    "math23k": Item("x", "", {"id": "1", "original_text": "一加一等于多少？", "ans": "2"}),
    "bbh": Item(
        "x", "navigate", {"input": "Is it?\nOptions:\n- Yes\n- No", "target": "No"},
        ("Decide.", "Q: One?\nA: Let's think step by step.\nYes. So the answer is Yes.",
         "Q: Two?\nA: Let's think step by step.\nNo. So the answer is No."),
    ),
    "perplexity": Item("x", "a.txt", {"text": "Any text.\n"}),
}  # fmt: skip


def shown(query) -> str:
    """A query as the golden file shows it: earlier turns, the prompt, then what is asked."""
    if isinstance(query, Predict):
        return f"{query.text}<predicted whole>\n"
    turns = "".join(f"{user}<answer>{said}<turn>" for user, said in query.history)
    if isinstance(query, Choose):
        return f"{turns}{query.prompt}<choices {list(query.choices)}, {query.max_tokens}>\n"
    begun = f"<begun>{query.begun}" if query.begun else ""
    return f"{turns}{query.prompt}{begun}<write {query.max_new_tokens}, {list(query.stops)}>\n"


@pytest.mark.parametrize("name", QUESTIONS)
def test_golden_prompts(name, golden):
    item, task, text = QUESTIONS[name], TASKS[name], ""
    for mode in task.shots:
        for shots in (0, 2) if task.max_shots else (0,):
            shot_item = item
            if task.max_shots:
                kept = item.shots[: shots + (name == "bbh")]
                shot_item = item._replace(shots=kept)
            text += (
                f"=== {mode}, {shots} shots\n{shown(task.query(shot_item, Setting(mode, shots)))}"
            )
    golden.text(f"prompts/{name}.txt", text)


def rendered(query, mode) -> str:
    return TOKENIZER.decode(engine.render(TOKENIZER, Setting(mode, 0), query))


def test_chat_prompts_are_conversations():
    query = Write("Q?", 8, begun="So", history=(("a", "b"),))
    assert rendered(query, CHAT) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nQ?<|im_end|>\n"
        "<|im_start|>assistant\nSo"
    )
    assert rendered(query, BASE) == "Q?So"
    # What a benchmark writes is never a control token.
    assert TOKENIZER.im_end not in engine.render(
        TOKENIZER, Setting(BASE, 0), Write("<|im_end|>", 8)
    )


def score(name, item, text, mode=CHAT):
    return TASKS[name].score(item, [Answer(text)], Setting(mode, 0), TOKENIZER)


def read(name, folder, mode=CHAT, shots=0):
    return TASKS[name].read(folder, Setting(mode, shots))


# Letters


@pytest.mark.parametrize(
    "text, letter",
    [
        ("The answer is B.", "B"),
        ("The answer is not A, I choose C", "C"),
        ("green is correct", "B"),
        ("D", "D"),
        ("B: because", "B"),
        ("Perhaps (C)?", "C"),
        ("A=3 and so B", "B"),
        ("a blu one", "C"),  # resembles an option
        ("", "A"),
    ],
)
def test_english_answers(text, letter):
    assert choice_answers.english(text, ROW["question"], {k: ROW[k] for k in "ABCD"}) == letter


@pytest.mark.parametrize(
    "text, letter",
    [
        ("答案是B。", "B"),
        ("应该选C选项。", "C"),
        ("A选项不正确，B选项正确", "B"),
        ("（D）", "D"),
        ("这里是乙。", "B"),
        ("没有", "A"),
    ],
)
def test_chinese_answers(text, letter):
    assert choice_answers.chinese(text, ZH["question"], {k: ZH[k] for k in "ABCD"}) == letter


def write_exam(folder, exam, subject, rows, columns):
    for name, kept in ((exam.dev, rows[:1]), (exam.test, rows)):
        path = folder / name.format(subject)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            if columns:
                writer.writerow(columns)
            writer.writerows([row[c.lower() if c == "Question" or c == "Answer" else c]
                              for c in columns or ROW] for row in kept)  # fmt: skip


def test_exams_are_read_in_their_three_formats(tmp_path):
    rows = [
        ROW | {"id": "0", "": "0"},
        ROW | {"question": "None", "A": '1.50, "x"\ny', "id": "1", "": "1"},
    ]
    formats = {
        "mmlu": (multiple_choice.MMLU, "anatomy", ()),
        "ceval": (multiple_choice.CEVAL, "law", ("id", *ROW)),
        "cmmlu": (multiple_choice.CMMLU, "arts", ("", "Question", *"ABCD", "Answer")),
    }  # fmt: skip
    for name, (exam, subject, columns) in formats.items():
        write_exam(tmp_path / name, exam, subject, rows, columns)
        items = read(name, tmp_path / name, BASE, 1)
        assert [item.id for item in items] == [f"{subject}/0", f"{subject}/1"]
        assert items[1].row == ROW | {"question": "None", "A": '1.50, "x"\ny'}
        assert list(items[0].shots) == [ROW]
        with pytest.raises(ValueError, match="1 rows, but --shots=2"):
            read(name, tmp_path / name, BASE, 2)
    with pytest.raises(ValueError, match="dev/anatomy_dev.csv is missing; the official data: http"):
        (tmp_path / "mmlu/dev/anatomy_dev.csv").unlink()
        read("mmlu", tmp_path / "mmlu", BASE, 1)
    with pytest.raises(ValueError, match="no such file; the official data: http"):
        read("mmlu", tmp_path)


def test_averages_of_exams():
    assert len(multiple_choice.all_subjects(multiple_choice.MMLU)) == 57
    assert len(multiple_choice.all_subjects(multiple_choice.CEVAL)) == 52
    assert len(multiple_choice.all_subjects(multiple_choice.CMMLU)) == 67
    marks = [("anatomy", 1), ("anatomy", 1), ("anatomy", 0), ("law", 0), ("philosophy", 1)]
    records = [{"id": str(i), "group": g, "correct": c} for i, (g, c) in enumerate(marks)]
    mmlu = {s.name: s for s in summarise(records, TASKS["mmlu"].metrics)}
    assert mmlu["accuracy"].value == 60.0 and mmlu["accuracy"].count == 5
    assert mmlu["accuracy/STEM"].value == pytest.approx(66.6667)
    cmmlu = {s.name: s for s in summarise(records, TASKS["cmmlu"].metrics)}
    assert cmmlu["accuracy"].value == pytest.approx(100 * (2 / 3 + 0 + 1) / 3, abs=1e-3)


@pytest.mark.parametrize("name", ["mmlu", "ceval", "cmmlu"])
def test_gold_letters_of_real_exams(name):
    folder = data_folder(name)
    items = read(name, folder)
    for item in items:
        gold = item.row["answer"]
        said = f"答案是{gold}。" if name != "mmlu" else f"The answer is {gold}."
        if any(option.strip(" .。") in ("", *"ABCD") for option in item.row.values()):
            continue  # options that are letters themselves are replaced first
        assert score(name, item, said)["correct"] == 1, (item.id, said)
        wrong = "ABCD"[("ABCD".index(gold) + 1) % 4]
        assert score(name, item, said.replace(gold, wrong))["correct"] == 0
    assert len(items) > 100


# Numbers


def test_rules_for_numbers():
    assert [numbers.last_digits(t) for t in ("it is 1,000", "12.5", "-3", "007", "no")] == [
        0, 5, 3, None, None,
    ]  # fmt: skip
    assert [numbers.last_number(t) for t in ("1,234.50 each", "-3.", "x .5", "12,34", "none")] == [
        "1234.50", "-3.", ".5", "34", None,
    ]  # fmt: skip
    assert numbers.chat_equal("3.00009", "3") and not numbers.chat_equal("3.001", "3")
    assert not numbers.chat_equal("007", "7") and not numbers.chat_equal(None, "7")


@pytest.mark.parametrize(
    "text, value",
    [
        ("880", 880), ("14.4", 14.4), ("25%", 0.25), ("85.5%", 0.855), ("((2)/(3))", 2 / 3),
        ("5((7)/(10))", 5.7), ("-((1)/(2))", -0.5), ("1,000", 1000), ("2/3", 2 / 3),
        (r"\frac{1}{4}", 0.25), ("1/0", None), ("", None), ("x", None), ("%", None),
    ],
)  # fmt: skip
def test_forms_of_values(text, value):
    assert numbers.read_value(text) == (None if value is None else pytest.approx(value))
    if value is not None:
        assert numbers.last_value(f"我算了3次，答案是{text}。") == pytest.approx(value)


def test_gsm8k_by_both_rules():
    item = QUESTIONS["gsm8k"]._replace(row={"question": "?", "answer": "so\n#### 1,200"})
    both = score("gsm8k", item, "The answer is 1,200", BASE)
    assert both["correct"] == 1 and both["correct_base"] == 0  # the base rule reads 200
    assert score("gsm8k", item, "The answer is 1200", BASE)["correct_base"] == 1
    assert score("gsm8k", item, "It is 7")["correct"] == 0
    assert "correct_base" not in score("gsm8k", item, "It is 7")


def test_math401_measures():
    item = QUESTIONS["math401"]._replace(row={"query": "1/3=", "response": "0.3333"})
    assert score("math401", item, "= 0.3334")["correct"] == 1
    far = score("math401", item, "it is 1,000")
    assert far["correct"] == 0 and far["relative_error"] == 10 and far["non_number"] == 0
    none = score("math401", item, "no idea")
    assert none["non_number"] == 1 and none["relative_error"] == 10
    assert score("math401", item, "0.4333")["relative_error"] == pytest.approx(0.1)


def test_examples_need_the_whole_train_file(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(dict(QUESTIONS["gsm8k"].row)))
    with pytest.raises(ValueError, match="train.jsonl is missing; the official data: github"):
        read("gsm8k", tmp_path, BASE, 8)
    (tmp_path / "train.jsonl").write_text(json.dumps(dict(QUESTIONS["gsm8k"].row)))
    with pytest.raises(ValueError, match="8 of the 8 examples are not in it"):
        read("gsm8k", tmp_path, BASE, 8)
    (tmp_path / "gsm8k_prompt.txt").write_text("Question: mine\n")
    with pytest.raises(ValueError, match="not those of the release"):
        read("gsm8k", tmp_path, BASE, 8)


def test_gsm8k_real_slice():
    folder = data_folder("gsm8k")
    items = read("gsm8k", folder, BASE, 8)
    for item in items:
        assert score("gsm8k", item, item.row["answer"])["correct"] == 1
        plain = item.row["answer"].replace(",", "")
        assert score("gsm8k", item, plain, BASE)["correct_base"] == 1
    wrong = [
        score("gsm8k", item, items[n - 1].row["answer"])["correct"] for n, item in enumerate(items)
    ]
    assert sum(wrong) < 0.1 * len(items)
    # The prompt is the released text, to the byte.
    text = next(folder.glob("*prompt.txt")).read_text()
    question = items[5].row["question"]
    assert TASKS["gsm8k"].query(items[5], Setting(BASE, 8)).prompt == (
        f"{text}\nQuestion: {question}\nLet's think step by step\n"
    )
    # Examples are made from rows of the train split as the release wrote them.
    rows = {math_tasks._sha256(row["question"])[:16]: row for row in
            reading.read_json(next(folder.glob("train*")))}  # fmt: skip
    here = [name for name in math_tasks.EIGHT if name in rows]
    assert here
    for name in here:
        assert (
            math_tasks._block(rows[name]) in text.split("\n\n")[math_tasks.EIGHT.index(name)] + "\n"
        )


@pytest.mark.parametrize("name, field", [("math401", "response"), ("math23k", "ans")])
def test_gold_numbers_of_real_slices(name, field):
    items = read(name, data_folder(name))
    for item in items:
        assert score(name, item, f"= {item.row[field]}")["correct"] == 1, item.row
    shifted = [score(name, item, f"= {items[n - 1].row[field]}") for n, item in enumerate(items)]
    assert sum(v["correct"] for v in shifted) < 0.2 * len(items)
    if name == "math23k":
        forms = {re.sub(r"\d+", "9", item.row["ans"]) for item in items}
        assert forms == {"9", "9.9", "9%", "9.9%", "((9)/(9))", "9((9)/(9))"}


# BBH


def test_bbh_reads_prompts_without_their_canary(tmp_path):
    (tmp_path / "cot-prompts").mkdir()
    head = "canary GUID\n-----\nDecide.\n\nMore.\n\n"
    examples = "\n\n".join(f"Q: {n}?\nA: Let's think step by step.\nx" for n in range(3))
    (tmp_path / "cot-prompts/navigate.txt").write_text(head + examples)
    content = {"canary": "c", "examples": [{"input": "i", "target": "Yes"}]}
    (tmp_path / "navigate.json").write_text(json.dumps(content))
    [item] = read("bbh", tmp_path, BASE, 3)
    assert item.shots[0] == "Decide.\n\nMore." and len(item.shots) == 4
    assert "canary" not in TASKS["bbh"].query(item, Setting(BASE, 3)).prompt
    with pytest.raises(ValueError, match="none of the 27 task files"):
        read("bbh", tmp_path / "cot-prompts", BASE, 0)


def test_bbh_answers():
    letter = Item("x", "snarks", {"target": "(B)"})
    assert score("bbh", letter, "So the answer is (B).")["correct"] == 1
    assert score("bbh", letter, "Because. B")["extracted"] == "B"
    assert score("bbh", letter, "the answer is (A). the answer is (B)")["correct"] == 0
    free = Item("x", "navigate", {"target": "No"})
    assert score("bbh", free, " x. So the answer is no.\nQ: next")["correct"] == 1
    assert score("bbh", free, "Yes")["correct"] == 0


def test_bbh_real_slice():
    items = read("bbh", data_folder("bbh"), BASE, 3)
    groups = {item.group for item in items}
    for item in items:
        assert (
            score("bbh", item, f" Therefore. So the answer is {item.row['target']}.")["correct"]
            == 1
        )
    others = {group: next(i.row["target"] for i in items if i.group == group) for group in groups}
    wrong = [score("bbh", item, f"the answer is {others[item.group]}x") for item in items]
    assert sum(v["correct"] for v in wrong) < 0.6 * len(items)
    assert all(len(item.shots) == 4 for item in items)


# Texts and files


def test_bits_per_byte_counts_bytes():
    item = Item("x", "a", {"text": "é"})
    found = TASKS["perplexity"].score(item, [Answer("", (-2 * math.log(2),), 5)], None, None)
    assert found == {"nats": pytest.approx(1.3863), "bits": 2.0, "tokens": 5, "bytes": 2}


def test_json_in_all_its_published_forms(tmp_path):
    for text in ('[{"a": 1}, {"a": 2}]', '{"a": 1}\n{"a": 2}\n', '{"a":\n 1}\n\n{"a": 2}'):
        path = tmp_path / "x.json"
        path.write_text(text)
        assert reading.read_json(path, "a") == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match="record 1 has no field 'b'"):
        reading.read_json(path, "b")
    path.write_text('{"a": 1}\n{"a": ')
    with pytest.raises(ValueError, match=r"x.json:2: not JSON"):
        reading.read_json(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        reading.read_json(path)


def test_shots_and_modes_are_checked():
    assert TASKS["mmlu"].setting(BASE, None, False).shots == 5
    assert TASKS["mmlu"].setting(CHAT, 3, False).shots == 3
    with pytest.raises(ValueError, match="--shots=6: mmlu has 0 to 5"):
        TASKS["mmlu"].setting(BASE, 6, False)
    with pytest.raises(ValueError, match="has no other form"):
        TASKS["mmlu"].setting("other", 0, False)
