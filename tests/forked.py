"""Runs of `compress` in forked processes, which need not import anything and can be killed.

A script of its own, `python forked.py JOBS`, that prints as JSON what it found for each job: a test process has threads,
which do not survive a fork, and what one of them holds at that moment is held for ever in the child. So this one never
has a second thread: BLAS gets none, and the store at which processes meet is a process, too.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read as numpy is imported

import contextlib
import faulthandler
import json
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import torch

import secateur
from secateur.errors import SecateurError
from secateur.pipeline.recorder import Recorder
from secateur.unfinished import kept_inputs

torch.set_num_threads(1)
os.fsync = lambda handle: None  # it is processes that die here, and not the machine

# A process that hangs says where, and ends; none takes a tenth of this.
HANGS_AFTER_S = 180


def forked(work):
    """Run a function in a new process; its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                work()
            code = 0
        except SecateurError as error:
            code = error.exit_code
            # In one piece: others may write at the same time.
            os.write(1, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    return child


def wait(child):
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def kills(job):
    """Kill runs at random moments, once or several times each, resume them, and compare with an uninterrupted run."""
    root = Path(job["root"])
    recipe = secateur.Recipe.from_dict(job["recipe"])

    def compress(out, resume):
        return lambda: secateur.compress(job["model"], out, recipe, resume=resume)

    began = time.monotonic()
    assert wait(forked(compress(root / "whole", False))) == 0
    took = time.monotonic() - began
    wanted = contents(root / "whole")
    draw = random.Random(job["seed"])
    found = []
    for i in range(job["kills"]):
        out = root / f"killed-{i}"
        partial = out.with_name(f"{out.name}.partial")
        deaths = []
        for again in range(1 + i % 3):
            child = forked(compress(out, again > 0))
            time.sleep(draw.uniform(0, took))
            os.kill(child, signal.SIGKILL)
            killed = wait(child) == -signal.SIGKILL
            # The journal is the last to go of a run that is over.
            journal = partial / "journal.json"
            if out.exists() and not journal.exists():
                break
            records = len(json.loads(journal.read_text())["records"]) if journal.exists() else 0
            deaths.append([killed, records])
        over = out.exists() and not journal.exists()
        resumed = 0 if over else wait(forked(compress(out, True)))
        same = resumed == 0 and contents(out) == wanted and (over or not partial.exists())
        found.append({"deaths": deaths, "resumed": resumed, "same": same})
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
    return found


def ranks(job):
    """Runs of several processes as torchrun would start them, each as `[processes, out]`; one of them may be killed."""
    found = []
    for size, out in job["runs"]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        store = forked(lambda port=port: keep_store(port))
        children = []
        for rank in range(size):

            def work(rank=rank, size=size, out=out, port=port):
                os.environ.update(
                    WORLD_SIZE=str(size),
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                    TORCHELASTIC_USE_AGENT_STORE="True",
                )
                recipe = secateur.Recipe.from_dict(job["recipe"])

                put = Recorder.put

                def dying(recorder, solution, in_place):
                    if [rank, recorder.number_of[solution.name]] == job.get("dies"):
                        os.kill(os.getpid(), signal.SIGKILL)
                    put(recorder, solution, in_place)

                Recorder.put = dying
                secateur.compress(job["model"], out, recipe, resume=job.get("resume", False))

            children.append(forked(work))
        found.append([wait(child) for child in children])
        os.kill(store, signal.SIGKILL)
        wait(store)
    return found


def keep_store(port):
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    signal.pause()
    del store


if __name__ == "__main__":
    found = []
    usual = kept_inputs._HIDDEN_EVERY, kept_inputs._HIDDEN_SHARE
    for job in json.loads(sys.argv[1]):
        kept_inputs._HIDDEN_EVERY, kept_inputs._HIDDEN_SHARE = (
            job.get("hidden_every", usual[0]),
            job.get("hidden_share", usual[1]),
        )
        found.append({"kills": kills, "ranks": ranks}[job["what"]](job))
    print(json.dumps(found))
