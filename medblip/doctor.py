"""`medblip doctor`: what would stop or spoil a training job on this machine, in seconds and all at once.

Rank 0 of every job asks the same questions before anything is built. A FAIL would end the job later; a warning would
not, but costs time or is easily overlooked.
"""

from __future__ import annotations

import glob
import json
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from medblip.config import PRESETS, TrainConfig, is_url, unknown

if TYPE_CHECKING:  # importing torch takes seconds, and `--help` must not wait for it
    from medblip.distributed import Control, Rank
    from medblip.shards import ShardIndex

Read = TypeVar("Read")
OK, WARNING, FAIL = "ok", "warning", "FAIL"
MIN_OPEN_FILES = 1024
MIN_SHM_BYTES = 1_000_000_000
"""NCCL's and torch's shared memory on a node; containers often come with 64 MB."""
GPU_FILES = "/dev/nvidia[0-9]*"
NO_GPUS = ("", "-1", "NoDevFiles")
"""CUDA_VISIBLE_DEVICES of a process that is to see no GPU; the last is Slurm's."""
LIBAIO_HEADERS = ("/usr/include/libaio.h", "/usr/local/include/libaio.h")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Look for what would stop a training job here. Exit code 1: something would.

    Examples:
      medblip doctor
      medblip doctor --data shards/ --run runs/x --preset biomedlm --deepspeed-config ds_configs/zero3.json --ranks 8
    """

    data: str | None = None
    """Folder of shards or its URL."""
    run: str | None = None
    """Run folder, new or to go on with. If it was begun, its frozen towers are loaded and compared."""
    deepspeed_config: str | None = None
    """DeepSpeed JSON."""
    preset: str | None = None
    """Model of the job. Without it: the one that the run was begun with, of a new run `tiny`."""
    lm: str | None = None
    """Another language model than the preset's, as in train.py."""
    patch_edge: int | None = None
    """Edge of a patch in voxels, as in train.py."""
    global_batch: int | None = None
    """Samples per optimizer step, as in train.py."""
    micro_batch: int | None = None
    """Samples per rank and forward pass, as in train.py."""
    ranks: int | None = None
    """Ranks of the job. Without it: one for each GPU here, at least one."""
    json: bool = False
    """Print a JSON list instead of the table."""

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(unknown("preset", self.preset, PRESETS))
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"--ranks must be at least 1, not {self.ranks}")


class Finding(NamedTuple):
    """One answer: what was looked at, `ok`, `warning` or `FAIL`, what was found and what to do."""

    about: str
    state: str
    found: str
    advice: str = ""


def doctor(options: DoctorOptions) -> int:
    """Prints all findings; returns 1 if one of them would stop the job."""
    import logging

    import torch

    from medblip.distributed import log

    log.setLevel(logging.WARNING)
    names = ("data", "run", "deepspeed_config", "preset", "lm", "patch_edge", "global_batch", "micro_batch")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    findings: list[Finding] = []
    config = TrainConfig(**{"data": "", "run": "", "deepspeed_config": ""} | given)
    if config.run:
        config = _ask(findings, "config.json", _begun_with(Path(config.run), given)) or config
    findings += examine(config, options.ranks or max(1, torch.cuda.device_count()), is_ours=False)
    if config.run:
        _ask(findings, "run lock", _lock(Path(config.run)))
        _ask(findings, "frozen towers", _fingerprints(config))
    if options.json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        print(_table(findings))
    return int(any(finding.state == FAIL for finding in findings))


def check(config: TrainConfig, rank: Rank, control: Control) -> None:
    """The same questions at the start of a job, on rank 0; warnings are logged. A collective.

    Raises:
        ValueError: on all ranks, with everything that would stop the job and what to do.
    """
    from medblip.distributed import log

    findings = examine(config, rank.world, is_ours=True) if rank.is_main else []
    for finding in findings:
        if finding.state == WARNING:
            log.warning("%s: %s; %s", *(finding.about, finding.found, finding.advice))
    faults = control.from_main([finding for finding in findings if finding.state == FAIL])
    if len(faults) == 1:
        raise ValueError(_sentence(faults[0]))
    if faults:
        lines = "".join(f"\n  {fault.about}: {_sentence(fault)}" for fault in faults)
        raise ValueError(f"{len(faults)} things would stop this job:{lines}")


