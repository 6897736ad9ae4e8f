"""The words a sample shop is made of, and the little grammar that lets them agree in English, German and French.

All brand and model names are invented. Forms of one word are separated by `|` where a rule cannot find them.
"""

from __future__ import annotations

from dataclasses import dataclass

LANGUAGES = ("en", "de", "fr")
EN, DE, FR = range(3)

Texts = tuple[str, str, str]


@dataclass(frozen=True)
class Word:
    """A colour, material or feature in three languages.

    German is the uninflected stem. French is `masculine|feminine`, or one form where both are equal, or all four forms;
    a leading `=` marks a word that never changes, such as `=vert olive`.
    """

    en: str
    de: str
    fr: str

    def plain(self, language: int) -> str:
        """Return the word as a value on its own: `color: white`, `Farbe: weiß`, `couleur : blanc`."""
        return (self.en, self.de, self.fr.removeprefix("=").split("|")[0])[language]

    def attributive(self, language: int, noun: Noun) -> str:
        """Return the form that stands beside the noun: `wasserdichter`, `étanches`."""
        if language == EN:
            return self.en
        if language == DE:
            return self.de + {"m": "er", "f": "e", "n": "es", "p": "e"}[noun.gender(DE)]
        return self.predicative(FR, noun)

    def predicative(self, language: int, noun: Noun) -> str:
        """Return the form behind `is` or `are`."""
        if language != FR or self.fr.startswith("="):
            return self.plain(language)
        gender = noun.gender(FR)
        forms = self.fr.split("|")
        if len(forms) == len(_FR_GENDERS):
            return forms[_FR_GENDERS.index(gender)]
        form = forms[-1] if gender.startswith("f") else forms[0]
        return form + "s" if gender.endswith("p") and form[-1] not in "sx" else form


