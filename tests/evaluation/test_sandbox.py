"""The sandbox: programs pass, fail, and do not get out."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from calm_jax.errors import CalmError
from calm_jax.evaluation import sandbox
from calm_jax.evaluation.sandbox import Limits, system_calls

try:
    sandbox.check("a test")
    LACKS = None
except CalmError as error:
    LACKS = str(error)
here = pytest.mark.skipif(LACKS is not None, reason=f"no sandbox: {LACKS}")

OURS = f"# a sandbox of the tests of {os.getpid()}"
SHORT = Limits(seconds=2, wait=4)


@pytest.fixture(autouse=True)
def marked(monkeypatch):
    """The sandboxes of this file, by the command that is their first program."""
    monkeypatch.setattr(sandbox, "_INSIDE", f"{sandbox._INSIDE}\n{OURS}\n")


def told(program: str, tests: str = "", limits: Limits = SHORT) -> str:
    """What becomes of a program that must not pass."""
    outcome = sandbox.run(program, tests, limits)
    assert not outcome.passed, program
    return outcome.told


def answer(expression: str, before: str = "import os", limits: Limits = SHORT) -> str:
    """The text of an expression's value inside."""
    found = told(f"{before}\nraise SystemExit(str({expression}))", limits=limits)
    assert found.startswith("SystemExit: "), found
    return found.removeprefix("SystemExit: ")


@here
def test_programs_pass_and_fail():
    add = "def add(a, b):\n    return a + b"
    assert sandbox.run(add, "assert add(1, 2) == 3") == sandbox.Outcome(True, "passed")
    assert told(add, "assert add(1, 2) == 4, 'not four'") == "AssertionError: not four"
    assert told("def add(a, b:", "").startswith("SyntaxError: ")
    assert told("", "add(1, 2)") == "NameError: name 'add' is not defined"
    assert sandbox.run("import hashlib, math, re, typing, collections", "").passed
    assert sandbox.run('text = "\\ud800 ü"', "assert len(text) == 3").passed
    assert sandbox.run('open("a", "w").write("b")', 'assert open("a").read() == "b"').passed


@here
@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "print('passed'); import os; os._exit(0)",
        # On every descriptor that it has.
        "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'passed\\n')\n"
        "    except OSError: pass\nos._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import builtins\nbuiltins.compile = lambda *_: compile('', '', 'exec')\n1 / 0",
        # Another process lives on, and holds the result's descriptor open.
        "import os\nif os.fork(): os._exit(0)\nwhile True: pass",
        "import threading, os\nthreading.Timer(0.1, os._exit, [0]).start()\nwhile True: pass",
        "import atexit; atexit.register(print, 'passed'); raise KeyboardInterrupt",
    ],
)
def test_a_pass_is_not_faked(program):
    told(program, "assert False")


@here
def test_tests_run_with_their_own_tools():
    """A program that changes `os` changes nothing for what tells the result."""
    program = "import os\nos.write = os.read = os._exit = None"
    assert sandbox.run(program, "").passed
    told(program, "assert False")


@here
def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        before = "import socket, os"
        for family, address in (
            ("AF_INET", f"('127.0.0.1', {port})"),
            ("AF_INET", "('8.8.8.8', 53)"),
            ("AF_INET6", f"('::1', {port})"),
            ("AF_VSOCK", "(2, 1)"),
            ("AF_UNIX", "'\\0/tmp/.X11-unix/X0'"),
        ):
            found = told(f"{before}\nsocket.socket(socket.{family}).connect({address})")
            assert found.startswith(("PermissionError", "OSError", "ConnectionRefused")), found


@here
def test_fork_bombs_end():
    start = time.monotonic()
    told("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    told("import threading\nwhile True: threading.Thread(target=lambda: [0 for _ in iter(int, 1)])"
         ".start()")  # fmt: skip
    assert time.monotonic() - start < 40
    # Only so many at once, and none is left.
    program = (
        "import os, time\ncount = 0\ntry:\n    while True:\n        if not os.fork():\n"
        "            time.sleep(9)\n            os._exit(0)\n        count += 1\n"
        "except OSError:\n    raise SystemExit(str(count))"
    )
    assert 1 <= int(told(program).removeprefix("SystemExit: ")) <= SHORT.processes
    assert not inner_processes()


def inner_processes() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if OURS.encode() in line:
            found.append(line.decode(errors="replace"))
    return found


@here
def test_ten_gigabytes_are_not_to_be_had():
    assert told("x = bytearray(10 * 2**30)").startswith("MemoryError")
    assert told("import mmap\nmmap.mmap(-1, 10 * 2**30)").startswith(("OSError", "MemoryError"))
    assert told("x = []\nwhile True: x.append(bytes(2**24))").startswith("MemoryError")


