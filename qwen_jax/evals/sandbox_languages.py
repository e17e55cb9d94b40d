"""How the sandbox builds and runs a program of each language, and how its end is proved.

A verdict cannot rest on the exit code, since `os._exit(0)` sets it too, nor on what was printed,
since a program can print anything. So a harness wraps the program, and reports a token that is
chosen anew for each run. The token waits in a pipe: while the program runs it is in no memory,
source, argument or variable of the process, and nothing but the harness, after the program's last
line, reads it from there and writes it into a second pipe. An early exit, an exception or a forked
child never comes to that place.

What is left: code that knows this harness and sets out to deceive it can read the pipe itself, just
as it can overload `==` to be always true. No judge inside the process can rule that out.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# The variable with the two descriptors, `FROM,TO`: read the token there, write it here.
CHANNEL = "SANDBOX_CHANNEL"
# What a harness reports instead of the token when the program ran out of memory.
OUT_OF_MEMORY = b"memory"
GIB = 1 << 30


class Build(NamedTuple):
    """Files to lay into the working folder, and a shell script that compiles and runs them."""

    files: dict[str, str]
    script: str


class Language(NamedTuple):
    """tools: programs that must be there. address_space_bytes: for each process."""

    tools: tuple[str, ...]
    build: Callable[[str], Build]
    address_space_bytes: int


_PYTHON = """
import os, sys, traceback, types

