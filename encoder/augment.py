"""Spelling noise for queries: a noisy copy beside the clean query, with the same judgments.

Only what people mistype is touched: words of four Latin letters or more. Numbers, model codes, and units behind a number
stay, because a wrong digit is another product and not a spelling. Everything follows from the seed and the text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from encoder.errors import EncoderError
from encoder.examples import JUDGMENTS, conform, hashed, same_query

Kind = Literal["keyboard", "transposition", "omission", "doubling", "phonetic", "spacing"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NOISE_MARK = "#noise"

_MIN_LETTERS = 4
_MIN_SPLIT = 6  # two parts of three letters
_NUMBER = re.compile(r"[\d.,/x×-]*\d[\d.,/x×-]*")
_LATIN = re.compile(r"[a-zà-öø-ÿœß]", re.IGNORECASE)

_ROWS = {
    "qwerty": ("qwertyuiop", "asdfghjkl", "zxcvbnm"),
    "qwertz": ("qwertzuiopü", "asdfghjklöä", "yxcvbnm"),
    "azerty": ("azertyuiop", "qsdfghjklm", "wxcvbn"),
}
_LAYOUTS = {"de": "qwertz", "at": "qwertz", "ch": "qwertz", "fr": "azerty", "be": "azerty"}
_ACCENTS = tuple((accented, plain) for accented, plain in zip("áàâãéèêëíîïóôõúùûçñ", "aaaaeeeeiiiooouuucn", strict=True))
_ENGLISH = (("ph", "f"), ("ck", "k"), ("ie", "ei"), ("ei", "ie"), ("ea", "ee"), ("ee", "ea"), ("tion", "shun"), ("gh", "g"), ("wh", "w"))
_GERMAN = (
    *(("ß", "ss"), ("ss", "ß"), ("ei", "ie"), ("ie", "ei"), ("ä", "ae"), ("ö", "oe"), ("ü", "ue"), ("ph", "f"), ("ck", "k")),
    *(("tz", "z"), ("dt", "t"), ("th", "t"), ("v", "f"), ("äu", "eu"), ("chs", "x"), ("ih", "i"), ("ah", "a"), ("eh", "e")),
)
_FRENCH = (("ph", "f"), ("eau", "o"), ("au", "o"), ("qu", "k"), ("ç", "s"), ("œ", "oe"), ("ai", "è"), ("th", "t"), *_ACCENTS)
_REWRITES = {"de": _GERMAN, "at": _GERMAN, "ch": _GERMAN, "fr": _FRENCH, "be": _FRENCH}
_REWRITES |= dict.fromkeys(("", "en", "us", "uk", "gb", "ca", "au"), (*_ENGLISH, *_ACCENTS))


def noisy(query: str, *, seed: int, kinds: Sequence[Kind] = KINDS, rate: float = 0.2, locale: str = "") -> str | None:
    """Return the query with a share of its words misspelled, one at least; None where nothing may be touched.

    A query that comes back differs from the clean one in more than case and the width of its spaces.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds or not 0 < rate <= 1:
        raise EncoderError(f"Noise of {list(kinds)} at rate {rate}: choose among {', '.join(KINDS)}, and a rate above 0, at most 1.")
    words = query.split()
    open_words = [place for place in range(len(words)) if _touchable(words, place)]
    draw = random.Random(f"{seed}:{locale}:{query}")  # noqa: S311  spelling, not secrets; seeding by text is the same everywhere
    draw.shuffle(open_words)
    wanted = max(1, round(rate * len(open_words)))
    changed = dict(enumerate(words))
    region = re.split(r"[-_]", locale.casefold())[0]
    hits = 0
    for place in open_words:
        for kind in draw.sample(kinds, len(kinds)):
            glued = kind == "spacing" and place + 1 in open_words and place + 1 in changed and draw.random() < 0.5  # noqa: PLR2004  a coin
            word = changed[place] + changed.pop(place + 1) if glued and place in changed else None
            word = word or (_misspelled(changed[place], kind, region, draw) if place in changed else None)
            if word:
                changed[place] = word
                hits += 1
                break
        if hits == wanted:
            break
    result = " ".join(changed[place] for place in sorted(changed))
    return result if result.lower().split() != query.lower().split() else None