@here
def test_the_disk_is_not_filled():
    huge = "with open('a', 'wb') as file:\n    while True: file.write(bytes(2**20))"
    assert told(huge).startswith("OSError: [Errno 27] File too large")
    many = (
        "number = 0\nwhile True:\n    number += 1\n"
        "    with open(str(number), 'wb') as file: file.write(bytes(2**22))"
    )
    assert told(many).startswith("OSError: [Errno 28] No space left")
    for place in ("/", "/dev", "/usr", "/etc", sys.base_prefix, "/dev/shm", "/var/tmp"):
        found = told(f"open({place + '/a'!r}, 'w')")
        assert found.startswith(("OSError", "FileNotFoundError", "PermissionError")), found


@here
def test_nothing_of_this_machine_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "in the environment")
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    secret.chmod(0o644)
    own = f"/proc/{os.getpid()}"
    for path in (secret, Path.home(), "/etc/passwd", "/etc/shadow", "/root/.ssh", "/home", "/run",
                 f"{own}/mem", f"{own}/environ", "/proc/1/mem", "/sys/class/net", "/var/log",
                 "/dev/mem", "/dev/kmsg", "/dev/vda"):  # fmt: skip
        inside = Path(sys.base_prefix)
        if inside.is_relative_to(path):
            listed = eval(answer(f"os.listdir({str(path)!r})"))
            assert listed == [inside.relative_to(path).parts[0]]
            continue
        opened = f"(os.listdir if os.path.isdir({str(path)!r}) else open)({str(path)!r})"
        found = told(f"import os\n{opened}")
        assert found.startswith(("FileNotFoundError", "PermissionError")), (path, found)
    assert "SECRET" not in answer("dict(os.environ)")
    assert set(eval(answer("os.listdir('/')"))) <= {
        "bin", "dev", "etc", "lib", "lib64", "tmp", "usr", Path(sys.base_prefix).parts[1]
    }  # fmt: skip
    assert eval(answer("os.listdir('.')")) == []


@here
def test_the_parent_is_out_of_reach():
    assert int(answer("os.getppid()")) <= 1
    pids = (os.getpid(), os.getppid(), 1)
    for pid in pids:
        found = told(f"import os, signal\nos.kill({pid}, signal.SIGKILL)\nraise SystemExit('sent')")
        # Number 1 inside is bubblewrap's own, and heeds no signal from inside.
        expected = ("SystemExit: sent", "PermissionError") if pid == 1 else "ProcessLookupError"
        assert found.startswith(expected)
    told("import os, signal\nos.kill(-1, signal.SIGKILL)\nos.killpg(0, signal.SIGKILL)")
    # Alive, and so is this process.
    assert sandbox.run("", "").passed
    assert answer("os.getuid()") not in ("0", str(os.getuid() or "0"))
    status = "__import__('resource').getrlimit(__import__('resource').RLIMIT_CORE)"
    assert answer(status) == "(0, 0)"


@here
@pytest.mark.parametrize("call", ["setuid(0)", "setgid(0)", "chroot('/tmp')", "mkfifo('/a')"])
def test_there_are_no_rights(call):
    assert told(f"import os\nos.{call}").startswith(("PermissionError", "OSError"))


@here
def test_descriptors_are_not_inherited():
    with open(__file__) as file:
        os.set_inheritable(file.fileno(), True)
        program = (
            "import os\nfound = []\nfor fd in range(64):\n    try: found.append((fd, "
            "os.fstat(fd).st_mode >> 12))\n    except OSError: pass\nraise SystemExit(str(found))"
        )
        found = dict(eval(told(program).removeprefix("SystemExit: ")))
    pipe, device = 1, 2
    # Nothing as standard input and outputs; the pipes of the token and of the result.
    assert [found.pop(fd) for fd in (0, 1, 2)] == [device] * 3
    assert sorted(found.values()) in ([pipe] * 2, [pipe] * 2 + [device])


@here
def test_endless_output_goes_nowhere():
    start = time.monotonic()
    assert told("while True: print('x' * 10**6)").startswith(("killed", "timed out"))
    assert told(
        "import os\nfor fd in range(3, 64):\n    try:\n        while True: "
        "os.write(fd, b'x' * 4096)\n    except OSError: pass"
    )
    assert time.monotonic() - start < 15
    assert len(told("raise ValueError('x' * 10**6)")) <= 200


@here
def test_the_time_limit_is_not_caught():
    start = time.monotonic()
    caught = (
        "import signal\nfor number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(number, lambda *_: None)\n"
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    )
    assert told(caught) in ("killed, as after 2 s of a processor", "timed out after 4 s")
    assert told("import time\ntime.sleep(1000)") == "timed out after 4 s"
    assert told("import os, time\nos.setsid\nif os.fork() == 0: os.setsid()\ntime.sleep(1000)")
    assert time.monotonic() - start < 40
    assert not inner_processes()


