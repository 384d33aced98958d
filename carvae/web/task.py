"""What the server asks of the process of a job, and what that answers: one line of JSON each."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from carvae.web.limits import Limits


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be done with a query."""

    do: Literal["look", "run"]
    query: str
    archive: str
    """Zip that the query is packed in; empty for none."""
    demo: bool
    """Whether the query is still to be simulated."""
    model: str
    result: str
    """Folder for the results."""
    stem: str
    name: str
    """The client's name of the query, for messages and the script."""
    hashes: dict[str, str]
    """The client's name of each file -> sha256."""
    settings: dict[str, Any]
    """Settings that differ from the defaults, as of `Config`."""
    limits: Limits

    def line(self) -> str:
        """The task as a line."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, line: str) -> Task:
        """The task of a line."""
        fields = json.loads(line)
        return cls(**fields | {"limits": Limits(**fields["limits"])})
