"""Synthetic queries for products that nobody has searched for yet: from templates over attributes, or from a local model.

The grades are derived, not judged: use them beside judged ones, in the first stage, and never to evaluate.
"""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from encoder.errors import EncoderError, TowerError
from encoder.examples import ESCI, JUDGMENTS, Grades, hashed, same_query

ID_MARK = "synthetic-"

_LOOKS = 8  # draws for each product that is wanted; most of a shop is of another category or brand


class QueryWriter(Protocol):
    """Writes queries for products. The table is `PRODUCTS`, whatever more columns it has; what comes back is `JUDGMENTS`."""

    def write(self, products: pa.Table) -> pa.Table:
        """Return judgments of the queries: each query once, with an id that follows from its locale and text."""
        ...


@dataclass(frozen=True, kw_only=True)
class TemplateWriter:
    """Fills templates such as "{brand} {category}" with the columns of a product that has all of them.

    Derived grades: the best for products that agree with the query in every column of its template, their number limited to
    `exact`; the second best for those of the same `category` that differ elsewhere (`substitutes` of them, none for a
    template without the category, or where the scale has two grades); 0 for products of other categories (`irrelevant` of
    them). A template with one column that is not the category says too little to derive the two lower grades from.
    """

    templates: tuple[str, ...]
    per_product: int = 2
    exact: int = 8
    substitutes: int = 4
    irrelevant: int = 4
    category: str = "category"
    grades: Grades = ESCI
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.templates or not all(_columns(template) for template in self.templates):
            raise EncoderError(f"The templates are {self.templates}. Give one or more, each with a column in braces.")
        if self.per_product < 1 or self.exact < 1 or self.substitutes < 0 or self.irrelevant < 0:
            raise EncoderError("per_product and exact are 1 or more, substitutes and irrelevant 0 or more.")

    def write(self, products: pa.Table) -> pa.Table:
        """Return the queries of the templates, sorted by locale and text."""
        used = dict.fromkeys(name for template in self.templates for name in _columns(template))
        lacking = [name for name in used if name not in products.column_names]
        if lacking:
            raise EncoderError(
                f"The products lack {', '.join(lacking)}; they have {', '.join(products.column_names)}. Change the templates."
            )
        named = [*used, self.category]
        shop = _Shop(rows=tuple(_rows(products, named)), category=self.category, seed=self.seed)
        chosen: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = {}
        for number, row in enumerate(shop.rows):
            for template in self._templates_of(row):
                query = " ".join(template.format_map(row).split())
                chosen.setdefault((row["locale"], query), (number, _columns(template)))
        judged = [
            (locale, query, shop.rows[product]["product_id"], grade)
            for (locale, query), (number, columns) in sorted(chosen.items())
            for product, grade in self._judged(shop, number, columns, query)
        ]
        return _judgments(judged)

    def _templates_of(self, row: Mapping[str, str]) -> Sequence[str]:
        """Return the templates of a product: as many as are wanted of those whose columns it has."""
        fit = [template for template in self.templates if all(row[name] for name in _columns(template))]
        draws = hashed("template", [f"{self.seed}:{row['locale']}:{row['product_id']}:{template}" for template in fit]).tolist()
        return [template for _, template in sorted(zip(draws, fit, strict=True))[: self.per_product]]

    def _judged(self, shop: _Shop, number: int, columns: tuple[str, ...], query: str) -> Iterator[tuple[int, int]]:
        """Yield the products of a query with their grades."""
        row = shop.rows[number]
        exact = shop.alike(columns, row)
        rest = shop.draw(exact, query, self.exact - 1, without={number})
        yield from ((product, self.grades.best) for product in [number, *rest])
        if self.category not in columns:
            return
        if len(columns) > 1 and self.grades.best > 1:
            category = shop.alike((self.category,), row)
            yield from ((product, self.grades.best - 1) for product in shop.draw(category, query, self.substitutes, without=set(exact)))
        yield from ((product, 0) for product in shop.others(row, query, self.irrelevant))


