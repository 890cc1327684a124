"""What can go wrong, through the real command: said in a line, with nothing half-written and nothing running on."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import environment, injected
from safetensors.torch import load_file, save_file
from test_process import is_alive, read_json
from test_resume import saved_steps, wait_until

pytestmark = pytest.mark.process  # real commands

CHILD = "llama_ft.launch.child"
DIM, FFN, VOCABULARY = 64, 96, 2048
SMALL = (
    *(f"model.{size}" for size in (f"dim={DIM}", f"ffn_dim={FFN}", "n_layers=2", "n_heads=4", "n_kv_heads=4")),
    "checkpoint=random",
    *("tracker=disabled", "training.micro_batch_size=1", "training.max_samples=3"),
)

# ------------------------------------------------------------------------------------------------ checkpoints to damage

NAMES = {  # of weights: Meta's, which are ours, Hugging Face's, and the shape
    "tok_embeddings": ("model.embed_tokens", "VD"),
    "norm": ("model.norm", "D"),
    "output": ("lm_head", "VD"),
    "attention.wq": ("self_attn.q_proj", "DD"),
    "attention.wk": ("self_attn.k_proj", "DD"),
    "attention.wv": ("self_attn.v_proj", "DD"),
    "attention.wo": ("self_attn.o_proj", "DD"),
    "feed_forward.w1": ("mlp.gate_proj", "FD"),
    "feed_forward.w2": ("mlp.down_proj", "DF"),
    "feed_forward.w3": ("mlp.up_proj", "FD"),
    "attention_norm": ("input_layernorm", "D"),
    "ffn_norm": ("post_attention_layernorm", "D"),
}


def weights(dim: int = DIM, hf: bool = False) -> dict[str, torch.Tensor]:
    tensors, sizes = {}, {"V": VOCABULARY, "D": dim, "F": FFN}
    for meta, (theirs, letters) in NAMES.items():
        in_layers = theirs.startswith(("self_attn", "mlp", "input", "post"))
        for layer in ("layers.0.", "layers.1.") if in_layers else ("",):
            name = f"{'model.' if layer else ''}{layer}{theirs}" if hf else f"{layer}{meta}"
            tensors[f"{name}.weight"] = torch.full([sizes[letter] for letter in letters], 0.01)
    return tensors


LORA = {f"layers.{n}.attention.{w}.lora_{m}" for n in (0, 1) for w in ("wq", "wv") for m in "AB"}  # by our names
TRAINED = {  # by file: the names of the tensors in it
    "model.safetensors": set(weights()),
    "adapter_model.safetensors": {
        f"base_model.model.model.layers.{n}.self_attn.{w}_proj.lora_{m}.weight"
        for n in (0, 1)
        for w in "qv"
        for m in "AB"
    },
}


def write_hf(folder: Path) -> Path:
    folder.mkdir()
    sizes = {"hidden_size": DIM, "intermediate_size": FFN, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(sizes))
    save_file(weights(hf=True), folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def write_meta(folder: Path) -> Path:
    folder.mkdir()
    sizes = {"dim": DIM, "n_layers": 2, "n_heads": 4, "vocab_size": -1, "norm_eps": 1e-5}
    sizes |= {"multiple_of": 32, "ffn_dim_multiplier": 0.5}  # 4 * 64 * 2/3 * 0.5 = 85, rounded up to 96
    (folder / "params.json").write_text(json.dumps(sizes))
    return folder / "consolidated.00.pth"


def write_own(folder: Path, dim: int = DIM) -> Path:
    folder.mkdir()
    sizes = {"dim": dim, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": FFN, "vocab_size": VOCABULARY}
    metadata = {"format": "pt", "llama_ft.model": json.dumps(sizes | {"norm_eps": 1e-5, "rope_theta": 1e4})}
    save_file(weights(dim), folder / "model.safetensors", metadata=metadata)
    return folder / "model.safetensors"


class Code:
    """Unpickled, it creates a file named `ran`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


# ---------------------------------------------------------------------------------------------- a case, and how it ends


