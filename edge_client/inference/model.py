"""An artefact in onnxruntime: pictures in, probabilities out. An adapter or other classes change it without loading it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edge_client.allocator import give_back
from edge_client.errors import InferenceError
from edge_client.inference.pictures import Pixels
from edge_client.inference.providers import Runtime, with_options
from protocol.findings import first_line
from protocol.messages import TextBank

log = logging.getLogger(__name__)

METADATA = "clipcast"
IMAGES, CLASSES, PROBABILITIES, EMBEDS = "images", "class_embeddings", "probabilities", "image_embeds"
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Facts:
    """What a file says of itself. `adapter_base` is the number that adapters for it carry, None if it takes none."""

    labels: tuple[str, ...]
    flavour: str
    model: str
    model_digest: str
    federation: str
    round: int
    adapter_sha256: str | None
    adapter_base: int | None
    logit_scale: float


@dataclass(frozen=True)
class Scores:
    """Answers to N pictures: `probabilities` (N, C) in the order of the labels, unit `embeddings` (N, D)."""

    probabilities: FloatArray
    embeddings: FloatArray


@dataclass(frozen=True)
class _Adapter:
    """An adapter that is loaded, and the options that use it: these do not keep it alive by themselves."""

    loaded: Any
    options: Any


class Model:
    """A loaded artefact. `run` may be called by several threads at a time."""

    def __init__(self, session: Any, facts: Facts, classes: TextBank | None = None, adapter: _Adapter | None = None) -> None:
        self.facts = facts
        self.labels: tuple[str, ...] = facts.labels if classes is None else classes.classes
        self._session = session
        self._adapter = adapter
        self._classes: dict[str, FloatArray] = {}
        if classes is not None:  # the scale is a constant of the graph
            ratio = classes.logit_scale / facts.logit_scale
            self._classes[CLASSES] = np.ascontiguousarray(ratio * classes.embeddings, np.float32)

    @classmethod
    def open(
        cls, path: Path, runtime: Runtime | None = None, *, adapter: Path | None = None, classes: TextBank | None = None
    ) -> Model:
        """Load a file; raises InferenceError.

        From bytes, which keeps onnxruntime from following references to other files.
        """
        runtime = runtime or Runtime()
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise InferenceError(f"{path}: no such file. `clipcast export` makes one") from error
        except OSError as error:
            raise InferenceError(f"{path} cannot be read: {error.strerror}") from error
        session = _session(data, path, runtime)
        del data
        give_back()
        return cls(session, _facts(session, path)).with_adapter(adapter, classes)

    def with_adapter(self, adapter: Path | None, classes: TextBank | None) -> Model:
        """Return the model with another adapter and other classes, None for the file's own; raises InferenceError.

        The session is shared: nothing is loaded anew but the adapter.
        """
        self._check(classes)
        return Model(self._session, self.facts, classes, None if adapter is None else self._loaded(adapter))

    @property
    def providers(self) -> tuple[str, ...]:
        """With what onnxruntime computes it, best first."""
        return tuple(self._session.get_providers())

    def run(self, images: Pixels) -> Scores:
        """Answer pictures of one size, uint8 (N, H, W, 3); raises InferenceError."""
        options = None if self._adapter is None else self._adapter.options
        try:
            probabilities, embeddings = self._session.run(
                [PROBABILITIES, EMBEDS], {IMAGES: images, **self._classes}, options
            )
        except Exception as error:
            raise InferenceError(f"onnxruntime cannot answer pictures of shape {images.shape}: {error}") from error
        if not np.isfinite(probabilities).all():  # as of a 16-bit model whose sums have overflowed
            raise InferenceError("the model's answer is not finite: try another flavour of export, or another provider")
        return Scores(probabilities, embeddings)

    def _check(self, classes: TextBank | None) -> None:
        if classes is not None and classes.model_digest != self.facts.model_digest:
            raise InferenceError(
                f"the classes are of model {classes.model_digest[:12]}, the file is of {self.facts.model_digest[:12]}: "
                f"their embeddings mean nothing to it"
            )

    def _loaded(self, path: Path) -> _Adapter:
        if self.facts.adapter_base is None:
            raise InferenceError(
                f"a file of flavour {self.facts.flavour} takes no adapter: `clipcast export --flavour adapter` makes one"
            )
        if not path.is_file():
            raise InferenceError(f"{path}: no such adapter")
        try:
            about = onnxruntime.AdapterFormat.read_adapter(str(path))
            base = about.get_model_version()
            adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
            adapter.Load(str(path))
            options.add_active_adapter(adapter)
        except Exception as error:
            raise InferenceError(f"{path} cannot be read as an adapter: {error}") from error
        if base != self.facts.adapter_base:
            raise InferenceError(
                f"{path} is an adapter for another base or other layers ({base}, not {self.facts.adapter_base})"
            )
        return _Adapter(adapter, options)


def _session(data: bytes, path: Path, runtime: Runtime) -> Any:
    """Return a session with the first provider that takes the model, and those behind it; raises InferenceError."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = runtime.threads
    options.log_severity_level = 3  # it warns of inputs with defaults, which are meant
    options.enable_cpu_mem_arena = False  # it keeps what the largest picture needed
    chain = with_options(runtime, data)
    while True:
        try:
            # By itself it would fall back without a word in the log, and with one on stdout.
            return onnxruntime.InferenceSession(data, options, providers=chain, enable_fallback=0)
        except Exception as error:
            if len(chain) == 1:
                raise InferenceError(f"{path}: onnxruntime cannot load it: {error}") from error
            log.warning("%s does not take %s and is not used: %s", chain[0][0], path, first_line(error))
            chain = chain[1:]


def _facts(session: Any, path: Path) -> Facts:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if text is None:
        raise InferenceError(
            f"{path} was not exported by clipcast: it names no labels. `clipcast export` makes one that does"
        )
    try:
        said = json.loads(text)
        lora = said.get("lora")
        return Facts(
            labels=tuple(str(label) for label in said["labels"]),
            flavour=str(said.get("flavour", "fp32")),
            model=str(said["model"]),
            model_digest=str(said["model_digest"]),
            federation=str(said["federation"]),
            round=int(said["round"]),
            adapter_sha256=said.get("adapter_sha256"),
            adapter_base=None if lora is None else int(lora["base"]),
            logit_scale=float(said["logit_scale"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InferenceError(f"{path}: what it says of itself cannot be read ({error}): export it anew") from error
