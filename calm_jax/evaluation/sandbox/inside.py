"""The first program in the sandbox: it takes on its limits, then runs a job.

It needs the standard library alone. `sandbox.__init__` starts it with the number of the descriptor
to tell the result by, and writes the job to its standard input.
"""

import json
import os
import resource
import sys


def limit(job: dict) -> None:
    """Sets limits that cannot be raised again, and drops the rights of root."""
    for name, value in (
        ("CPU", job["seconds"]),
        ("AS", job["memory"]),
        ("FSIZE", job["file"]),
        ("NPROC", job["processes"]),
        ("NOFILE", 64),
        ("CORE", 0),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])


def main() -> None:
    result = int(sys.argv[1])
    job = json.loads(sys.stdin.buffer.readline())
    # Nothing of this program may stay in reach by name, and its tools must not change.
    write, leave, read = os.write, os._exit, os.read
    token, inner = os.pipe()
    write(inner, job.pop("token").encode())
    os.close(inner)
    nothing = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    limit(job)
    sys.argv = ["program.py"]
    namespace = {"__name__": "program", "__builtins__": __builtins__}
    try:
        for name in ("program", "tests"):
            exec(compile(job[name], f"{name}.py", "exec"), namespace)
    except BaseException as error:
        told = f"{type(error).__name__}: {error}".replace("\n", " ")
        write(result, told.encode(errors="replace")[:1000] + b"\n")
        leave(1)
    write(result, read(token, 64) + b"\n")
    leave(0)


main()