@dataclass(frozen=True)
class Case:
    """A command that something is wrong with. It runs in a folder of its own, and its run in `run` there."""

    overrides: str
    said: tuple[str, ...]  # in the last line of stderr; of an interrupted run in its result; else in stdout
    exit_status: int = 1
    status: str | None = "error"  # in result.json; None where no run begins
    files: dict[str, str | bytes] = field(default_factory=dict)  # that are there before
    make: Callable[[Path], object] = lambda cwd: None  # makes more of them
    inject: str = ""  # what the run's process does first
    signals: tuple[signal.Signals, ...] = ()  # sent once it has got to slow()
    leaves_temporary: bool = False
    then: Callable[["Ended"], None] = lambda ended: None  # checks what else holds


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    cwd: Path
    returncode: int
    stdout: str
    stderr: str
    earlier_result: str | None

    @property
    def run_dir(self) -> Path:
        return self.cwd / "run"

    @property
    def last_line(self) -> str:
        return (self.stderr.splitlines() or [""])[-1]


# For injected code: slow() goes on when it has been interrupted, and fill_disk(n) limits what is written to a file.
HELPERS = """
import resource, signal, time
from pathlib import Path
def slow(ignores_interrupts=False):
    if Path('slow').exists():
        return
    heard = []
    def handler(number, frame):
        heard.append(1)
        Path('heard').touch()
        earlier[number](number, frame)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    earlier = {number: signal.signal(number, handler) for number in numbers}
    Path('slow').touch()
    end = time.monotonic() + 60
    while time.monotonic() < end and (ignores_interrupts or not heard):
        time.sleep(0.05)
    for number in numbers:
        signal.signal(number, earlier[number])
def fill_disk(n_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""


def with_code(cwd: Path, code: str) -> dict[str, str]:
    return injected(cwd / "inject", into=CHILD, code=HELPERS + code)


def start(cwd: Path, *overrides: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "llama_ft.train", *SMALL, f"hydra.run.dir={cwd / 'run'}", *overrides],
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    wait_until(lambda: file.exists() or process.poll() is not None)


def end(
    process: subprocess.Popen[str], cwd: Path, case: Case | None = None, earlier_result: str | None = None
) -> Ended:
    """Send a case's signals, and wait for the end."""
    try:
        for marker, sent in zip(("slow", "heard"), case.signals if case else (), strict=False):
            wait_for(cwd / marker, process)
            process.send_signal(sent)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()  # which its run notices
    return Ended(cwd, process.returncode, stdout, stderr, earlier_result)


def run_case(case: Case, cwd: Path) -> Ended:
    for name, content in case.files.items():
        (cwd / name).parent.mkdir(parents=True, exist_ok=True)
        (cwd / name).write_bytes(content.encode() if isinstance(content, str) else content)
    case.make(cwd)
    earlier = cwd / "run" / "result.json"
    earlier_result = earlier.read_text() if earlier.exists() else None
    process = start(cwd, *case.overrides.split(), env=with_code(cwd, case.inject) if case.inject else None)
    return end(process, cwd, case, earlier_result)


def goes_on(ended: Ended, *overrides: str) -> dict[str, Any]:
    """The result of a next command in the same folder, which ends well."""
    last = end(start(ended.cwd, *overrides), ended.cwd)
    assert last.returncode == 0, last.stdout + last.stderr
    assert_nothing_left(last)
    assert_whole(ended.run_dir)
    return read_json(ended.run_dir / "result.json")


# ---------------------------------------------------------------------------------------------------- what always holds


