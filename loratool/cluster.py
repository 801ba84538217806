"""A Dask cluster as an executor. The package `distributed` is optional, and imported only here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path

from loratool.errors import ChoiceNeeded, OutputRefused, Problem

PATIENCE = 5  # seconds for a scheduler to answer
RETRIES = 2  # of a call that fails on a worker, beside those that Dask does for workers it has lost


@contextmanager
def dask_executor(address: str) -> Iterator[Executor]:
    """The cluster of the scheduler at `address` ("host:8786"), or of its scheduler file, until the block ends.

    Raises ChoiceNeeded (E-OPTION) where `distributed` is not installed or the file is not there, OutputRefused
    (E-WORKER) if no scheduler answers. For the command line: it silences the log of `distributed`.
    """
    try:
        from distributed import Client
    except ImportError:
        what = "a Dask cluster needs the package `distributed`, which is not installed"
        raise ChoiceNeeded(Problem("E-OPTION", what, hint="pip install 'loratool[dask]'")) from None
    for name in ("distributed", "distributed.client", "tornado.application"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a lost connection is a traceback there
    is_file = address.endswith(".json") or Path(address).is_file()
    if is_file and not Path(address).is_file():
        what, hint = f"there is no scheduler file {address}", "start `dask scheduler --scheduler-file` first"
        raise ChoiceNeeded(Problem("E-OPTION", what, hint=hint))
    place = {"scheduler_file": address} if is_file else {"address": address}
    try:
        client = Client(**place, timeout=PATIENCE, set_as_default=False)
    except Exception as error:  # an address that is none, a name nobody has, a port nobody listens at
        what = f"no Dask scheduler answers at {address}: {error}"
        raise OutputRefused(Problem("E-WORKER", what, hint="is it started, and is this its address?")) from error
    with client:
        yield client.get_executor(pure=False, retries=RETRIES)
