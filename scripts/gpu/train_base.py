"""Train an adapter for a base on a GPU machine that is reached by small pieces, within twelve minutes of a card.

Everything that is not in the repository travels in pieces (pieces.py), in as many calls as it takes; work runs on
between calls, writes a line for every step and stage, and goes on where it stopped when it is started again. The
defaults are the run of Qwen2.5-Coder-0.5B-Instruct (docs/training.md, "On a card that is lent").

    here    python scripts/gpu/train_base.py pack PIECES --base base.gguf --train DIR... --questions FILE...
    there   python scripts/gpu/train_base.py take STATE PIECES          # in every call that brings some
    there   python scripts/gpu/train_base.py start STATE --workers 8    # returns at once
    there   python scripts/gpu/train_base.py status STATE --wait 500
    there   python scripts/gpu/train_base.py give STATE OUT             # until nothing is left
    here    python scripts/gpu/train_base.py join RESULT OUT            # in any order

STATE is a folder outside the tree that lives as long as the machine. ``give --checkpoint`` brings back what another
machine goes on from: ``pack --checkpoint``. ``--smoke`` does all of it with a tiny random base on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import pieces

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "docs/recipes/qwen2.5-coder-0.5b.json"
FILES, FILE_MIB, PIECE_MIB = 8, 15.5, 53.0  # what comes back in a call, and what is brought in one
STAGES = ("before", "train", "after", "tables")
DEFAULTS: dict[str, Any] = {
    "recipe": str(RECIPE),
    "workers": 8,
    "device": "cuda",
    "chunk_size": 512,
    "seconds": 690.0,  # of all stages of one start
    "evaluation": 170.0,  # of them, kept for what follows training
    "chunks": [4, 16, 64],
    "loss_examples": 24,
    "lengths": "4k,16k",
    "trials": 20,
    "documents": "10",
    "asked": 40,
    "stages": list(STAGES),
    "tokens": None,  # most input tokens of the whole run
    "set": [],
}


# -- stages, each in a process of its own -----------------------------------------------------------------------


class State:
    """The folder of a run: what was brought, what is made, what was logged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run, self.results, self.compact = folder / "run", folder / "results", folder / "compact"
        self.journal = folder / "journal.jsonl"
        self.results.mkdir(parents=True, exist_ok=True)

    @property
    def settings(self) -> dict[str, Any]:
        """What ``start`` was given."""
        return DEFAULTS | dict(json.loads((self.folder / "settings.json").read_text(encoding="utf-8")))

    @property
    def base(self) -> Path:
        """The base's GGUF file or folder."""
        found = sorted((self.folder / "base").iterdir())
        return found[0]

    @property
    def step(self) -> int:
        """Optimizer steps in the last checkpoint."""
        path = self.run / "checkpoint.safetensors"
        if not path.is_file():
            return 0
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return int(json.loads(file.metadata()["state"])["step"])

    @property
    def data(self) -> Path:
        """``train/`` and ``questions/`` as they were packed."""
        return self.folder / "data"

    def note(self, **values: Any) -> None:
        """Append a line to the journal, and print it."""
        line = json.dumps({"time": round(time.time(), 1), **values})
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def work(state: State) -> None:
    """Run the stages that are not done for the present step, within the seconds of this start."""
    settings, began = state.settings, time.monotonic()
    brought = state.folder / "checkpoint"
    if brought.is_dir() and not state.run.exists():
        brought.rename(state.run)
    state.note(stage="start", step=state.step, settings=settings)
    for stage in settings["stages"]:
        left = settings["seconds"] - (time.monotonic() - began)
        if stage == "train":
            left -= settings["evaluation"]
        mark, done = state.results / f"{stage}.done", "once" if stage == "before" else str(state.step)
        if stage != "train" and mark.is_file() and mark.read_text(encoding="utf-8") == done:
            continue
        if left < 5:
            state.note(stage=stage, left_out="no time left; start again to go on")
            continue
        started = time.monotonic()
        code = _run([sys.executable, __file__, "stage", str(state.folder), stage, str(left)], state, left)
        state.note(stage=stage, code=code, seconds=round(time.monotonic() - started, 1), step=state.step)
        if code == 0:
            mark.write_text(done, encoding="utf-8")
        elif stage == "train" and not state.step:
            break
    state.note(stage="end", step=state.step, seconds=round(time.monotonic() - began, 1))


def stage_before(state: State, left: float) -> None:
    """Convert the base, and measure its loss with untrained candidates."""
    _measure(state, None, state.results / "loss-before.json")


def stage_train(state: State, left: float) -> None:
    """Train until the schedule or the time ends; a checkpoint lies in ``run`` then."""
    settings = state.settings
    command = ["train", "--base", state.base, "--data", state.data / "train", "--output", state.run]
    command += ["--config", settings["recipe"], "--workers", settings["workers"], "--device", settings["device"]]
    command += ["--chunk-size", settings["chunk_size"], "--max-minutes", max(0.02, (left - 25) / 60)]
    command += ["--max-tokens", settings["tokens"]] if settings["tokens"] else []
    for pair in settings["set"]:
        command += ["--set", pair]
    _focusllm(command)