def processes_in(folder: Path) -> list[str]:
    """Command lines of living processes that name the folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_text(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if f"{folder}/" in command and is_alive(int(file.parent.name)):
            found.append(command)
    return found


def assert_nothing_left(ended: Ended) -> None:
    """A few lines, no process, and no code of a checkpoint has run."""
    text = ended.stdout + ended.stderr
    assert len(ended.stderr.splitlines()) <= 6, text
    assert "Traceback" not in text
    assert "looks like a bug" not in text
    assert processes_in(ended.cwd) == []
    assert not (ended.cwd / "ran").exists()


def assert_whole(run_dir: Path) -> None:
    """No temporary file, and all tensors in every file of weights that a run wrote."""
    assert [path.name for path in run_dir.rglob("*.tmp")] == []
    for file in run_dir.rglob("*.safetensors"):
        names = set(load_file(file))
        if file.name in TRAINED:
            assert names == TRAINED[file.name], file
        else:
            (trained,) = (name for name in TRAINED if (file.parent / name).exists())
            parameters = LORA if trained.startswith("adapter") else TRAINED[trained]
            assert names == {f"{name}:{key}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")}
    for folder in run_dir.glob("checkpoints/step_*"):
        assert len(list(folder.iterdir())) == 3 + (folder / "adapter_config.json").exists(), folder


def assert_as_expected(case: Case, ended: Ended) -> None:
    text, file = ended.stdout + ended.stderr, ended.run_dir / "result.json"
    assert ended.returncode == case.exit_status, text
    if case.status is None:
        assert (file.read_text() if file.exists() else None) == ended.earlier_result
        where = ended.last_line
    else:
        result = read_json(file)
        assert result["status"] == case.status, f"{result['error']}\n{text}"
        where = {"ok": ended.stdout, "error": ended.last_line}.get(case.status, result["error"])
        if case.status == "error":
            assert ended.last_line == f"error: {result['error']}"
        elif case.status == "interrupted":
            assert f"{ended.run_dir}: {result['error']}" in ended.stdout
    missing = [words for words in case.said if words not in where]
    assert not missing, f"{missing} not said:\n{text}"
    if case.exit_status == 130:
        assert ended.last_line == "interrupted"


# ---------------------------------------------------------------------------------------------------------- checkpoints

DAMAGED = {  # one of each kind; test_checkpoint.py has them all
    "HF, cut short": (lambda folder: os.truncate(write_hf(folder), 10**6), "not downloaded or copied completely"),
    "own, another size": (lambda folder: write_own(folder, dim=32), "model.dim is 64 but the file has 32"),
    "no folder": (lambda folder: None, "there is no such folder"),
    "code in it": (
        lambda folder: torch.save(weights() | {"norm.weight": Code()}, write_meta(folder)),
        "consolidated.00.pth is not loaded: it holds",
    ),
}
UNREADABLE = ("HF, cut short", "code in it")  # found when the sizes are asked for, before the run
CASES = {
    f"checkpoint: {name}": Case(
        "checkpoint=ckpt",
        ("ckpt", said),
        exit_status=2 if name in UNREADABLE else 1,
        make=lambda cwd, make=make: make(cwd / "ckpt"),
    )
    for name, (make, said) in DAMAGED.items()
}

# --------------------------------------------------------------------------------------------------- data and tokenizer

RECORD = '{"instruction": "Say one.", "output": "one"}\n'
RECORDS = {  # what the file holds, and what is said of it; test_data.py has more
    "empty": ("", "there are no records"),
    "a broken line": (RECORD + '{"instruction": "Say\n' + RECORD, "record 1 (line 2): not valid JSON"),
    "a record that is a list": ("[[1, 2]]", "record 0: a record must be an object"),
}


def the_files_are_still_there(ended: Ended) -> None:
    assert (ended.run_dir / "checkpoints" / "other" / "notes.txt").read_text() == "mine"


def the_weights_are_still_there(ended: Ended) -> None:
    assert set(load_file(ended.run_dir / "model.safetensors")) == set(weights())


CASES |= {
    f"data: {name}": Case("data.path=data", ("data", said), files={"data": content})
    for name, (content, said) in RECORDS.items()
}
CASES |= {
    "data: samples longer than allowed, and the user's own files in the run's folder": Case(
        "data.max_length=56",
        ("1 truncated; 2 dropped", "longest 56"),
        exit_status=0,
        status="ok",
        files={"run/checkpoints/other/notes.txt": "mine"},
        then=the_files_are_still_there,
    ),
    "tokenizer: missing": Case("tokenizer=t.model", ("tokenizer=t.model: there is no such file",)),
    "tokenizer: another vocabulary": Case("model.vocab_size=999", ("has 2048 pieces", "a vocabulary of 999")),
}


# ----------------------------------------------------------------------------------------------- the run and its folder

FULL = "the disk is full"
# The third checkpoint's first file still fits, and its second does not.
FILL_AT_THE_THIRD_CHECKPOINT = """
from llama_ft.techniques import peft
from llama_ft.training import saver
write, folders = saver.save_tensors, set()
def save_tensors(tensors, file, config):
    folders.add(file.parent)
    if len(folders) == 3:
        fill_disk(50_000)
    write(tensors, file, config)
