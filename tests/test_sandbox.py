"""The sandbox: what an attack may not do, and that only a program that came to its end passes."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from tiny import ROOT

from qwen_jax.evals import isolation, sandbox

# Of attacks that end by themselves, and of those that do not.
LIMIT_SECS, LOOP_LIMIT_SECS = 10.0, 1.0
NOBODY = 65534


@pytest.fixture(params=["bwrap", "unshare"])
def way(request, monkeypatch):
    """Each way to lock a program up, forced."""
    problem = isolation.try_out(request.param)
    if problem is not None:
        pytest.skip(f"{request.param}: {problem}")
    monkeypatch.setattr(isolation, "find", lambda: (request.param, ""))
    return request.param


@pytest.fixture
def any_way():
    name, problem = isolation.find()
    if name is None:
        pytest.skip(problem)


def processes_with(marker: str) -> list[str]:
    """Processes that see a file of this name in the sandbox's working folder."""
    pids = [name for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}/root/sandbox/{marker}")]


# Each ends by reaching its last line if the attack succeeds, and would pass then.
ATTACKS = {
    "fork bomb": """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
    "3 GB": "block = bytearray(3 << 30)",
    "network": """
import socket
socket.create_connection(("127.0.0.1", PORT), timeout=1).send(b"here")
""",
    "reading the host": """
import os
seen = [path for path in HOST_PATHS if os.path.exists(path)]
print(seen)
assert seen
""",
    "os._exit": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "forged output": """
import os, sys
print(open(__file__).read(), open("/proc/self/environ").read(), open("/proc/self/cmdline").read())
frame = sys._getframe()
while frame:
    print(frame.f_locals, frame.f_globals)
    frame = frame.f_back
print("passed", flush=True)
for descriptor in range(3, 64):
    try:
        os.write(descriptor, b"passed")
    except OSError:
        pass
os._exit(0)
""",
    "infinite loop": "while True: pass",
    "deaf infinite loop": """
import os, signal
for number in range(1, 32):
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_IGN)
os.closerange(0, 256)
while True: pass
""",
    # The grandchild goes on to the last line of the program.
    "daemonised child": """
import os, time
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
end = time.monotonic() + 60
while time.monotonic() < end and "ESCAPED" not in os.environ:
    try:
        open("MARKER_PATH", "a").write("alive")
    except OSError:
        pass
    os.environ["ESCAPED"] = "1"
""",
    "200 MB file": 'open("big", "wb").write(bytes(200 << 20))',
    "many files": """
for number in range(100):
    open(f"big{number}", "wb").write(bytes(40 << 20))
""",
    "memory as files": """
for number in range(100):
    open(f"/dev/shm/big{number}", "wb").write(bytes(40 << 20))
""",
    "endless output": "while True: print('x' * 1000)",
    "writing outside": """
for path in ("MARKER_PATH", "/usr/MARKER", "/usr/lib/MARKER"):
    try:
        open(path, "w").write("x")
    except OSError:
        pass
raise OSError
""",
    "becoming root": "import os; os.setuid(0); open('/usr/x', 'w')",
}
STATUS = {
    "fork bomb": "timeout",
    "3 GB": "memory",
    "infinite loop": "timeout",
    "deaf infinite loop": "timeout",
    "endless output": "output",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_fail_and_leave_nothing(name, way, tmp_path, monkeypatch):
    if name == "becoming root" and os.geteuid() != 0 and way == "unshare":
        pytest.skip("root of a user namespace is nobody outside; other tests show what it may do")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    marker = secrets.token_hex(8)
    expected = STATUS.get(name, "failed")
    limit_secs = LOOP_LIMIT_SECS if expected == "timeout" else LIMIT_SECS
    outside = Path("/var/tmp", marker)
    hidden = ["/etc/passwd", "/home", "/root/.bashrc", "/var", str(ROOT / "qwen_jax")]
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = ATTACKS[name].replace("PORT", str(server.getsockname()[1]))
        program = program.replace("HOST_PATHS", repr(hidden)).replace("MARKER_PATH", str(outside))
        start = time.monotonic()
        verdict = sandbox.run(
            program.replace("MARKER", marker), timeout_secs=limit_secs, files={marker: ""}
        )
        assert time.monotonic() - start < limit_secs + 1
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not verdict.passed, verdict
    assert verdict.status == expected, verdict
    while processes_with(marker) and time.monotonic() < start + limit_secs + 1:
        time.sleep(0.02)  # dying
    assert not processes_with(marker)
    assert not list(tmp_path.iterdir())
    assert not outside.exists() and not Path("/usr", marker).exists()


def test_the_attacks_would_be_seen(way):
    """What the checks above look for is there in a run that does no harm."""
    marker = secrets.token_hex(8)
    with sandbox.ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            sandbox.run, "import time; time.sleep(1)", timeout_secs=5, files={marker: ""}
        )
        deadline = time.monotonic() + 5
        while not processes_with(marker) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert processes_with(marker)
        assert running.result().passed
    assert not processes_with(marker)


def test_memory_of_all_processes_together_is_bounded(way, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_MEMORY_BYTES", 300 << 20)
    program = """