def stage_after(state: State, left: float) -> None:
    """Write the compact adapter, and measure its loss on the same examples."""
    from focus_core.model.hub import load_base
    from focus_core.training.export import export_adapter

    export_adapter(load_base(state.base, device=state.settings["device"]), state.run / "adapter", state.compact)
    _measure(state, state.compact, state.results / "loss-after.json")


def stage_tables(state: State, left: float) -> None:
    """Find pass keys, and answer questions among documents beside the base that reads the gold one alone."""
    settings = state.settings
    _evaluate(state, "passkey", ["--lengths", settings["lengths"], "--trials", settings["trials"]])
    file = sorted((state.data / "questions").iterdir())[0]
    arguments = ["--file", file, "--documents", settings["documents"], "--trials", settings["asked"]]
    _evaluate(state, "questions", [*arguments, "--methods", "focusllm,gold"])


def _evaluate(state: State, task: str, arguments: Sequence[Any]) -> None:
    model = ["--base", state.base, "--adapter", state.compact, "--device", state.settings["device"]]
    _focusllm(["eval", task, *arguments, *model, "--output", state.results / f"step-{state.step}"])


def _measure(state: State, adapter: Path | None, output: Path) -> None:
    """Write the loss of questions that are not trained on, at several numbers of chunks."""
    import dataclasses

    import torch

    from focus_core.config import TrainConfig
    from focus_core.model.candidate import CandidateAdapter
    from focus_core.model.families import BaseDecoder
    from focus_core.model.fitting import sink_of
    from focus_core.model.hub import load_adapter, load_base
    from focus_core.text.tokenization import TextTokenizer
    from focus_core.training.data import ExampleStream
    from focus_core.training.heldout import measure_loss
    from focus_core.training.texts import read_training_texts

    loaded = load_base(state.base, device=state.settings["device"])
    recipe = TrainConfig.from_dict(json.loads(Path(state.settings["recipe"]).read_text(encoding="utf-8")))
    texts = read_training_texts([state.data / "questions"])
    base, losses = BaseDecoder(loaded.model), {}
    with CandidateAdapter(base, torch.float32) as candidates:
        if adapter is not None:
            load_adapter(adapter, candidates, loaded)
        for most in state.settings["chunks"]:
            config = dataclasses.replace(recipe, mix={"question": 1.0}, max_chunks=most, stages=())
            stream = ExampleStream(texts, TextTokenizer(loaded.tokenizer), config)
            examples = [stream.fixed(index) for index in range(state.settings["loss_examples"])]
            losses[most] = measure_loss(base, candidates, examples, sink_of(loaded), config).loss
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    output.write_text(json.dumps({"step": state.step, "device": device, "loss": losses}, indent=1) + "\n")
    state.note(measured=output.name, step=state.step, device=device, loss=losses)


def _focusllm(arguments: Sequence[Any]) -> None:
    subprocess.run([sys.executable, "-m", "focus_core.cli", *map(str, arguments)], check=True)