def with_noise(judgments: pa.Table, *, share: float, seed: int, kinds: Sequence[Kind] = KINDS, rate: float = 0.2) -> pa.Table:
    """Append noisy copies of a share of the queries, with the same judgments; their ids end in `NOISE_MARK`.

    Copies of copies are not made. A misspelling that is another query of the table is no noise, and left out; so is a query
    that cannot be misspelled: fewer than the share may be added.
    """
    if not 0 <= share <= 1:
        raise EncoderError(f"share is {share}. Give a share of the queries from 0 to 1.")
    judgments = conform(judgments, JUDGMENTS, "judgments")
    queries = judgments.group_by(["locale", "query_id", "query"], use_threads=False).aggregate([])
    rows = queries.to_pylist()
    place = hashed("noise", [f"{seed}:{row['locale']}:{row['query_id']}" for row in rows]) / 2.0**63
    taken = {same_query(row["query"]) for row in rows}
    noise: dict[tuple[str, str], str] = {}
    for row, chosen in zip(rows, (place < share).tolist(), strict=True):
        if not chosen or row["query_id"].endswith(NOISE_MARK):
            continue
        text = noisy(row["query"], seed=seed, kinds=kinds, rate=rate, locale=row["locale"])
        if text is not None and (same_query(text) not in taken or same_query(text) == same_query(row["query"])):
            noise[row["locale"], row["query_id"]] = text
    keys = list(zip(judgments["locale"].to_pylist(), judgments["query_id"].to_pylist(), strict=True))
    places = np.array([number for number, key in enumerate(keys) if key in noise], np.int64)
    copies = judgments.take(pa.array(places))
    columns = {name: copies[name] for name in JUDGMENTS.names}
    columns["query"] = pa.array([noise[keys[number]] for number in places.tolist()], pa.string())
    columns["query_id"] = pc.binary_join_element_wise(copies["query_id"], NOISE_MARK, "")
    return pa.concat_tables([judgments, pa.table(columns, schema=JUDGMENTS)])


def _touchable(words: Sequence[str], place: int) -> bool:
    """Tell whether a word may be misspelled: letters, no code (digits, capitals), no unit behind a number."""
    word = words[place]
    letters = sum(bool(_LATIN.match(letter)) for letter in word)
    if letters < _MIN_LETTERS or letters < sum(map(str.isalpha, word)) or any(letter.isnumeric() for letter in word):
        return False
    code = word.isupper() and not all(other.isupper() or not other.isalpha() for other in words)
    return not code and not (place and _NUMBER.fullmatch(words[place - 1]))


def _misspelled(word: str, kind: Kind, region: str, draw: random.Random) -> str | None:
    """Return the word with one error behind its first letter, which people rarely get wrong; None if the kind does not apply."""
    inner = [place for place in range(1, len(word)) if _LATIN.match(word[place])]
    if kind == "phonetic":
        return _rewritten(word, region, draw)
    if kind == "spacing":
        cuts = [place for place in inner if 3 <= place <= len(word) - 3]  # noqa: PLR2004  parts of three letters
        return None if len(word) < _MIN_SPLIT or not cuts else _cut(word, draw.choice(cuts))
    if kind == "transposition":
        inner = [place for place in inner[:-1] if place + 1 in inner and word[place].casefold() != word[place + 1].casefold()]
    if kind == "keyboard":
        inner = [place for place in inner if _neighbours(word[place], region)]
    if not inner:
        return None
    place = draw.choice(inner)
    before, letter, after = word[:place], word[place], word[place + 1 :]
    if kind == "keyboard":
        other = draw.choice(_neighbours(letter, region))
        return before + (other.upper() if letter.isupper() else other) + after
    if kind == "transposition":
        return before + after[0] + letter + after[1:]
    return before + after if kind == "omission" else before + letter + letter + after


def _cut(word: str, place: int) -> str:
    return f"{word[:place]} {word[place:]}"


def _rewritten(word: str, region: str, draw: random.Random) -> str | None:
    """Return the word as it might be written by ear in the language of its locale."""
    folded = word.lower()  # not casefold, which rewrites ß itself
    found = [
        (match.start(), sound, other)
        for sound, other in _REWRITES.get(region, _ACCENTS)
        for match in re.finditer(sound, folded)
        if len(folded) == len(word)
    ]
    if not found:
        return None
    place, sound, other = draw.choice(found)
    return word[:place] + (other.capitalize() if word[place].isupper() else other) + word[place + len(sound) :]


def _neighbours(letter: str, region: str) -> str:
    """Return the letters around a key; a key touches its neighbours in the row, and two in each row beside it."""
    rows = _ROWS[_LAYOUTS.get(region, "qwerty")]
    for number, row in enumerate(rows):
        column = row.find(letter.lower())
        if column >= 0:
            near = [row[max(column - 1, 0) : column], row[column + 1 : column + 2]]
            if number:
                near.append(rows[number - 1][column : column + 2])
            if number + 1 < len(rows):
                near.append(rows[number + 1][max(column - 1, 0) : column + 1])
            return "".join(near)
    return ""
