"""A stage's checkpoints on disk: a crash at any moment leaves only complete ones, and each is verified when it is read.

    <directory>/stage-<i>/step-<completed, 8 digits>/state.safetensors    all tensors of `Stage.snapshot`
                                                     manifest.json        whose it is, after which step, digests
    <directory>/stage-0/tokenizer/                                        once for all (`kept_tokenizer.py`)

A checkpoint is written into a temporary sibling, files and directories are flushed to the disk (fsync), and then the
directory is renamed: a name that can be listed is a checkpoint that was complete. What the disk does to it later shows
in the digests: of the file in the manifest, and of the manifest in itself. Each stage writes its own and nobody
coordinates; stages that fail together go on from the newest step that all of them have intact, which is why several
are kept.

Why not torch.save: it is pickle, and a checkpoint may come from another machine. Why not one file with all in it: a
listing would have to read gigabytes to know what is there. Why no state of random generators: all draws are functions
of (seed, step, ...), and the batch of a step is one too, so the number of completed steps says where everything stands.
No decision here depends on a clock: times are arguments, kept for people to read.

torch is imported where tensors are, because `thinpipe checkpoint ls` need not wait for it.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from .durable_files import another_writes, make, remove, sync_directory, temporary_name
from .kept_tokenizer import beside
from .manifest import (
    FORMAT,
    MANIFEST,
    NOTES,
    CheckpointError,
    Fingerprint,
    ForeignCheckpoint,
    Manifest,
    read_manifest,
    regular_size,
    seal,
)

if TYPE_CHECKING:
    from ..stage_state import StageSnapshot

STATE = "state.safetensors"
HELD_TIMES = 4  # times `keep`: more than so many are not held for copies that fall behind
KEEP_MIN = 3  # neighbours are a checkpoint apart at most, and the newest may be damaged


class CheckpointStore:
    """The checkpoints of one stage of one run. One process at a time may write; any number may read.

    directory: of the whole run. keep: the newest ones that stay, at least KEEP_MIN.
    """

    def __init__(self, directory: Path, *, stage: int, fingerprint: Fingerprint, keep: int = KEEP_MIN) -> None:
        if keep < KEEP_MIN:
            raise ValueError(f"keep = {keep}: with fewer than {KEEP_MIN} the stages may be left without a common one")
        self.directory = directory / f"stage-{stage}"
        self.stage, self.fingerprint, self.keep = stage, fingerprint, keep
        self._verified: dict[int, tuple[int, ...]] = {}  # completed -> the file that had its digest
        self.pinned: set[int] = set()  # completed steps that stay whatever comes: another lane takes them up
        self.floor = 0  # nothing from here on is pruned: a copy of another stage's state may need what goes with it
        self._writing = threading.Lock()  # what a write leaves half done is not to be put away by another thread

    def path(self, completed: int) -> Path:
        """Of the checkpoint after `completed` steps."""
        return self.directory / f"step-{completed:08d}"

    # -- reading ----------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Completed steps, ascending, of the checkpoints that look whole: the manifest is of this run and stage, and
        the file as long as it says. Reads no tensors; `verify` does."""
        listed = []
        for completed in self.numbers():
            with suppress(CheckpointError):
                self.manifest(completed)
                listed.append(completed)
        return listed

    def numbers(self) -> list[int]:
        """Completed steps, ascending, of all directories that are called so, whatever they hold. Raises CheckpointError
        for a directory that cannot be read."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            remedy = "set checkpoint.directory"
            raise CheckpointError(f"cannot list {self.directory}: {error.strerror}; {remedy}") from None
        numbers = {name: int(name[5:]) for name in names if re.fullmatch(r"step-[0-9]{8,18}", name)}
        return sorted(number for name, number in numbers.items() if self.path(number).name == name)

    def manifest(self, completed: int) -> Manifest:
        """What the checkpoint says of itself. Raises CheckpointError for one that is torn, ForeignCheckpoint for one
        that is not of this run and stage; the tensors are not read."""
        path = self.path(completed)
        manifest = read_manifest(path)
        self.check_same_run(manifest, str(path))
        remedy = "delete it, an older one is used"
        if manifest.completed != completed:
            raise CheckpointError(f"{path} is after {manifest.completed} steps and not {completed}; {remedy}")
        try:
            size = regular_size(path / STATE)
        except OSError as error:
            raise CheckpointError(f"cannot read {path / STATE}: {error.strerror}; {remedy}") from None
        if size != manifest.file_bytes:
            wanted = f"{manifest.file_bytes} bytes were written"
            raise CheckpointError(f"{path / STATE} is damaged: it has {size} bytes, {wanted}; {remedy}")
        return manifest

    def check_same_run(self, manifest: Manifest, where: str) -> None:
        """Raises ForeignCheckpoint unless it is of this run and stage."""
        ours = {"run": self.fingerprint.run, "stages": self.fingerprint.stages, "stage": self.stage}
        if self.fingerprint.configuration is not None:
            ours["configuration"] = self.fingerprint.configuration
        for name, wanted in ours.items():
            if (found := getattr(manifest, name)) != wanted:
                raise ForeignCheckpoint(
                    f"{where} is of another run: its {name} is {found!a}, here {wanted!a}; start with the run.toml "
                    "that it was written with, or choose another checkpoint.directory"
                )

    def verify(self, completed: int) -> Manifest:
        """Read all of it and compare the digests. Raises CheckpointError, as `manifest` does."""
        manifest, file_path = self.manifest(completed), self.path(completed) / STATE
        try:
            with file_path.open("rb") as file:
                stamp = _stamp(os.fstat(file.fileno()))
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"cannot read {file_path}: {error.strerror}; an older one is used") from None
        if found != manifest.file_sha256:
            raise CheckpointError(
                f"{file_path} is damaged: it has the digest {found[:16]}…, {manifest.file_sha256[:16]}… was written; "
                "delete that checkpoint, an older one is used"
            )
        self._verified[completed] = stamp
        return manifest

    def newest_intact(self, limit: int, report: Callable[[str], None]) -> list[int]:
        """At most `limit` completed steps, and those from `floor` on, newest first, whose checkpoints were verified
        just now. Damaged and foreign ones are reported, a line each, and left out; what broken-off writes left is put
        away first."""
        with self._writing, suppress(OSError):  # a directory that is only read
            self._sweep()
        intact: list[int] = []
        for completed in reversed(self.numbers()):
            if len(intact) >= limit and not 0 < self.floor <= completed:
                break
            try:
                self.verify(completed)
                intact.append(completed)
            except CheckpointError as error:
                report(str(error))
        return intact

    def load(self, completed: int) -> StageSnapshot:
        """The state after `completed` steps, verified; its tensors are mapped from the file. Raises CheckpointError."""
        from safetensors.torch import load_file

        from ..stage_state import StageSnapshot

        manifest, path = self.manifest(completed), self.path(completed) / STATE
        try:
            if self._verified.get(completed) != _stamp(path.stat()):
                self.verify(completed)
            tensors = load_file(path)
        except CheckpointError:
            raise
        except Exception as error:  # whatever the library makes of a file that is not its own
            cause = " ".join(str(error).split())
            raise CheckpointError(f"{path} cannot be loaded: {cause}; an older one is used") from None
        dictionaries = {name: held.model_dump() for name, held in manifest.dictionaries.items()}
        return StageSnapshot(completed=completed, tensors=tensors, dictionaries={**dictionaries})

    # -- writing ----------------------------------------------------------------------------------------------------

    def write(self, snapshot: StageSnapshot, *, generation: int, written_s: float) -> int:
        """Write a checkpoint, then remove all but the newest `keep` up to it; returns its bytes.

        One that is there already (the step was replayed) is replaced; later ones stay. `written_s`: seconds since 1970,
        for people. Raises CheckpointError for a full or unwritable disk and leaves all others as they were, and
        ForeignCheckpoint rather than replace another run's.
        """
        manifest = self._place(snapshot.completed, lambda to: self._fill(to, snapshot, generation, written_s))
        return manifest.file_bytes

    def adopt(self, manifest: Manifest, state: Path, *, supersede: bool = False) -> None:
        """Take in a checkpoint that came from elsewhere: `state`, a file on the same disk, is moved here if it is what
        the manifest says. supersede: it is the newest there is, and later ones go. Raises CheckpointError, as `write`
        does."""
        self.check_same_run(manifest, "the copy")
        try:
            with state.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"cannot read {state}: {error.strerror}") from None
        if found != manifest.file_sha256:
            raise CheckpointError(f"the copy after {manifest.completed} steps is damaged: its digest differs")

        def fill(to: Path) -> Manifest:
            os.rename(state, to / STATE)
            return _finish(to, manifest)

        self._place(manifest.completed, fill)
        if supersede:
            self.discard_after(manifest.completed)

    def discard_after(self, completed: int) -> None:
        """All later ones go. Raises CheckpointError."""
        try:
            with self._writing:
                for later in [number for number in self.numbers() if number > completed]:
                    self._discard(later)
        except OSError as error:
            raise CheckpointError(f"cannot put away {self.directory}: {error.strerror}") from None

    def _place(self, completed: int, fill: Callable[[Path], Manifest]) -> Manifest:
        """Have a directory filled aside, and give it its name."""
        final = self.path(completed)
        with self._writing:
            return self._place_alone(completed, final, fill)

    def _place_alone(self, completed: int, final: Path, fill: Callable[[Path], Manifest]) -> Manifest:
        self._refuse_foreign(completed)
        try:
            make(self.directory)
            self._sweep()
            temporary = self.directory / temporary_name(final.name)
            try:
                os.mkdir(temporary)
                manifest = fill(temporary)
                self._publish(temporary, final)
            except BaseException:
                with suppress(OSError):
                    self._sweep()
                raise
            self._prune(completed)
        except (OSError, SafetensorError) as error:
            cause = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
            raise CheckpointError(
                f"cannot write the checkpoint {final}: {cause}; the earlier ones are as they were: "
                "make room there, or set checkpoint.directory"
            ) from None
        return manifest

    def _refuse_foreign(self, completed: int) -> None:
        try:
            self.manifest(completed)
        except ForeignCheckpoint:
            raise
        except CheckpointError:
            return  # nothing there, or damaged: to be replaced

    def _fill(self, temporary: Path, snapshot: StageSnapshot, generation: int, written_s: float) -> Manifest:
        from safetensors.torch import save_file
        from torch import __version__ as torch_version

        path = temporary / STATE
        save_file(snapshot.tensors, path)
        with path.open("rb") as file:  # once, and of what is there: the library has told nobody what it wrote
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        manifest = seal(
            {
                "format": FORMAT,
                "notes": NOTES,
                "run": self.fingerprint.run,
                "configuration": self.fingerprint.configuration,
                "stage": self.stage,
                "stages": self.fingerprint.stages,
                "completed": snapshot.completed,
                "generation": generation,
                "corpus": self.fingerprint.corpus,
                "tokenizer": self.fingerprint.tokenizer,
                "beside": {name: file.model_dump() for name, file in beside(self.directory).items()},
                "dictionaries": snapshot.dictionaries,
                "file_bytes": path.stat().st_size,
                "file_sha256": digest,
                "torch": str(torch_version),
                "written_s": int(written_s),
            }
        )
        return _finish(temporary, manifest)

    def _publish(self, temporary: Path, final: Path) -> None:
        replaced = self.directory / f".old-{final.name}"
        if final.exists():  # a directory that is not empty cannot be renamed over
            os.rename(final, replaced)
        os.rename(temporary, final)
        sync_directory(self.directory)
        if replaced.exists():
            remove(replaced)

    def _sweep(self) -> None:
        """Put away what a broken-off write left: unfinished ones go, one that was about to be replaced comes back."""
        for left in sorted(self.directory.glob(".tmp-*")):
            if another_writes(left):
                continue
            remove(left)
        for old in sorted(self.directory.glob(".old-*")):
            final = self.directory / old.name.removeprefix(".old-")
            remove(old) if final.exists() else os.rename(old, final)

    def _prune(self, completed: int) -> None:
        """Of what a rollback left behind later steps stay: they will be replaced, and must not push out earlier
        ones."""
        whole = [number for number in self.steps() if number <= completed]
        held = sum(number >= self.floor for number in whole) if self.floor else 0
        kept = whole[-max(self.keep, min(held, HELD_TIMES * self.keep)) :]
        for number in self.numbers():
            if len(kept) < self.keep or number >= kept[0]:
                break
            if number in self.pinned:
                continue
            try:
                self.manifest(number)
            except ForeignCheckpoint:
                continue
            except CheckpointError:
                pass  # damaged, and too old to be missed
            self._discard(number)

    def _discard(self, number: int) -> None:
        doomed = self.directory / f".tmp-{self.path(number).name}"
        os.rename(self.path(number), doomed)  # half of one must never be listed
        remove(doomed)
        self._verified.pop(number, None)


def _finish(directory: Path, manifest: Manifest) -> Manifest:
    """Put the manifest beside a state that is on the disk already."""
    with (directory / MANIFEST).open("wb") as file:
        file.write(manifest.rendered())
        file.flush()
        os.fsync(file.fileno())
    sync_directory(directory)
    return manifest


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_ino, found.st_size, found.st_mtime_ns)
