"""Every kind of model with every setting of `parallel`: two steps on two processes against one.

    run.py OUT.json [KIND ...]      kinds: every feed-forward, depth and attention; settings: recompute none, selective,
                                    full x compile off, on (graphs) x layout copies, shard, replicas x fp32, bf16
    run.py OUT.json inductor        kernels, for two kinds

Cases and bounds are those of tests/test_train_parallel.py, which runs a part of them. Kinds that OUT.json holds are
left alone, so the same command goes on.
"""

import json
import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from test_train_parallel import KINDS, case, check, on_two

from moma.data.synthetic import write_synthetic

RECOMPUTE, PRECISIONS = ("none", "selective", "full"), ("fp32", "bf16")


def main(out: Path, wanted: list[str]) -> int:
    """Run what is missing; the worst difference of every kind, and whether all are within the bounds."""
    inductor = wanted == ["inductor"]
    kinds = ["dense", "4t4i"] if inductor else wanted or list(KINDS)
    compiled, layouts = (["on"], ["shard"]) if inductor else (["off", "on"], ["copies", "shard", "replicas"])
    results = json.loads(out.read_text()) if out.is_file() else {}
    for kind in kinds:
        key = f"{kind} (kernels)" if inductor else kind
        if key in results:
            continue
        with tempfile.TemporaryDirectory() as name:
            made = write_synthetic(Path(name) / "made", pairs=60, texts=60)
            settings = list(product(RECOMPUTE, compiled, layouts, PRECISIONS))
            found = on_two(Path(name), (), [case(made, kind, *one) for one in settings], inductor=inductor)
        rows = {"-".join(one): found["-".join((kind, *one))] for one in settings}
        bad = []
        for setting, row in rows.items():
            try:
                check(row, setting.rsplit("-", 1)[1])
            except AssertionError:
                bad.append([setting, {name: row[name] for name in ("loss", "first", "second", "routing", "counts")}])
        results[key] = {
            "cases": len(rows),
            "outside the bounds": bad,
            **{
                f"worst {what}, {precision}": max(
                    max(row["loss"]) if what == "loss" else row[what]
                    for setting, row in rows.items()
                    if setting.endswith(precision)
                )
                for what in ("loss", "first", "second", "routing")
                for precision in PRECISIONS
            },
        }
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(key, json.dumps(results[key]), flush=True)
    return int(any(row["outside the bounds"] for row in results.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
