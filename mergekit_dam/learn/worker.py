"""Learn masks as one of several worker processes: `python -m mergekit_dam.learn.worker FOLDER`."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import transformers

from mergekit_dam.engine.group import process_group
from mergekit_dam.engine.processes import JOB, Job, dump_stacks_on_sigterm, end_with_parent, write_error
from mergekit_dam.engine.progress import silence_libraries
from mergekit_dam.learn.run import optimise
from mergekit_dam.models.families import register_architectures
from mergekit_dam.tasks import build_tasks


def main(folder: Path) -> int:
    """Learn the masks of the job in `folder`; return the exit code, 0 for success."""
    rank = int(os.environ["RANK"])
    end_with_parent(lambda: os._exit(1))
    dump_stacks_on_sigterm(folder, rank)
    if rank > 0:
        transformers.logging.set_verbosity_error()  # only the first process prints warnings
    try:
        register_architectures()
        # the pickle is safe: the parent wrote it into a folder that only this user can enter
        job: Job = pickle.loads((folder / JOB).read_bytes())
        config = job.plan.config
        if job.quiet:
            silence_libraries()
        with process_group(device=config.device, timeout=config.constants.worker_timeout) as (shards, device):
            assert device is not None, "started with a group"
            tasks = build_tasks(job.plan, device)
            optimise(job.plan, job.folder, job.description, job.inputs, tasks, device, shards=shards, quiet=job.quiet)
    except Exception as error:
        write_error(folder, rank, error)
        return 1
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # threads of a broken process group may never end
    os._exit(code)