@dataclass(frozen=True, kw_only=True)
class Seq2SeqWriter:
    """Asks a local encoder-decoder model (T5, BART and their like) for queries; the product's grade is the best.

    Greedy for one query a product, sampled with the seed for more. What has too few or too many words, repeats, or says no
    more than the product's text, is left out. The draws of a product depend on the batch in which it stands.
    """

    directory: Path
    prompt: str = "Write a search query for this product: {text}"
    per_product: int = 1
    min_words: int = 1
    max_words: int = 12
    max_input_tokens: int = 256
    max_new_tokens: int = 32
    batch: int = 16
    temperature: float = 1.0
    grades: Grades = ESCI
    seed: int = 0

    def __post_init__(self) -> None:
        if _columns(self.prompt) != ("text",):
            raise EncoderError(f"The prompt is {self.prompt!r}. Put {{text}} where the product's text goes, and nothing else in braces.")
        if min(self.per_product, self.min_words, self.max_input_tokens, self.max_new_tokens, self.batch) < 1 or self.temperature <= 0:
            raise EncoderError("per_product, min_words, the numbers of tokens and the batch are 1 or more, and the temperature is above 0.")

    def write(self, products: pa.Table) -> pa.Table:
        """Return the queries that the model wrote, sorted by locale and text."""
        if "text" not in products.column_names:
            raise EncoderError(f"The products lack text; they have {', '.join(products.column_names)}. Render the template first.")
        tokenizer, model = _model(self.directory)
        rows = list(_rows(products, ["text"]))
        judged = set()
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            texts = self._generated([self.prompt.format(text=row["text"]) for row in part], tokenizer, model, start)
            for number, text in enumerate(texts):
                row, query = part[number // self.per_product], " ".join(text.split())
                fits = self.min_words <= len(query.split()) <= self.max_words
                if fits and same_query(query) and same_query(query) != same_query(row["text"]):
                    judged.add((row["locale"], query, row["product_id"], self.grades.best))
        return _judgments(sorted(judged))

    def _generated(self, prompts: Sequence[str], tokenizer: Any, model: Any, start: int) -> list[str]:
        """Return `per_product` texts for each prompt, in order; the caller's random numbers are left as they were."""
        import torch  # noqa: PLC0415  seconds, and only this writer needs it

        ids = tokenizer(list(prompts), return_tensors="pt", padding=True, truncation=True, max_length=self.max_input_tokens)
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0} if self.per_product > 1 else {"do_sample": False}
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(int(hashed("generate", [f"{self.seed}:{start}"])[0]))
            out = model.generate(
                input_ids=ids["input_ids"],
                attention_mask=ids["attention_mask"],
                num_beams=1,
                num_return_sequences=self.per_product,
                max_new_tokens=self.max_new_tokens,
                **sampling,
            )
        texts: list[str] = tokenizer.batch_decode(out, skip_special_tokens=True)
        return texts


