"""napari with its unmodified plugin: connect, click, undo → the masks it shows, as an .npz.

Run by an interpreter that has napari: python napari_clicks.py URL IMAGE.npy MASKS.npz
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import napari
import numpy as np
from napari_nninteractive.widget_main import nnInteractiveWidget
from qtpy.QtWidgets import QApplication

SECONDS = 300
POINT = 0
"""Index of the plugin's button for points."""


def wait(condition: Callable[[], bool]) -> None:
    """Let the window work until something is true."""
    limit = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > limit:
            raise SystemExit("napari did not get that far")
        QApplication.processEvents()
        time.sleep(0.02)


def main(url: str, image: str, output: str) -> None:
    """Two clicks and an undo."""
    viewer = napari.Viewer()
    viewer.add_image(np.load(image), name="image")
    widget = nnInteractiveWidget(viewer)
    viewer.window.add_dock_widget(widget)
    widget.server_url_edit.setText(url)
    widget.init_button.click()
    wait(lambda: widget.label_layer_name in viewer.layers)
    widget.interaction_button.buttons[POINT].click()
    wait(lambda: widget.point_layer_name in viewer.layers)
    masks = {"propagate": np.array(widget.propagate_ckbx.isChecked())}
    for name, place in (("first", (6, 18, 20)), ("second", (6, 3, 40))):
        viewer.layers[widget.point_layer_name].add(place)
        masks[name] = viewer.layers[widget.label_layer_name].data.copy()
    widget.on_undo()
    masks["undone"] = viewer.layers[widget.label_layer_name].data.copy()
    np.savez(output, **masks)
    viewer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