import os, time
for _ in range(COUNT):
    if os.fork() == 0:
        block = b"x" * (100 << 20)
        time.sleep(1)
        os._exit(0)
time.sleep(0.5)
"""
    few = sandbox.run(program.replace("COUNT", "1"), timeout_secs=10)
    many = sandbox.run(program.replace("COUNT", "5"), timeout_secs=10)
    assert (few.status, many.status) == ("passed", "memory")


def test_an_interpreter_in_a_temporary_folder(way, monkeypatch, tmp_path):
    """What the sandbox hides, /tmp and the folder of the new root, can hold the interpreter."""
    subprocess.check_call([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"])
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    verdict = sandbox.run("import sys; print(sys.prefix)", timeout_secs=10)
    assert verdict.stdout.strip() == str(tmp_path / "venv"), verdict


def test_parallel_runs_do_not_share_the_limit_of_processes(way):
    program = """
import os, time
for _ in range(40):
    if os.fork() == 0:
        time.sleep(0.7)
        os._exit(0)
time.sleep(0.3)
"""
    jobs = [sandbox.Job(program, timeout_secs=10)] * 4
    done = []
    verdicts = sandbox.run_many(jobs, workers=4, progress=done.append)
    assert [verdict.status for verdict in verdicts] == ["passed"] * 4
    assert done == [1, 2, 3, 4]


def test_verdicts_keep_the_order_of_the_jobs(any_way):
    jobs = [sandbox.Job(f"import time; time.sleep({0.3 / (i + 1)}); print({i})") for i in range(4)]
    verdicts = sandbox.run_many(jobs, workers=4)
    assert [verdict.stdout for verdict in verdicts] == ["0\n", "1\n", "2\n", "3\n"]


def test_errors_read_as_in_a_plain_run(any_way):
    verdict = sandbox.run("def f():\n    return 1 / 0\nf()\n", timeout_secs=5)
    assert verdict.status == "failed"
    assert "ZeroDivisionError" in verdict.stderr and 'File "main.py", line 2' in verdict.stderr
    assert "run.py" not in verdict.stderr


def test_files_and_main_module(any_way):
    program = """
import __main__, helper, pathlib
assert __name__ == "__main__" and __main__.x == 1 if "x" in globals() else True
x = 1
assert __main__.x == 1
assert helper.VALUE == 7 and pathlib.Path("data/in.txt").read_text() == "ünï"
pathlib.Path("data/out.txt").write_text("x")
"""
    files = {"helper.py": "VALUE = 7", "data/in.txt": "ünï"}
    verdict = sandbox.run(program, timeout_secs=5, files=files)
    assert verdict.passed, verdict.stderr


GOOD = {
    "python": "print('out')",
    "js": "setTimeout(() => console.log('out'), 50);",
    "java": """import java.util.*;
class Solution { int one() { return 1; } }
public class Main {
    public static void main(String[] args) throws Exception {
        if (new Solution().one() != 1) throw new AssertionError();
        System.out.println("out");
    }
}""",
    "cpp": '#include <cassert>\n#include <cstdio>\nint main() { assert(1 == 1); puts("out"); }',
    "go": 'package main\n\nimport "fmt"\n\nfunc main() { fmt.Println("out") }',
    "rust": 'fn main() { assert_eq!(1, 1); println!("out"); }',
}
# What to write in place of the line that prints.
EARLY_EXIT = {
    "python": ("print('out')", "raise SystemExit(0)"),
    "js": ("console.log('out')", "process.exit(0)"),
    "java": ('System.out.println("out")', "System.exit(0)"),
    "cpp": ('puts("out")', "_Exit(0)"),
    "go": ('fmt.Println("out")', 'fmt.Print(); os.Exit(0) }; func init() { fmt.Print("")'),
    "rust": ('println!("out")', "std::process::exit(0)"),
}
FAULT = {
    "python": ("print('out')", "assert 1 == 2"),
    "js": ("console.log('out')", "console.assert(1 === 2)"),
    "java": ("one() != 1", "one() != 2"),
    "cpp": ("1 == 1", "1 == 2"),
    "go": ('fmt.Println("out")', 'panic(fmt.Sprint("no"))'),
    "rust": ("assert_eq!(1, 1)", "assert_eq!(1, 2)"),
}


def changed(program: str, change: tuple[str, str]) -> str:
    assert change[0] in program
    text = program.replace(*change)
    return text.replace('import "fmt"', 'import ("fmt"; "os")') if "os.Exit" in text else text


@pytest.mark.parametrize("language", GOOD)
def test_languages(language, any_way):
    missing = sandbox.available_languages()[language]
    if missing:
        assert sandbox.run("", language=language, timeout_secs=1).status == "refused"
        pytest.skip(missing)
    assert GOOD.keys() == sandbox.LANGUAGES.keys()
    good = GOOD[language]
    broken = good + "\n}}} ((("
    programs = [good, changed(good, EARLY_EXIT[language]), changed(good, FAULT[language]), broken]
    jobs = [sandbox.Job(program, language, timeout_secs=60) for program in programs]
    verdicts = sandbox.run_many(jobs)
    assert [verdict.status for verdict in verdicts] == ["passed", *["failed"] * 3], verdicts
    assert "out" in verdicts[0].stdout
    assert "out" not in verdicts[1].stdout


TESTS = {
    "go": """package main