@dataclass(frozen=True, kw_only=True)
class _Shop:
    """Products by what they have in common."""

    rows: tuple[Mapping[str, str], ...]
    category: str
    seed: int

    @cached_property
    def _places(self) -> dict[tuple[str, ...], dict[tuple[str, ...], list[int]]]:
        return {}

    def alike(self, columns: tuple[str, ...], row: Mapping[str, str]) -> list[int]:
        """Return the products of the row's locale that have its values in some columns."""
        if columns not in self._places:
            groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
            for number, other in enumerate(self.rows):
                groups[_values(other, columns)].append(number)
            self._places[columns] = groups
        return self._places[columns][_values(row, columns)]

    def draw(self, products: Sequence[int], query: str, wanted: int, *, without: Container[int]) -> list[int]:
        """Return some of the products, in the random order of a query; of many only a few are looked at."""
        looked: Sequence[int] = products
        if len(products) > _LOOKS * wanted:
            draws = hashed("draw", [f"{self.seed}:{query}:{turn}" for turn in range(_LOOKS * wanted)]).tolist()
            looked = list(dict.fromkeys(products[draw % len(products)] for draw in draws))
        keys = hashed("draw", [f"{self.seed}:{query}:{self.rows[product]['product_id']}" for product in looked]).tolist()
        ordered = [product for _, product in sorted(zip(keys, looked, strict=True))]
        return [product for product in ordered if product not in without][:wanted]

    def others(self, row: Mapping[str, str], query: str, wanted: int) -> list[int]:
        """Return some products of the locale that name another category."""
        locale = self.alike((), row)
        drawn = self.draw(locale, query, _LOOKS * wanted, without=())
        own = same_query(row[self.category])
        return [product for product in drawn if same_query(self.rows[product][self.category]) not in {"", own}][:wanted]


def _values(row: Mapping[str, str], columns: Sequence[str]) -> tuple[str, ...]:
    return (row["locale"], *(same_query(row[name]) for name in columns))


def _columns(template: str) -> tuple[str, ...]:
    """Return the columns that a template names, each once, in their order."""
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise EncoderError(f"The template {template!r} cannot be read: {error}. Write columns as {{brand}}.") from error
    if any(spec or conversion or not name.isidentifier() for name, spec, conversion in parts):
        raise EncoderError(f"The template {template!r} has more than names in its braces. Write columns as {{brand}}.")
    return tuple(dict.fromkeys(name for name, _, _ in parts))


def _rows(products: pa.Table, named: Sequence[str]) -> Iterator[Mapping[str, str]]:
    """Yield the products with their columns as texts; a column that is not there and a null are empty."""
    lacking = [name for name in ("locale", "product_id") if name not in products.column_names]
    if lacking:
        raise EncoderError(f"The products lack {', '.join(lacking)}; they have {', '.join(products.column_names)}.")
    empty = dict.fromkeys(named, "")
    kept = [name for name in dict.fromkeys(("locale", "product_id", *named)) if name in products.column_names]
    for batch in products.select(kept).to_batches():
        for row in batch.to_pylist():
            yield empty | {name: "" if value is None else str(value).strip() for name, value in row.items()}


def _judgments(judged: Sequence[tuple[str, str, str, int]]) -> pa.Table:
    """Return (locale, query, product, grade) as judgments; texts that are the same query become one, with its best grades."""
    first: dict[tuple[str, str], str] = {}
    best: dict[tuple[str, str, str], int] = {}
    for locale, query, product, grade in judged:
        text = first.setdefault((locale, same_query(query)), query)
        best[locale, text, product] = max(grade, best.get((locale, text, product), grade))
    keys = list(best)
    ids = [
        f"{ID_MARK}{key:016x}" for key in hashed("synthetic", [f"{locale}\x1f{same_query(query)}" for locale, query, _ in keys]).tolist()
    ]
    columns = {
        "query_id": ids,
        "query": [query for _, query, _ in keys],
        "locale": [locale for locale, _, _ in keys],
        "product_id": [product for _, _, product in keys],
        "grade": list(best.values()),
    }
    return pa.table(columns, schema=JUDGMENTS)


def _model(directory: Path) -> tuple[Any, Any]:
    """Open an encoder-decoder model: files on this disk, safetensors, no code of its own."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer  # noqa: PLC0415  seconds, and only one writer needs it

    if not any(directory.glob("*.safetensors")):
        raise TowerError(f"{directory} has no .safetensors file. Give the directory of a T5- or BART-like model, saved as safetensors.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model = AutoModelForSeq2SeqLM.from_pretrained(directory, local_files_only=True, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise TowerError(f"{directory} is no encoder-decoder model: {str(error)[:200]}. Give a T5- or BART-like directory.") from error
    return tokenizer, model.eval()