saver.save_tensors = peft.save_tensors = save_tensors
"""


def saved_twice_and_goes_on(ended: Ended) -> None:
    assert saved_steps(ended.run_dir) == [1, 2]
    assert not (ended.run_dir / "adapter_model.safetensors").exists()
    result = goes_on(ended, "optim=lora", "training.save_every=1", "training.resume=true")
    assert result["resumed_at_step"] == 2


def saved_nothing(ended: Ended) -> None:
    assert not list(ended.run_dir.rglob("*.safetensors"))


CASES |= {
    f"{FULL}: while the weights are saved": Case(
        "", ("run/model.safetensors (1 MiB) cannot be written: ", "File too large"), inject="fill_disk(10**6)"
    ),
    f"{FULL}: while a checkpoint is saved": Case(
        "optim=lora training.save_every=1",
        ("step_00000003", "optimizer.safetensors (0 MiB) cannot be written: ", "File too large"),
        inject=FILL_AT_THE_THIRD_CHECKPOINT,
        then=saved_twice_and_goes_on,
    ),
    f"{FULL}: in training": Case(
        "training.micro_batch_size=1 training.max_samples=120 training.save=false",
        ("cannot be written during training: File too large",),
        inject="fill_disk(10_000)",
    ),
    "the loss is not a number": Case(
        "training.lr=1e30", ("the loss of optimizer step 2 is ", "lower training.lr"), then=saved_nothing
    ),
    "no GPU for a card's profile": Case(
        "gpu.device=cuda gpu.name=a100_40gb gpu.memory_mib=40000", ("gpu=a100_40gb needs a CUDA GPU", "gpu=cpu")
    ),
    "folder: below a file": Case(
        "hydra.run.dir=file/run", ("file/run: Not a directory", "hydra.run.dir=DIR"), 2, None, files={"file": ""}
    ),
    "folder: with a result of another version": Case(
        "",
        ("run/result.json has schema_version 99, and this version reads 2",),
        2,
        None,
        files={"run/result.json": '{"schema_version": 99}'},
    ),
    "folder: with the weights to start from": Case(
        "checkpoint=run",
        ("checkpoint=run is in the run's own folder",),
        exit_status=2,
        make=lambda cwd: write_own(cwd / "run"),
        then=the_weights_are_still_there,
    ),
}

# ------------------------------------------------------------------------------------------------- Ctrl-C at any moment

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
SLOW_LOADING = """
from llama_ft.model.mapped import StoredTensor
read = StoredTensor.pieces
def pieces(*arguments):
    slow()
    yield from read(*arguments)
StoredTensor.pieces = pieces
"""
SLOW_TRAINING = """
from llama_ft.training.metrics import StepMeter
record = StepMeter.record
def slow_record(*arguments):
    metrics = record(*arguments)
    slow()
    return metrics
StepMeter.record = slow_record
"""
SLOW_SAVING = """
from llama_ft.techniques import peft
from llama_ft.training import saver
write = saver.save_tensors
def save_tensors(tensors, file, config):
    if {when}:
        slow({how})
    write(tensors, file, config)
saver.save_tensors = peft.save_tensors = save_tensors
"""
EVERY_STEP = "training.save_every=1"


def resumes(ended: Ended) -> None:
    steps = saved_steps(ended.run_dir)
    assert steps, ended.stdout
    assert goes_on(ended, EVERY_STEP, "training.resume=true")["resumed_at_step"] == steps[-1]


def begins_anew(ended: Ended) -> None:
    assert list((ended.run_dir / "checkpoints").glob(".step_*.tmp"))
    assert not list((ended.run_dir / "checkpoints").glob("step_*"))
    assert goes_on(ended, EVERY_STEP)["resumed_at_step"] is None


def has_its_weights(ended: Ended) -> None:
    assert (ended.run_dir / "model.safetensors").exists()


interrupted = partial(Case, exit_status=130, status="interrupted")
CASES |= {
    "Ctrl-C: while the weights are loaded": interrupted(
        "checkpoint=ckpt",
        ("interrupted during loading the weights",),
        make=lambda cwd: write_own(cwd / "ckpt"),
        inject=SLOW_LOADING,
        signals=(INT,),
    ),
    "SIGTERM: in training": interrupted(
        EVERY_STEP, ("saved after optimizer step 1:",), inject=SLOW_TRAINING, signals=(TERM,)
    ),
    "SIGUSR1: in training": interrupted(
        "", ("saved after optimizer step 1: training.resume=true",), inject=SLOW_TRAINING, signals=(USR1,), then=resumes
    ),
    "Ctrl-C: while a checkpoint is saved": interrupted(
        EVERY_STEP,
        ("saved after optimizer step 2:",),
        inject=SLOW_SAVING.format(when="'checkpoints' in str(file)", how=""),
        signals=(INT,),
        then=resumes,
    ),
    "Ctrl-C: while the weights are saved": interrupted(
        "", (), status="ok", inject=SLOW_SAVING.format(when="True", how=""), signals=(INT,), then=has_its_weights
    ),
    "Ctrl-C: twice while a checkpoint is saved": interrupted(
        EVERY_STEP,
        ("did not stop by itself in time",),
        inject=SLOW_SAVING.format(when="True", how="True"),
        signals=(INT, INT),
        leaves_temporary=True,
        then=begins_anew,
    ),
}


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module", autouse=True)
def as_from_a_terminal() -> Iterator[None]:
    """Commands hear Ctrl-C, also where these tests run in the background of a script, which ignores it."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.fixture(scope="module")
