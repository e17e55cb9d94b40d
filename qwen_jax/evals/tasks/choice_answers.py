"""The letter that a chat model chose, read out of its answer as the released scripts do it.

First the text of each option is replaced by its letter, the longest option first. Then the first
rule that finds something decides: a phrase such as "the answer is X", "X is correct", X at the very
beginning, the first letter that stands alone; at last the option that resembles the answer most.
"""

import re
from collections.abc import Mapping

from thefuzz import process

_LETTER = "(A|B|C|D)"


def _gap(longest: int) -> str:
    """Up to so many characters that are no letter of an option, as few as possible."""
    return f"[^ABCD]{{0,{longest}}}?"


def _english_rules() -> tuple[re.Pattern, ...]:
    denied = "(?:n't|not)"
    stated = rf"(?:[Aa]nswer|[Cc]hoice)(?!{_gap(20)}{denied}){_gap(10)}\b(?:|is|:|be)\b"
    right = "(?:correct|right)"
    return tuple(
        map(
            re.compile,
            (
                rf"(?:[Cc]hoose|{stated}){_gap(20)}\b{_LETTER}\b",
                rf"\b{_LETTER}\b(?!{_gap(8)}{denied}{_gap(5)}{right}){_gap(10)}\b{right}\b",
                rf"^{_LETTER}(?:\.|,|:|$)",
                _ALONE,
            ),
        )
    )


def _chinese_rules() -> tuple[re.Pattern, ...]:
    denied = "(?:不|非)"
    copula = "(?:是|选|为|：|:|】)"
    chosen = r"(?:选|选择|选定)[：:]?\s*"
    stated = rf"(?:答案|选项)(?!{_gap(10)}{denied}{_gap(10)}{copula}){_gap(10)}{copula}"
    after = r"(?:\)|。|\.|，|,|．|、|A|B|C|D|$|：|:|）)"
    right = "(?:正确|对[的，。：]|符合)"
    return tuple(
        map(
            re.compile,
            (
                rf"(?:{chosen}|{stated}{_gap(10)}){_LETTER}(?:选项)?{after}",
                rf"{_LETTER}(?:选?项)?(?!{_gap(4)}{denied}{_gap(4)}{right}){_gap(4)}{right}",
                rf"^[\(（]?{_LETTER}(?:。|\)|）|\.|，|,|．|：|:|$)",
                _ALONE,
            ),
        )
    )


_ALONE = rf"(?<![a-zA-Z]){_LETTER}(?![a-zA-Z=])"
_ENGLISH, _CHINESE = _english_rules(), _chinese_rules()


def english(answer: str, question: str, options: Mapping[str, str]) -> str:
    """The letter in an answer to MMLU."""
    del question
    for letter, text in _longest_first(options):
        answer = re.sub(re.escape(text.rstrip(".")), letter, answer, flags=re.IGNORECASE)
    return _first_rule(answer, _ENGLISH, options)


def chinese(answer: str, question: str, options: Mapping[str, str]) -> str:
    """The letter in an answer to C-Eval or CMMLU.

    An answer that repeats the question's last sentence, with the option where its blank is, is
    first shortened: what stands before the blank says "the answer is", what follows is dropped.
    """
    parts = question.rstrip("。").split("。")[-1].split("_")
    if len(parts[0].strip()) > 4:
        answer = answer.replace(parts[0], "答案是")
    if len(parts[-1].strip()) > 4:
        answer = answer.replace(parts[-1], "")
    for letter, text in _longest_first(options):
        answer = answer.replace(text.rstrip("。"), letter)
    return _first_rule(answer, _CHINESE, options)


def _longest_first(options: Mapping[str, str]) -> list[tuple[str, str]]:
    return sorted(options.items(), key=lambda pair: len(pair[1]), reverse=True)


def _first_rule(answer: str, rules: tuple[re.Pattern, ...], options: Mapping[str, str]) -> str:
    for rule in rules:
        found = rule.search(answer)
        if found:
            return found.group(1)
    texts = list(options.values())
    # An answer without a word resembles nothing: the first option, as in the released scripts.
    found = process.extractOne(answer, texts)
    return list(options)[texts.index(found[0]) if found else 0]
