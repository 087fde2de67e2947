"""Imported by Python as it starts, where this folder is in PYTHONPATH: the process ends when its parent does.

So no rank outlives its launcher, and no launcher a pytest that is killed.
"""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