def endings(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Ended]]]:
    """How the cases that are tested end, by name. Two run at a time, since each mostly starts processes."""
    tests = [
        item for item in request.session.items if getattr(item, "originalname", "") == "test_what_goes_wrong_is_said"
    ]
    folders = {item.callspec.params["name"]: tmp_path_factory.mktemp("case") for item in tests}
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run_case, CASES[name], folder) for name, folder in folders.items()}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", CASES)
def test_what_goes_wrong_is_said(name: str, endings: dict[str, Future[Ended]]) -> None:
    case, ended = CASES[name], endings[name].result()
    assert_as_expected(case, ended)
    assert_nothing_left(ended)
    if not case.leaves_temporary:
        assert_whole(ended.run_dir)
    case.then(ended)


def test_a_second_run_in_the_same_folder_is_refused_and_ctrl_c_stops_the_first_at_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = start(tmp_path, "training.save=false", env=with_code(tmp_path, SLOW_TRAINING))
    try:
        wait_for(tmp_path / "slow", first)
        before = {file: file.read_bytes() for file in run_dir.iterdir()}
        code = "import llama_ft.launch.process as process\nprocess.SECONDS_FOR_THE_LAST = 1"
        env = injected(tmp_path / "second", into="llama_ft.train", code=code)
        second = end(start(tmp_path, "training.save=false", env=env), tmp_path)
        assert second.returncode == 2
        assert second.stderr.startswith(f"error: another run is writing into {run_dir}: wait for its end")
        assert {file: file.read_bytes() for file in run_dir.iterdir()} == before
    finally:
        first.send_signal(INT)
        ended = end(first, tmp_path)
    assert_as_expected(interrupted("", ("interrupted during training",)), ended)
    assert_nothing_left(ended)
    saved_nothing(ended)


@pytest.mark.parametrize("where", ["checkpoints", "run/model"])
def test_what_a_killed_command_was_saving_is_not_lost_to_the_next(tmp_path: Path, where: str) -> None:
    """The run goes on saving for two seconds without its command; the next one waits for it."""
    still_slow = "\ndef slow(stop=slow):\n    stop()\n    time.sleep(2)\n"
    code = SLOW_SAVING.format(when=f"'{where}' in str(file)", how="") + still_slow
    options = (EVERY_STEP, "training.resume=true")
    first = start(tmp_path, *options, env=with_code(tmp_path, code))
    wait_for(tmp_path / "slow", first)
    first.kill()
    second = end(start(tmp_path, *options), tmp_path)
    first.communicate(timeout=60)
    assert second.returncode == 0, second.stdout + second.stderr
    if where == "checkpoints":
        assert "resuming after optimizer step 2" in second.stdout  # the one at whose end the interrupt was seen
    else:
        assert "done before (ok)" in second.stdout
    assert read_json(second.run_dir / "result.json")["status"] == "ok"
    assert_nothing_left(second)
    assert_whole(second.run_dir)


def test_a_file_system_without_space(tmp_path: Path) -> None:
    """A real one: the weights do not fit, and what is smaller does."""
    (tmp_path / "run").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "run")]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        ended = end(start(tmp_path), tmp_path)
        said = ("run/model.safetensors (1 MiB) cannot be written: ", "No space left on device")
        assert_as_expected(Case("", said), ended)
        assert_nothing_left(ended)
        assert_whole(ended.run_dir)
    finally:
        subprocess.run(["umount", str(tmp_path / "run")], check=True)
