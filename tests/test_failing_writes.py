"""What HDF5 fails to write is told, whichever write it is (all verbs: ``scripts/kill_test.py``)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "scripts" / "failing_calls.c"
WRITES = """
import ctypes, errno, os, sys
import numpy as np
from pathlib import Path
from carvae.data.atomic import replacing_file
from carvae.data.hdf5 import writing_hdf5

calls = ctypes.CDLL(os.environ["LD_PRELOAD"])
target = Path(sys.argv[1])

def write():
    with replacing_file(target) as scratch, writing_hdf5(scratch) as file:
        for name in "abc":
            file[name] = np.arange(40)
        file.create_dataset("d", data=np.arange(4000), chunks=(500,), compression="gzip")
        file["a"][3] = 7

write()
whole = target.read_bytes()
number, codes = 0, []
while 0 not in codes:
    number += 1
    target.write_bytes(b"older")
    process = os.fork()
    if process == 0:
        calls.arm(number, errno.EIO)
        try:
            write()
        except OSError:
            os._exit(1)
        os._exit(2 if calls.seen(-1) >= number else 0)  # 2: it did without the call
    codes.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    assert target.read_bytes() == (b"older" if codes[-1] == 1 else whole), f"call {number} was lost"
    assert [p.name for p in target.parent.iterdir()] == [target.name]
print(codes.count(1))
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="needs Linux and gcc")
def test_no_write_of_hdf5_is_lost_in_silence(tmp_path: Path) -> None:
    library = tmp_path / "failing_calls.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    (tmp_path / "out").mkdir()
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", WRITES, tmp_path / "out" / "a.h5"],
        check=False, capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert int(done.stdout) > 10
