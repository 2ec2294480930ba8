"""What an actor forks does not outlive it."""

import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

SCRIPT = """
import os
import signal
import sys
import time
from popmtl.distributed import orphans

orphans.LOOK_SECONDS = 0.05
orphans.end_forks_with_their_parents()
reader, writer = os.pipe()
child = os.fork()
if not child:
    if sys.argv[1] == "grandchild":
        child = os.fork()
        if child:
            time.sleep(0.5)
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it has ended before its parent"
            os.write(writer, str(child).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
os.close(writer)
if sys.argv[1] == "grandchild":
    print(os.read(reader, 100).decode(), flush=True)
else:
    time.sleep(0.5)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "it has ended before its parent"
    print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("which", ["child", "grandchild"])
def test_a_fork_ends_with_its_parent(which):
    command = [sys.executable, "-c", SCRIPT, which]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        forked = int(process.stdout.readline())
        with suppress(psutil.NoSuchProcess):
            psutil.Process(forked).wait(10)
        assert process.wait(10) == -9
