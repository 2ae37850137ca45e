"""Work divided over machines with Ray (extra `ray`): what a lost worker had is done again, nothing comes back twice."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from weightspace.networks.architectures import TRUSTED
from weightspace.runs import RunFailed, UserError

ATTEMPTS = 5
"""How often a job whose worker was lost is started again."""
PATIENCE = 10.0
"""Seconds in which a cluster has to answer."""

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

    Raises:
        RunFailed: a job whose worker was lost again and again.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    remote: Any = ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=ATTEMPTS)(work)
    waiting = [remote.remote(job) for job in jobs]
    while waiting:
        done, waiting = ray.wait(waiting)
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
