"""Golden files: numbers and texts in `tests/golden/` that change on purpose only."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "golden"
ADVICE = (
    "If the change is meant: run `python -m pytest tests --update-golden -k golden`, look at the "
    "diff of tests/golden/ and say in the commit why it changed."
)


class Golden:
    """Compares with the stored file, or writes it when the run has `--update-golden`."""

    def __init__(self, update: bool):
        self._update = update

    def text(self, name: str, text: str) -> None:
        """The file holds exactly this text."""
        stored = self._stored(name, text)
        if stored != text:
            old, new = stored.splitlines(), text.splitlines()
            changed = [f"- {line}" for line in old if line not in new]
            changed += [f"+ {line}" for line in new if line not in old]
            pytest.fail("\n".join([f"tests/golden/{name} differs:", *changed, ADVICE]), False)

    def numbers(self, name: str, values: list[float], rel: float) -> None:
        """The file holds these numbers, one a line, to a relative tolerance."""
        stored = self._stored(name, "".join(f"{value:.6f}\n" for value in values))
        expected = [float(line) for line in stored.splitlines()]
        if values != pytest.approx(expected, rel=rel):
            rows = [f"{i:3} {a:.6f} {b:.6f}" for i, (a, b) in enumerate(zip(expected, values))]
            head = f"tests/golden/{name}: stored {len(expected)} and new {len(values)} values"
            pytest.fail("\n".join([head, *rows, ADVICE]), False)

    def _stored(self, name: str, text: str) -> str:
        path = FOLDER / name
        if self._update:
            path.write_text(text, encoding="utf-8")
        if not path.exists():
            pytest.fail(f"tests/golden/{name} does not exist. {ADVICE}", False)
        return path.read_text(encoding="utf-8")