def examine(config: TrainConfig, ranks: int, is_ours: bool) -> list[Finding]:
    """All findings about a job of so many ranks; what needs an option that is empty is left out.

    Args:
        config: the job.
        ranks: its ranks, over all nodes.
        is_ours: this process is the job, and holds the run folder's lock.
    """
    findings: list[Finding] = []
    _ask(findings, "device", _device(ranks))
    _ask(findings, "limits", _limits(ranks))
    _ask(findings, "rendezvous", _rendezvous(ranks, is_ours))
    index = None
    if config.run:
        _ask(findings, "run folder", _run_folder(Path(config.run)))
        config = _ask(findings, "options", _options(config, ranks)) or config
    if config.data:
        index = _ask(findings, "shards", _shards(config))
    engine = _ask(findings, "batches", _batches(config, ranks, index))
    _ask(findings, "towers", _towers(config))
    _ask(findings, "network", _network(config))
    if engine is not None:
        _ask(findings, "NVMe offload", _nvme(engine))
    if not any(finding.state == FAIL and finding.about in ("towers", "shards") for finding in findings):
        _ask(findings, "memory and disk", _room(config, ranks, engine or {}, index))
    return findings


def _ask(findings: list[Finding], about: str, question: Generator[Finding, None, Read]) -> Read | None:
    """Adds the answers to a question and returns what it read; what it raises is an answer, its advice in the words.

    An error that no question is known to raise is only a warning: it may be the question that is at fault.
    """
    try:
        while True:
            findings.append(next(question))
    except StopIteration as end:
        return end.value
    except (ValueError, OSError) as error:
        findings.append(Finding(about, FAIL, str(error)))
    except Exception as error:
        found = f"could not be looked at ({type(error).__name__}: {error})"
        findings.append(Finding(about, WARNING, found, "everything else was; the job may meet this too"))
    return None


