"""The H goals on one GPU, in three calls of at most nine minutes each.

    python experiments/speed-h200/run.py OUT_FOLDER CALL [budget=540] [dry=1]          CALL: 1, 2 or 3

The stages of a call stand in the order of their worth. Each is a process of its own with a time limit; one that fails
or runs too long costs the others nothing but its time. OUT_FOLDER gets `call-N.json` (rewritten after every stage) and
`call-N.log`. `dry=1`: toy sizes on a CPU.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = [sys.executable, "-u"]
TOY = [
    *("rows=2", "row_length=256", "vocab_size=512"),
    *("rounds=3", "warmup=1", "micro_batches=1", "prompt_tokens=4", "new_tokens=4", "compile=off"),
    *("ceilings=false", "peers=false"),
]


def bench(suite: str, size: str, dry: bool, *overrides: str) -> list[str]:
    """`moma bench` at 6 x 4096 tokens in bf16."""
    peers = [f"peers_path={HERE / 'peers'}"] if (HERE / "peers").is_dir() else []
    if dry:
        size, given = "tiny", [*(each for each in overrides if each.startswith("variants=")), *TOY]
    else:
        given = ["precision=bf16", "rows=6", "row_length=4096", *overrides, *peers]
    return ["-m", "moma.cli", "bench", f"suite={suite}", f"model={size}", *given, "out={out}"]


def stages(call: int, dry: bool) -> list[tuple[str, int, list[str]]]:
    """Name, seconds at most, and arguments of Python, `{out}` standing for the JSON to write."""
    short, toy = ["rounds=5", "warmup=1", "peers=false"], (["dry=1"] if dry else [])
    parts, steps = str(HERE / "parts.py"), str(HERE / "steps.py")
    at_scale = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    at_scale += [str(ROOT / "experiments/at-scale/run.py"), "{out}", "only=435m-moe_4t4i-mixed", *toy]
    tested = [
        "tests/model/test_kernels.py",
        "tests/model/test_attention.py",
        "tests/test_distributed.py",
        "-k",
        "gpu or interpreter",
    ]
    if call == 1:
        return [
            ("kernels are right", 100, ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tested]),
            ("parts", 180, [parts, "{out}", *toy]),
            ("layer 1_4b", 150, bench("layer", "1_4b", dry, "rounds=7")),  # H5, H6, H7
            ("attention 1_4b", 90, bench("attention", "1_4b", dry, "rounds=7")),  # H9
            ("head 1_4b", 90, bench("head", "1_4b", dry, "rounds=7")),  # H8, H7
            ("layer 435m", 90, bench("layer", "435m", dry, "rounds=7")),
            ("head 90m", 60, bench("head", "90m", dry, "rounds=7")),
        ]
    if call == 2:
        mod = "variants=[dense,mod_moe_1t1i,mod_moe_4t4i]"
        graphs = [steps, "{out}", "model=90m", "variants=dense,moe_4t4i", "graphs=1", *toy]
        return [
            ("step 435m", 210, bench("step", "435m", dry, *short)),  # H1, H2, H3, H7, H11
            ("step 90m", 150, bench("step", "90m", dry, "rounds=7", "warmup=1")),  # H1, H2, and transformers
            ("graphs 90m", 150, graphs),  # H10
            ("depth 435m", 150, bench("step", "435m", dry, mod, *short)),  # H4
        ]
    large = [steps, "{out}", "model=1_4b", "variants=dense,moe_1t1i,moe_4t4i", "reduced=moe_4t4i", *toy]
    return [
        ("step 1_4b", 330, large),  # H1, H2, H3
        ("200 mixed steps 435m", 200, at_scale),  # H10
        ("decode 1_4b", 90, bench("decode", "1_4b", dry, "rounds=5", "variants=[dense,moe_4t4i]")),  # H12
    ]


def main(out: Path, call: int, budget: float, dry: bool) -> int:
    """Run what fits; nonzero if a stage failed, ran too long or was not reached."""
    out.mkdir(parents=True, exist_ok=True)
    started, found = time.monotonic(), {}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1"} if dry else {}
    with tempfile.TemporaryDirectory() as folder, open(out / f"call-{call}.log", "w") as log:
        for number, (name, limit, arguments) in enumerate(stages(call, dry)):
            left = budget - (time.monotonic() - started)
            result: dict[str, Any] = {"left_s": left}
            found[name] = result
            if left < 20:
                result["rc"] = "not reached"
            else:
                path = Path(folder) / f"{number}.json"
                command = [*PYTHON, *(argument.format(out=path) for argument in arguments)]
                print(f"\n==== {name}: {' '.join(command)}", file=log, flush=True)
                begun = time.monotonic()
                # memory is short at 1.4B; recorded graphs have pools of their own
                grow = {} if "graphs=1" in arguments else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
                result["rc"] = run(command, min(limit, left - 5), log, environment | grow)
                result["seconds"] = time.monotonic() - begun
                if path.is_file():
                    result["result"] = json.loads(path.read_text())
            (out / f"call-{call}.json").write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}: {result['rc']}, {result.get('seconds', 0):.0f} s", flush=True)
            for goal in result.get("result", {}).get("goals", []):
                print(f"  {goal['id']} {goal['held']}: {goal['words']}: {goal['value']} ({goal['bound']})", flush=True)
    return int(any(result["rc"] != 0 for result in found.values()))


def run(command: list[str], limit: float, log: Any, environment: dict[str, str]) -> int | str:
    """Exit status, or "too long": then the process and all that it started are ended."""
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, process_group=0
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return "too long"


if __name__ == "__main__":
    options = dict(each.split("=", 1) for each in sys.argv[3:])
    sys.exit(main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), float(options.get("budget", 540)), "dry" in options))
