"""Code in a new process that has imported torch and nothing of ours.

Forked from one that waits with torch imported: importing it takes each process longer than what
most tests ask of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from tempfile import TemporaryDirectory

SERVER = """
import gc, json, os, sys, traceback
gc.disable()
import torch
gc.freeze()  # children walk through what they make only, and copy no page of what they do not
gc.enable()

assert "nsa_neuron" not in sys.modules
for line in sys.stdin:
    code, environment, out, err = json.loads(line)
    child = os.fork()
    if not child:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.environ.clear()
        os.environ.update(environment)
        status = 1
        try:
            exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    """Ends with this process, whose end closes its input."""
    return subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code; an exception gives status 1 and its traceback, as `python -c` does.

    Args:
        environment: variables that differ from those of this process.
    """
    server = _server()
    assert server.stdin and server.stdout
    with TemporaryDirectory() as folder:
        out, err = (os.path.join(folder, name) for name in ("out", "err"))
        ask = [code, {**os.environ, **environment}, out, err]
        server.stdin.write(json.dumps(ask) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        with open(out) as said, open(err) as wrong:
            return subprocess.CompletedProcess(code, status, said.read(), wrong.read())
