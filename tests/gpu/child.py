"""A replacement for the child process of a trial, without a framework; see test_trial.py."""

import os
import signal
import sys
import time
from pathlib import Path

from common.program import start

start()  # makes the child end with its parent

_, behavior, log, *_ = sys.argv
with Path(log).open("a") as file:
    file.write(f"{os.getpid()}\n")
if behavior == "hang":
    time.sleep(20)
elif behavior == "error":
    sys.exit("line\nImportError: no NVRTC")
elif behavior.startswith("SIG"):
    os.kill(os.getpid(), signal.Signals[behavior])
elif behavior == "slow":
    time.sleep(1)
print("noise")
reasons = {"wrong": "is off by 1.0e-02", "memory": os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"]}
print(f"verdict: {reasons.get(behavior, '')}")
