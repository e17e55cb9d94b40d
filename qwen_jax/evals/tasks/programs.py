"""Generated programs as verdicts: run in the sandbox, passed or not."""

from typing import Any

from qwen_jax.evals import sandbox
from qwen_jax.evals.task import Metric, Setting, Verdict, verdict

PASS_AT_1 = Metric("pass@1", "correct")
# Programs that run at one time.
WORKERS = 4
_ERROR_CHARACTERS = 500


def judge(
    program: str, timeout_secs: float, setting: Setting, *, extracted: str, language: str = "python"
) -> Verdict:
    """Whether a program comes to its end.

    Raises:
      ValueError: programs may not run here; the text says why.
    """
    ran = run(program, timeout_secs, setting, language=language)
    found = verdict(extracted, None, ran.passed, status=ran.status)
    if not ran.passed and ran.stderr:
        found["error"] = ran.stderr[-_ERROR_CHARACTERS:]
    return found


def run(program: str, timeout_secs: float, setting: Setting, **options: Any) -> "sandbox.Verdict":
    """What becomes of a program.

    Raises:
      ValueError: programs may not run here.
    """
    ran = sandbox.run(
        program, timeout_secs=timeout_secs, allow_unsafe=setting.allow_unsafe, **options
    )
    if ran.status == "refused":
        raise ValueError(
            f"generated programs cannot run here: {ran.stderr}; --allow_unsafe_exec runs them "
            "without a sandbox"
        )
    return ran


def missing_tools(language: str) -> str | None:
    """Why programs of a language cannot be run here; None when they can."""
    return sandbox.available_languages()[language]
