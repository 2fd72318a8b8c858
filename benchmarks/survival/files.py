"""Files of a run folder that are cut, binary, foreign or not files, and strays beside them."""

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from benchmarks.survival.lab import COMMANDS, Lab, contents, gone, steps_of, told, training
from benchmarks.survival.registry import BADLY, LOST, WELL, Trial, fault

RECORDS = ("metrics.jsonl", "examples.jsonl")  # lines that a damage has destroyed exist nowhere else


# ---- damages


def _rewritten(change: Callable[[bytes], bytes]) -> Callable[[pathlib.Path], None]:
    def damage(path: pathlib.Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return damage


def _other_types(text: bytes) -> bytes:
    """JSON with the same keys, and a value of another type for each."""
    try:
        content = json.loads(text)
    except ValueError:
        return b'{"step": "one"}\n'
    return json.dumps({k: {"a": 1} if isinstance(v, (int, str)) else 7 for k, v in content.items()}).encode()


def _folder(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


def _nowhere(path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nothing")


DAMAGES: dict[str, Callable[[pathlib.Path], None]] = {
    "empty": _rewritten(lambda b: b""),
    "cut in half": _rewritten(lambda b: b[: len(b) // 2]),
    "binary": _rewritten(lambda b: bytes(range(128, 256)) * 4),
    "zeros": _rewritten(lambda b: bytes(len(b))),
    "a list": _rewritten(lambda b: b"[1, 2]"),
    "of another program": _rewritten(lambda b: b'{"name": "left-pad", "version": 3, "files": {"a": "b"}}'),
    "other types": _rewritten(_other_types),
    "nested deeply": _rewritten(lambda b: b"[" * 100_000),
    "a folder": _folder,
    "a link to nothing": _nowhere,
    "gone": pathlib.Path.unlink,
}
FEW = ("empty", "cut in half", "of another program")  # for commands that read through the same function


# ---- trials


def resume(lab: Lab, what: str, damage: Callable[[pathlib.Path], None], record: str = "") -> Trial:
    """Damage a copy of the run that was stopped half way, and continue it.

    Args:
      record: the damaged file is this one of RECORDS: it cannot become what it was, but what is in it must be kept.
    """
    work = lab.copy(lab.half)
    damage(work)
    before, kept = contents(work), _foreign(work / record) if record else b""
    ended = lab.quick(training(work))
    if ended.code == 0:
        wrong = lab.same_end(work, only_state=bool(record))
        if kept and not any(kept == p.read_bytes() for p in work.glob("*.jsonl")):
            wrong = wrong or "its content is gone"
        found = Trial(what, LOST, wrong) if wrong else _judged(what, told(ended, 0))
    elif lost := gone(before, work):
        found = Trial(what, LOST, f"{lost} is gone; {told(ended, 2)}")
    else:
        found = _judged(what, told(ended, 2))
    if found.outcome == WELL:
        shutil.rmtree(work)
    return found


def _foreign(path: pathlib.Path) -> bytes:
    """The content of a file that has no record in it; b"" if it has one, was cut, or is no file."""
    content = path.read_bytes() if path.is_file() else b""
    return b"" if b'"step": ' in content and b'"one"' not in content or not content.strip(b"\0") else content


def again(lab: Lab, what: str, damage: Callable[[pathlib.Path], None]) -> Trial:
    """Damage a copy of the finished run, and give the same command again."""
    work = lab.copy(lab.done)
    damage(work)
    before = contents(work)
    ended = lab.quick(training(work))
    lost = gone(before, work)
    shutil.rmtree(work)
    return Trial(what, LOST, f"{lost} is gone") if lost and ended.code else _judged(what, told(ended, 0, 2))


def read(lab: Lab, what: str, command: str, damage: Callable[[pathlib.Path], None]) -> Trial:
    """Damage a copy of the finished run, and evaluate, embed or export it."""
    work = lab.copy(lab.done)
    damage(work)
    before, (older, newest) = contents(work), steps_of(lab.done)[-2:]
    ended, content = lab.answer(command, work)
    lost = gone(before, work)
    shutil.rmtree(work)
    if lost:
        return Trial(what, LOST, f"{lost} is gone")
    if ended.code:
        return _judged(what, told(ended, 2))
    if content != lab.right(command, lab.done, newest):
        if "damaged" not in ended.error or content != lab.right(command, lab.done, older):
            return Trial(what, LOST, "another result, without a word")
    return _judged(what, told(ended, 0))


def _judged(what: str, wrong: str) -> Trial:
    return Trial(what, BADLY if wrong else WELL, wrong)


def trials(lab: Lab, name: str, find: Callable[[pathlib.Path], pathlib.Path]) -> Iterator[Trial]:
    """All damages of one file, met by each command."""

    def of_another_run(path: pathlib.Path) -> None:
        shutil.copyfile(find(lab.other), path)

    for kind, damage in (DAMAGES | {"of another run": of_another_run}).items():

        def at(work: pathlib.Path, damage: Callable = damage) -> None:
            if os.path.lexists(path := find(work)):
                damage(path)

        if os.path.lexists(find(lab.half)):
            yield resume(lab, f"{name} {kind}, continued", at, name if name in RECORDS else "")
        if name in ("config.json", "data.json", "results.json", "lock.json"):
            yield again(lab, f"{name} {kind}, started again at its end", at)
        for command in COMMANDS:
            if command == "evaluate" or kind in FEW:
                yield read(lab, f"{name} {kind}, {command}", command, at)


def _of_checkpoint(pattern: str) -> Callable[[pathlib.Path], pathlib.Path]:
    def find(work: pathlib.Path) -> pathlib.Path:
        return sorted((work / "checkpoints" / str(steps_of(work)[-1])).glob(pattern))[0]

    return find


FILES: dict[str, Callable[[pathlib.Path], pathlib.Path]] = {
    **{
        f"{name}": lambda work, name=name: work / name
        for name in ("config.json", "data.json", "environment.json", "results.json", *RECORDS)
    },
    "manifest.json": _of_checkpoint("manifest.json"),
    "_CHECKPOINT_METADATA": _of_checkpoint("_CHECKPOINT_METADATA"),
    "_METADATA": _of_checkpoint("state/_METADATA"),
    "_sharding": _of_checkpoint("state/_sharding"),
    "array_metadatas": _of_checkpoint("state/array_metadatas/*"),
    "manifest.ocdbt": _of_checkpoint("state/manifest.ocdbt"),
    "parameters": _of_checkpoint("state/ocdbt.process_0/d/*"),
}


def _register(name: str, find: Callable[[pathlib.Path], pathlib.Path]) -> None:
    part = "" if name.endswith(("n", "l")) and "manifest" not in name else " of the newest checkpoint"

    @fault(f"file:{name}", f"{name}{part} damaged in {len(DAMAGES) + 1} ways; continued, evaluated, embedded, exported")
    def tries(lab: Lab, rounds: int) -> Iterator[Trial]:
        yield from trials(lab, name, find)


for _name, _find in FILES.items():
    _register(_name, _find)


@fault("file:lock.json", "a lock.json that is none; continued, started again, evaluated")
def lock(lab: Lab, rounds: int) -> Iterator[Trial]:
    def made(damage: Callable) -> Callable[[pathlib.Path], None]:
        def at(work: pathlib.Path) -> None:
            (work / "lock.json").write_text('{"host": "h", "token": "t", "pid": 1}')
            damage(work / "lock.json")

        return at

    for kind, damage in DAMAGES.items():
        yield resume(lab, f"lock.json {kind}, continued", made(damage))
        yield again(lab, f"lock.json {kind}, started again at its end", made(damage))
        yield read(lab, f"lock.json {kind}, evaluate", "evaluate", made(damage))


FOLDERS: dict[str, Callable[[pathlib.Path], pathlib.Path]] = {
    "the run folder": lambda work: work,
    **{name: lambda work, name=name: work / name for name in ("checkpoints", "tensorboard")},
    "the newest checkpoint": lambda work: work / "checkpoints" / str(steps_of(work)[-1]),
}


@fault("file:permission", "files that may not be read, and folders that may not be written to; continued, evaluated")
def permission(lab: Lab, rounds: int) -> Iterator[Trial]:
    for name, find in (FILES | FOLDERS).items():
        for command in ("train", "evaluate"):
            what, work = f"{name} without permission, {command}", lab.copy(lab.half if command == "train" else lab.done)
            if not os.path.lexists(path := find(work)):
                continue
            mode, before = path.stat().st_mode, contents(work)
            path.chmod(0o555 if path.is_dir() else 0)
            if command == "train":
                ended, content = lab.quick(training(work), denied=True), ""
            else:
                ended, content = lab.answer(command, work, denied=True)
            # It may have been set aside.
            path = next((p for p in (path, path.with_name(f"damaged-{path.name}")) if p.exists()), None)
            if path:
                path.chmod(mode)
            wrong, lost = told(ended, 0, 2), ""
            if command == "train":  # with permission again
                code = lab.quick(training(work)).code if ended.code else 0
                lost = f"exit code {code}" if code else lab.same_end(work, only_state=name in RECORDS)
            elif gone(before, work):
                lost = f"{gone(before, work)} is gone"
            elif ended.code == 0 and content not in [lab.right(command, lab.done, s) for s in steps_of(lab.done)[-2:]]:
                lost = "another result"
            yield Trial(what, LOST if lost else BADLY if wrong else WELL, lost or wrong)
            shutil.rmtree(work, ignore_errors=True)


def _stray_checkpoint(work: pathlib.Path) -> None:
    shutil.copytree(work / "checkpoints" / str(steps_of(work)[0]), work / "checkpoints" / "9999")


def _text(name: str) -> Callable[[pathlib.Path], None]:
    def at(work: pathlib.Path) -> None:
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("notes\n")

    return at


STRAYS: dict[str, Callable[[pathlib.Path], None]] = {
    "an empty folder checkpoints/9999": lambda w: (w / "checkpoints" / "9999").mkdir(),
    "checkpoints/9999 with a file in it": _text("checkpoints/9999/notes.txt"),
    "a copy of a checkpoint as checkpoints/9999": _stray_checkpoint,
    "a file checkpoints/9998": _text("checkpoints/9998"),
    "a file checkpoints/notes.txt": _text("checkpoints/notes.txt"),
    "a folder checkpoints/old": _text("checkpoints/old/notes.txt"),
    "a half-saved checkpoint": _text("checkpoints/16.orbax-checkpoint-tmp-0/state/notes"),
    "a file checkpoints/-4": _text("checkpoints/-4"),
    "a checkpoint called 0012": lambda w: shutil.copytree(
        w / "checkpoints" / str(steps_of(w)[0]), w / "checkpoints" / "0012"
    ),
    "hidden files of file systems": lambda w: [_text(f"{d}.nfs0001")(w) for d in ("", "checkpoints/", "tensorboard/")],
    "half-written temporary files": lambda w: [
        _text(f"{n}.0123456789ab.tmp")(w) for n in ("config.json", "lock.json", "results.json")
    ],
    "a file tensorboard": lambda w: (shutil.rmtree(w / "tensorboard"), _text("tensorboard")(w)),
    "a file checkpoints": lambda w: (w / "checkpoints").rename(w / "kept") and _text("checkpoints")(w),
}


@fault("file:strays", f"{len(STRAYS)} kinds of strays in a run folder; continued, evaluated")
def strays(lab: Lab, rounds: int) -> Iterator[Trial]:
    for kind, put in STRAYS.items():
        yield resume(lab, f"{kind}, continued", put)
        yield read(lab, f"{kind}, evaluate", "evaluate", put)