def _run(command: Sequence[str], state: State, seconds: float) -> int:
    """Run a command in its own session, its output in a log; end all of it when the time is over."""
    with (state.folder / "output.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=_environment(state), start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 15)
            try:
                return process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                return process.wait()


def _environment(state: State) -> dict[str, str]:
    path = [str(ROOT), str(state.folder / "site"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "FOCUSLLM_CACHE": str(state.folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


# -- what is typed ----------------------------------------------------------------------------------------------


def pack(options: argparse.Namespace) -> None:
    """Cut what must travel into pieces."""
    out, size = options.pieces, options.piece_mib
    if options.base:
        pieces.cut("base", {options.base.name: options.base}, out, size)
    if options.train:
        data = {f"train/{path.name}": path for path in options.train}
        pieces.cut("data", data | {f"questions/{path.name}": path for path in options.questions}, out, size)
    if options.wheels:
        pieces.cut("wheels", {path.name: path for path in sorted(options.wheels.glob("*.whl"))}, out, size)
    if options.checkpoint:
        pieces.cut("checkpoint", {path.name: path for path in sorted(options.checkpoint.iterdir())}, out, size)
    print(f"{sum(1 for _ in out.glob('*.[0-9]*'))} pieces in {out}; bring them with all .json files")


def take(options: argparse.Namespace) -> None:
    """Take pieces; wheels are unpacked beside the interpreter's own packages, not installed."""
    missing = pieces.take(options.pieces, options.state)
    for wheel in sorted((options.state / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(options.state / "site")
    print("  ".join(f"{name}: {f'{count} pieces missing' if count else 'whole'}" for name, count in missing.items()))


def start(options: argparse.Namespace) -> None:
    """Start the work in a session of its own, so that it outlives this call."""
    state = State(options.state)
    given = {name: value for name in DEFAULTS if (value := getattr(options, name, None)) is not None}
    (state.folder / "settings.json").write_text(json.dumps(given), encoding="utf-8")
    with (state.folder / "output.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "work", str(state.folder)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=_environment(state),
            start_new_session=True,
        )
    (state.folder / "pid").write_text(str(process.pid), encoding="utf-8")
    print(f"started as process {process.pid}")


def status(options: argparse.Namespace) -> bool:
    """Print the journal's and the log's last lines; wait for the end if asked. Return whether it is over."""
    state, end = State(options.state), time.monotonic() + options.wait
    while not _over(state) and time.monotonic() < end:
        time.sleep(1.0)
    for path, count in ((state.journal, 8), (state.run / "log.jsonl", 3), (state.folder / "output.log", 6)):
        if path.is_file():
            print(
                f"== {path.name}", *path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:], sep="\n"
            )
    print("== over" if _over(state) else "== at work")
    return _over(state)


def _over(state: State) -> bool:
    lines = state.journal.read_text(encoding="utf-8").splitlines() if state.journal.is_file() else []
    return bool(lines) and json.loads(lines[-1]).get("stage") == "end"


def give(options: argparse.Namespace) -> int:
    """Put pieces of the adapter, and of the checkpoint if asked, into OUT; return how many are left."""
    state = State(options.state)
    bundles, step = state.folder / "bundles", state.step
    results = {path.name: path for path in (state.results, state.journal, state.run / "log.jsonl") if path.exists()}
    if state.compact.is_dir() and not (bundles / f"adapter-{step}.json").is_file():
        pieces.cut(f"adapter-{step}", results | {"adapter": state.compact}, bundles, options.file_mib)
    if options.checkpoint and step and not (bundles / f"checkpoint-{step}.json").is_file():
        files = {path.name: path for path in (state.run / "checkpoint.safetensors", state.run / "log.jsonl")}
        pieces.cut(f"checkpoint-{step}", files, bundles, options.file_mib)
    loose = [path for path in (state.journal, state.run / "log.jsonl") if path.is_file()]
    left = pieces.give(bundles, options.out, state.folder / "given.json", options.files, loose)
    print(f"{left} pieces left; give again" if left else "all given")
    return left


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--smoke", action="store_true", help="all of it with a tiny random base on the CPU")
    commands = top.add_subparsers(dest="command")
    command = commands.add_parser("pack")
    command.add_argument("pieces", type=Path)
    for name in ("base", "wheels", "checkpoint"):
        command.add_argument(f"--{name}", type=Path)
    for name in ("train", "questions"):
        command.add_argument(f"--{name}", type=Path, nargs="+", default=[])
    command.add_argument("--piece-mib", type=float, default=PIECE_MIB)
    for name in ("take", "join"):
        command = commands.add_parser(name)
        command.add_argument("state", type=Path)
        command.add_argument("pieces", type=Path)
    command = commands.add_parser("start")
    command.add_argument("state", type=Path)
    for name in ("seconds", "evaluation"):
        command.add_argument(f"--{name}", type=float)
    for name in ("workers", "trials", "asked", "loss-examples", "chunk-size", "tokens"):
        command.add_argument(f"--{name}", type=int)
    for name in ("recipe", "device", "lengths", "documents"):
        command.add_argument(f"--{name}")
    command.add_argument("--chunks", type=int, nargs="+")
    command.add_argument("--stages", nargs="+", choices=STAGES)
    command.add_argument("--set", action="append")
    command = commands.add_parser("status")
    command.add_argument("state", type=Path)
    command.add_argument("--wait", type=float, default=0.0)
    command = commands.add_parser("give")
    command.add_argument("state", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--checkpoint", action="store_true")
    command.add_argument("--files", type=int, default=FILES)
    command.add_argument("--file-mib", type=float, default=FILE_MIB)
    commands.add_parser("work").add_argument("state", type=Path)
    command = commands.add_parser("stage")
    command.add_argument("state", type=Path)
    command.add_argument("name", choices=STAGES)
    command.add_argument("left", type=float)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was typed; return the exit status."""
    options = parser().parse_args(arguments)
    if options.smoke:
        from smoke import smoke

        smoke(main)
    elif options.command in ("take", "join"):
        take(options)
    elif options.command == "work":
        work(State(options.state))
    elif options.command == "stage":
        globals()[f"stage_{options.name}"](State(options.state), options.left)
    elif options.command == "status":
        return 0 if status(options) else 1
    elif options.command == "give":
        give(options)
    elif options.command == "start":
        start(options)
    elif options.command == "pack":
        pack(options)
    else:
        parser().print_help()
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
