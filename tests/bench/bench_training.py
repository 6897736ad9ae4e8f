"""The table of docs/training.md: towers trained on public product data, measured on graded queries that none of them saw.

Learned from: PriceRunner (cluster labels as queries; other grades derived from category and brand), Abt-Buy (matches graded
by people), and Icecat's own titles (queries made of the product type that a title names; all grades derived). Chosen and
measured on the 54 human-graded Icecat queries over its whole catalog of 19,406 products.

python -m tests.bench.bench_training --work /tmp/training        (CATALOG_EMBED_DATA names the folder of the data)
python -m tests.bench.bench_training --work /tmp/training --only stage1 mask

Each row is trained by `jobs.train`, as `catalog-embed train` does; a row that is there is not trained again.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from encoder.registry import default_tower
from jobs.evaluate import EvalRequest, evaluate
from jobs.settings import Settings, load
from jobs.train import Lesson, train_tower

SEED = 7
_PER_GRADE = {"S": 3, "C": 2, "I": 2}


def recipe(name: str, *stages: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "dtype": "bfloat16", "seed": SEED, "dev": 0.02, "test": 0.02, "stages": list(stages)}


def stage(name: str, objective: dict[str, Any], batch: dict[str, Any], *, steps: int, lr: float) -> dict[str, Any]:
    train = {"steps": steps, "lr": lr, "warmup_share": 0.1, "log_every": 20}
    return {"name": name, "objective": objective, "batch": batch, "train": train}


def recipes(steps: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every row: what it starts from, and its one or two stages."""
    plain = {"parts": {"infonce": 1.0}, "tau": 0.05, "delta": None}
    masked = {**plain, "delta": 0.1, "max_mask_frac": 0.05}
    wide, deep = {"queries": 64, "documents": 1}, {"queries": 16, "documents": 8}
    mined = {**deep, "mined": True}
    odds = {**masked, "parts": {"infonce": 1.0, "roar": 0.1}, "tau_a": 0.05}
    return {
        "stage1": ("", recipe("stage1", stage("contrastive", plain, wide, steps=steps, lr=2e-5))),
        "mask": ("", recipe("mask", stage("contrastive", masked, wide, steps=steps, lr=2e-5))),
        "hard": ("mask", recipe("hard", stage("hard", masked, mined, steps=steps // 3, lr=1e-5))),
        "roar": ("hard", recipe("roar", stage("odds", odds, mined, steps=steps // 3, lr=5e-6))),
        "bt": ("hard", recipe("bt", stage("bt", {**odds, "form": "bt"}, mined, steps=steps // 3, lr=5e-6))),
        "supcon": ("", recipe("supcon", stage("ordinal", {"parts": {"supcon": 1.0}, "tau": 0.05}, deep, steps=steps, lr=2e-5))),
        "circle": (
            "supcon",
            recipe("circle", stage("circle", {"parts": {"circle": 1.0}, "gamma": 32.0}, mined, steps=steps // 3, lr=5e-6)),
        ),
        "noise": ("", recipe("noise", stage("contrastive", masked, {**wide, "noise": 0.3}, steps=steps, lr=2e-5))),
    }


# The data.


def prepare(data: Path, work: Path) -> tuple[list[Settings], Settings]:
    """Write the projects that are learned from, and the one that measures; return their settings."""
    learned = [pricerunner(data, work / "pricerunner"), abt_buy(data, work / "abt_buy"), icecat_types(data, work / "icecat_types")]
    human = work / "icecat"
    source = data / "chorus_icecat"
    judged = {"path": str(source / "judgments.parquet"), "queries": str(source / "queries.parquet")}
    return [load(path) for path in learned], load(project(human, pq.read_table(source / "products.parquet"), judged))


def project(folder: Path, products: pa.Table, judged: dict[str, Any], *, licence: str = "", vertical: str | None = None) -> Path:
    """Write a project whose texts are titles, and return its configuration."""
    (folder / "catalog").mkdir(parents=True, exist_ok=True)
    columns = ["product_id", "title", *([vertical] if vertical else [])]
    pq.write_table(products.select(columns), folder / "catalog" / "products.parquet")
    filters = {vertical: "string"} if vertical else {}
    tree = {
        "project": folder.name,
        "source": {"type": "parquet", "path": "catalog/", "id": "product_id"},
        "document": {"template": "{{ title }}", "filters": filters},
        "store": {"root": "index"},
        "tower": {"dtype": "bfloat16"},  # 1.65 times as fast on a CPU that has it, at a cosine of .9998, and for all rows alike
        "judgments": {**judged, "licence": licence, **({"vertical": vertical} if vertical else {})},
    }
    (folder / "catalog-embed.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder / "catalog-embed.yaml"


def pricerunner(data: Path, folder: Path, *, most: int = 5_000) -> Path:
    """Cluster labels as queries. E: offers of the cluster. Derived: S the same category and brand, I another category."""
    source = data / "pricerunner"
    products, asked = pq.read_table(source / "products.parquet"), pq.read_table(source / "queries.parquet").to_pylist()
    exact = defaultdict(list)
    for row in pq.read_table(source / "judgments.parquet").to_pylist():
        exact[row["query_id"]].append(row["product_id"])
    rows = {row["product_id"]: row for row in products.select(["product_id", "title", "category"]).to_pylist()}
    shelf, all_ids = defaultdict(list), list(rows)
    for row in rows.values():
        shelf[row["category"], row["title"].split()[0]].append(row["product_id"])
    draw, judged = np.random.default_rng(SEED), []
    chosen = [asked[at] for at in np.sort(draw.permutation(len(asked))[:most])]
    for query in chosen:
        found = dict.fromkeys(exact[query["query_id"]], "E")
        first = rows[exact[query["query_id"]][0]]
        near = [item for item in shelf[first["category"], first["title"].split()[0]] if item not in found]
        found |= dict.fromkeys(_drawn(draw, near, _PER_GRADE["S"]), "S")
        far = [item for item in _drawn(draw, all_ids, 8) if rows[item]["category"] != first["category"] and item not in found]
        found |= dict.fromkeys(far[: _PER_GRADE["I"]], "I")
        judged += [(query["query_id"], query["query"], item, grade) for item, grade in found.items()]
    kept = {item for _, _, item, _ in judged}
    table = products.filter(pa.array([item in kept for item in products["product_id"].to_pylist()]))
    return project(folder, table, _written(folder, judged), licence="CC BY 4.0 (PriceRunner aggregate, UCI)", vertical="category")


def abt_buy(data: Path, folder: Path) -> Path:
    """Matches graded by people: E the same product, I another one that looks like it."""
    source = data / "abt_buy"
    texts = {row["query_id"]: row["query"] for row in pq.read_table(source / "queries.parquet").to_pylist()}
    judged = [
        (row["query_id"], texts[row["query_id"]], row["product_id"], "E" if row["grade"] else "I")
        for row in pq.read_table(source / "judgments.parquet").to_pylist()
    ]
    return project(folder, pq.read_table(source / "products.parquet"), _written(folder, judged), licence="CC BY 4.0 (Leipzig, Abt-Buy)")


def icecat_types(data: Path, folder: Path, *, most: int = 3_000) -> Path:
    """Queries made of what titles call the product: `toner cartridge`, `HP toner cartridge`. Every grade is derived.

    E: the type, and the brand where it is asked for. S: the type, another brand. C: another type with the same last word.
    I: any other type.
    """
    products = pq.read_table(data / "chorus_icecat" / "products.parquet")
    kinds = {
        row["product_id"]: (product_type(row), row["brand"] or "")
        for row in products.select(["product_id", "title", "brand", "name"]).to_pylist()
    }
    counts = Counter(kind for kind, _ in kinds.values())
    of_kind, of_head = defaultdict(list), defaultdict(list)
    for item, (kind, _) in kinds.items():
        if kind and counts[kind] >= 3:
            of_kind[kind].append(item)
            of_head[kind.split()[-1]].append(item)
    asked = {(kind, "") for kind in of_kind} | {
        (kind, kinds[item][1]) for kind, items in of_kind.items() for item in items if kinds[item][1]
    }
    draw, judged, all_ids = np.random.default_rng(SEED), [], [item for items in of_kind.values() for item in items]
    ordered = sorted(asked)
    for number in np.sort(draw.permutation(len(ordered))[:most]):
        kind, brand = ordered[number]
        same = of_kind[kind]
        found = dict.fromkeys(_drawn(draw, [item for item in same if not brand or kinds[item][1] == brand], 6), "E")
        if brand:
            found |= dict.fromkeys(_drawn(draw, [item for item in same if kinds[item][1] != brand], _PER_GRADE["S"]), "S")
        akin = [item for item in of_head[kind.split()[-1]] if kinds[item][0] != kind]
        found |= dict.fromkeys(_drawn(draw, akin, _PER_GRADE["C"]), "C")
        far = [item for item in _drawn(draw, all_ids, 8) if kinds[item][0].split()[-1] != kind.split()[-1]]
        found |= dict.fromkeys([item for item in far if item not in found][: _PER_GRADE["I"]], "I")
        query = f"{brand} {kind}".strip().lower()
        judged += [(f"type-{number}", query, item, grade) for item, grade in found.items()]
    return project(folder, products, _written(folder, judged), licence="Open Icecat Open Content License")


def product_type(row: dict[str, Any]) -> str:
    """Return what a title calls the product: its words without brand and model, up to the first that holds a digit or stands for a colour."""
    text = row["title"]
    for known in (row["brand"], row["name"]):
        if known:
            text = re.sub(re.escape(known), " ", text, count=1, flags=re.IGNORECASE)
    words: list[str] = []
    for word in re.findall(r"[^\s,;()]+", text):
        if not re.fullmatch(r"[A-Za-z][A-Za-z/-]+", word) or word.lower() in _STOP:
            break
        words.append(word.lower())
    return " ".join(words[:4]) if words and len(words[-1]) > 2 else ""


_STOP = {
    "original",
    "black",
    "white",
    "gray",
    "grey",
    "blue",
    "red",
    "silver",
    "cyan",
    "magenta",
    "yellow",
    "for",
    "with",
    "and",
    "in",
    "internal",
    "external",
}


def _drawn(draw: np.random.Generator, items: list[str], count: int) -> list[str]:
    return [items[at] for at in draw.permutation(len(items))[:count]] if items else []


def _written(folder: Path, judged: list[tuple[str, str, str, str]]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("query_id", "query", "product_id", "grade")
    columns = list(zip(*judged, strict=True))
    grades = {"I": 0, "C": 1, "S": 2, "E": 3}
    arrays = [*columns[:3], [grades[grade] for grade in columns[3]]]
    pq.write_table(pa.table(dict(zip(names, arrays, strict=True))), folder / "judgments.parquet")
    return {"path": str(folder / "judgments.parquet")}


# The rows.


def trained(name: str, base: str, tree: dict[str, Any], projects: list[Settings], work: Path) -> None:
    """Train a row unless it is there."""
    target = work / "towers" / name
    if target.exists():
        return
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    begin = time.perf_counter()
    lesson = Lesson(
        recipe=str(path), target=target, work=work / "work" / name, base=work / "towers" / base if base else default_tower(), pool=0
    )
    found = train_tower(
        projects[0],
        lesson,
        others=projects[1:],
        tell=lambda _, line: print(line["step"], round(line["loss"], 4), flush=True) if line["step"] % 50 == 0 else None,
    )
    print(f"{name}: {time.perf_counter() - begin:.0f} s, {[dict(item.record) for item in found.stages]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", nargs="*", default=None)
    options = parser.parse_args()
    data = Path(os.environ["CATALOG_EMBED_DATA"])
    projects, human = prepare(data, options.work)
    rows = {name: row for name, row in recipes(options.steps).items() if options.only is None or name in options.only}
    for name, (base, tree) in rows.items():
        trained(name, base, tree, projects, options.work)
    towers = [default_tower(), *(options.work / "towers" / name for name in rows)]
    found = evaluate(human, EvalRequest(towers=towers))
    found.write(options.work / "board")
    print(found.board.to_text())


if __name__ == "__main__":
    main()
