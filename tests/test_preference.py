"""Blind sheets, votes, majority, shares and Elo; and the page in a real browser."""

import csv
import html
import json
import math
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from qwen_jax import preference as command
from qwen_jax.evals import annotation, preference
from qwen_jax.evals.annotation import Comparison, Vote

CATEGORIES = ("knowledge", "math", "coding")
EVIL = '</script><script>document.title="stolen"</script><img src=x onerror="document.title=1">'


def write_results(folder: Path, num_prompts: int = 12) -> list[str]:
    """Two models; what a model says tells which it is, for the tests alone."""
    arguments = []
    for model in ("ours", "rival"):
        rows = [
            {
                "prompt": f'问题 {i}: what, "then"?\n{EVIL if i == 3 else ""}',
                "category": CATEGORIES[i % 3],
                "response": f"{model}-says {i}\n    indented {EVIL if i == 4 else ''}",
            }
            for i in range(num_prompts)
        ]
        path = folder / f"{model}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments.append(f"{model}={path}")
    return arguments


def make_sheets(folder: Path, *more: str) -> Path:
    results = ",".join(write_results(folder))
    out = folder / "sheets"
    arguments = [f"--results={results}", "--baseline=rival", f"--out={out}", *more]
    assert command.main(["preference", "sheets", *arguments]) == 0
    return out


def sheet_rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def fill(path: Path, choose) -> None:
    """Fills a sheet; choose: row -> choice."""
    rows = sheet_rows(path)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row | {"choice": choose(row)} for row in rows)


def test_sheets_are_blind_and_shuffled(tmp_path):
    out = make_sheets(tmp_path, "--annotators=ann,bo")
    rows = sheet_rows(out / "ann.csv")
    other = sheet_rows(out / "bo.csv")
    assert sorted(row["comparison"] for row in rows) == sorted(row["comparison"] for row in other)
    assert [row["comparison"] for row in rows] != [row["comparison"] for row in other]
    first = Counter(row["response_1"].split("-")[0] for row in rows)
    assert first == {"ours": 6, "rival": 6}
    for path in (out / "ann.csv", out / "ann.html"):
        text = path.read_text(encoding="utf-8-sig")
        for model in ("ours", "rival"):
            assert model not in text.replace(f"{model}-says", "")
    assert not any(row["choice"] for row in rows)
    # The same seed gives the same sheets, another one other sheets.
    before = (out / "ann.csv").read_bytes()
    make_sheets(tmp_path, "--annotators=ann,bo")
    assert (out / "ann.csv").read_bytes() == before
    make_sheets(tmp_path, "--annotators=ann,bo", "--seed=1")
    assert (out / "ann.csv").read_bytes() != before


def test_votes_go_back_to_the_right_model(tmp_path, capsys):
    """Everybody prefers `ours` in math and `rival` in coding, on whichever side it stands."""
    out = make_sheets(tmp_path, "--annotators=ann,bo,cy")

    def choose(row):
        liked = {"math": "ours", "coding": "rival"}.get(row["category"])
        if liked is None:
            return "tie"
        return "1" if row["response_1"].startswith(liked) else "2"

    for name in ("ann", "bo", "cy"):
        fill(out / f"{name}.csv", choose)
    arguments = [f"--sheets={out}", f"--annotations={out}/*.csv", f"--out={tmp_path}/table.json"]
    assert command.main(["preference", "table", *arguments]) == 0
    results = json.loads((tmp_path / "table.json").read_text())
    shares = {line["category"]: line["shares"] for line in results["shares"]}
    assert shares["math"] == {"win": 100.0, "tie": 0.0, "loss": 0.0}
    assert shares["coding"] == {"win": 0.0, "tie": 0.0, "loss": 100.0}
    assert shares["knowledge"] == {"win": 0.0, "tie": 100.0, "loss": 0.0}
    assert shares["all"] == pytest.approx({name: 100 / 3 for name in preference.OUTCOMES})
    assert results["judged_by"] == "people" and results["agreement"] == 1.0
    assert results["elo"]["ours"][0] == pytest.approx(1000) and results["elo"]["rival"][0] == 1000
    printed = capsys.readouterr().out
    assert "Judged by 3 annotators (ann, bo, cy)." in printed
    assert "| ours | rival | math | 4 | 100.0 [100.0, 100.0] |" in printed


def comparisons_of(count: int, models=("a", "b"), category="x") -> list[Comparison]:
    return [
        Comparison(f"{models}{i}", category, f"prompt {i}", models, ("left", "right"))
        for i in range(count)
    ]


@pytest.mark.parametrize(
    "cast, outcome",
    [
        ([0], "win"),
        ([0, 0, 1], "win"),
        ([1, 1, None], "loss"),
        ([None, None, 0], "tie"),
        ([0, 1, None], "tie"),
        ([0, 1], "tie"),
        ([0, None], "tie"),
    ],
)
def test_majority_by_hand(cast, outcome):
    (item,) = comparisons_of(1)
    votes = [Vote(str(i), item.name, better) for i, better in enumerate(cast)]
    assert preference.majority([item], votes) == [(item, outcome, len(cast))]


