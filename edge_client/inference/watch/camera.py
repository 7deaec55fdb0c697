"""Frames of a camera through OpenCV: a V4L2 device by number or path, a GStreamer pipeline, or a video file."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_client.errors import InferenceError
from edge_client.inference.pictures import Pixels

SINK = "appsink"


def is_camera(source: str) -> bool:
    """Whether this names a camera rather than a folder: a number, /dev/video..., or a pipeline that ends in appsink."""
    return source.isdigit() or source.startswith("/dev/video") or SINK in source


class Camera:
    """An open camera. `frame` returns the newest picture; raises InferenceError when there are no more."""

    def __init__(self, source: str) -> None:
        import cv2

        self._source = source
        self._cv2: Any = cv2
        if SINK in source:
            self._capture = cv2.VideoCapture(source, cv2.CAP_GSTREAMER)
        else:
            self._capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
        if not self._capture.isOpened():
            hint = " This OpenCV may lack GStreamer: PyPI's does, JetPack's has it." if SINK in source else ""
            raise InferenceError(f"{source!r} cannot be opened as a camera.{hint} `v4l2-ctl --list-devices` lists cameras")
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest frame, not one that has waited

    def frame(self) -> Pixels:
        """Return a frame as uint8 (height, width, 3), red first."""
        good, blue_first = self._capture.read()
        if not good:
            raise InferenceError(f"{self._source!r} gives no more frames: was it unplugged, or is the video over?")
        return np.ascontiguousarray(self._cv2.cvtColor(blue_first, self._cv2.COLOR_BGR2RGB), np.uint8)

    def close(self) -> None:
        """Let the camera go."""
        self._capture.release()
