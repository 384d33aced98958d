"""The process of one job: it is started ahead of time, takes one task, tells how far it is, and ends.

What it says to the server are lines of JSON on its standard output, which nothing else writes to.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shlex
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from carvae.errors import CarvaeError
from carvae.web.script import repeat_script
from carvae.web.task import Task

LABELLING, REPORT = "Labelling cells", "Drawing the report"
STARTED, LABELLED, LAID_OUT = 0.02, 0.3, 0.5
"""Shares of the work that are done when labelling begins, when the report begins, and when its map is laid out."""
Tell = Callable[[dict[str, Any]], None]


def main() -> None:
    """Wait for a task, do it, and say what came of it."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1) as channel:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        _be_first_to_go()
        import carvae.check
        import carvae.predict
        import carvae.report  # noqa: F401 (slow to import: done before there is a task)

        if line := sys.stdin.readline():
            _serve(Task.read(line), channel)


def _serve(task: Task, channel: TextIO) -> None:
    def tell(event: dict[str, Any]) -> None:
        channel.write(json.dumps(event) + "\n")

    threading.Thread(target=_follow_server, daemon=True).start()
    _bound_memory(task)
    handler = _Forward(task, tell)
    logging.getLogger("carvae").addHandler(handler)
    logging.getLogger("carvae").setLevel(logging.INFO)
    try:
        tell({"look": _look, "run": _run}[task.do](task, tell))
    except CarvaeError as error:
        tell({"error": handler.plain(str(error))})
    except MemoryError:
        tell({"error": memory_sentence(task.name)})
    except RuntimeError as error:  # torch's word for it
        if "allocate memory" not in str(error):
            raise
        tell({"error": memory_sentence(task.name)})
    except OSError as error:
        place = f": {Path(os.fsdecode(error.filename)).name}" if error.filename else ""
        tell({"error": handler.plain(f"{error.strerror or error}{place}")})


def memory_sentence(name: str) -> str:
    """What is said where memory ran out."""
    return (
        f"{name} needs more memory than this machine has free; close other programs, label fewer samples at a time, or "
        "give an .h5ad or a 10x .h5, which are read in parts, in place of matrix.mtx"
    )


class _Forward(logging.Handler):
    """Hands what carvae says to the server, without the paths of this machine."""

    def __init__(self, task: Task, tell: Tell) -> None:
        super().__init__(logging.INFO)
        self.task, self.tell = task, tell

    def emit(self, record: logging.LogRecord) -> None:
        if not record.getMessage().startswith("wrote "):
            self.tell({"say": self.plain(record.getMessage())})

    def plain(self, text: str) -> str:
        """The text with the names that the user knows."""
        query, result = Path(self.task.query), Path(self.task.result)
        for path, name in ((query, self.task.name), (query.parent, ""), (result, ""), (Path(self.task.model), "")):
            text = text.replace(f"{path}/", f"{name}/" if name else "").replace(str(path), name or path.name)
        return text


def _look(task: Task, tell: Tell) -> dict[str, Any]:
    """Unpack, or simulate, and see what is there."""
    from carvae.check import of_query
    from carvae.config import Config
    from carvae.model.bundle import load
    from carvae.model.cell_clones import Asked

    bundle, query = load(task.model), Path(task.query)
    if task.demo:
        from carvae.web.sample import write_sample

        tell({"stage": "Drawing a sample from the model", "share": 0.1})
        write_sample(bundle, query)
    if task.archive:
        query = _unpacked(task, tell)
    tell({"stage": "Looking at the counts", "share": 0.6})
    config = Config.parse(task.settings)
    checked = of_query(query, config, bundle, Asked(None, config.clones, config.seed))
    return {"found": checked.to_dict() | {"query": task.name}, "query": str(query)}


def _unpacked(task: Task, tell: Tell) -> Path:
    """The folder of what was packed: the innermost one in which everything lies."""
    from carvae.web.archive import unpack

    folder = Path(task.query)
    unpack(Path(task.archive), folder, task.limits, lambda share: tell({"stage": "Unpacking", "share": share / 2}))
    Path(task.archive).unlink()
    while len(inside := list(folder.iterdir())) == 1:
        folder = inside[0]
        if not folder.is_dir():
            break
    return folder


def _run(task: Task, tell: Tell) -> dict[str, Any]:
    """Label the cells, and write everything that can be downloaded."""
    import pandas as pd

    from carvae.config import Config
    from carvae.data.results import cells_path, samples_path
    from carvae.model.cell_clones import Asked
    from carvae.predict import run
    from carvae.report import run as write_report

    tell({"stage": LABELLING, "share": STARTED})

    def labelled(done: int, n_cells: int) -> None:
        share = STARTED + (LABELLED - STARTED) * done / n_cells
        tell({"stage": LABELLING, "share": share, "cells": [done, n_cells]})

    def drawn(done: int, n_sections: int) -> None:
        tell({"stage": REPORT, "share": LAID_OUT + (1 - LAID_OUT) * done / n_sections})

    config, model = Config.parse(task.settings), Path(task.model)
    out = Path(task.result) / f"{task.stem}_carvae.h5ad"
    asked = Asked(None, config.clones, config.seed)
    run(Path(task.query), model, out, config.predict, label=True, asked=asked, progress=labelled)
    tell({"stage": REPORT, "share": LABELLED})
    page = out.with_name(f"{task.stem}_report.html")
    command = shlex.join(["carvae", "report", out.name, "--model", model.name, "--out", page.name])
    results = {"annotated": out, "cells": cells_path(out), "samples": samples_path(out)}
    try:
        write_report(out, page, model=model, clones=config.clones, seed=config.seed, command=command, progress=drawn)
        results["report"] = page
    except CarvaeError as error:  # the cells are labelled, and that is not to be lost
        tell({"say": f"there is no report: {error}"})
    script = out.with_name(f"{task.stem}_repeat.sh")
    script.write_text(repeat_script(task), encoding="utf-8")
    samples = pd.read_csv(samples_path(out), dtype={"sample": str}, na_filter=False)
    shown = [name for name in ("sample", "n_cells", "n_cells_used", "verdict", "verdict_reason") if name in samples]
    rows = json.loads(samples[shown].to_json(orient="records"))
    results["script"] = script
    return {"samples": rows, "results": {key: str(path) for key, path in results.items()}}


def _be_first_to_go() -> None:
    """Where memory runs out, the system is to end this process and not the server."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _bound_memory(task: Task) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    most = int(task.limits.memory_share * total)
    with contextlib.suppress(OSError, ValueError):  # macOS knows the limit and does not keep it
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _follow_server() -> None:
    """End at once where the server is gone: its end of the pipe is closed then."""
    while os.read(sys.stdin.fileno(), 4096):  # not through sys.stdin, whose lock the interpreter wants when it ends
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
