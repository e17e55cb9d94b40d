"""Numbers in answers: the rules of the released GSM8K scripts, and those of Math401 and Math23K."""

import math
import re

_DIGITS = re.compile(r"[0-9]+")
# A sign, a number whose groups of three may be set off by commas, decimals. The empty match that
# the lookahead forbids and the order of the alternatives are those of the released script: "12,34"
# yields 34, and a number with a leading zero is found whole.
_NUMBER = re.compile(
    r"[+-]?(?=[0-9]|\.[0-9])(?:0|(?:[1-9](?:\d{0,2}(?:,\d{3})*)|\d*))?(?:\.\d*)?(?=\D|$)"
)
_FRACTION = re.compile(r"(-?)(\d*)\(\((-?\d+(?:\.\d+)?)\)/\((\d+(?:\.\d+)?)\)\)")
_PLAIN_FRACTION = re.compile(r"(-?\d+)\s*/\s*(\d+)")
_LATEX_FRACTION = re.compile(r"(-?)(\d*)\s*\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_VALUE = re.compile(r"[+-]?(?:\d+(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d+)?")
_IN_TEXT = re.compile(
    r"-?\d*\(\(-?\d+(?:\.\d+)?\)/\(\d+(?:\.\d+)?\)\)"
    r"|-?\d*\s*\\[dt]?frac\{-?\d+\}\{\d+\}"
    r"|-?\d+\s*/\s*\d+"
    r"|[+-]?(?:\d+(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][+-]?\d+)?%?"
)


def last_digits(text: str) -> int | None:
    """The last run of digits; None without one, or when it has a leading zero.

    The rule of the script for base models. It loses signs, decimals and what stands before a comma.
    """
    found = _DIGITS.findall(text)
    if not found or (len(found[-1]) > 1 and found[-1].strip("0") and found[-1][0] == "0"):
        return None
    return int(found[-1])


def last_number(text: str) -> str | None:
    """The last number, commas and plus signs taken out: the rule of the script for chat models."""
    found = [match.group() for match in _NUMBER.finditer(text)]
    return found[-1].replace(",", "").replace("+", "") if found else None


def chat_equal(found: str | None, gold: str) -> bool:
    """Whether two numbers of `last_number` differ by at most 1e-4.

    A number with a leading zero is none: the script evaluates the text as Python.
    """
    values = [_python_number(text) for text in (found, gold)]
    return None not in values and math.isclose(*values, rel_tol=0, abs_tol=1e-4)


def _python_number(text: str | None) -> float | None:
    if text is None:
        return None
    digits = text.lstrip("-")
    whole = digits.split(".")[0]
    if "." not in digits and len(whole) > 1 and whole[0] == "0" and whole.strip("0"):
        return None
    return float(text)


def read_value(text: str) -> float | None:
    """One number as Math23K and Math401 write it; None when the text is none.

    Forms: `880`, `14.4`, `1,000`, `25%`, `((2)/(3))`, `5((7)/(10))` for five and seven tenths, and
    `2/3` or LaTeX's `\\frac` besides, which a model may write instead.
    """
    text = text.strip()
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    for form in (_FRACTION, _LATEX_FRACTION):
        match = form.fullmatch(text)
        if match:
            sign, whole, above, below = match.groups()
            if float(below) == 0:
                return None
            value = float(whole or 0) + float(above) / float(below)
            return (-value if sign else value) / (100 if percent else 1)
    match = _PLAIN_FRACTION.fullmatch(text)
    if match:
        above, below = map(float, match.groups())
        return above / below if below else None
    if not any(char.isdigit() for char in text) or not _VALUE.fullmatch(text):
        return None
    return float(text.replace(",", "")) / (100 if percent else 1)


def last_value(text: str) -> float | None:
    """The last number of an answer in any form that `read_value` knows."""
    found = [match.group() for match in _IN_TEXT.finditer(text)]
    values = [read_value(piece) for piece in found if any(char.isdigit() for char in piece)]
    values = [value for value in values if value is not None]
    return values[-1] if values else None