@dataclass(frozen=True)
class Noun:
    """A product type: `word/gender` per language, price range in whole euros, weight range in grams, what goes with it.

    Genders: s, p in English; m, f, n, p in German; m, f, mp, fp in French. `goes_with` holds English words.
    """

    en: str
    de: str
    fr: str
    price: tuple[int, int]
    weight: tuple[int, int]
    goes_with: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name of the product type in queries and judgments: its English word."""
        return self.word(EN)

    def word(self, language: int) -> str:
        """Return the bare word."""
        return (self.en, self.de, self.fr)[language].rsplit("/", 1)[0]

    def gender(self, language: int) -> str:
        """Return the gender, or the number in English."""
        return (self.en, self.de, self.fr)[language].rsplit("/", 1)[1]

    def slots(self, language: int) -> dict[str, str]:
        """Return what agrees with the noun in a sentence: determiner, pronoun, verb endings."""
        gender = self.gender(language)
        many = gender.endswith("p")
        if language == EN:
            this, agreement = ("these", _EN_MANY) if many else ("this", _EN_ONE)
        elif language == DE:
            this = {"m": "dieser", "f": "diese", "n": "dieses", "p": "diese"}[gender]
            agreement = (_DE_MANY if many else _DE_ONE) | {"it": {"m": "er", "f": "sie", "n": "es", "p": "sie"}[gender]}
        else:
            vowel = self.word(FR)[0] in "aeéèêiou"
            this = {"m": "cet" if vowel else "ce", "f": "cette", "mp": "ces", "fp": "ces"}[gender]
            feminine = "e" if gender.startswith("f") else ""
            pronoun = {"m": "il", "f": "elle", "mp": "ils", "fp": "elles"}[gender]
            agreement = (_FR_MANY if many else _FR_ONE) | {"it": pronoun, "e": feminine + ("s" if many else "")}
        return agreement | {"noun": self.word(language), "this": f"{this} {self.word(language)}"}


_FR_GENDERS = ("m", "f", "mp", "fp")
_EN_ONE = {"is": "is", "has": "has", "s": "s", "it": "it"}
_EN_MANY = {"is": "are", "has": "have", "s": "", "it": "they"}
_DE_ONE = {"is": "ist", "t": "t"}
_DE_MANY = {"is": "sind", "t": "en"}
_FR_ONE = {"is": "est", "nt": "", "pl": ""}
_FR_MANY = {"is": "sont", "nt": "nt", "pl": "s"}


@dataclass(frozen=True)
class Attribute:
    """An attribute that a category has: its name and its values, in three languages."""

    name: Texts
    values: tuple[Texts, ...]


@dataclass(frozen=True, kw_only=True)
class Category:
    """A shelf of the shop. Every material, feature, attribute and size fits every noun on it."""

    name: Texts
    nouns: tuple[Noun, ...]
    materials: tuple[Word, ...]
    features: tuple[Word, ...]
    details: tuple[Attribute, Attribute]
    sizes: tuple[str, ...] = ()
    share: int = 1


def same(*values: str) -> tuple[Texts, ...]:
    """Return values that are written alike in all languages."""
    return tuple((value, value, value) for value in values)


COLOR = ("Color", "Farbe", "Couleur")
MATERIAL = ("Material", "Material", "Matière")
FEATURE = ("Feature", "Eigenschaft", "Caractéristique")
ORIGIN = Attribute(
    ("Made in", "Herkunft", "Fabrication"),
    (
        ("Portugal", "Portugal", "Portugal"),
        ("Italy", "Italien", "Italie"),
        ("Poland", "Polen", "Pologne"),
        ("Germany", "Deutschland", "Allemagne"),
        ("France", "Frankreich", "France"),
        ("Vietnam", "Vietnam", "Viêt Nam"),
        ("Turkey", "Türkei", "Turquie"),
        ("India", "Indien", "Inde"),
    ),
)
WARRANTY = Attribute(
    ("Warranty", "Garantie", "Garantie"),
    (("2 years", "2 Jahre", "2 ans"), ("3 years", "3 Jahre", "3 ans"), ("5 years", "5 Jahre", "5 ans"), ("10 years", "10 Jahre", "10 ans")),
)

COLORS = (
    Word("black", "schwarz", "noir|noire"),
    Word("white", "weiß", "blanc|blanche"),
    Word("grey", "grau", "gris|grise"),
    Word("light grey", "hellgrau", "=gris clair"),
    Word("navy blue", "marineblau", "=bleu marine"),
    Word("blue", "blau", "bleu|bleue"),
    Word("green", "grün", "vert|verte"),
    Word("olive green", "olivgrün", "=vert olive"),
    Word("red", "rot", "rouge"),
    Word("burgundy", "weinrot", "=bordeaux"),
    Word("yellow", "gelb", "jaune"),
    Word("brown", "braun", "=marron"),
)

# Words that several categories share.
AUDIENCE = Attribute(
    ("For", "Zielgruppe", "Public"),
    (("women", "Damen", "femme"), ("men", "Herren", "homme"), ("children", "Kinder", "enfant"), ("everyone", "alle", "mixte")),
)
STEEL = Word("stainless steel", "Edelstahl", "acier inoxydable")
ALUMINUM = Word("aluminum", "Aluminium", "aluminium")
PLASTIC = Word("recycled plastic", "Recycling-Kunststoff", "plastique recyclé")
BRASS = Word("brass", "Messing", "laiton")
COTTON = Word("cotton", "Baumwolle", "coton")
POLYESTER = Word("recycled polyester", "Recycling-Polyester", "polyester recyclé")
OAK = Word("oak", "Eiche", "chêne")
WATERPROOF = Word("waterproof", "wasserdicht", "étanche")
WEATHERPROOF = Word("weatherproof", "wetterfest", "=tout temps")
HANDMADE = Word("handmade", "handgefertigt", "=fait main")
ADJUSTABLE = Word("adjustable", "verstellbar", "réglable")
LIGHTWEIGHT = Word("lightweight", "leicht", "léger|légère")
BREATHABLE = Word("breathable", "atmungsaktiv", "respirant|respirante")
NON_SLIP = Word("non-slip", "rutschfest", "antidérapant|antidérapante")
STURDY = Word("sturdy", "robust", "robuste")
TIMELESS = Word("timeless", "zeitlos", "intemporel|intemporelle")
COMPACT = Word("compact", "kompakt", "compact|compacte")
FOLDABLE = Word("foldable", "faltbar", "pliable")
EASY_CARE = Word("easy-care", "pflegeleicht", "=d'entretien facile")

BRANDS = (
    "Aldenmoss",
    "Brightholm",
    "Calindra",
    "Duskfern",
    "Elvanti",
    "Feldmarke",
    "Grantica",
    "Havrelle",
    "Iskovar",
    "Kestova",
    "Korrivan",
    "Lindqvara",
    "Mirabeck",
    "Norvane",
    "Oskavi",
    "Pellorin",
    "Quillane",
    "Rovanto",
    "Sorrelby",
    "Stelgard",
    "Tamsel",
    "Torvessa",
    "Virelune",
    "Wexmoor",
)
# Every category is served by this many neighbours on the list, so brands are specialised and overlap.
BRANDS_PER_CATEGORY = 8

MODELS = (
    "Abrel",
    "Alvik",
    "Andor",
    "Arven",
    "Aska",
    "Balto",
    "Birka",
    "Brenna",
    "Calder",
    "Corvo",
    "Dalen",
    "Dovre",
    "Elba",
    "Elmo",
    "Enso",
    "Falk",
    "Fenna",
    "Fjara",
    "Galen",
    "Garda",
    "Harlo",
    "Hedda",
    "Ilmar",
    "Inari",
    "Ivalo",
    "Jara",
    "Joran",
    "Kaldi",
    "Karsa",
    "Kelda",
    "Lagan",
    "Lerka",
    "Luma",
    "Maren",
    "Melka",
    "Mira",
    "Narvi",
    "Nilo",
    "Norda",
    "Odal",
    "Orla",
    "Oska",
    "Pelle",
    "Quinta",
    "Ravna",
    "Rilo",
    "Runa",
    "Saga",
    "Selja",
    "Skara",
    "Solva",
    "Stella",
    "Tarn",
    "Tessa",
    "Tindra",
    "Tova",
    "Ulva",
    "Vanda",
    "Vega",
    "Velia",
    "Vinter",
    "Yara",
    "Ylva",
    "Zeno",
)
