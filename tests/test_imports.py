"""Imports go one way, and every third-party library has its doors.

modality, routing, experts  <-  model | data | tokenizer | vqgan  <-  services  <-  config  <-  verbs
"""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "moma"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
SERVICES = {
    *("distributed", "optim", "checkpoint", "log", "meter"),
    *("generation", "evaluation", "objectives", "hf_chameleon", "meta_chameleon", "memory", "trace"),
    "twin",
}
PARTS = {"model", "data", "tokenizer", "vqgan"}

# library -> the modules (or packages) that may import it
DOORS = {
    "hydra": {"moma.config", "moma.cli"},
    "omegaconf": {"moma.config", "moma.cli"},
    "wandb": {"moma.log", "moma.analysis.wandb_runs"},
    "tiktoken": {"moma.tokenizer.text"},
    "transformers": {"moma.hf_chameleon", "moma.benchmarks.peers", "moma.benchmarks.peers_model"},
    "torchtitan": {"moma.benchmarks.peers"},
    "st_moe_pytorch": {"moma.benchmarks.peers"},
    "scattermoe": {"moma.benchmarks.peers"},
    "liger_kernel": {"moma.benchmarks.peers"},
    "cut_cross_entropy": {"moma.benchmarks.peers"},
    "triton": {"moma.model.kernels"},
    "safetensors": {"moma.hf_chameleon", "moma.vqgan"},
    "matplotlib": {"moma.analysis"},
    "tokenizers": {"moma.train_bpe", "moma.tokenizer.chameleon"},
    "PIL": {
        *("moma.tokenizer.image", "moma.tokenizer.documents", "moma.data.sources"),
        *("moma.data.encoding", "moma.data.near_duplicates"),
        *("moma.generate", "moma.train_vq", "moma.analysis"),
    },
    "yaml": {"moma.vqgan.convert"},
    "pyarrow": {"moma.data.sources"},
    "ray": {"moma.data.ray_workers"},
    "torchtune": {"moma.generation.kv_cache"},
    "fully_shard": {"moma.distributed"},
}


@cache
def imported(name: str) -> frozenset[str]:
    """Every module and name that a file imports, as dotted paths, also those inside functions."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: write imports in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def own(name: str) -> set[str]:
    """The modules of moma that a file imports."""
    modules = set()
    for path in imported(name):
        while path.startswith("moma") and path not in FILES:
            path = path.rpartition(".")[0]
        if path.startswith("moma."):
            modules.add(path)
    return modules


LEAVES = tuple(
    f"moma.model.{name}" for name in ("routing", "experts", "slots", "grouped_matmul", "kernels", "precision")
)


def layer(name: str) -> int:
    """Place of a module in the picture above; a module imports from its own layer or from below."""
    part = name.split(".")[1] if "." in name else ""
    if part in ("", "modality", "schema", "seeds") or name.startswith(LEAVES):
        return 0
    if part in PARTS:
        return 1
    return 2 if part in SERVICES else 3 if part == "config" else 4


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name: str) -> None:
    part = name.split(".")[1] if "." in name else ""
    if part == "analysis":
        return
    for other in own(name):
        other_part = other.split(".")[1]
        assert layer(other) <= layer(name), f"{name} imports {other}, which stands above it"
        if part == "model":
            assert other_part in ("model", "modality", "schema", "seeds"), f"{name} imports {other}"
        if part in ("data", "tokenizer", "vqgan"):
            assert other_part != "model", f"{name} imports {other}"
        if part != "cli":
            assert other != "moma.cli", f"{name} imports the command line"


@pytest.mark.parametrize("name", FILES)
def test_libraries_come_in_by_their_doors(name: str) -> None:
    for path in imported(name):
        parts = path.split(".")
        for library in {parts[0], parts[-1]} & DOORS.keys():
            if parts[0] in (library, "torch"):
                doors = DOORS[library]
                inside = any(name == door or name.startswith(f"{door}.") for door in doors)
                assert inside, f"{name} imports {path}: only {', '.join(sorted(doors))} may"


def test_analysis_reads_files_and_never_loads_torch() -> None:
    seen, open_ = set(), [name for name in FILES if name.startswith("moma.analysis")]
    while open_:
        name = open_.pop()
        seen.add(name)
        assert not any(path.split(".")[0] in ("torch", "torchtune") for path in imported(name)), name
        open_ += own(name) - seen
