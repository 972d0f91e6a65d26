"""The towers of a preset made or downloaded ahead, for a job on a node without a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medblip.config import PRESETS, unknown

# The same weights once more, for other frameworks.
NOT_FOR_TORCH = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.tflite"]


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Make or download the towers of a preset, and print their folders.

    Examples:
      medblip fetch --preset tiny
      MEDBLIP_HOME=/shared/medblip medblip fetch --preset tiny
    """

    preset: str = "tiny"
    """The preset whose vision, text and language towers are wanted."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(unknown("preset", self.preset, PRESETS))


def fetch(options: FetchOptions) -> int:
    """Prints one `part folder` line per tower; returns the exit code.

    Raises:
        ValueError: for a tower that does not exist.
        OSError: if a download fails.
    """
    from medblip.towers import locate

    model = PRESETS[options.preset].model
    for part, source in (("vision", model.vision), ("qformer", model.qformer), ("language", model.language)):
        folder = locate(source)
        if not Path(folder).is_dir():
            from huggingface_hub import snapshot_download

            folder = snapshot_download(folder, ignore_patterns=NOT_FOR_TORCH)
        print(f"{part:9} {folder}")
    return 0
