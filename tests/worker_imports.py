"""What a worker process imports, imported once by the fork server of tests/worker_processes.py."""

import cluster.worker_build  # noqa: F401
import engine.runner.torch_executor  # noqa: F401
