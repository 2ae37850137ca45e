"""Zoos and representations on the Hugging Face hub: a folder goes there and comes back, without code."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from weightspace.runs import UserError, locked, write_text

Kind = Literal["model", "dataset"]
CARD_FILE = "README.md"
EXTRA = "the hub needs the extra 'hub': pip install 'weightspace[hub]'"


def push(
    folder: Path, repository: str | Path, kind: Kind, files: Sequence[str], card: str, private: bool = False
) -> str:
    """Upload the named files of a folder with a card, in one commit.

    Args:
        folder: what is shared.
        repository: "owner/name" on the hub (made where it is missing; your token as the hub's own tools find it), or a
            `Path`: a local folder that is to hold the same files.
        kind: "model" or "dataset".
        files: names and patterns.
        card: text of README.md.
        private: whether a new repository is.

    Returns:
        Where it is now.

    Raises:
        UserError: the extra is not installed, no access, or a local folder that holds something.
    """
    if isinstance(repository, Path):
        if repository.exists() and any(repository.iterdir()):
            raise UserError(f"{repository} is not empty; choose another folder")
        repository.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            for path in sorted({path for pattern in files for path in folder.glob(pattern)}):
                shutil.copy2(path, repository / path.name)
        write_text(repository / CARD_FILE, card)
        return str(repository)
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError:
        raise UserError(EXTRA) from None
    try:
        api = HfApi(library_name="weightspace")
        where = api.create_repo(repository, repo_type=kind, private=private, exist_ok=True).repo_id
        with locked(folder):
            found = sorted({path for pattern in files for path in folder.glob(pattern)})
            parts = [CommitOperationAdd(path.name, str(path)) for path in found]
            parts.append(CommitOperationAdd(CARD_FILE, card.encode()))
            told = api.create_commit(where, parts, commit_message="From weightspace", repo_type=kind)
        return str(told.commit_url)
    except UserError:
        raise
    except Exception as error:  # its own, or one of the library for the network that it uses
        hint = "`hf auth login` gives access"
        raise UserError(f"{repository} cannot be written on the hub ({reason(error)}); {hint}") from None


def fetch(repository: str, kind: Kind, files: Sequence[str], revision: str | None = None) -> Path:
    """The named files of a repository as a local folder, downloaded once; a local folder is taken as it is.

    Args:
        repository: "owner/name" on the hub, or a folder.
        kind: "model" or "dataset".
        files: names and patterns; nothing else is fetched.
        revision: branch, tag or commit (default: the newest).

    Raises:
        UserError: the extra is not installed, or there is no such repository.
    """
    if Path(repository).is_dir():
        return Path(repository)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{repository} is no local folder, and {EXTRA}") from None
    try:
        return Path(snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # its own, or one of the library for the network that it uses
        hint = "give a local folder instead"
        raise UserError(f"{repository} cannot be fetched from the hub ({reason(error)}); {hint}") from None


def reason(error: Exception) -> str:
    """The first line of an error."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
