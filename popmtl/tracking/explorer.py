from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from popmtl.runs.front import Front


@dataclass(frozen=True)
class Loading:
    run: str
    models: Mapping[int, str] = field(default_factory=dict)
    picker: str | None = None


def explorer_page(front: Front, title: str, history: Sequence[tuple[int, float]], loading: Loading) -> str:
    return "<html></html>"
