"""Run a job's workers under torch's elastic agent: `python -m mergekit_dam.engine.supervisor WORKER FOLDER COUNT`.

The agent needs its own process: it handles signals, and the parent may call from any thread of any program.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mergekit_dam.engine.processes import OUTCOME, end_with_parent


def main(worker: str, folder: Path, count: int) -> int:
    """Run the workers and return the exit code: 0 if all workers succeeded, else 1."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the parent reports the failure
    end_with_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, sys.executable)("-m", worker, str(folder))
    except ChildFailedError as error:
        codes = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
        (folder / OUTCOME).write_text(json.dumps(codes), encoding="utf-8")
        return 1
    except SignalException:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
