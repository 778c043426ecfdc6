"""Processes that talk to the Hub of `hub_server`, with nothing of the surrounding environment's login or cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Runs what it reads, one JSON string a line, and answers with what the code left in `result`, or how it failed.
LOOP = """
import contextlib, json, sys
import hf_mcsmoe
names = {}
for line in sys.stdin:
    names["result"] = None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(json.loads(line), names)
        answer = {"result": names["result"]}
    except Exception as error:
        causes = [error]
        while causes[-1].__cause__ or causes[-1].__context__:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        answer = {"error": type(error).__name__, "message": str(error), "all": "\\n".join(map(repr, causes))}
    print(json.dumps(answer), flush=True)
"""


def environment(endpoint, home, token=None):
    """Environment variables of a client of `endpoint` that keeps its cache below `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    login = {"HF_TOKEN": token} if token else {}
    return {
        **kept,
        **login,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def start(environment, *arguments):
    """A fresh Python process whose output is read with `finish`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, **pipes)


def finish(process, status=0):
    """What a process printed, once it has ended with `status`."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


class Client:
    """A process that stays, because importing torch takes longer than any of the tests.

    Attributes:
        log: File of what it wrote to stderr, and what code that it ran printed.
        answers: The lines that it answered with.
    """

    def __init__(self, environment, folder):
        self.log, self.answers = folder / "client.log", []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([sys.executable, "-c", LOOP], env=environment, stderr=log, **pipes)

    def answer(self, code):
        """What became of `code`: {"result"} or {"error", "message", "all"}."""
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.answers.append(line)
        return json.loads(line)

    def run(self, code):
        """The value that `code` gives to `result`."""
        answer = self.answer(code)
        assert "error" not in answer, f"{answer}\n{self.log.read_text()}"
        return answer["result"]

    def fail(self, code):
        """(class name, message) of the error that `code` raises."""
        answer = self.answer(code)
        assert "error" in answer, answer
        return answer["error"], answer["message"]

    def close(self):
        self.process.kill()  # it has nothing to save, and torch takes seconds to end
        self.process.communicate()
