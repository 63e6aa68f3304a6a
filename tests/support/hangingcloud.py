"""`tidegate cloud` on a model whose steps never end while a file exists; run as a script.

python hangingcloud.py FILE cloud CHECKPOINT ...
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from tidegate.cloud.torch_executor import TorchExecutor
from tidegate.engine.executor import ExecutorStep, StepResult


def main() -> int:
    """Run the command line with steps that may hang."""
    from tidegate.cli.main import main as tidegate

    flag, *arguments = sys.argv[1:]
    execute = TorchExecutor.execute

    def hanging(self: TorchExecutor, step: ExecutorStep) -> StepResult:
        if Path(flag).exists():
            threading.Event().wait()  # as a kernel that deadlocked: no signal ends it
        return execute(self, step)

    TorchExecutor.execute = hanging  # type: ignore[method-assign]
    return tidegate(arguments)


if __name__ == "__main__":
    sys.exit(main())
