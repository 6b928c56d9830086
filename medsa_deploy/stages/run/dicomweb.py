"""Series on a DICOMweb server → files, and files → the server (QIDO, WADO, STOW; extra `node`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsa_deploy.errors import ImageError, MissingDependencyError, one_line


@dataclass(frozen=True, kw_only=True)
class WebSeries:
    """A series, or all of a study, on a DICOMweb server."""

    url: str
    """Of the service, such as http://localhost:8042/dicom-web."""
    study: str
    series: str | None = None

    def fetch(self, folder: Path) -> list[Path]:
        """Write every image into `folder`, one file each; ImageError if there are none."""
        client = _client(self.url)
        try:
            if self.series is None:
                datasets = client.retrieve_study(self.study)
            else:
                datasets = client.retrieve_series(self.study, self.series)
        except Exception as e:  # of the connection, of HTTP, or of what came
            raise ImageError(
                f"{self.url}: study {self.study} cannot be fetched: {one_line(e)}; expected a "
                "DICOMweb service that has it"
            ) from e
        paths = []
        for number, dataset in enumerate(datasets):
            path = folder / f"{number:06d}.dcm"
            dataset.save_as(path, enforce_file_format=True)
            paths.append(path)
        if not paths:
            raise ImageError(f"{self.url} has no images of study {self.study}")
        return paths


def store_files(url: str, paths: Sequence[Path]) -> None:
    """Store DICOM files on a server; ImageError if it does not take each of them."""
    import pydicom

    client = _client(url)
    try:
        answer = client.store_instances([pydicom.dcmread(path) for path in paths])
    except Exception as e:  # of the connection or of HTTP
        raise ImageError(
            f"{url}: {', '.join(path.name for path in paths)} cannot be stored: {one_line(e)}; "
            "expected a DICOMweb service that takes STOW"
        ) from e
    failed = answer.get("FailedSOPSequence") or ()
    if failed:
        reason = failed[0].get("FailureReason", 0)
        raise ImageError(f"{url} refused {len(failed)} of {len(paths)} files: 0x{reason:04X}")


def _client(url: str) -> Any:
    """The library's client, imported when it is needed."""
    try:
        from dicomweb_client.api import DICOMwebClient
    except ImportError as e:
        raise MissingDependencyError("dicomweb-client", extra="node", purpose="DICOMweb") from e
    try:
        client = DICOMwebClient(url)
        client.set_http_retry_params(retry=False)  # it would try for half a minute
        return client
    except (TypeError, ValueError) as e:
        raise ImageError(f"{url!r} is no address of a DICOMweb service: {one_line(e)}") from e
