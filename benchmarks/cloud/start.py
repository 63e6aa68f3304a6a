"""Cold start of the cloud service: process start to the first token of the demo's model, on a CPU.

Each start is a process of its own with its files in the page cache; the first one, which warms
that, is not counted. Beside the total: until it listens, the answer's own time, and what the
import of the largest packages takes (`python -X importtime`, a run of its own).

    python benchmarks/cloud/start.py --repeats 5 --keep benchmarks/results/cloud-start.json
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from cloud.processes import TIDEGATE, ServiceProcess, environment  # noqa: E402
from peers.bars import Bar  # noqa: E402
from peers.daemon import stream_together  # noqa: E402
from report import report  # noqa: E402

MODEL = ROOT / "examples" / "assistant" / "cloud"
MOST_S = 5.0
_IMPORT = re.compile(r"import time:\s+\d+ \|\s+(\d+) \|\s*(\S+)")
PACKAGES = ("torch", "tokenizers", "llguidance", "uvicorn", "starlette", "cryptography", "numpy")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Seconds from the start of the process."""

    listens_s: float
    first_token_s: float
    answer_s: float
    """From the request to its first token, a part of the above."""
    cpu_s: float
    """Processor time until then, of all threads: what does not depend on who else is busy."""


def start_once(folder: Path) -> Start:
    """One life: start, answer, stop."""
    arguments = [*TIDEGATE, "cloud", str(MODEL), "--listen", "127.0.0.1:0"]
    with ServiceProcess(arguments, folder / "log") as service:
        listens_s = time.perf_counter() - service.began_s
        asked = {
            "messages": [{"role": "user", "content": "turn the lamp in the hall on"}],
            "max_tokens": 1,
            "temperature": 0,
            "stream": True,
        }
        (answer,) = stream_together(service.port, [asked], path="/v1/chat/completions")
        cpu_s = service.cpu_s()
        first_s = answer.texts_s[0] - service.began_s
        return Start(
            listens_s=round(listens_s, 3),
            first_token_s=round(first_s, 3),
            answer_s=round(first_s - listens_s, 3),
            cpu_s=round(cpu_s, 2),
        )


def import_times() -> dict[str, float]:
    """Seconds that the service's imports take, all and by package, imports of theirs included."""
    command = [sys.executable, "-P", "-X", "importtime", "-c", "import tidegate.cloud.service"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    found = {name: int(took) / 1e6 for took, name in _IMPORT.findall(done.stderr)}
    chosen = {name: found[name] for name in PACKAGES if name in found}
    return {"all": found["tidegate.cloud.service"], **chosen}


def main() -> int:
    """Measure and print; keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        starts = [start_once(Path(folder)) for _ in range(args.repeats + 1)][1:]
    bar = Bar(
        what="process start to first token, median",
        bar=MOST_S,
        kind="at most",
        value=statistics.median(one.first_token_s for one in starts),
        unit=" s",
    )
    imports = import_times()
    body = {
        "starts": [asdict(one) for one in starts],
        "import_s": {name: round(took, 3) for name, took in imports.items()},
        "load_before": round(load, 2),
        "bar": {**asdict(bar), "verdict": bar.verdict},
    }
    text = report("cloud/start.py", ("torch", "uvicorn", "starlette", "tokenizers"), body)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
    else:
        print(bar.line)
        cpu_s = statistics.median(one.cpu_s for one in starts)
        print(f"  processor time: {cpu_s:.2f} s")
        for name, took in imports.items():
            print(f"  import {name}: {took:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
