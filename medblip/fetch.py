"""The towers of a preset made or downloaded ahead, for a job on a node without a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medblip.config import PRESETS, unknown

# The same weights once more, for other frameworks and formats.
NOT_FOR_TORCH = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.tflite", "*.mlmodel", "*.mlpackage/*", "onnx/*", "*.gguf"]


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Make or download the towers of a preset with their tokenizers, and print their folders.

    Examples:
      medblip fetch --preset tiny
      MEDBLIP_HOME=/shared/medblip medblip fetch --preset biomedlm
      medblip fetch --source google-bert/bert-base-uncased
    """

    preset: str = "tiny"
    """The preset whose vision, text and language towers are wanted."""
    source: str | None = None
    """One hub id instead of a preset."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(unknown("preset", self.preset, PRESETS))


def fetch(options: FetchOptions) -> int:
    """Prints one `part folder` line per tower; returns the exit code.

    Raises:
        ValueError: for a tower that does not exist.
        OSError: if a download fails.
    """
    model = PRESETS[options.preset].model
    parts = {"vision": model.vision, "qformer": model.qformer, "language": model.language}
    if options.source:
        parts = {"source": options.source}
    for part, source in parts.items():
        print(f"{part:9} {_bring(source)}")
    return 0


def _bring(source: str) -> str:
    from medblip import towers

    if source.startswith("tiny/") or Path(source).expanduser().exists():
        return towers.locate(source)
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = [file.rfilename for file in HfApi().model_info(source).siblings]
        twice = ["*.bin", "*.pth", "*.pt"] if any(name.endswith(".safetensors") for name in files) else []
        return snapshot_download(source, cache_dir=towers.hub_cache(), ignore_patterns=[*NOT_FOR_TORCH, *twice])
    except Exception as error:  # where there is no network, the hub's client raises what its own client raises
        raise OSError(f"{source} cannot be brought from the hub: {error}") from error