def run():
    source, target = map(int, os.environ.pop("SANDBOX_CHANNEL").split(","))
    os.set_inheritable(source, False)
    os.set_inheritable(target, False)
    process = os.getpid()
    module = types.ModuleType("__main__")
    module.__file__ = os.path.abspath("main.py")
    sys.modules["__main__"] = module
    sys.argv = ["main.py"]
    sys.path.insert(0, os.getcwd())
    try:
        with open("main.py", encoding="utf-8") as file:
            code = compile(file.read(), "main.py", "exec")
        exec(code, module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        # Without the frame of this file.
        frames = error.__traceback__.tb_next
        traceback.print_exception(type(error), error, frames)
        if isinstance(error, MemoryError):
            os.write(target, b"memory")
        sys.exit(1)
    if os.getpid() == process:
        os.write(target, os.read(source, 64))

run()
"""

_JAVASCRIPT = """
const fs = require("fs");
const [source, target] = process.env.SANDBOX_CHANNEL.split(",").map(Number);
delete process.env.SANDBOX_CHANNEL;
let failed = false;
const assert = console.assert;
// console.assert only prints: here a false assertion also fails the run.
console.assert = (condition, ...rest) => {
  if (!condition) failed = true;
  assert.call(console, condition, ...rest);
};
// Comes when nothing is left to do, and never after process.exit().
process.once("beforeExit", (code) => {
  if (failed || code) { process.exitCode = 1; return; }
  const token = Buffer.alloc(64);
  const size = fs.readSync(source, token, 0, 64, null);
  fs.writeSync(target, token, 0, size);
});
"""

_JAVA = """
import java.io.*;
import java.lang.reflect.*;

public class SandboxHarness {
    static FileDescriptor open(String number) throws Exception {
        Constructor<FileDescriptor> make = FileDescriptor.class.getDeclaredConstructor(int.class);
        make.setAccessible(true);
        return make.newInstance(Integer.parseInt(number));
    }

    public static void main(String[] args) throws Exception {
        String[] channel = System.getenv("SANDBOX_CHANNEL").split(",");
        Method program = Class.forName(args[0]).getDeclaredMethod("main", String[].class);
        program.setAccessible(true);
        try {
            program.invoke(null, (Object) new String[0]);
        } catch (InvocationTargetException error) {
            error.getCause().printStackTrace();
            if (error.getCause() instanceof OutOfMemoryError) {
                new FileOutputStream(open(channel[1])).write("memory".getBytes());
            }
            System.exit(1);
        }
        byte[] token = new byte[64];
        int size = new FileInputStream(open(channel[0])).read(token);
        new FileOutputStream(open(channel[1])).write(token, 0, size);
    }
}
"""

# `ld --wrap=main` calls this in place of the program's main, which stays what it is to the
# compiler: a main may end without a return.
_NATIVE = """
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#ifdef __cplusplus
extern "C" {
#endif
int __real_main(int argc, char **argv, char **environment);

int __wrap_main(int argc, char **argv, char **environment) {
    int source = -1, target = -1;
    pid_t process = getpid();
    if (sscanf(getenv("SANDBOX_CHANNEL"), "%d,%d", &source, &target) != 2) return 1;
    unsetenv("SANDBOX_CHANNEL");
    int status = __real_main(argc, argv, environment);
    if (status == 0 && getpid() == process) {
        char token[64];
        ssize_t size = read(source, token, sizeof token);
        if (size <= 0 || write(target, token, size) != size) return 1;
    }
    return status;
}
#ifdef __cplusplus
}
#endif
"""

_GO_REPORT = """
func sandboxReport() {
    var source, target int
    fmt.Sscanf(os.Getenv("SANDBOX_CHANNEL"), "%d,%d", &source, &target)
    token := make([]byte, 64)
    size, _ := os.NewFile(uintptr(source), "source").Read(token)
    os.NewFile(uintptr(target), "target").Write(token[:size])
}
"""
_GO_MAIN = """package main

import ("fmt"; "os")
%s
func main() { programMain(); sandboxReport() }
"""
_GO_TEST = """package main

import ("fmt"; "os"; "testing")
%s
func TestMain(m *testing.M) {
    status := m.Run()
    if status == 0 { sandboxReport() }
    os.Exit(status)
}
"""


def _python(program: str) -> Build:
    files = {"main.py": program, ".harness/run.py": _PYTHON}
    return Build(files, f"exec '{sys.executable}' -s -P -B .harness/run.py")


def _javascript(program: str) -> Build:
    files = {"main.js": program, ".harness/run.js": _JAVASCRIPT}
    command = f"'{find_tool('node')}' --max-old-space-size=1024 -r ./.harness/run.js main.js"
    return Build(files, f"exec {command}")


def _java(program: str) -> Build:
    public = re.search(r"\bpublic\s+(?:final\s+)?class\s+(\w+)", program)
    before_main = re.split(r"\bpublic\s+static\s+void\s+main\b", program)[0]
    classes = re.findall(r"\bclass\s+(\w+)", before_main) or ["Main"]
    name = f"{public.group(1) if public else 'Main'}.java"
    files = {name: program, ".harness/SandboxHarness.java": _JAVA}
    options = "-ea -Xmx1g -Xss16m -XX:+UseSerialGC -XX:TieredStopAtLevel=1"
    return Build(
        files,
        f"'{find_tool('javac')}' -J-XX:+UseSerialGC -J-XX:TieredStopAtLevel=1 -nowarn "
        f"-encoding UTF-8 -d .harness {name} .harness/SandboxHarness.java && "
        f"exec '{find_tool('java')}' {options} --add-opens java.base/java.io=ALL-UNNAMED "
        f"-cp .harness SandboxHarness {classes[-1]}",
    )


def _cpp(program: str) -> Build:
    files = {"main.cpp": program, ".harness/run.cpp": _NATIVE}
    # Programs that hash take libcrypto, where its headers are installed.
    crypto = (
        "libs=; for lib in crypto ssl; do"
        ' if [ -n "$(ls /usr/lib/lib$lib.so /usr/lib*/*/lib$lib.so 2>/dev/null)" ];'
        ' then libs="$libs -l$lib"; fi; done'
    )
    compiler = f"'{find_tool('g++')}' -std=c++17 -w -Wl,--wrap=main"
    build = f"{compiler} main.cpp .harness/run.cpp -o .harness/program $libs"
    return Build(files, f"{crypto}; {build} && exec .harness/program")


def _go(program: str) -> Build:
    if re.search(r"^func Test\w*\(", program, re.MULTILINE):
        files = {"main_test.go": program, "harness_test.go": _GO_TEST % _GO_REPORT}
        build = "test -vet=off -c -o program main_test.go harness_test.go"
    else:
        renamed = re.sub(r"^func\s+main\s*\(\)", "func programMain()", program, flags=re.MULTILINE)
        files = {"main.go": renamed, "harness.go": _GO_MAIN % _GO_REPORT}
        build = "build -o program main.go harness.go"
    settings = "GO111MODULE=off GOPATH=/usr/share/gocode GOCACHE=$PWD/.cache"
    settings = f"export {settings} GOPROXY=off GOTOOLCHAIN=local GOMAXPROCS=2"
    return Build(files, f"{settings}; '{find_tool('go')}' {build} && exec ./program")


def _rust(program: str) -> Build:
    is_test = "#[test]" in program
    files = {"main.rs": program, ".harness/run.c": _NATIVE}
    options = f"--edition 2021 -A warnings -C codegen-units=2 -C linker='{find_tool('cc')}'"
    options += " -C link-arg=.harness/run.o -C link-arg=-Wl,--wrap=main -o .harness/program"
    options += " --test" * is_test
    return Build(
        files,
        f"'{find_tool('cc')}' -c .harness/run.c -o .harness/run.o && "
        f"'{find_tool('rustc')}' {options} main.rs && "
        f"exec .harness/program{' --test-threads=1' * is_test}",
    )


# Node, Java and Go reserve far more addresses than they use: the total is watched besides.
LANGUAGES = {
    "python": Language((), _python, 2 * GIB),
    "js": Language(("node",), _javascript, 16 * GIB),
    "java": Language(("javac", "java"), _java, 16 * GIB),
    "cpp": Language(("g++",), _cpp, 2 * GIB),
    "go": Language(("go",), _go, 16 * GIB),
    "rust": Language(("rustc", "cc"), _rust, 4 * GIB),
}


@functools.cache
def find_tool(name: str) -> str | None:
    """Real path of a program; of `rustc` not rustup's, which needs a home folder."""
    path = shutil.which(name)
    if path is None or name != "rustc":
        return path and os.path.realpath(path)
    command = [path, "--print", "sysroot"]
    shown = subprocess.run(command, check=False, capture_output=True, text=True)
    return f"{shown.stdout.strip()}/bin/rustc" if shown.returncode == 0 else None


def folders_of(language: str) -> list[str]:
    """Folders outside /usr that a language needs, to be shown read-only in the sandbox."""
    if language == "python":
        found = [sys.base_prefix, sys.prefix]
        found += ["/etc/fonts"] if Path("/etc/fonts").is_dir() else []  # for plots
    else:
        real = [Path(find_tool(tool)).resolve() for tool in LANGUAGES[language].tools]
        found = [str(path.parent.parent) for path in real]
        if language == "java":  # Debian keeps its settings here
            found += [str(path) for path in sorted(Path("/etc").glob("java-*"))]
    found = [str(Path(folder).resolve()) for folder in found] + found
    return [folder for folder in dict.fromkeys(found) if not f"{folder}/".startswith("/usr/")]