def test_agreement_by_hand():
    votes = [Vote("a", "x", 0), Vote("b", "x", 0), Vote("c", "x", 1), Vote("a", "y", None)]
    assert preference.agreement(votes) == pytest.approx(1 / 3)
    assert preference.agreement(votes[3:]) is None


def verdicts_of(wins: int, ties: int, losses: int, models=("a", "b")):
    outcomes = ["win"] * wins + ["tie"] * ties + ["loss"] * losses
    items = comparisons_of(len(outcomes), models)
    return [preference.Verdict(*pair, 1) for pair in zip(items, outcomes)]


def test_intervals_cover_and_shrink():
    small, large = (preference.table(verdicts_of(5 * k, 3 * k, 2 * k))[0] for k in (4, 400))
    assert small.shares == large.shares == {"win": 50.0, "tie": 30.0, "loss": 20.0}
    for line, count in ((small, 40), (large, 4000)):
        low, high = line.intervals["win"]
        # The normal approximation of a share of one half.
        assert (high - low) / 2 == pytest.approx(196 * math.sqrt(0.25 / count), rel=0.15)
        assert low < 50 < high


def test_elo_of_two_models_in_closed_form():
    """Score s of n games, and one tie more: 400 log10 of the odds."""
    ratings = preference.elo(verdicts_of(60, 20, 20), "b")
    points, games = 60 + 10 + 0.5, 101
    assert ratings["a"][0] - 1000 == pytest.approx(400 * math.log10(points / (games - points)))
    assert ratings["b"] == (1000, 1000, 1000)
    assert ratings["a"][1] < ratings["a"][0] < ratings["a"][2]
    always = preference.elo(verdicts_of(50, 0, 0), "b")["a"][0]
    assert always - 1000 == pytest.approx(400 * math.log10(50.5 / 0.5))


def test_elo_orders_models_that_never_met():
    verdicts = verdicts_of(30, 0, 10, ("a", "b")) + verdicts_of(30, 0, 10, ("b", "c"))
    ratings = {name: value[0] for name, value in preference.elo(verdicts, "b").items()}
    assert ratings["a"] - 1000 == pytest.approx(1000 - ratings["c"])
    assert ratings["a"] > 1150


