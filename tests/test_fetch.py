import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import published
import pytest
import torch
from conftest import ROOT

from medblip.pretrained import load_vision
from medblip.towers import locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"

JOB = """
import logging, socket, sys
import torch
from medblip.config import TrainConfig
def no_network(*_):
    raise AssertionError("the job tried the network")
socket.socket.connect = socket.getaddrinfo = no_network
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from medblip.model import MedBLIP
from medblip.words import build_words
config = TrainConfig(data="", run="", deepspeed_config="", preset=sys.argv[1]).model_config()
try:
    model, words = MedBLIP(config, 64, torch.device("cpu")), build_words(config)
    print("features", model.vision(torch.rand(1, 64, 64, 64)).isfinite().all().item())
    print("record ids", words.texts(["The age"])[0].tolist())
except ValueError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.fixture
def hub(tmp_path):
    """A hub on this machine with small checkpoints under the published names; the requests are listed."""
    released = tmp_path / "released"
    published.blip2(released / "Salesforce/blip2-itm-vit-g", num_query_tokens=32)
    published.shard(released / "Salesforce/blip2-itm-vit-g", "safetensors shards")
    (released / "Salesforce/blip2-itm-vit-g/pytorch_model.bin").write_bytes(b"the same weights once more")
    published.gpt2(released / "stanford-crfm/BioMedLM")
    published.shard(released / "stanford-crfm/BioMedLM", "bin")
    (released / "stanford-crfm/BioMedLM/flax_model.msgpack").write_bytes(b"the same weights once more")
    requests = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(f"{self.command} {self.path}")
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                folder = released / parts[2] / parts[3]
                files = [{"rfilename": path.name} for path in sorted(folder.glob("*"))]
                found = json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": files}).encode()
                if "tree" in parts:
                    found = json.dumps(
                        [
                            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
                            for path in sorted(folder.glob("*"))
                        ]
                    ).encode()
            else:
                found = (released / parts[0] / parts[1] / parts[-1]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(found)))
            self.send_header("ETag", f'"{hashlib.sha256(found).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(found)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HOME", "HF_HUB_CACHE")}
    environment = kept | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_what_fetch_brought_is_all_that_a_job_without_a_network_needs(hub, tmp_path, monkeypatch):
    endpoint, requests = hub
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MEDBLIP_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=f"not in the cache {tmp_path}/cache/hub: .*`medblip fetch --preset biomedlm`"):
        locate("Salesforce/blip2-itm-vit-g")

    fetched = python("-m", "medblip.cli", "fetch", "--preset", "biomedlm", HF_ENDPOINT=endpoint)
    assert fetched.returncode == 0, fetched.stderr
    folders = dict(line.split(maxsplit=1) for line in fetched.stdout.splitlines())
    assert set(folders) == {"vision", "qformer", "language"} and folders["vision"] == folders["qformer"]
    assert all(Path(folder).is_relative_to(tmp_path / "cache/hub") for folder in folders.values())
    brought = {path.name for folder in folders.values() for path in Path(folder).iterdir()}
    assert {"model-00002-of-00002.safetensors", "tokenizer.json", "pytorch_model.bin"} <= brought
    assert not any("blip2" in request and "pytorch_model" in request for request in requests)  # nothing twice
    assert not any("flax" in request for request in requests)

    before = len(requests)
    job = python("-c", JOB, "biomedlm", HF_ENDPOINT=endpoint)
    assert job.returncode == 0, job.stderr
    assert f"vision: Salesforce/blip2-itm-vit-g at {COMMIT}, Blip2VisionModel" in job.stdout
    assert f"language: stanford-crfm/BioMedLM at {COMMIT}, GPT2LMHeadModel" in job.stdout
    assert "features True" in job.stdout and "record ids [[2, 5, 6, 3]]" in job.stdout
    assert len(requests) == before

    Path(folders["vision"], "model-00002-of-00002.safetensors").unlink()
    told = f"at {COMMIT}: model-00002-of-00002.safetensors missing: run `medblip fetch --preset biomedlm` again"
    with pytest.raises(ValueError, match=told):
        load_vision(locate("Salesforce/blip2-itm-vit-g"), torch.float32, "eager")


def test_one_checkpoint_can_be_fetched_by_its_hub_id(hub, tmp_path):
    command = ("-m", "medblip.cli", "fetch", "--source", "stanford-crfm/BioMedLM")
    fetched = python(*command, HF_ENDPOINT=hub[0], HF_HOME=str(tmp_path / "hf"))
    assert fetched.returncode == 0, fetched.stderr
    part, folder = fetched.stdout.split()
    assert part == "source" and Path(folder).name == COMMIT and Path(folder).is_relative_to(tmp_path / "hf/hub")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("somebody/model", r"not in the cache .*run `medblip fetch --source somebody/model`"),
        ("microsoft/BioGPT-Large", r"run `medblip fetch --preset biogpt-large`"),
        ("no/such/folder", r"no/such/folder: no such folder or file"),
    ],
)
def test_a_checkpoint_that_is_not_here_is_an_error_with_the_command_that_brings_it(source, told):
    with pytest.raises(ValueError, match=told):
        locate(source)


def test_without_a_network_fetch_says_what_it_could_not_bring(tmp_path):
    fetched = python("-m", "medblip.cli", "fetch", "--preset", "biogpt", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert fetched.returncode == 1 and fetched.stdout == ""
    assert fetched.stderr.startswith("medblip: Salesforce/blip2-itm-vit-g cannot be brought from the hub: ")


def test_fetching_a_tiny_preset_prints_folders_that_exist():
    fetched = python("-m", "medblip.cli", "fetch", "--preset", "tiny", HF_HUB_OFFLINE="1")
    assert fetched.returncode == 0
    assert [line.split()[0] for line in fetched.stdout.splitlines()] == ["vision", "qformer", "language"]
    assert all(Path(line.split(maxsplit=1)[1], "config.json").exists() for line in fetched.stdout.splitlines())