def _device(ranks: int) -> Iterator[Finding]:
    import torch

    from medblip.model import resolve_attention

    version = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
        found = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, {version}, CUDA {torch.version.cuda}"
        yield Finding("device", OK, f"{found}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            yield Finding("device", WARNING, "these GPUs compute no bf16", "take ds_configs/zero2_fp32.json")
        kernel = resolve_attention("vision", torch.device("cuda", 0))
        hint = "" if kernel == "flash_attention_2" else ", which has its own flash kernel; flash-attn is not installed"
        yield Finding("attention", OK, f"{kernel}{hint}")
        return
    if glob.glob(GPU_FILES):
        if os.environ.get("CUDA_VISIBLE_DEVICES") not in NO_GPUS:
            found = f"there is an NVIDIA driver, but {version} sees no GPU"
            yield Finding("device", FAIL, found, "install a torch build for its CUDA")
            return
        # On purpose (CPU ranks), or because the Slurm job asked for none.
        found = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides this node's GPUs"
        yield Finding("device", WARNING, found, "unset it, or ask Slurm for GPUs, unless the CPU is to train")
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    yield Finding("device", OK, f"CPU with {os.cpu_count()} cores, {version}, gloo, eager attention")
    if not has_bf16:
        yield Finding(
            "device", WARNING, "this CPU computes bf16 several times slower", "take ds_configs/zero2_fp32.json"
        )


def _limits(ranks: int) -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_few = 0 <= soft < MIN_OPEN_FILES
    yield Finding("open files", WARNING if is_few else OK, f"at most {soft} a process", "ulimit -n 65536" * is_few)
    if ranks > 1 and os.path.isdir("/dev/shm"):
        free_bytes = shutil.disk_usage("/dev/shm").free
        is_small = free_bytes < MIN_SHM_BYTES
        advice = "give the container more (docker --shm-size=8g), or --ipc=host"
        yield Finding("/dev/shm", WARNING if is_small else OK, f"{_gb(free_bytes)} free", advice * is_small)


def _rendezvous(ranks: int, is_ours: bool) -> Iterator[Finding]:
    if "SLURM_JOB_ID" in os.environ:
        names = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_JOB_NODELIST")
        found = ", ".join(f"{name.lower()} {os.environ[name]}" for name in names if name in os.environ)
        yield Finding("Slurm", OK, found)
        gpus, tasks = (os.environ.get(name, "") for name in ("SLURM_GPUS_ON_NODE", "SLURM_NTASKS_PER_NODE"))
        if gpus.isdigit() and tasks.isdigit() and gpus != tasks and int(gpus) > 0:
            advice = "one task a GPU: --ntasks-per-node and --gpus-per-node must be equal"
            yield Finding("Slurm", WARNING, f"{tasks} tasks and {gpus} GPUs a node", advice)
    if ranks > 1 and not is_ours:  # the ranks of a job that runs have met
        try:
            socket.getaddrinfo(os.environ.get("MASTER_ADDR", socket.gethostname()), None)
        except OSError:
            name = os.environ.get("MASTER_ADDR", socket.gethostname())
            yield Finding("rendezvous", WARNING, f"the name {name} does not resolve", "export MASTER_ADDR=ADDRESS")


def _run_folder(run: Path) -> Iterator[Finding]:
    from medblip.progress import read_json

    _try_writing(run)
    status = run / "status.json"
    found = "new"
    if status.exists():
        says = read_json(status)
        if says is None:
            advice = "nothing to do: it is only a report, which the next job writes anew"
            yield Finding("run folder", WARNING, f"{status} is damaged", advice)
            return
        found = f"{says.get('state')} at step {says.get('step')} of {says.get('steps')}, saved {says.get('saved')}"
        found += f"; it ended with: {says['error']}" if says.get("error") else ""
    yield Finding("run folder", OK, f"{run}: {found}")


def _begun_with(run: Path, given: dict[str, Any]) -> Generator[Finding, None, TrainConfig | None]:
    """Returns the options of a run that was begun; those that are given go first, and must be the same."""
    yield from ()
    begun = _stored(run)
    return TrainConfig(**begun["train"] | given) if begun else None


def _lock(run: Path) -> Iterator[Finding]:
    from medblip.progress import lock

    if (run / ".lock").exists():  # else no job has trained here yet; nothing is made by looking
        with lock(run):
            pass
    yield Finding("run lock", OK, "no other job trains here")


def _options(config: TrainConfig, ranks: int) -> Generator[Finding, None, TrainConfig]:
    from medblip.progress import keep_schedule

    yield from ()
    return keep_schedule(Path(config.run), config, ranks)


def _shards(config: TrainConfig) -> Generator[Finding, None, ShardIndex]:
    """Returns the index."""
    from medblip.guards import recipe_differences
    from medblip.shards import ShardIndex

    index = ShardIndex(config.data)
    samples = index.samples("train")
    edge = config.model_config().patch_edge
    found = f"{len(samples)} training samples of {len({sample.subject for sample in samples})} subjects, "
    found += f"{len(index.shards)} shards, all of the size that index.json says" if index.remote is None else "remote"
    yield Finding("shards", OK, found)
    if index.grid_size % edge:
        advice = "take a --patch-edge that does, or build shards of another --size"
        yield Finding(
            "shards", FAIL, f"volumes of {index.grid_size} voxels are not divided by patches of {edge}", advice
        )
    begun = _stored(Path(config.run)) if config.run else None
    if begun and (differing := recipe_differences(index.recipe, begun["recipe"])):
        advice = "give the shards that the run was trained on, or a new --run"
        yield Finding("shards", FAIL, f"another recipe than the run's: {'; '.join(differing)}", advice)
    return index


def _batches(config: TrainConfig, ranks: int, index: ShardIndex | None) -> Generator[Finding, None, dict | None]:
    """Returns the DeepSpeed config, if one was given."""
    from medblip.ds_config import load_deepspeed_config
    from medblip.schedule import plan_schedule

    num_samples = len(index.samples("train")) if index else PRESETS[config.preset].global_batch * ranks
    schedule, _ = plan_schedule(config, num_samples, ranks)
    found = f"global batch {schedule.global_batch} = micro-batch {schedule.micro_batch} x accumulation "
    yield Finding("batches", OK, f"{found}{schedule.accumulation} x {ranks} ranks")
    if not config.deepspeed_config:
        return None
    engine = load_deepspeed_config(config.deepspeed_config, schedule, config.run or None)
    stage = engine.get("zero_optimization", {}).get("stage", 0)
    yield Finding("DeepSpeed config", OK, f"{config.deepspeed_config}: ZeRO stage {stage}, every key known")
    return engine


def _towers(config: TrainConfig) -> Iterator[Finding]:
    from medblip import towers
    from medblip.pretrained import weights_on_disk

    model = config.model_config()
    for part in ("vision", "qformer", "language"):
        source = getattr(model, part)
        if source.startswith("tiny/"):
            if not towers.home().exists():
                _try_writing(towers.home())
            yield Finding(f"{part} tower", OK, f"{source}, made here once from a seed in {towers.home()}")
            continue
        try:
            located = towers.locate(source)
            weights_on_disk(located)
            yield Finding(f"{part} tower", OK, towers.describe(located))
        except (ValueError, OSError) as error:
            yield Finding("towers", FAIL, f"{part}: {error}")


def _network(config: TrainConfig) -> Iterator[Finding]:
    needs = []
    if is_url(config.data):
        needs.append(f"the shards ({config.data})")
    if config.wandb and os.environ.get("WANDB_MODE") != "offline":
        needs.append("wandb (WANDB_MODE=offline does not)")
    if needs:
        yield Finding("network", WARNING, f"needed for {' and '.join(needs)}", "this node must reach it")
    else:
        yield Finding("network", OK, "not needed: towers and shards are files here")


def _nvme(engine: dict[str, Any]) -> Iterator[Finding]:
    from medblip.ds_config import nvme_of

    folder = nvme_of(engine)
    if folder is None:
        return
    free_bytes = shutil.disk_usage(_try_writing(folder)).free
    yield Finding("NVMe offload", OK, f"{folder}, {_gb(free_bytes)} free")
    if not any(map(os.path.exists, LIBAIO_HEADERS)):
        advice = "on Debian: apt-get install libaio-dev (DeepSpeed builds its op async_io with it)"
        yield Finding("NVMe offload", FAIL, "libaio.h is not here", advice)
    if shutil.which("c++") is None:
        yield Finding(
            "NVMe offload", FAIL, "no C++ compiler for DeepSpeed's op async_io", "apt-get install g++ ninja-build"
        )


def _room(config: TrainConfig, ranks: int, engine: dict[str, Any], index: Any) -> Iterator[Finding]:
    """Disk for the checkpoints, host memory for the start; figures of `medblip plan`."""
    import logging

    import torch

    from medblip import plan

    model_config, model = config.model_config(), None
    # Tiny towers are too small to matter, and may not be made yet.
    if not any(getattr(model_config, part).startswith("tiny/") for part in ("vision", "qformer", "language")):
        logging.getLogger("transformers").setLevel(logging.ERROR)
        width = 2 if engine.get("bf16", {}).get("enabled", True) else 4
        try:
            model = plan.build(model_config, index.grid_size if index else 224, width)
        except Exception as error:  # a model that cannot be estimated may well train
            found = f"cannot be estimated for this model ({type(error).__name__}: {error})"
            yield Finding("memory", WARNING, found, "watch the first steps")
    if model is not None:
        here = max(1, min(ranks, torch.cuda.device_count() or int(os.environ.get("LOCAL_WORLD_SIZE", ranks))))
        share = plan.divide(engine, model, here, max(1, ranks // here))
        # Estimates, so none of them ends the job.
        needed, available = share["host_per_node_at_start"], _available_bytes()
        is_short = needed > available
        advice = f"{here} ranks build the model at the same time: fewer ranks a node, or more memory for the job"
        found = f"{_gb(needed)} needed at the start, {_gb(available)} available"
        yield Finding("host memory", WARNING if is_short else OK, found, advice * is_short)
        if torch.cuda.is_available():
            fixed, total = sum(share[name] for name in plan.ON_GPU), torch.cuda.mem_get_info()[1]
            is_short = fixed > total
            advice = "`medblip plan` names a config that fits"
            found = f"{_gb(fixed)} before activations, {_gb(total)} on a GPU"
            yield Finding("GPU memory", WARNING if is_short else OK, found, advice * is_short)
    if config.run:
        run = Path(config.run)
        sizes = [sum(f.stat().st_size for f in folder.iterdir()) for folder in (run / "checkpoints").glob("step-*")]
        checkpoint_bytes = max([12 * plan.count(model).trained if model else 50_000_000, *sizes])
        # One is being written while those that are kept, and the best one, are still there.
        needed = (config.keep_checkpoints + 2) * checkpoint_bytes - sum(sizes)
        free = shutil.disk_usage(_nearest(run)).free
        is_short = needed > free
        found = f"{_gb(free)} free, checkpoints of {_gb(checkpoint_bytes)} take {_gb(max(0, needed))} more"
        yield Finding("disk", FAIL if is_short else OK, found, "free some, or a lower --keep-checkpoints" * is_short)


def _fingerprints(config: TrainConfig) -> Iterator[Finding]:
    begun = _stored(Path(config.run))
    if not begun:
        return
    import torch

    from medblip.model import MedBLIP

    model = MedBLIP(config.model_config(), begun["recipe"]["size"], torch.device("cpu"))
    for part, now in model.frozen_fingerprints().items():
        before = begun["frozen"][part]
        if now == before:
            yield Finding("frozen towers", OK, f"{part} {now}, as at the start of the run")
        else:
            advice = "bring back the checkpoint that the run was begun with, or take another --run"
            yield Finding("frozen towers", FAIL, f"{part} was {before} at the start of the run, now {now}", advice)


def _stored(run: Path) -> dict[str, Any] | None:
    """config.json of a run that was begun. A damaged one is `keep_schedule`'s to refuse, once there are checkpoints."""
    from medblip.progress import read_json

    return read_json(run / "config.json")


def _nearest(folder: Path) -> Path:
    """The folder, or what is there of the path to it."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _try_writing(folder: Path) -> Path:
    """Writes where the folder is or will be made, leaves nothing behind, and returns that place."""
    nearest = _nearest(folder)
    with tempfile.TemporaryFile(dir=nearest) as file:
        file.write(b"-")
    return nearest


def _available_bytes() -> int:
    """Host memory that this process may still take: the node's, or less where a container or a Slurm job is limited."""
    with open("/proc/meminfo") as file:
        values = dict(line.split(":") for line in file)
    return min([int(values["MemAvailable"].split()[0]) * 1024, *_memory_limits()])


def _memory_limits(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Memory limits in bytes of this process' control group and of all groups above it, of cgroup v2 and v1."""
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, file = mounted, "memory.max"
        elif "memory" in controllers.split(","):
            root, file = mounted / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            # In a container the groups above its own are not there.
            if folder.is_relative_to(root) and (folder / file).is_file():
                text = (folder / file).read_text().strip()
                if text.isdigit():  # not `max`
                    yield int(text)


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


def _sentence(finding: Finding) -> str:
    return finding.found + (f": {finding.advice}" if finding.advice else "")


def _table(findings: list[Finding]) -> str:
    width = max(len(finding.about) for finding in findings)
    lines = [f"{finding.state:8} {finding.about:{width}}  {_sentence(finding)}" for finding in findings]
    counts = {state: sum(finding.state == state for finding in findings) for state in (OK, WARNING, FAIL)}
    return "\n".join([*lines, "", ", ".join(f"{count} {state}" for state, count in counts.items())])