def test_a_reward_model_is_marked_as_judge(tmp_path, capsys):
    out = make_sheets(tmp_path)
    lines = []
    for line in (out / "score_data.jsonl").read_text().splitlines():
        row = json.loads(line)
        likes = 1.0 if "what" in row["prompt"] else 0.0
        scores = [likes if text.startswith("ours") else 0.5 for text in row["responses"]]
        lines.append(json.dumps(row | {"scores": scores}))
    (tmp_path / "scored.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["preference", "table", f"--sheets={out}", f"--scores={tmp_path}/scored.jsonl"]
    assert command.main([*arguments, f"--out={tmp_path}/table.json"]) == 0
    results = json.loads((tmp_path / "table.json").read_text())
    assert results["judged_by"] == "reward model"
    assert results["shares"][0]["shares"]["win"] == 100.0
    assert "Judged by a REWARD MODEL, not by people" in capsys.readouterr().out
    assert command.main([*arguments, "--margin=0.6", f"--out={tmp_path}/table.json"]) == 0
    results = json.loads((tmp_path / "table.json").read_text())
    assert results["shares"][0]["shares"]["tie"] == 100.0


def test_spreadsheets_do_not_compute_answers(tmp_path):
    items = [Comparison("c", "x", "=1+1", ("a", "b"), ("@SUM(A1)", "plain"))]
    annotation.write_sheets(items, ["ann"], 0, tmp_path)
    (row,) = sheet_rows(tmp_path / "ann.csv")
    assert row["prompt"] == "'=1+1"
    assert {row["response_1"], row["response_2"]} == {"'@SUM(A1)", "plain"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sheets"], "--results is missing"),
        (["nothing"], "usage"),
        (["sheets", "--results=a=FOLDER/ours.jsonl", "--out=FOLDER/x"], "two models"),
        (["sheets", "--results=RESULTS", "--baseline=c", "--out=FOLDER/x"], "'ours', 'rival'"),
        (["sheets", "--results=RESULTS", "--response_field=text", "--out=FOLDER/x"], "'text'"),
        (["sheets", "--results=RESULTS,c=FOLDER/short.jsonl", "--out=FOLDER/x"], "11 are in one"),
        (["sheets", "--results=RESULTS", "--annotators=a/b", "--out=FOLDER/x"], "'a/b'"),
        (["table", "--sheets=FOLDER"], "key.json is missing"),
        (["table", "--sheets=FOLDER/sheets"], "one of them"),
        (["table", "--sheets=FOLDER/sheets", "--annotations=FOLDER/bad.csv"], "choice 'left'"),
        (["table", "--sheets=FOLDER/sheets", "--annotations=FOLDER/other.csv"], "'somebody'"),
        (["table", "--sheets=FOLDER/sheets", "--annotations=FOLDER/sheets/*.csv"], "no vote"),
        (["table", "--sheets=FOLDER/sheets", "--scores=FOLDER/part.jsonl"], "no score of"),
    ],
)
def test_mistakes_are_named(arguments, message, tmp_path, capsys):
    out = make_sheets(tmp_path)
    results = ",".join(write_results(tmp_path))
    (tmp_path / "short.jsonl").write_text((tmp_path / "ours.jsonl").read_text().split("\n")[0])
    rows = sheet_rows(out / "annotator.csv")
    head = "annotator,comparison,choice\n"
    (tmp_path / "bad.csv").write_text(f"{head}annotator,{rows[0]['comparison']},left\n")
    (tmp_path / "other.csv").write_text(f"{head}somebody,{rows[0]['comparison']},1\n")
    (tmp_path / "part.jsonl").write_text('{"prompt": "p", "responses": ["r"], "scores": [1]}\n')
    arguments = [
        text.replace("FOLDER", str(tmp_path)).replace("RESULTS", results) for text in arguments
    ]
    assert command.main(["preference", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium that keeps what it downloads in tmp_path/downloads."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed (apt: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1280,860",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    (tmp_path / "downloads").mkdir()
    options.add_experimental_option(
        "prefs", {"download.default_directory": str(tmp_path / "downloads")}
    )
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    with webdriver.Chrome(options=options, service=service) as opened:
        yield opened


def downloaded(tmp_path: Path, name: str) -> Path:
    path = tmp_path / "downloads" / name
    deadline = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return path


def test_the_page_in_a_browser(browser, tmp_path, capsys):
    """A person fills the page with keys and clicks, comes back later, exports; then the table."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    out = make_sheets(tmp_path, "--annotators=ann,bo")

    def text_of(name: str) -> str:
        return browser.find_element(By.ID, name).get_property("textContent")

    def press(*keys: str) -> None:
        browser.find_element(By.TAG_NAME, "body").send_keys(*keys)

    browser.get((out / "ann.html").as_uri())
    expected = sheet_rows(out / "ann.csv")
    for row in expected:  # everything is shown as it is, in the order of the sheet
        assert text_of("prompt") == row["prompt"]
        assert text_of("response1") == row["response_1"]
        assert text_of("response2") == row["response_2"]
        press(Keys.ARROW_RIGHT)
    assert browser.title == "Which answer is better?"
    assert not browser.find_elements(By.TAG_NAME, "img")
    # Always the answer of `ours`; the first half with keys, then a new visit.
    browser.find_element(By.CSS_SELECTOR, "#dots button").click()
    choices = ["1" if row["response_1"].startswith("ours") else "2" for row in expected]
    for choice in choices[:6]:
        press(choice)
    assert text_of("progress") == "6 of 12 done"
    # Chrome writes the storage of a page behind its back: on a busy machine a visit within
    # milliseconds is too early, a later one must see everything.
    deadline = time.monotonic() + 10
    browser.refresh()
    while text_of("progress") != "6 of 12 done" and time.monotonic() < deadline:
        time.sleep(0.5)
        browser.refresh()
    assert text_of("progress") == "6 of 12 done"
    assert text_of("prompt") == expected[6]["prompt"]  # the first open one
    note = browser.find_element(By.ID, "note")
    note.send_keys('1, "good"')  # the 1 in a note is no choice
    assert text_of("progress") == "6 of 12 done"
    note.send_keys(Keys.ENTER)
    for choice in choices[6:11]:
        browser.find_element(By.ID, f"choose{choice}").click()
    press("0")
    assert text_of("progress") == "12 of 12 done"
    browser.find_element(By.ID, "csv").click()
    browser.find_element(By.ID, "json").click()
    exported = downloaded(tmp_path, "ann-choices.csv")
    as_json = json.loads(downloaded(tmp_path, "ann-choices.json").read_text())
    rows = sheet_rows(exported)
    assert [row["choice"] for row in rows] == [*choices[:11], "tie"]
    assert rows[6]["note"] == '1, "good"' and rows == as_json
    assert not browser.get_log("browser")
    arguments = [f"--sheets={out}", f"--annotations={exported}", f"--out={tmp_path}/table.json"]
    assert command.main(["preference", "table", *arguments]) == 0
    results = json.loads((tmp_path / "table.json").read_text())
    assert results["shares"][0]["shares"] == pytest.approx(
        {"win": 1100 / 12, "tie": 100 / 12, "loss": 0}
    )
    assert "Judged by 1 annotators (ann)." in capsys.readouterr().out


def test_the_page_loads_nothing_and_runs_one_script(tmp_path):
    page = (make_sheets(tmp_path) / "annotator.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and page.count("<script") == 2
    assert "default-src 'none'; script-src 'sha256-" in page
    assert EVIL not in page and html.escape(EVIL) not in page