@here
@pytest.mark.skipif(system_calls.problem() is not None, reason=f"{system_calls.problem()}")
@pytest.mark.parametrize(
    ("call", "number"), [("ptrace", 101), ("process_vm_readv", 310), ("unshare", 272),
                         ("keyctl", 250), ("bpf", 321), ("io_uring_setup", 425)],
)  # fmt: skip
def test_system_calls_are_refused(call, number):
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers are those of x86-64")
    before = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)"
    found = answer(f"(libc.syscall({number}, 0x10000000, 0, 0, 0, 0), ctypes.get_errno())", before)
    assert found == "(-1, 1)"  # EPERM


@here
def test_many_at_once():
    outcomes = [None] * 8

    def one(number):
        outcomes[number] = sandbox.run(f"x = {number}", f"assert x == {number} and x % 2")

    threads = [threading.Thread(target=one, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.passed for outcome in outcomes] == [False, True] * 4


@here
def test_nothing_is_left_open():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        sandbox.run("", "")
        told("1 / 0")
    assert len(os.listdir("/proc/self/fd")) == before


@here
def test_what_is_missing_is_told(monkeypatch, caplog):
    monkeypatch.setattr(system_calls, "problem", lambda: None)
    monkeypatch.setattr(sandbox, "_uid", lambda: 2**30)
    assert sandbox.missing() == []
    with monkeypatch.context() as patch:
        patch.setattr(sandbox.os, "geteuid", lambda: 0)
        patch.setattr(sandbox, "_form", lambda: (True, None))
        patch.setattr(sandbox, "_id_map", lambda: [0, 0, 2**32 - 1])
        assert sandbox.missing() == ["no limit of processes, since Linux sets none for root"]
    monkeypatch.setattr(system_calls, "problem", lambda: "libseccomp.so.2: no such file")
    assert sandbox.missing() == ["no filter of system calls: libseccomp.so.2: no such file"]
    sandbox.check("a test")
    assert "The sandbox of this machine has no filter of system calls: libseccomp" in caplog.text
    # It runs without, as its other walls stand.
    assert sandbox.run("x = 1", "assert x").passed


def test_where_there_is_no_sandbox(monkeypatch):
    refused = "humaneval is run in a sandbox only, which this machine does not offer: "
    with monkeypatch.context() as patch:
        patch.setattr(sandbox.shutil, "which", lambda name: None)
        with pytest.raises(CalmError, match=rf"{refused}bubblewrap is not installed \(apt-get"):
            sandbox.check("humaneval")
        with pytest.raises(CalmError, match="bubblewrap is not installed"):
            sandbox.run("", "")
    with monkeypatch.context() as patch:
        patch.setattr(sandbox.sys, "platform", "darwin")
        with pytest.raises(CalmError, match=f"{refused}it needs Linux, and this is darwin"):
            sandbox.check("humaneval")


def test_where_bubblewrap_does_not_run(monkeypatch, tmp_path):
    """Such as in a container that allows no namespaces."""
    fake = tmp_path / "bwrap"
    line = "bwrap: No permissions to create a new namespace"
    fake.write_text(f"#!/bin/sh\necho '{line}' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: str(fake))
    sandbox._form.cache_clear()
    try:
        with pytest.raises(CalmError, match="not offer: bwrap: No permissions to create a new nam"):
            sandbox.check("mbpp")
    finally:
        sandbox._form.cache_clear()


@here
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("before", [[], ["unshare", "--user", "--map-root-user"]])
def test_without_root(before):
    """As a user without rights, and as the root of such a user's container."""
    python = "/usr/bin/python3"
    code = "import sys; sys.exit(sys.version_info < (3, 11))"
    if not Path(python).exists() or subprocess.run([python, "-c", code]).returncode:
        pytest.skip(f"{python} is not there or too old")
    code = (
        "from calm_jax.evaluation import sandbox as s\n"
        "print(s.run('x = 1', 'assert x'), s.run('import os; os._exit(0)', ''),"
        " s.run('import os\\nwhile True: os.fork()', '').told[:15], s.run('import os\\n"
        "raise SystemExit(str(os.getuid()))', '').told, s.missing())"
    )
    package = Path(sandbox.__file__).parents[3]
    run = subprocess.run(
        [*before, python, "-c", code], user=65533, group=65533, extra_groups=[],
        capture_output=True, text=True,
        env={"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1",
             "PATH": os.environ["PATH"]},
    )  # fmt: skip
    if "ermission denied" in run.stderr or "No module named" in run.stderr:
        pytest.skip(f"another user cannot: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stderr
    ended = "Outcome(passed=False, told='ended before its tests did')"
    passed = f"Outcome(passed=True, told='passed') {ended} BlockingIOError SystemExit: 1000 "
    assert run.stdout.startswith(passed)
    assert "no limit of processes" not in run.stdout
