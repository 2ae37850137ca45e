"""Work divided over machines with Ray (extra `ray`): what a lost worker had is done again, nothing comes back twice."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from weightspace.networks.architectures import TRUSTED
from weightspace.runs import RunFailed, UserError, notice

ATTEMPTS = 5
"""How often a job whose worker was lost is started again."""
PATIENCE = 10.0
"""Seconds in which a cluster has to answer."""

SILENCE = 60.0
"""Seconds without a result after which it is told what the cluster has free."""

Job = TypeVar("Job")
Result = TypeVar("Result")


@contextmanager
def connected(address: str) -> Iterator[int]:
    """Use a Ray cluster; yields how many processors it has.

    Args:
        address: "auto" (the cluster that runs on this machine or that RAY_ADDRESS names), "local" (one that is started
            here and ends here), or HOST:PORT.

    Raises:
        UserError: the extra is not installed, or nothing answers at the address.
    """
    if address != "local":
        _use_token()
    try:
        import ray
    except ImportError:
        raise UserError("--cluster needs the extra 'ray': pip install 'weightspace[ray]'") from None
    place = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if place not in ("", "local"):
        _probe(place)
    passed = {name: os.environ[name] for name in (TRUSTED, "PYTHONPATH") if name in os.environ}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address=address, runtime_env={"env_vars": passed} if passed else None, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address!r} ({str(error).splitlines()[0]}); {_START}") from None
    try:
        yield int(ray.cluster_resources().get("CPU", 1))
    finally:
        ray.shutdown()


_START = "start one with `ray start --head` and give its address, or use --cluster local"


def _use_token() -> None:
    """Let Ray connect with the token of this machine: `ray start` asks for it, but nobody sends it unasked."""
    place = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if "RAY_AUTH_TOKEN" in os.environ or place.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _probe(address: str) -> None:
    """Whether a cluster answers; asked by itself, Ray tries for minutes."""
    if not (found := re.fullmatch(r"\[?([^\]/]+?)\]?:(\d+)", address)):
        raise UserError(f"{address!r} is no address of a Ray cluster; give auto, local or HOST:PORT")
    check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        socket.create_connection((found[1], int(found[2])), PATIENCE).close()
        subprocess.run(check, capture_output=True, check=True, timeout=PATIENCE)
    except (OSError, OverflowError, subprocess.SubprocessError) as error:
        reason = error if isinstance(error, OSError | OverflowError) else "something else answers there"
        raise UserError(f"no Ray cluster answers at {address} ({reason}); {_START}") from None


def over(work: Callable[[Job], Result], jobs: Sequence[Job], gpu: bool = False) -> Iterator[Result]:
    """The results of some work on jobs, as they come, one processor (and GPU) each; inside `connected`.

    That nothing comes for a while is told once: the processors may be busy with the work of others.

    Raises:
        UserError: no machine of the cluster has what a job needs.
        RunFailed: a job whose worker was lost again and again.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    needed = {"CPU": 1, "GPU": 1} if gpu else {"CPU": 1}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(machine.get(kind, 0) >= count for kind, count in needed.items()) for machine in machines):
        raise UserError(
            f"every job needs {_told(needed)} of one machine, which none of the cluster has (in all "
            f"{_told(ray.cluster_resources(), needed)}); add a machine with `ray start`"
            f"{', or compute on processors with --device cpu' if gpu else ''}"
        )
    remote: Any = ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=ATTEMPTS)(work)
    waiting = [remote.remote(job) for job in jobs]
    silent = False
    while waiting:
        done, waiting = ray.wait(waiting, timeout=SILENCE)
        if not done:
            if not silent:
                free, whole = _told(ray.available_resources(), needed), _told(ray.cluster_resources(), needed)
                notice(f"the cluster: {len(waiting)} jobs run or wait, free are {free} of {whole}")
            silent = True
            continue
        try:
            result: Any = ray.get(done[0])
        except RayTaskError as error:
            if isinstance(error.cause, UserError | RunFailed):
                raise error.cause from None
            raise
        except RayError as error:
            raise RunFailed(
                f"a worker of the cluster was lost {ATTEMPTS + 1} times ({str(error).splitlines()[0]}); start the same "
                "command again, what is finished is kept"
            ) from None
        yield result


def _told(resources: Mapping[str, float], kinds: Iterable[str] = ()) -> str:
    """Resources of machines in words: 2 CPU and 0 GPU."""
    return " and ".join(f"{resources.get(kind, 0):g} {kind}" for kind in kinds or resources)
