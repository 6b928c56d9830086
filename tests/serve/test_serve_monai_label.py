"""MONAI Label's own client against the server."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medsa_deploy import Structure, load, segment_volume
from medsa_deploy.images import read_volume

pytestmark = [
    pytest.mark.filterwarnings("ignore:'cgi' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # files that the client opens
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.skipif(sys.version_info >= (3, 13), reason="the client needs cgi, gone in 3.13"),
    pytest.mark.skipif(
        importlib.util.find_spec("monailabel") is None,
        reason="needs monailabel, without what it needs: pip install --no-deps monailabel==0.8.5",
    ),
]


def test_info_session_infer(serving, bundle: Path, volume_file: Path, tmp_path: Path) -> None:
    from monailabel.client import MONAILabelClient
    from monailabel.client.client import MONAILabelClientException

    client = MONAILabelClient(serving(bundle).url, tmpdir=str(tmp_path))
    assert list(client.info()["models"]) == [bundle.stem]
    session = client.create_session(str(volume_file))["session_id"]
    assert client.get_session(session)["image_shape"] == [48, 40, 12]
    clicks = {"foreground": [[20, 15, 5], [30, 20, 5]], "background": [[4, 3, 5]]}
    path, params = client.infer(bundle.stem, "", clicks, session_id=session)
    written = nibabel.load(path)
    volume = read_volume(volume_file)
    structure = Structure(points=((20, 15, 5), (30, 20, 5), (4, 3, 5)), labels=(1, 1, 0))
    with load(bundle) as opened:
        labels = segment_volume(opened, volume, [structure]).labels
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)
    np.testing.assert_allclose(written.affine, volume.affine, atol=1e-5)
    assert params["label_names"] == {"mask": 1}
    path, _ = client.infer(bundle.stem, "", clicks, file=str(volume_file))
    np.testing.assert_array_equal(np.asarray(nibabel.load(path).dataobj), labels)
    client.remove_session(session)
    with pytest.raises(MONAILabelClientException):
        client.get_session(session)
