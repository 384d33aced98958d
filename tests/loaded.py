"""What the server of ``apart.py`` loads, once for all the processes that are forked from it."""

import h5py
import numba
import numpy as np

import carvae.cli
import carvae.export
import carvae.predict
import carvae.report
import carvae.reproduce
import carvae.train  # noqa: F401 - to have them loaded is what this is for

# LLVM and HDF5 end a process where they get no memory for their own beginning.
numba.njit(lambda n: np.zeros(n).sum())(2)
h5py.File.in_memory().close()
