"""Where a run is sent to, and where its files may go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from popmtl.errors import RequestError
from popmtl.runs.folder import RunFolder
from popmtl.runs.trust import SQLITE, without_credentials
from popmtl.tracking.links import is_served

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Target:
    """Where a run is sent to.

    Attributes:
        uri: the tracking URI, with its credentials.
        artifacts: where a new experiment's files go; None for the place that MLflow takes by itself.
        within: the folder that files on this machine must go to; None for any.
    """

    uri: str
    artifacts: str | None
    within: Path | None

    def check(self, artifacts: str) -> str:
        """Checks where the server, or the database, has files go: MLflow would send its tokens along; gives it back.

        Raises:
            RequestError: to another server, or to files where they may not go.
        """
        ours, theirs = urlsplit(self.uri), urlsplit(artifacts)
        if theirs.scheme in ("http", "https", "mlflow-artifacts"):
            proxied = theirs.scheme == "mlflow-artifacts"
            theirs = theirs._replace(scheme=ours.scheme) if proxied else theirs
            right = is_served(self.uri) and (_server(theirs) == _server(ours) or (proxied and not theirs.netloc))
        elif theirs.scheme in ("", "file"):
            right = not is_served(self.uri) or ours.hostname in LOOPBACK
            if right and self.within:
                path = Path(unquote(theirs.path)).resolve()
                right = theirs.hostname in (None, "", "localhost") and path.is_relative_to(self.within)
        else:
            right = theirs.scheme not in ("ftp", "sftp") and not self.within
        if not right:
            raise RequestError(
                f"MLflow has the run's files go to {without_credentials(artifacts)}, which nothing is sent to: it is "
                f"not of {without_credentials(self.uri)}"
            )
        return artifacts


def artifacts_of(uri: str, folder: RunFolder) -> str | None:
    """Where an experiment's files go, whatever the journal says; None for the place that MLflow takes by itself.

    That is the server's own, or, with a database alone, ./mlruns, whatever folder that may be.
    """
    if is_served(uri):
        return None
    if folder.files.path:
        return (folder.storage.resolve() / "mlartifacts").as_uri()
    return (
        (Path(uri.removeprefix(SQLITE)).resolve().parent / "mlartifacts").as_uri() if uri.startswith(SQLITE) else None
    )


def _server(parts: SplitResult) -> tuple[str, str | None, int | None]:
    """What a request to a URI goes to."""
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