import "testing"

func TestOne(t *testing.T) { if 1 != 1 { t.Fail() } }
""",
    "rust": """fn main() {}
#[cfg(test)]
mod tests { #[test] fn one() { assert!(1 == 1); } }
""",
}


@pytest.mark.parametrize("language", TESTS)
def test_languages_with_tests_of_their_own(language, any_way):
    if sandbox.available_languages()[language]:
        pytest.skip(sandbox.available_languages()[language])
    good = TESTS[language]
    wrong = good.replace("1 != 1", "1 != 2").replace("1 == 1", "1 == 2")
    jobs = [sandbox.Job(program, language, timeout_secs=60) for program in (good, wrong)]
    assert [verdict.passed for verdict in sandbox.run_many(jobs)] == [True, False]


def test_nothing_runs_unlocked_unless_allowed(monkeypatch, tmp_path):
    monkeypatch.setattr(isolation, "find", lambda: (None, "bwrap: not installed"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    verdict = sandbox.run("print(1)", timeout_secs=5)
    assert verdict.status == "refused" and "bwrap: not installed" in verdict.stderr
    allowed = [
        sandbox.run(program, timeout_secs=2, allow_unsafe=True)
        for program in ("print(1)", ATTACKS["os._exit"], ATTACKS["3 GB"], ATTACKS["infinite loop"])
    ]
    assert [verdict.status for verdict in allowed] == ["passed", "failed", "memory", "timeout"]
    assert not list(tmp_path.iterdir())


def test_a_sandbox_that_does_not_come_up_is_no_verdict(any_way, monkeypatch):
    broken = isolation.Isolation("bwrap", ["sh", "-c", "echo no namespaces >&2; exit 1"], [])
    monkeypatch.setattr(isolation, "make", lambda name, folders: broken)
    with pytest.raises(OSError, match="no namespaces"):
        sandbox.run("print(1)", timeout_secs=5)


def test_what_is_found_without_bubblewrap(monkeypatch):
    monkeypatch.setattr(isolation, "_bwrap_path", lambda: None)
    name, problems = isolation.find.__wrapped__()
    assert name in ("unshare", None) and "bwrap: not installed" in problems


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"language": "cobol"}, "cobol"),
        ({"timeout_secs": 0}, "timeout_secs = 0"),
        ({"files": {"../x": ""}}, "'../x'"),
        ({"files": {"/x": ""}}, "'/x'"),
        ({"files": {"main.py": ""}}, "main.py"),
    ],
)
def test_wrong_arguments(arguments, message, any_way):
    with pytest.raises(ValueError, match=re.escape(message)):
        sandbox.run("print(1)", **{"timeout_secs": 5, **arguments})


AS_NOBODY = """
import sys, json
from qwen_jax.evals import isolation, sandbox
isolation.find = lambda: (sys.argv[1], "")
problem = isolation.try_out(sys.argv[1])
verdicts = []
if problem is None:
    verdicts = [
        sandbox.run(program, timeout_secs=2, files={sys.argv[3]: ""}).status
        for program in json.loads(sys.argv[2])
    ]
print(json.dumps([problem, verdicts]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("name", ["bwrap", "unshare"])
def test_as_an_ordinary_user(name):
    python = "/usr/bin/python3"
    if not os.path.exists(python) or not shutil.which("setpriv"):
        pytest.skip(f"needs {python} and setpriv")
    version = subprocess.check_output(
        [python, "-c", "import sys; print(sys.version_info[:2] >= (3, 11))"], text=True
    )
    if version.strip() != "True":
        pytest.skip(f"{python} is too old")
    names = ("3 GB", "os._exit", "fork bomb", "200 MB file", "reading the host", "memory as files")
    programs = ["print(1)", *(ATTACKS[attack] for attack in names)]
    programs = [text.replace("HOST_PATHS", repr(["/etc/passwd", "/root"])) for text in programs]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(ROOT / "qwen_jax" / "evals", Path(folder, "qwen_jax", "evals"))
        shutil.copy(ROOT / "qwen_jax" / "__init__.py", Path(folder, "qwen_jax"))
        marker = secrets.token_hex(8)
        drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        ended = subprocess.run(
            [*drop, python, "-B", "-c", AS_NOBODY, name, json.dumps(programs), marker],
            check=False,
            cwd=folder,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
    assert ended.returncode == 0, ended.stderr
    problem, statuses = json.loads(ended.stdout)
    if problem is not None:
        pytest.skip(f"{name} as an ordinary user: {problem}")
    expected = ["passed", "memory", "failed", "timeout", "failed", "failed", "failed"]
    assert statuses == expected
    assert not processes_with(marker)


def test_no_import_of_jax():
    """Workers that only run programs must start fast."""
    code = "import sys; import qwen_jax.evals.sandbox; print('jax' in sys.modules)"
    shown = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert shown.strip() == "False"
